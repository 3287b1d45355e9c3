"""On a real GPU: the promises of the CPU tests, and what only a GPU shows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import Transformer, by_hand, cnn, differences, images, mlp, sentences, vectors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine.device import probe_for
from hybrid_magic.engine.prefetch import SideStreamMover

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def _begun() -> None:
    """CUDA begins, and cuBLAS takes the workspaces that it keeps: one for each thread that computes
    (autograd has its own), tens of MiB each. No test is to find them in its own memory, whichever
    of them runs first."""
    torch.cuda.init()
    for dtype in (torch.float32, torch.float16):
        layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).to(GPU, dtype)
        layers(torch.zeros(64, 64, device=GPU, dtype=dtype)).sum().backward()
    torch.cuda.synchronize(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)


def on_gpu(loader: Any) -> list[Any]:
    return [(x.to(GPU), y.to(GPU)) for x, y in loader]


@pytest.mark.parametrize(
    ("model", "data"),
    [(mlp(dropout=0.1), vectors(150)), (cnn(), images(150)), (Transformer(), sentences(150))],
    ids=["mlp", "cnn", "transformer"],
)
def test_fp32_with_the_loaders_batch_is_bit_equal_to_the_plain_loop(model: Any, data: Any) -> None:
    loader = DataLoader(TensorDataset(*data), batch_size=16)
    one, other = copy.deepcopy(model).to(GPU), copy.deepcopy(model).to(GPU)
    torch.manual_seed(11)
    by_hand(one, on_gpu(loader), torch.optim.SGD(one.parameters(), lr=0.05), epochs=3)
    torch.manual_seed(11)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    options: dict[str, Any] = {"precision": "fp32", "batch": "fixed", "micro": 16}
    hm.train(other, loader, optimizer=optimizer, epochs=3, **options)
    assert differences(one, other) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_what_fp32_learns(precision: str) -> None:
    losses = []
    for name in ("fp32", precision):
        model = cnn(dropout=0.0)
        torch.manual_seed(1)
        run = hm.train(
            model,
            DataLoader(TensorDataset(*images(64)), batch_size=16, shuffle=True),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
            epochs=6,
            precision=name,
            batch="fixed",
            device="cuda",
        )
        losses.append(run.final_loss)
        assert next(model.parameters()).device.type == "cpu"  # back where it was
        assert all(p.is_contiguous() for p in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_fresh_optimizer_is_fused_and_skips_on_the_device() -> None:
    x, y = vectors(160)
    x[40] = float("nan")
    model = mlp()
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    run = hm.train(model, data, device="cuda", batch="fixed", micro=8, precision="fp32")
    assert [record.step for record in run.history] == list(range(1, 21))
    assert [record.step for record in run.history if record.skipped] == [6]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_readings_agree_with_a_known_allocation() -> None:
    probe = probe_for(GPU)
    probe.reset_peak()
    before = probe.peak()[0] or 0
    held = torch.empty(64 * 2**20, dtype=torch.uint8, device=GPU)
    after, reserved = probe.peak()
    assert after is not None
    assert after - before == held.numel()
    assert reserved is not None
    assert reserved >= after
    start = probe.mark()
    torch.cuda._sleep(10_000_000)
    assert probe.seconds(probe.mark(), start) > 1e-3


def test_what_is_copied_beside_the_work_arrives_whole() -> None:
    mover = SideStreamMover(GPU)
    batches = [torch.randint(0, 255, (2**22,), dtype=torch.uint8).pin_memory() for _ in range(32)]
    noise = torch.randn(2048, 2048, device=GPU)
    coming = mover.send(batches[0])
    sums = []
    for number in range(len(batches)):
        moved = mover.receive(coming)
        if number + 1 < len(batches):
            coming = mover.send(batches[number + 1])
        for _ in range(20):  # the computing stream lags far behind the host and the copies
            noise = noise @ noise / 2048
        sums.append(moved.long().sum())
        del moved  # its memory may be given to the next copy, or to what overwrites it here
        torch.full((2**22,), 255, dtype=torch.uint8, device=GPU)
        if number % 8 == 7:
            torch.cuda.empty_cache()
    assert [int(value) for value in sums] == [int(batch.long().sum()) for batch in batches]


def test_the_micro_batch_stays_within_a_rehearsed_budget() -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)])
    x = torch.randn(16384, 1024)
    data = DataLoader(TensorDataset(x, x), batch_size=8192)
    weights = sum(4 * param.numel() for param in model.parameters())
    # An optimizer step needs, whatever the micro-batch: the weights, their gradients, AdamW's two
    # moments, and copies of weights and moments that make it revocable. And what was there before.
    fixed = 7 * weights + torch.cuda.memory_allocated(GPU)
    # The passes need 4 of these 7, and for a sample 16 KiB for itself and the next one, 4 KiB for
    # each of the 8 layers' outputs and for the gradients that pass them: some 450 MiB for a whole
    # batch, which has to be cut.
    budget = fixed + 160 * 2**20
    options: dict[str, Any] = {"precision": "fp32", "batch": "fixed", "memory": budget}
    run = hm.train(
        model, data, lambda m, b: F.mse_loss(m(b[0]), b[1]), device="cuda", epochs=4, **options
    )
    assert run.peak_allocated_bytes is not None
    assert run.peak_allocated_bytes <= budget
    assert max(record.microbatch_size for record in run.history) < 8192
    assert run.samples_seen == 4 * 16384


def test_memory_is_given_back_after_a_run() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    model = mlp()
    hm.train(model, DataLoader(TensorDataset(*vectors(64)), batch_size=8), device="cuda")
    assert torch.cuda.memory_allocated(GPU) <= before + 2**20


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16")])
def test_auto_trains_as_a_t4_and_an_a100_would(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    model = cnn()
    run = hm.train(
        model, DataLoader(TensorDataset(*images(64)), batch_size=16), device="cuda", epochs=2
    )
    assert run.start is not None
    assert run.start.precision == precision
    assert all(torch.isfinite(p).all() for p in model.parameters())


# -- running out of memory, for real


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """Lets the process have so many bytes of the GPU beyond what it holds now."""

    def limit(size: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(GPU).total_memory
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved(GPU) + size) / total, GPU
        )

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    torch.cuda.empty_cache()


class Wide(torch.nn.Module):
    """Activations of 256 KiB a sample between small weights, with dropout and batch statistics."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = torch.nn.Linear(12, 2**14)
        self.norm = torch.nn.BatchNorm1d(2**14) if norm else torch.nn.Identity()
        self.drop = torch.nn.Dropout(0.3)
        self.out = torch.nn.Linear(2**14, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(torch.relu(self.norm(self.into(x)))))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batchnorm"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_does_not_fit_starts_over_and_leaves_no_trace(
    room: Callable[[int], None], norm: bool, kind: Any
) -> None:
    data = DataLoader(TensorDataset(*vectors(4096)), batch_size=2048, shuffle=True)
    ends = []
    recorded: Any = None
    for _ in range(2):
        model = Wide(norm=norm).to(GPU)
        optimizer = kind(model.parameters(), lr=0.01)
        options: dict[str, Any] = {"precision": "fp32", "epochs": 2}
        if recorded is None:
            options |= {"batch": "fixed", "micro": 2048, "memory": 64 * 2**30}
            room(400 * 2**20)
        torch.manual_seed(3)
        before = torch.cuda.memory_allocated(GPU)
        run = hm.train(model, data, optimizer=optimizer, replay=recorded, **options)
        if recorded is None:
            assert sum(record.retries for record in run.history) >= 1
            assert any("ran out of memory" in change.reason for change in run.changes)
            torch.cuda.set_per_process_memory_fraction(1.0, GPU)
        else:
            assert sum(record.retries for record in run.history) == 0
        assert run.samples_seen == 2 * 4096
        states = sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if value.device == GPU
        )
        assert torch.cuda.memory_allocated(GPU) <= before + states + 2**20
        ends.append([*model.state_dict().values(), torch.cuda.get_rng_state(GPU)])
        recorded = run
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_what_never_fits_is_told_and_the_model_stays_at_a_whole_step(
    room: Callable[[int], None],
) -> None:
    model = Wide(norm=False).to(GPU)
    found = {name: value.clone() for name, value in model.state_dict().items()}
    room(2 * 2**20)
    with pytest.raises(hm.HybridMagicError, match="out of memory"):
        hm.train(
            model,
            DataLoader(TensorDataset(*vectors(64)), batch_size=64),
            optimizer=torch.optim.AdamW(model.parameters()),
            precision="fp32",
        )
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_default_budget_knows_what_this_process_may_have(room: Callable[[int], None]) -> None:
    room(900 * 2**20)
    model = Wide(norm=False).to(GPU)
    data = DataLoader(TensorDataset(*vectors(8192)), batch_size=2048)
    run = hm.train(model, data, optimizer=torch.optim.SGD(model.parameters(), lr=0.01), epochs=3)
    assert sum(record.retries for record in run.history) == 0
    assert run.samples_seen == 3 * 8192


