"""P8: watching changes nothing. And what a person asks of a run while it runs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from plain import cnn, differences, images, mlp, vectors
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine.control import ACTIONS, SETTINGS, RunControl
from hybrid_magic.records import BatchChangeRecord, Record, StartRecord, StepRecord

FIXED = {"precision": "fp32", "batch": "fixed", "micro": 8}


def loader(n: int = 96) -> Any:
    return DataLoader(TensorDataset(*vectors(n)), batch_size=8, shuffle=True)


@pytest.mark.parametrize(
    "options", [FIXED, {**FIXED, "micro": 3}, {**FIXED, "batch": 24}], ids=["one", "cut", "joined"]
)
def test_records_controls_and_views_leave_the_weights_bit_equal(options: dict[str, Any]) -> None:
    from hybrid_magic.notebook.live import open_view

    trained = []
    for watched in ("nothing", "sink", "view"):
        model = cnn()
        data = DataLoader(TensorDataset(*images(96)), batch_size=8, shuffle=True)
        torch.manual_seed(5)
        seen: list[Record] = []
        view = open_view(plain=True) if watched == "view" else None
        run = hm.train(
            model,
            data,
            optimizer=torch.optim.AdamW(model.parameters()),
            epochs=3,
            sink=view or (seen.append if watched == "sink" else None),
            control=None
            if watched == "nothing"
            else view.control
            if view
            else RunControl(poll=lambda: None),
            **options,
        )
        if view is not None:
            view.close(run)
        trained.append(model)
    assert differences(trained[0], trained[1]) == []
    assert differences(trained[0], trained[2]) == []


def test_a_sink_sees_the_start_first_and_every_step() -> None:
    seen: list[Record] = []
    model = mlp()
    run = hm.train(model, loader(), sink=seen.append, epochs=2, **FIXED)
    assert isinstance(seen[0], StartRecord)
    steps = [record for record in seen if isinstance(record, StepRecord)]
    assert [record.step for record in steps] == list(range(1, 25))
    assert [record.samples_seen for record in steps] == list(range(8, 200, 8))
    assert list(run.history) == steps
    for record in steps:
        stages = (record.data_s, record.forward_s, record.backward_s, record.optimizer_s)
        assert all(stage is not None and stage >= 0 for stage in stages)
        assert record.step_s is not None
        assert record.step_s >= sum(stage for stage in stages if stage is not None) * 0.99


def test_stop_ends_at_a_whole_step_and_the_next_run_goes_on() -> None:
    model, control = mlp(), RunControl()

    def sink(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == 4:
            control.ask("stop")

    run = hm.train(model, loader(), sink=sink, control=control, **FIXED)
    assert (run.outcome, run.steps, run.samples_seen) == ("stopped", 4, 32)
    assert hm.last_run is run
    assert all(p.grad is None for p in model.parameters())
    assert hm.train(model, loader(), **FIXED).outcome == "finished"


def test_a_pause_holds_the_steps_and_is_not_counted_as_training() -> None:
    model, control, steps = mlp(), RunControl(), []

    def sink(record: Record) -> None:
        if isinstance(record, StepRecord):
            steps.append(record.step)
            if record.step == 3:
                control.ask("pause")

    held: list[int] = []

    def poll() -> None:  # called while paused, too
        if steps and steps[-1] == 3:
            held.append(len(steps))
            if len(held) == 10:
                control.ask("resume")

    control.poll = poll
    run = hm.train(model, loader(), sink=sink, control=control, **FIXED)
    assert set(held) == {3}
    assert run.outcome == "finished"
    assert [change.after for change in run.changes if change.what == "control"] == [
        "paused",
        "running",
    ]
    assert run.seconds < 10 * 0.02 + sum(record.step_s or 0 for record in run.history)


def test_every_control_may_be_asked_from_any_thread_and_is_recorded() -> None:
    control, model = RunControl(), mlp()
    wanted = {
        "accum": 2,
        "memory": 0.5,
        "stability_threshold": 0.05,
        "growth_factor": 1.2,
        "max_batch": 16,
    }
    wanted["lr_multiplier"] = 0.5
    assert wanted.keys() == SETTINGS.keys()

    def ask() -> None:
        for name, value in wanted.items():
            control.set(name, value)

    def sink(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == 2:
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()

    run = hm.train(model, loader(), sink=sink, control=control, epochs=2, precision="fp32", lr=1e-3)
    asked = [change for change in run.changes if change.what == "control"]
    assert len(asked) >= len(wanted)
    for name in wanted:
        assert any(
            name in change.reason or name.replace("_", " ") in change.reason for change in asked
        ), name
    assert run.history[-2].lr == pytest.approx(0.5e-3)
    assert run.history[-2].accumulation_steps == 2


@pytest.mark.parametrize("action", ["grow", "shrink"])
def test_the_batch_can_be_moved_by_hand(action: str) -> None:
    control, model = RunControl(), mlp()

    def sink(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == 2:
            control.ask(action)

    run = hm.train(model, loader(), sink=sink, control=control, precision="fp32")
    (change,) = [
        change
        for change in run.changes
        if isinstance(change, BatchChangeRecord) and change.what == "control"
    ]
    assert (change.after > change.before) == (action == "grow")
    assert run.history[4].global_batch_size == change.after
    assert run.samples_seen == 96


def test_what_cannot_be_asked_is_refused() -> None:
    control = RunControl()
    for wrong in (
        lambda: control.set("colour", 1),
        lambda: control.set("memory", 2.0),
        lambda: control.ask("jump"),
    ):
        with pytest.raises(hm.ConfigError):
            wrong()
    assert not control.mail
    assert set(ACTIONS) == {"grow", "shrink", "pause", "resume", "stop"}


@pytest.mark.parametrize("limit", ["steps", "minutes"])
def test_the_first_end_that_is_reached_ends_the_run(limit: str) -> None:
    model = mlp()
    val = loader(16)
    ends: dict[str, Any] = {"steps": 17} if limit == "steps" else {"minutes": 0.001}
    run = hm.train(model, loader(), val=val, epochs=10_000, **ends, **FIXED)
    assert run.outcome == "finished"
    if limit == "steps":
        assert run.steps == 17
        assert [metrics["epoch"] for metrics in run.metrics] == [1, 2]
    else:
        assert run.seconds >= 0.06


@pytest.mark.parametrize("base", [4, 8, 16, 33])
def test_a_step_is_never_cut_into_single_samples_unasked(base: int) -> None:
    sizes: list[int] = []

    def squeezing(model: Any, batch: Any) -> Any:
        sizes.append(len(batch[0]))
        return torch.nn.functional.mse_loss(model(batch[0]).mean(1).squeeze(), batch[1].float())

    data = DataLoader(TensorDataset(*vectors(4 * base)), batch_size=base)
    hm.train(mlp(), data, squeezing, epochs=3, precision="fp32", batch="fixed")
    assert min(sizes) >= 2


def test_batch_statistics_keep_two_samples_in_a_piece_however_many_are_asked_for() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.BatchNorm1d(5))
    data = DataLoader(TensorDataset(*vectors(32)), batch_size=16)
    run = hm.train(model, data, accum=16, precision="fp32")
    assert {(record.microbatch_size, record.accumulation_steps) for record in run.history} == {
        (2, 8)
    }
