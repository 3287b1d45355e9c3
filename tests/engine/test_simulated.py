"""The paths that only a GPU takes, on a device that is simulated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from plain import cnn, differences, images, mlp, step_state, vectors
from simulated import RecordingMover, SimulatedProbe, numbered
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine.prefetch import one_step_ahead
from hybrid_magic.engine.step import train_step

MB = 2**20


def test_late_readings_lose_and_reorder_nothing(on: Any) -> None:
    one, other = mlp(), mlp()
    options: dict[str, Any] = {"precision": "fp32", "batch": "fixed", "micro": 8, "epochs": 2}
    data = DataLoader(TensorDataset(*vectors(48)), batch_size=8)
    plain = hm.train(one, data, optimizer=torch.optim.AdamW(one.parameters()), **options)
    probe = on(SimulatedProbe(other, fixed=MB, per_sample=MB, total=100 * MB))
    late = hm.train(other, data, optimizer=torch.optim.AdamW(other.parameters()), **options)
    assert differences(one, other) == []
    assert [record.step for record in late.history] == list(range(1, 13))
    assert [record.loss for record in late.history] == [record.loss for record in plain.history]
    assert late.final_loss == plain.final_loss
    assert probe.read_early == 12  # the one read of a step that must know whether to skip


def test_a_fused_optimizer_is_never_waited_for(on: Any) -> None:
    model = mlp()
    probe = on(SimulatedProbe(model, fixed=MB, per_sample=MB, total=100 * MB))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = vectors(160)
    x[40] = float("nan")
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    run = hm.train(model, data, optimizer=optimizer, precision="fp32", batch="fixed", micro=8)
    assert probe.read_early == 1  # the last step's, when the run is over
    assert [record.step for record in run.history] == list(range(1, 21))
    assert [record.step for record in run.history if record.skipped] == [6]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not hasattr(optimizer, "found_inf")


def test_the_micro_batch_stays_within_the_budget_from_the_first_step(on: Any) -> None:
    model = mlp()
    # the loader's own batch of 64 would take 74 MB
    probe = on(SimulatedProbe(model, fixed=10 * MB, per_sample=MB, total=100 * MB))
    data = DataLoader(TensorDataset(*vectors(64 * 20)), batch_size=64)
    run = hm.train(model, data, precision="fp32", batch="fixed", memory=0.5)
    assert probe.highest <= 50 * MB
    assert run.samples_seen == 64 * 20
    assert {record.global_batch_size for record in run.history} == {64}
    assert max(record.microbatch_size for record in run.history) <= 40
    assert run.peak_allocated_bytes == probe.highest


def test_batch_statistics_are_sized_by_a_rehearsal_that_leaves_no_trace(on: Any) -> None:
    one, other = cnn(), cnn()
    data = DataLoader(TensorDataset(*images(64 * 3)), batch_size=64)
    torch.manual_seed(1)
    options: dict[str, Any] = {"precision": "fp32", "batch": "fixed"}
    hm.train(one, data, optimizer=torch.optim.SGD(one.parameters(), lr=0.1), **options)
    sizes: list[int] = []
    probe = on(SimulatedProbe(other, fixed=10 * MB, per_sample=MB, total=200 * MB))
    other.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    torch.manual_seed(1)
    run = hm.train(other, data, optimizer=torch.optim.SGD(other.parameters(), lr=0.1), **options)
    assert sizes[:3] == [8, 16, 32]
    assert [record.microbatch_size for record in run.history] == [64, 64, 64]
    assert probe.highest == 74 * MB
    assert differences(one, other) == []


def test_batch_statistics_give_way_to_memory_only_and_that_is_said(on: Any) -> None:
    model = cnn()
    probe = on(SimulatedProbe(model, fixed=10 * MB, per_sample=MB, total=50 * MB))
    data = DataLoader(TensorDataset(*images(64 * 4)), batch_size=64)
    run = hm.train(model, data, precision="fp32", batch="fixed", memory=1.0)
    assert probe.highest <= 50 * MB
    assert {record.global_batch_size for record in run.history} == {64}
    assert any("below the loader's batch of 64" in change.reason for change in run.changes)


def test_the_next_micro_batch_is_sent_before_this_one_is_computed() -> None:
    model, mover = mlp(), RecordingMover()
    state = step_state(
        model,
        lambda m, b: F.mse_loss(m(b[0]).mean(1), b[1].float()),
        torch.optim.SGD(model.parameters(), lr=0.0),
    )
    state.mover = mover
    steps = one_step_ahead(numbered([[4], [4, 4, 4], [4]]), mover)
    for step in steps:
        train_step(state, step)
    assert mover.log == [
        "send 0", "send 1",
        "use 0", "send 4",
        "use 1", "send 2", "use 2", "send 3", "use 3",
        "use 4",
    ]  # fmt: skip


def test_nothing_is_drawn_ahead_of_a_loader_that_shares_the_models_random_numbers(on: Any) -> None:
    model, mover = mlp(), RecordingMover()
    on(SimulatedProbe(model, fixed=MB, per_sample=MB, total=100 * MB), mover)
    rows = list(zip(*vectors(24), strict=True))
    hm.train(model, DataLoader(rows, batch_size=8), precision="fp32", batch="fixed", micro=8)
    assert [entry[:4] for entry in mover.log] == ["send", "use "] * 3


def test_a_steps_peak_is_its_own_however_late_it_is_read(on: Any) -> None:
    # Read after the next step was begun, a growing micro-batch would lend its peak to the last one.
    model = mlp()
    on(SimulatedProbe(model, fixed=10 * MB, per_sample=MB, total=10_000 * MB))
    data = DataLoader(TensorDataset(*vectors(32 * 60)), batch_size=32)
    run = hm.train(model, data, precision="fp32", batch=256, lr_scale="none", max_batch=256)
    sizes = {record.microbatch_size for record in run.history}
    assert len(sizes) > 1
    for record in run.history:
        assert record.allocated_peak_bytes == (10 + record.microbatch_size) * MB
