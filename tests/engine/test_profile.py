"""`hm.profile`: numbers that can be worked out by hand, problems that were planted, and nothing of
the person's changed."""

from __future__ import annotations

import copy
import gzip
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import cnn, images, mlp, vectors
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hybrid_magic as hm
from hybrid_magic import profiles
from hybrid_magic.engine import lens as lenses
from hybrid_magic.engine import precision as precisions
from hybrid_magic.engine import roofline, tracing
from hybrid_magic.engine.device import DeviceProbe
from hybrid_magic.engine.ledger import Ledger
from hybrid_magic.engine.prefetch import Mover

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _device_rates(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What the device can do takes a second to measure; one test does."""
    if "measured" not in request.keywords:
        monkeypatch.setattr(roofline, "flops_per_s", lambda *_: 1e11)
        monkeypatch.setattr(roofline, "bytes_per_s", lambda _: 1e10)


def loader(x: Any, y: Any, batch: int = 16, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True, **options)


def looked_at(model: nn.Module, data: Any, **options: Any) -> hm.Profile:
    if "optimizer" not in options:
        options["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.01)
    return hm.profile(model, data, **{"precision": "fp32", "steps": 3, **options})


def kinds(profile: hm.Profile, stage: str) -> dict[str, int]:
    return next(peak.kinds for peak in profile.peaks if peak.stage == stage)


# -- by hand --


def test_memory_and_operations_of_an_mlp_are_those_worked_out_by_hand() -> None:
    n, a, b, c = 64, 96, 160, 10
    model = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c))
    data = loader(torch.randn(4 * n, a), torch.randint(0, c, (4 * n,)), n)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = looked_at(model, data, optimizer=optimizer)

    weights = 4 * (a * b + b + b * c + c)
    hidden = 4 * n * b  # where most is in use: what ReLU reads, which is given back, and gives
    at_forward, at_backward = kinds(found, "forward"), kinds(found, "backward")
    assert at_forward["parameters"] == weights
    assert at_forward["optimizer state"] == weights
    assert at_forward["activations"] == pytest.approx(hidden, rel=0.05)
    by_hand = 2 * weights + 2 * hidden + 4 * n * a + 8 * n + 2 * weights  # and the undoing copies
    (peak,) = (peak for peak in found.peaks if peak.stage == "forward")
    assert peak.total_bytes == pytest.approx(by_hand, rel=0.05)
    assert peak.total_bytes == sum(peak.kinds.values())
    assert at_forward["input"] == 4 * n * a + 8 * n
    assert at_backward["gradients"] <= weights
    assert kinds(found, "optimizer")["gradients"] == weights

    forward = 2 * n * (a * b + b * c)
    assert found.work is not None
    assert found.work.flops == {"fp32": 3 * forward - 2 * n * a * b}  # no gradient of the input
    by_path = {module.path: module for module in found.modules}
    assert by_path["0"].flops == 4 * n * a * b
    assert by_path["2"].flops == 6 * n * b * c
    assert by_path["1"].activation_bytes == 4 * n * b
    assert by_path["0"].parameter_bytes == 4 * (a * b + b)


def test_operations_of_a_convolution_are_those_worked_out_by_hand() -> None:
    n, size = 8, 12
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    data = loader(torch.randn(4 * n, 3, size, size), torch.randint(0, 4, (4 * n,)), n)
    found = looked_at(model, data)
    first, second = (2 * n * cin * cout * 9 * size**2 for cin, cout in ((3, 6), (6, 4)))
    assert found.work is not None
    assert found.work.total_flops == 2 * first + 3 * second
    assert found.setting.convolution_flops == found.work.total_flops


def test_the_line_over_sizes_tells_the_peak_of_a_size_that_was_not_tried() -> None:
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh())
    data = loader(torch.randn(2048, 64), torch.randn(2048, 512), 128)
    line = looked_at(model, data).line
    larger = looked_at(model, data, batch=512, micro=512)
    assert line is not None
    (size,) = (size for size in larger.sizes if size.samples == 512)
    assert line.fixed_bytes + 512 * line.per_sample_bytes == pytest.approx(
        size.peak_bytes, rel=0.02
    )


def test_stages_add_up_to_the_step_and_modules_to_their_stages() -> None:
    found = looked_at(mlp(), loader(*vectors(256)), steps=20)
    assert sum(stage.seconds for stage in found.stages) == pytest.approx(found.step_s, rel=0.05)
    top = found.modules[0]
    passes = sum(found.stage(name).seconds for name in ("forward", "backward"))  # type: ignore[union-attr]
    assert top.path == ""
    assert top.seconds is not None
    assert found.outside_s is not None
    assert top.seconds + found.outside_s == pytest.approx(passes, rel=0.01)
    children = [module.seconds or 0.0 for module in found.modules[1:]]
    assert sum(children) == pytest.approx(top.seconds, rel=0.25)  # the rest is the model's own


def test_a_module_that_is_slow_backward_is_told_from_one_that_is_slow_forward() -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            _spend(0.004)
            return grad

    class Backward(nn.Module):
        def forward(self, x: Any) -> Any:
            return Slow.apply(x)

    class Forward(nn.Module):
        def forward(self, x: Any) -> Any:
            _spend(0.004)
            return x.clone()

    model = nn.Sequential(nn.Linear(12, 5), Backward(), nn.Linear(5, 5), Forward())
    found = {module.kind: module for module in looked_at(model, loader(*vectors(96))).modules}
    ahead, back = found["Forward"], found["Backward"]
    assert ahead.forward_s > 4 * ahead.backward_s  # type: ignore[operator]
    assert back.backward_s > 4 * back.forward_s  # type: ignore[operator]


def _spend(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


# -- nothing is changed --


def everything(model: Any, optimizer: Any, generator: Any) -> Any:
    return copy.deepcopy(
        (
            {name: (value, value.requires_grad) for name, value in model.state_dict().items()},
            optimizer.state_dict(), torch.get_rng_state(), generator.get_state(),
            [module.training for module in model.modules()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        )
    )  # fmt: skip


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("used", [False, True])
def test_everything_ends_bit_equal(used: bool) -> None:
    model, generator = cnn(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = loader(*images(64), generator=generator)
    if used:
        hm.train(model, data, optimizer=optimizer, precision="fp32")
    before, last_run = everything(model, optimizer, generator), hm.last_run
    looked_at(model, data, optimizer=optimizer)
    assert same(before, everything(model, optimizer, generator))
    assert all(param.grad is None for param in model.parameters())
    assert hm.last_run is last_run
    assert lenses._opened is None
    assert not _get_current_dispatch_mode_stack()


@pytest.mark.parametrize("at", [1, 4, 7, 8, 12])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_whatever_ends_it_everything_is_put_back(at: int, error: type[BaseException]) -> None:
    model, generator = mlp(dropout=0.2), torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    data = loader(*vectors(96), generator=generator)
    before, calls = everything(model, optimizer, generator), 0

    def step(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        out = model(batch[0])
        if calls == at:
            raise error
        return F.cross_entropy(out, batch[1])

    with pytest.raises(error):
        looked_at(model, data, step=step, optimizer=optimizer)
    assert same(before, everything(model, optimizer, generator))
    assert lenses._opened is None
    assert not _get_current_dispatch_mode_stack()


def test_a_profiled_run_trains_as_one_that_is_not() -> None:
    """Looking closely changes no weight: the same steps with a lens over them, and without."""

    def trained(modes: list[str]) -> Any:
        model = cnn()
        data = DataLoader(TensorDataset(*images(64)), batch_size=16)
        turns = iter(modes)
        with lenses.Lens(lambda _: next(turns, "pass"), lambda _: None):
            hm.train(model, data, precision="fp32", batch="fixed", micro=16, epochs=2, seed=0)
        return model.state_dict()

    plain = trained([])
    assert same(plain, trained(["pass", "time", "modules", "ledger", "modules", "ledger"]))


# -- problems that were planted --


class FakeGpu(DeviceProbe):
    """A device that works ahead of the host, and says nothing of its memory."""

    late = True


class Reading(Dataset[Any]):
    def __init__(self, n: int, seconds: float) -> None:
        self._n, self._seconds = n, seconds

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, at: int) -> Any:
        _spend(self._seconds)
        return torch.full((12,), float(at)), at % 5


def told(part: str, look: Callable[[], hm.Profile]) -> hm.Profile:
    """Return a profile whose first advice holds `part`; a machine that stalls gets three tries."""
    for _ in range(3):
        found = look()
        if found.advice and part in str(found.advice[0]):
            break
    assert part in str(found.advice[:1])
    return found


def test_a_slow_loader_is_told_first() -> None:
    data = DataLoader(Reading(128, 0.001), batch_size=16)
    found = told("--workers", lambda: looked_at(mlp(), data))
    assert found.pipeline.loader_samples_per_s < found.pipeline.model_samples_per_s  # type: ignore[operator]


def test_a_hidden_item_is_told_first_with_its_line(on: Any, monkeypatch: Any) -> None:
    on(FakeGpu(CPU))
    total = 0.0

    def step(model: Any, batch: Any) -> Any:
        nonlocal total
        loss = F.cross_entropy(model(batch[0]), batch[1])
        total += loss.item()  # the planted one
        return loss

    found = told("item", lambda: looked_at(wide(), wide_data(), step=step))
    (read,) = found.reads
    assert "total += loss.item()" in read.where
    assert "test_profile.py" in read.where
    assert read.times == 1


def test_unpinned_memory_is_told_first(on: Any, monkeypatch: Any) -> None:
    class Slow(Mover):
        def send(self, batch: Any) -> Any:
            _spend(0.02)
            return super().send(batch)

    on(FakeGpu(CPU), Slow(CPU))
    found = told("pin_memory", lambda: looked_at(wide(), wide_data()))
    assert found.pipeline.pinned is False


def test_fp32_where_the_device_computes_bf16_is_told_first(monkeypatch: Any) -> None:
    monkeypatch.setattr(precisions, "native", lambda _: ("bf16", "a patched probe"))
    rates = {"fp32": 1e10, "bf16": 8e10}
    monkeypatch.setattr(roofline, "flops_per_s", lambda _, name: rates[name])
    monkeypatch.setattr(roofline, "bytes_per_s", lambda _: 1e12)
    told("--precision", lambda: looked_at(wide(), wide_data()))


def test_a_tiny_batch_is_told_first() -> None:
    told("--batch", lambda: looked_at(mlp(), loader(*vectors(256), batch=2), steps=20))


def test_a_well_tuned_run_gets_no_advice(monkeypatch: Any) -> None:
    monkeypatch.setattr(precisions, "native", lambda _: (None, "a patched probe"))
    monkeypatch.setattr(precisions, "worth_measuring", lambda _: None)
    assert () in (looked_at(wide(), wide_data(), steps=6).advice for _ in range(3))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 5))


def wide_data() -> DataLoader[Any]:
    return loader(torch.randn(4096, 256), torch.randint(0, 5, (4096,)), 512)


# -- told by a ledger --


def test_a_value_of_the_host_is_no_read_of_the_device() -> None:
    ledger = Ledger(torch.device("cuda", 0), time.perf_counter)
    with ledger:
        depth = torch.rand(1).item()
        int(torch.tensor([3, 4]).max())
        torch.tensor([0.0, depth]).nonzero()
    assert ledger.reads == []
    ledger = Ledger(CPU, time.perf_counter)
    with ledger:
        torch.rand(1).item()
    assert len(ledger.reads) == 1


def test_arithmetic_is_in_the_precision_of_the_first_tensor() -> None:
    """The last one is a bias in another precision, a scale, or a random seed."""
    ledger = Ledger(CPU, time.perf_counter)
    ledger._formulas = {torch.ops.aten.index_select: lambda *_, **__: 7}  # type: ignore[dict-item]
    with ledger:
        torch.zeros(2, dtype=torch.bfloat16).index_select(0, torch.tensor([1]))
    assert [found[2:4] for found in ledger.flops] == [("bf16", 7)]


def test_a_recurrent_layer_of_cudnn_is_seen() -> None:
    ledger = Ledger(torch.device("cuda", 0), time.perf_counter)
    x, hidden = torch.zeros(5, 2, 4, device="meta"), torch.zeros(1, 2, 8, device="meta")
    weights = [torch.zeros(32, n, device="meta") for n in (4, 8)]
    with ledger:
        ledger.path = "rnn"
        torch.ops.aten._cudnn_rnn(
            x, weights, 2, None, hidden, hidden, 2, 8, 0, 1, False, 0.0, True, False, [], None
        )
    assert [path for _, path in ledger.uncounted] == ["rnn"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LSTM(12, 8, batch_first=True))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x)[0][:, -1])


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="its layers are many here")
def test_where_operations_cannot_be_counted_no_share_of_them_is_told() -> None:
    x, y = vectors(96)
    found = looked_at(Recurrent(), loader(x[:, None].repeat(1, 3, 1), y))
    assert found.work is not None
    assert found.work.flops == {}
    assert "the operations of a step could not be counted" in found.table()
    counted = {module.path: module.flops for module in found.modules}
    assert counted == {"": None, "inner": None, "inner.0": None, "head": 3 * 2 * 16 * 8 * 5}


class Copying(Mover):
    """A mover to a device that is the host."""

    def send(self, batch: Any) -> Any:
        return [tensor.clone() for tensor in batch]


def test_the_next_steps_input_that_is_there_already_is_input(on: Any) -> None:
    on(FakeGpu(CPU), Copying(CPU))
    n, a = 512, 64
    data = DataLoader(TensorDataset(torch.randn(8 * n, a), torch.zeros(8 * n).long()), n)
    found = looked_at(nn.Linear(a, 5), data)
    held = kinds(found, "forward")
    assert held["input"] == 3 * (4 * n * a + 8 * n)  # on the host, on the device, and the next one
    assert held.get("rest", 0) < 4 * n * a


class Whole:
    """A batch of the person's own class."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: torch.device) -> Whole:
        _spend(0.003)
        return Whole(self.x.clone(), self.y.clone())


class Waiting(Mover):
    """A mover that leaves the person's own objects until they are waited for, as a GPU's does."""

    def send(self, batch: Any) -> Any:
        return batch

    def receive(self, moved: Any) -> Any:
        return super().send(moved)


def test_stages_add_up_where_the_persons_own_objects_are_copied(on: Any) -> None:
    on(FakeGpu(CPU), Waiting(CPU))
    rows: Any = list(zip(*vectors(128), strict=True))

    def collate(samples: list[Any]) -> Whole:
        return Whole(*(torch.stack(column) for column in zip(*samples, strict=True)))

    def step(model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch.x), batch.y)

    found = looked_at(mlp(), DataLoader(rows, batch_size=16, collate_fn=collate), step=step)
    assert sum(stage.seconds for stage in found.stages) == pytest.approx(found.step_s, rel=0.1)
    assert found.stage("forward").seconds > 0.003  # type: ignore[union-attr]
    assert found.pipeline.pinned is None


