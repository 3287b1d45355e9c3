"""`--processes`: what was trained in new processes is in the notebook's own things afterwards."""

import io
import logging
import sys

import pytest
import torch
from launched import notebook, trained_with

import hybrid_magic as hm
from hybrid_magic.engine.control import RunControl
from hybrid_magic.records import NoteRecord, StepRecord


def state_of(names):
    return {name: value.clone() for name, value in names["model"].state_dict().items()}


def test_model_optimizer_scheduler_and_run_come_back(temporary, monkeypatch, caplog):
    printed = io.StringIO()
    monkeypatch.setattr(sys, "stdout", printed)
    caplog.set_level(logging.DEBUG)
    names = notebook("print('in', rank) if last else None")
    model, optimizer, loader = (names[name] for name in ("model", "optimizer", "loader"))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.1)
    before, weights = state_of(names), list(model.parameters())
    drawn, ordered = torch.get_rng_state(), loader.generator.get_state()
    records = []
    run = trained_with(names, epochs=2, scheduler=scheduler, sink=records.append)

    assert run is hm.last_run
    assert (run.outcome, run.steps, run.samples_seen) == ("finished", 16, 128)
    assert run.config["processes"] == 2
    steps = [record for record in records if isinstance(record, StepRecord)]
    assert steps == list(run.history)
    assert [record.step for record in steps] == list(range(1, 17))
    assert {type(record) for record in records} > {NoteRecord, StepRecord}

    assert all(weight is now for weight, now in zip(weights, model.parameters(), strict=True))
    assert all(weight.grad is None for weight in weights)
    after = state_of(names)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert after["norm.num_batches_tracked"] == 16
    assert {float(held["step"]) for held in optimizer.state.values()} == {16.0}
    assert len(optimizer.state) == len(weights)
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (2, pytest.approx(1e-4))
    assert not torch.equal(loader.generator.get_state(), ordered)
    assert not torch.equal(torch.get_rng_state(), drawn)

    assert set(printed.getvalue().split()) == {"in", "0"}  # what the others print is not shown
    assert not [record for record in caplog.records if "elastic" in record.name]


def test_a_run_is_stopped_from_the_panel_and_can_go_on(temporary):
    names = notebook("time.sleep(0.01)")
    control = RunControl()
    seen, asked = [], []

    def poll():
        if len(seen) >= 5 and not asked:  # they come in batches
            asked.append(control.set("lr_multiplier", 0.5))
        if len(seen) > 8:
            control.ask("stop")

    def sink(record):
        seen.extend([record] if isinstance(record, StepRecord) else [])

    control.poll = poll
    run = trained_with(names, epochs=500, sink=sink, control=control)
    assert run.outcome == "stopped"
    assert 8 < run.steps < 500
    assert run.steps == float(names["optimizer"].state_dict()["state"][0]["step"])
    assert [made.after for made in run.changes if made.what == "control"] == [0.5, "stopped"]


@pytest.mark.thorough
def test_an_error_of_the_view_ends_the_run_whole(temporary):
    names = notebook("time.sleep(0.01)")

    def sink(record):
        if isinstance(record, StepRecord):
            raise LookupError("no picture")

    with pytest.raises(LookupError, match="no picture"):
        trained_with(names, epochs=500, sink=sink)
    run = hm.last_run
    assert (run.outcome, run.error) == ("failed", "LookupError: no picture")
    assert run.steps == float(names["optimizer"].state_dict()["state"][0]["step"])


@pytest.mark.parametrize("given", [{}, {"processes": 1}, {"processes": "1"}])
def test_one_process_is_this_one(temporary, monkeypatch, given):
    monkeypatch.setattr("hybrid_magic.launch.start.train_in_processes", None)
    names = notebook()
    assert hm.train(names["model"], names["loader"], steps=1, **given).steps == 1


def test_a_worker_starts_no_workers(temporary, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run of torchrun's")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    names = notebook()
    assert trained_with(names, steps=1).steps == 1


def test_a_rank_that_was_set_by_hand_is_no_worker(temporary, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    started = []
    monkeypatch.setattr(
        "hybrid_magic.launch.start.train_in_processes", lambda *given: started.append(given)
    )
    trained_with(notebook())
    assert len(started) == 1


def refused(things, **options):
    before = state_of(things)
    with pytest.raises(hm.HybridMagicError) as told:
        trained_with(things, **options)
    after = state_of(things)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert hm.last_run is None
    return str(told.value)


def test_what_can_be_known_is_told_before_a_process_is_started(temporary, monkeypatch):
    monkeypatch.setattr("hybrid_magic.launch.start.Agent", None)
    names = notebook()
    assert refused(names, processes="many").startswith("--processes is 'many'; wanted a whole ")
    assert refused(names, ephocs=1) == "there is no option ephocs; did you mean epochs?"
    assert refused(names, device="cpu:0").startswith(
        "--device cpu:0 is one device, and --processes 2 takes one for each process; wanted cpu; "
    )
    assert refused(names, lr=0.1).startswith("--lr 0.1 is for a fresh AdamW")
    doubled = {**names, "model": torch.nn.DataParallel(names["model"])}
    assert refused(doubled, names={"model": "net"}) == (
        "net is a DataParallel, which spreads each batch over all GPUs itself, and --processes 2 "
        "has a process for each; wanted the plain model; use net.module, whose weights are the "
        "same ones, also in the step"
    )
    once = {**names, "loader": iter(names["loader"])}
    assert refused(once, names={"loader": "batches"}).startswith(
        "batches can be read only once, and --processes 2 reads it in every process; wanted "
    )
    names["model"].norm.weight.register_post_accumulate_grad_hook(lambda _: None)
    assert refused(names) == (
        "norm.weight of model has a hook that runs once its gradient is accumulated, and under "
        "--processes 2 that is one process's share of it; wanted a hook that sees the gradient of "
        "all; use optimizer.register_step_pre_hook, or train without --processes"
    )


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("cuda", "--processes 2 is above 1, the GPUs of this machine; wanted a GPU for each; use "),
        ("mps", "--processes 2 on mps, which is one device; wanted several GPUs, or the CPU; "),
    ],
)
def test_every_process_has_a_device_of_its_own(temporary, monkeypatch, kind, found):
    monkeypatch.setattr("hybrid_magic.engine.task.choose_device", lambda *_: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert refused(notebook()).startswith(found)
