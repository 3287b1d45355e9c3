"""Ways in which such a loop goes wrong in the field that no other file of tests is about."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import Transformer, by_hand, differences, mlp, vectors
from simulated import SimulatedProbe
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine.control import RunControl
from hybrid_magic.engine.device import DeviceProbe, probe_for

MB = 2**20


class Sentences(Dataset[Any]):
    """Token sequences of one length, but for a stretch at the end that is four times as long."""

    def __init__(self, n: int, long: int) -> None:
        self._n, self._long = n, long

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Any:
        length = 28 if index >= self._n - self._long else 7
        return torch.full((length,), index % 20), index % 5


class Crowded(SimulatedProbe):
    """A device whose memory goes with samples times length, and that runs out of it."""

    refused = 0

    def _note(self, _: Any, args: Any) -> None:
        tokens = args[0].numel()
        if self._fixed + tokens * self._per_sample > self._total:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self._largest = max(self._largest, tokens)
        self.highest = max(self.highest, self._now())


def test_the_longest_samples_may_come_last(on: Any) -> None:
    model = Transformer(dropout=0.0)
    probe = Crowded(model, fixed=10 * MB, per_sample=MB // 7, total=80 * MB)
    on(probe)
    seen: list[int] = []

    def step(model: Any, batch: Any) -> Any:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        seen.append(len(batch[0]))
        return loss

    data = DataLoader(Sentences(32 * 12, long=64), batch_size=32)
    run = hm.train(model, data, step, precision="fp32", batch="fixed")
    assert run.samples_seen == sum(seen) == 32 * 12
    assert probe.refused == sum(record.retries for record in run.history) <= 1
    assert run.history[-1].global_batch_size == 32


def test_every_size_that_was_decided_was_run(on: Any) -> None:
    model = mlp()
    probe = SimulatedProbe(model, fixed=10 * MB, per_sample=MB, total=100 * MB)
    on(probe)
    data = DataLoader(TensorDataset(*vectors(64 * 150)), batch_size=64)
    run = hm.train(model, data, precision="fp32", memory=0.5)
    ran = {size for sizes, _ in run.sizes for size in sizes}
    decided = [change.after for change in run.changes if change.what == "micro"]
    assert decided
    assert set(decided) <= ran
    assert len(ran) <= 12  # few sizes, for kernels are tuned anew for each
    assert len(run.sizes) == run.steps


def test_memory_is_collected_after_running_out_of_it_and_never_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collected: list[int] = []
    monkeypatch.setattr(DeviceProbe, "release", lambda self: collected.append(1))
    model = mlp()
    data = DataLoader(TensorDataset(*vectors(160)), batch_size=16)
    calls: list[int] = []

    def step(model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return F.cross_entropy(model(batch[0]), batch[1])

    failing: set[int] = set()
    hm.train(model, data, step, precision="fp32", batch="fixed", micro=16)
    assert collected == []
    failing = {len(calls) + 4}
    hm.train(model, data, step, precision="fp32", batch="fixed", micro=16)
    assert collected == [1]


def test_workers_are_started_once_an_epoch_whatever_the_sizes_do() -> None:
    before = set(multiprocessing.active_children())
    alive: list[frozenset[int | None]] = []
    control = RunControl()

    def sink(record: Any) -> None:
        if hasattr(record, "microbatch_size"):
            started = set(multiprocessing.active_children()) - before
            alive.append(frozenset(process.pid for process in started))
            control.set("accum", 1 + len(alive) % 4)

    rows = list(zip(*vectors(16 * 24), strict=True))
    data: Any = DataLoader(rows, batch_size=16, num_workers=2)  # type: ignore[arg-type]
    run = hm.train(mlp(), data, precision="fp32", batch="fixed", control=control, sink=sink)
    assert sum(change.what == "control" for change in run.changes) >= 20
    assert len({workers for workers in alive if workers}) == 1
    assert max(map(len, alive)) == 2
    assert set(multiprocessing.active_children()) == before


def test_the_persons_loader_tells_the_truth_while_the_batch_grows() -> None:
    data = DataLoader(TensorDataset(*vectors(16 * 20)), batch_size=16, drop_last=True)
    found = (data.batch_sampler, data.sampler, data.dataset)
    control, seen = RunControl(), []

    def sink(record: Any) -> None:
        if hasattr(record, "microbatch_size"):
            control.ask("grow")
            batch_sampler: Any = data.batch_sampler
            seen.append((len(data), data.batch_size, batch_sampler.batch_size))

    run = hm.train(mlp(), data, precision="fp32", control=control, sink=sink, max_batch=256)
    assert max(record.global_batch_size for record in run.history) > 16
    assert set(seen) == {(20, 16, 16)}
    assert (data.batch_sampler, data.sampler, data.dataset) == found


def test_a_loss_that_is_not_safe_in_half_precision_is_computed_in_fp32() -> None:
    kinds: list[tuple[torch.dtype, bool]] = []

    class Loss(nn.BCELoss):
        def forward(self, output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            kinds.append((output.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(output, y)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 1), nn.Sigmoid(), nn.Flatten(0))
    x, _ = vectors(64)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).float()), batch_size=16)
    hm.train(model, data, loss=Loss(), precision="bf16", epochs=1)
    assert set(kinds) == {(torch.float32, False)}


def test_a_fused_optimizer_clips_as_torch_does(on: Any) -> None:
    one, other = mlp(), mlp()
    data = DataLoader(TensorDataset(*vectors(160)), batch_size=16)
    by_hand(one, data, torch.optim.AdamW(one.parameters(), lr=0.01, fused=True), clip=0.05)
    on(SimulatedProbe(other, fixed=MB, per_sample=MB, total=100 * MB))
    run = hm.train(
        other,
        data,
        optimizer=torch.optim.AdamW(other.parameters(), lr=0.01, fused=True),
        precision="fp32",
        batch="fixed",
        micro=16,
        clip=0.05,
    )
    assert differences(one, other) == []
    assert all(record.grad_norm is None or record.grad_norm > 0.05 for record in run.history)


def test_a_known_tensor_is_in_the_reading_of_the_host() -> None:
    probe = probe_for(torch.device("cpu"))
    probe.reset_peak()
    before = probe.peak()[0]
    if before is None:
        pytest.skip("this host does not tell its resident set")
    held = torch.ones(64 * MB, dtype=torch.uint8)
    after = probe.peak()[0]
    assert after is not None
    assert 0.95 * held.numel() <= after - before <= 1.25 * held.numel()