# -- what does not fit, what ends early, what is written --


class Tight(nn.Module):
    """Runs out of memory above 8 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(x)


def test_a_batch_that_does_not_fit_is_profiled_in_pieces() -> None:
    found = looked_at(Tight(), loader(*vectors(256), batch=32))
    assert found.batch == 32
    assert found.micro <= 8
    assert found.setting.retries > 0


def test_a_loader_with_few_batches_is_read_again() -> None:
    found = looked_at(mlp(), loader(*vectors(40), batch=16))  # 16, 16, 8
    assert found.batch == 16
    assert found.steps >= 2
    assert found.peaks


def test_a_trace_is_written_packed_and_small(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    path = tmp_path / "trace.json.gz"
    looked_at(mlp(), loader(*vectors(96)), trace=str(path))
    whole = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in whole}
    assert "aten::addmm" in names
    assert "3" in names
    monkeypatch.setattr(tracing, "MOST_BYTES", 40_000)
    found = looked_at(mlp(), loader(*vectors(96)), trace=str(path))
    assert len(gzip.decompress(path.read_bytes())) <= 40_000
    assert any("left out" in note for note in found.notes)
    assert [each.name for each in tmp_path.iterdir()] == ["trace.json.gz"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trace": "trace.txt"}, "--trace trace.txt ends in neither"),
        ({"trace": "nowhere/trace.json"}, "is no folder"),
        ({"snapshot": "memory.pickle"}, "wanted a CUDA device"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_runs(
    options: dict[str, Any], said: str
) -> None:
    model, ran = mlp(), []
    model.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(hm.HybridMagicError, match=said):
        looked_at(model, loader(*vectors(96)), **options)
    assert not ran


def test_a_profile_is_saved_and_loaded_whole(tmp_path: pathlib.Path) -> None:
    found = looked_at(mlp(), loader(*vectors(96)))
    found.save(tmp_path / "profile.json")
    assert hm.load_profile(tmp_path / "profile.json") == found
    assert hm.last_profile is found
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(hm.HybridMagicError, match="is damaged, or not a profile"):
        hm.load_profile(tmp_path / "other.json")


def test_what_a_profile_holds_keeps_no_tensor_alive() -> None:
    import gc
    import weakref

    model = mlp()
    seen: list[Any] = []
    model.register_forward_hook(lambda _m, _i, out: seen.append(weakref.ref(out)))
    found = looked_at(model, loader(*vectors(96)))
    gc.collect()
    assert found.steps == 3
    assert not [ref for ref in seen if ref() is not None]


def test_scores_of_attention_written_by_hand_are_found() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.head = nn.Linear(8, 24), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.project(x).chunk(3, -1)
            scores = (q @ k.transpose(1, 2) / 8**0.5).softmax(-1)
            return self.head((scores @ v).mean(1))

    found = looked_at(Attention(), loader(torch.randn(32, 96, 8), torch.randint(0, 5, (32,)), 8))
    assert found.setting.attention_scores == "8 x 96 x 96"
    assert found.setting.attention_bytes == 4 * 8 * 96 * 96
    assert profiles.last_profile is found