def test_an_error_in_the_persons_code_gives_the_memory_back_at_once() -> None:
    model = Wide(norm=False).to(GPU)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    kept: list[Any] = []

    def step(model: Any, batch: Any) -> Any:
        x, y = batch
        loss = F.cross_entropy(model(x), y)
        raise KeyError(loss.dtype)

    data = DataLoader(TensorDataset(*vectors(2048)), batch_size=2048)
    try:
        hm.train(model, data, step, precision="fp32", batch="fixed", micro=2048)
    except KeyError as error:
        kept.append(error)  # as a notebook holds on to it
    assert torch.cuda.memory_allocated(GPU) <= before + 2**20
    assert kept[0].__traceback__ is not None


def test_keeping_a_step_revocable_does_not_raise_the_peak() -> None:
    peaks = []
    data = DataLoader(TensorDataset(*vectors(4096)), batch_size=1024)
    for way in ("by hand", "ours"):
        model = Wide(norm=True).to(GPU)
        optimizer = torch.optim.AdamW(model.parameters())
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(GPU)
        if way == "by hand":
            by_hand(model, on_gpu(data), optimizer)
        else:
            options: dict[str, Any] = {"precision": "fp32", "batch": "fixed", "micro": 1024}
            hm.train(model, data, optimizer=optimizer, **options)
        peaks.append(torch.cuda.max_memory_allocated(GPU))
        del model, optimizer
    assert peaks[1] <= 1.02 * peaks[0]


def test_an_ablation_gives_each_variant_its_own_peak_and_the_same_one_twice() -> None:
    data = DataLoader(TensorDataset(*images(512)), batch_size=128, shuffle=True)
    found = hm.ablate(
        cnn(dropout=0.0), data, val=data, device="cuda", variants=["fp32", "ga", "fp32+ga"], seeds=2
    )
    whole, cut, again = found.variants
    assert whole.peak_allocated_bytes is not None
    assert cut.peak_allocated_bytes is not None
    assert again.peak_allocated_bytes == pytest.approx(cut.peak_allocated_bytes, rel=0.01)
    assert cut.peak_allocated_bytes < whole.peak_allocated_bytes
    assert again.accuracy == pytest.approx(cut.accuracy)


class Heavy(torch.nn.Module):
    """32 MiB a sample, for as long as the graph lives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x.new_ones(len(x), 8 * 2**20, requires_grad=True)
        return self.inner(x) + (kept * 2).mean(1, keepdim=True)


def test_a_loader_batch_that_does_not_fit_is_a_row_of_the_ablation() -> None:
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total, GPU)
    try:
        data = DataLoader(TensorDataset(*vectors(128)), batch_size=64)
        found = hm.ablate(Heavy(), data, device="cuda", variants=["fp32", "ga", "hybrid"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    assert [row.outcome for row in found.variants] == ["oom", "finished", "finished"]


def test_a_profile_tells_the_bytes_that_the_allocator_tells() -> None:
    """Parameters, optimizer state and input to the byte, the forward peak as in a loop by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 10)).to(GPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = TensorDataset(torch.randn(4096, 1024), torch.randint(0, 10, (4096,)))
    loader = DataLoader(data, batch_size=512)
    profile = hm.profile(model, loader, optimizer=optimizer, precision="fp32", batch="fixed")
    forward, backward = (
        next(peak for peak in profile.peaks if peak.stage == stage)
        for stage in ("forward", "backward")
    )

    def blocks(*sizes: int) -> int:
        return sum(-(-size // 512) * 512 for size in sizes)

    weights = blocks(*(4 * param.numel() for param in model.parameters()))
    assert forward.kinds["parameters"] == weights
    assert forward.kinds["optimizer state"] == weights
    assert forward.kinds["input"] == 2 * blocks(512 * 1024 * 4, 512 * 8)  # and the next one's

    for _ in range(2):  # by hand, with what the first step makes
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        x, y = (tensor[:512].to(GPU) for tensor in data.tensors)
        torch.cuda.reset_peak_memory_stats()
        loss = F.cross_entropy(model(x), y)
        at_forward = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        at_backward = torch.cuda.max_memory_allocated() - before
        optimizer.step()
        optimizer.zero_grad()
        del loss, x, y
    ahead = blocks(512 * 1024 * 4, 512 * 8)
    assert forward.total_bytes - before == pytest.approx(at_forward + ahead, rel=0.01)
    assert backward.total_bytes - before == pytest.approx(at_backward + ahead, rel=0.01)


def test_a_profile_on_a_gpu_has_both_clocks_and_finds_the_line_that_waits(tmp_path: Any) -> None:
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8)), nn.Linear(2048, 10)).to(GPU)
    data = TensorDataset(torch.randn(4096, 2048), torch.randint(0, 10, (4096,)))
    loader = DataLoader(data, batch_size=1024, pin_memory=True)
    totals: list[float] = []

    def step(model: Any, batch: Any) -> torch.Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        totals.append(loss.item())
        return loss

    snapshot = tmp_path / "memory.pickle"
    found = hm.profile(model, loader, step, precision="fp32", snapshot=str(snapshot))
    assert snapshot.stat().st_size > 1000
    forward = found.stage("forward")
    assert forward is not None
    assert forward.host_seconds is not None
    assert forward.seconds > 0
    assert found.stage("copy") is not None
    assert found.pipeline.pinned
    assert [read.where for read in found.reads if "totals.append(loss.item())" in read.where]
    assert found.work is not None
    assert found.work.peak is not None
    assert 0 < found.work.achieved_flops_per_s < 1.2 * found.work.peak  # type: ignore[operator]
    layers = [module.seconds for module in found.modules if module.kind == "Linear"][1:8]
    assert max(layers) < 2 * min(layers)  # type: ignore[type-var]


def test_the_line_over_sizes_tells_the_peak_of_a_larger_batch() -> None:
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(512, 512), nn.Tanh()))).to(GPU)
    data = TensorDataset(torch.randn(8192, 512), torch.randn(8192, 512))
    line = hm.profile(model, DataLoader(data, batch_size=256), precision="fp32").line
    larger = hm.profile(model, DataLoader(data, batch_size=2048), precision="fp32")
    assert line is not None
    told = next(size.peak_bytes for size in larger.sizes if size.samples == 2048)
    assert line.fixed_bytes + 2048 * line.per_sample_bytes == pytest.approx(told, rel=0.05)
