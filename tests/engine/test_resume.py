"""A run that is gone on with ends in the weights of one that was never interrupted."""

from __future__ import annotations

import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faults import Faults
from plain import cnn, differences, images, mlp, vectors
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import hybrid_magic as hm
from hybrid_magic.config import TrainConfig
from hybrid_magic.engine import keeper
from hybrid_magic.engine.control import RunControl
from hybrid_magic.engine.device import DeviceProbe
from hybrid_magic.engine.randomness import seed_everything
from hybrid_magic.engine.session import Session
from hybrid_magic.errors import ConfigError, HybridMagicError

SAMPLES, EPOCHS = 60, 3  # batches of 8, so an epoch ends in a short one


class Augmented(Dataset[Any]):
    """Draws from all three generators for each sample."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        noise = 0.1 * torch.randn(1) + 0.1 * random.random() + 0.1 * float(np.random.rand())  # noqa: NPY002 - the one that people use
        return self.x[index] + noise, self.y[index]


class Stream(IterableDataset[Any]):
    """Samples that come in an order of their own, drawn as they come."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(len(self.x)).tolist():
            yield self.x[index] + 0.1 * torch.randn(1), self.y[index]


class SteadyProbe(DeviceProbe):
    """A device on which every stage takes a millisecond, so that equal runs decide alike."""

    def __init__(self, *, late: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        ticks = itertools.count()
        self.mark = lambda: 0.001 * next(ticks)
        self.late = late


class Kit:
    """One run's things, made anew and alike each time."""

    def __init__(self, **given: Any) -> None:
        self.model: nn.Module = given.get("model", cnn)()
        data = (vectors if given.get("model") is mlp else images)(given.get("samples", SAMPLES))
        kind = given.get("data", Augmented)
        own = torch.Generator().manual_seed(7) if given.get("generator") else None
        self.dataset = kind(*data)
        shuffled = {} if kind is Stream else {"shuffle": True, "generator": own}
        self.loader = DataLoader(
            self.dataset, batch_size=8, num_workers=given.get("workers", 0), **shuffled
        )
        make = given.get("optimizer", lambda p: torch.optim.AdamW(p, lr=0.01))
        self.optimizer = make(self.model.parameters())
        schedule = given.get("scheduler")
        self.scheduler = None if schedule is None else schedule(self.optimizer)
        self.val = DataLoader(TensorDataset(*data), batch_size=30) if given.get("val") else None
        self.step = given.get("step")
        self.options = {"epochs": EPOCHS, "precision": "fp32", "batch": "fixed"} | given.get(
            "options", {}
        )

    def train(self, stop: int | None = None, seed: int | None = 5, **more: Any) -> hm.Run:
        """Train; `stop` presses the stop button after so many steps."""
        if seed is not None:
            seed_everything(seed)
        control, steps = RunControl(), itertools.count(1)
        control.poll = lambda: control.ask("stop") if next(steps) == stop else None
        return hm.train(
            self.model, self.loader, self.step, optimizer=self.optimizer, val=self.val,
            scheduler=self.scheduler, control=control, **{**self.options, **more},
        )  # fmt: skip


def facts(run: hm.Run) -> Any:
    """What must not differ of two runs, times apart."""
    kept = ("step", "samples_seen", "loss", "grad_norm", "lr", "global_batch_size", "skipped",
            "accumulation_steps", "microbatch_size", "noise_scale", "retries")  # fmt: skip
    steps = [[getattr(record, name) for name in kept] for record in run.history]
    changes = [(c.step, c.before, c.after, c.what) for c in run.changes if c.what != "control"]
    return steps, changes, run.metrics, run.sizes.entries(), run.skipped_steps, run.retries


def equal(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # so that NaN is itself


def check_resumes(folder: pathlib.Path, stops: Any, **given: Any) -> hm.Run:
    """A run that is stopped after each of `stops` and gone on with is the one that is not."""
    whole = Kit(**given)
    expected = whole.train()
    ended = torch.get_rng_state()
    for stop in stops:
        place = folder / f"{stop}"
        run = Kit(**given).train(stop, checkpoint=place)
        assert (run.outcome, run.steps) == ("stopped", stop)
        resumed = Kit(**given)
        run = resumed.train(seed=99, checkpoint=place, resume=True)
        assert run.outcome == expected.outcome == "finished"
        assert f"went on from the checkpoint of step {stop}" in run.notes
        assert differences(whole.model, resumed.model) == [], f"stopped after {stop}"
        assert equal(facts(run), facts(expected)), f"stopped after {stop}"
        assert torch.equal(torch.get_rng_state(), ended)
    return expected


STEPS = -(-SAMPLES // 8)  # of an epoch


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"generator": True},
        {"data": TensorDataset},
        {"data": TensorDataset, "generator": True},
        {"data": Stream},
        {"val": True, "model": mlp},
    ],
    ids=lambda given: " ".join(given) or "augmented",
)
def test_wherever_it_was_stopped_it_ends_the_same(given, tmp_path):
    check_resumes(tmp_path, [3, 2 * STEPS], **given)


def test_workers_read_again_what_their_random_numbers_went_on_with(tmp_path):
    given = {"workers": 2, "options": {"micro": 3}}
    check_resumes(tmp_path, [3], **given)
    run = Kit(**given).train(checkpoint=tmp_path / "3", resume=True)
    assert any("the run was over already" in note for note in run.notes)
    assert any(
        note.startswith("24 samples of the open epoch were read again") for note in run.notes
    )


def one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, epochs=EPOCHS, steps_per_epoch=STEPS
    )


def milestones(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], 0.3)


def chain(optimizer: Any) -> Any:
    ahead = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
    then = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 9], 0.3)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [ahead, then], [STEPS])


def plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


@pytest.mark.parametrize("scheduler", [one_cycle, milestones, chain, plateau])
def test_schedulers_of_batches_and_of_epochs_go_on(scheduler, tmp_path):
    given = {"scheduler": scheduler, "data": TensorDataset, "val": True}
    check_resumes(tmp_path, [2, STEPS + 3], **given)


def momentum(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True)


def scaled_to_overflow(model: Any, batch: Any) -> Any:
    """Overflows float16 at first, so that the loss scale has to find its place."""
    x, y = batch
    return F.cross_entropy(model(x), y) * 4.0


@pytest.mark.parametrize(
    "options",
    [
        {"accum": 3},
        {"micro": 3, "clip": 0.5},
        {"precision": "bf16"},
        {"precision": "fp16"},
    ],
    ids=str,
)
def test_momentum_accumulation_clipping_and_loss_scales_go_on(options, tmp_path):
    step = scaled_to_overflow if options.get("precision") == "fp16" else None
    given = {"optimizer": momentum, "options": options, "step": step}
    run = check_resumes(tmp_path, [1, STEPS + 1], **given)
    assert step is None or run.skipped_steps


@pytest.mark.parametrize(
    ("policy", "late", "workers"),
    [
        ("goodput", False, 0),
        ("stability", True, 0),
        pytest.param("goodput", True, 0, marks=pytest.mark.thorough),
        pytest.param("goodput", False, 2, marks=pytest.mark.thorough),
    ],
)
def test_a_batch_that_grows_grows_on(policy, late, workers, on, tmp_path):
    on(SteadyProbe(late=late))
    options = {"batch": "adaptive", "policy": policy, "max_batch": 64}
    given = {"model": mlp, "samples": 600, "options": options, "data": TensorDataset,
             "workers": workers, "optimizer": momentum}  # fmt: skip
    run = check_resumes(tmp_path, [125] if workers else [113, 125], **given)
    grown = [change.step for change in run.changes if change.what == "global"]
    assert min(grown) <= 113 < 125 < max(grown)


def test_gradients_held_for_a_measurement_of_the_noise_are_kept(on, tmp_path):
    on(SteadyProbe())
    options = {"batch": "adaptive"}
    given = {"samples": 320, "data": TensorDataset, "options": options}  # BatchNorm: over two steps
    run = check_resumes(tmp_path, range(12, 14), **given)
    assert any(record.noise_scale for record in run.history)


def test_steps_that_were_not_finite_or_ran_out_of_memory_before_change_nothing(tmp_path):
    def kit() -> Kit:
        made = Kit(model=mlp, data=TensorDataset, options={"micro": 8})
        made.dataset.tensors[0][11] = float("nan")
        return made

    def out_of_memory(step: int, attempt: int, sizes: list[int]) -> int | None:
        return 5 if step in (2, 13) and attempt == 0 else None

    with Faults(out_of_memory).at_work():
        whole = kit()
        expected = whole.train()
    for stop in (1, STEPS + 4):
        with Faults(out_of_memory).at_work():
            kit().train(stop, checkpoint=tmp_path / f"{stop}")
            resumed = kit()
            run = resumed.train(checkpoint=tmp_path / f"{stop}", resume=True)
        assert differences(whole.model, resumed.model) == []
        assert equal(facts(run), facts(expected))
        assert run.retries == 2
        assert run.skipped_steps == EPOCHS


class Unused(nn.Module):
    """Has a weight that no loss ever uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.spare = mlp(), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_an_optimizer_holds_no_state_that_the_plain_loop_would_not_have(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "EVERY_S", 0.0)
    given = {"model": lambda: Unused(), "data": TensorDataset, "step": _vectors_step}
    made = Kit(**given)
    made.train(3, checkpoint=tmp_path)
    os.unlink(max(tmp_path.glob("*.pt")))  # left: one that was taken in the midst of the run
    resumed = Kit(**given)
    resumed.train(checkpoint=tmp_path, resume=True)
    for kit in (made, resumed):
        assert len(kit.optimizer.state) == len(list(kit.model.inner.parameters()))


def _vectors_step(model: Any, batch: Any) -> Any:
    return F.cross_entropy(model(batch[0].flatten(1)[:, :12]), batch[1])


# -- when --


def steps_saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The step of every checkpoint from now on."""
    saved: list[int] = []
    save = keeper.Store.save

    def noted(self: Any, tree: Any, *, step: int) -> None:
        saved.append(step)
        save(self, tree, step=step)

    monkeypatch.setattr(keeper.Store, "save", noted)
    return saved


def test_the_newest_epoch_stands_in_the_folder_before_the_next_one_is_over(tmp_path, monkeypatch):
    saved = steps_saved(monkeypatch)
    Kit(data=TensorDataset).train(checkpoint=tmp_path)
    assert saved == [STEPS, 2 * STEPS, 3 * STEPS]  # the last epoch's is the run's
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        f"checkpoint-{step:08d}.pt" for step in saved
    ]


def test_time_takes_checkpoints_inside_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "EVERY_S", 0.0)
    saved = steps_saved(monkeypatch)
    Kit(data=TensorDataset).train(checkpoint=tmp_path, epochs=1)
    assert saved == [*range(STEPS + 1), STEPS]  # at every boundary, and at the end


class Pressing(Augmented):
    """Interrupts the kernel once, before sample number `at` is read."""

    at = -1

    def __getitem__(self, index: int) -> Any:
        type(self).at -= 1
        if type(self).at == 0:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return super().__getitem__(index)

    times = 1


@pytest.mark.parametrize("at", [3, 61, 100])
def test_an_interrupt_while_data_are_read_is_gone_on_from(at, tmp_path):
    whole = Kit(data=Pressing)
    whole.train()
    Pressing.at = at
    with pytest.raises(KeyboardInterrupt):
        Kit(data=Pressing).train(checkpoint=tmp_path)
    Pressing.at = -1
    assert hm.last_run.outcome == ("interrupted" if at > 8 else "finished")
    resumed = Kit(data=Pressing)
    run = resumed.train(seed=99 if at > 8 else 5, checkpoint=tmp_path, resume=True)
    assert run.outcome == "finished"
    assert differences(whole.model, resumed.model) == []


def test_interrupts_inside_a_step_and_in_a_validation_are_gone_on_from(tmp_path):
    pressed = {"at": -1}

    def step(model: Any, batch: Any) -> Any:
        x, y = batch
        loss = F.cross_entropy(model(x) + 0.01 * torch.randn(1), y)
        pressed["at"] -= 1
        if pressed["at"] == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100):
                time.sleep(0.0001)
        return loss

    given = {"step": step, "val": True}
    whole = Kit(**given)
    expected = whole.train()
    for at in (3, STEPS + 2):
        pressed["at"] = at
        with pytest.raises(KeyboardInterrupt):
            Kit(**given).train(checkpoint=tmp_path / f"{at}")
        pressed["at"] = -1
        resumed = Kit(**given)
        run = resumed.train(seed=99, checkpoint=tmp_path / f"{at}", resume=True)
        assert differences(whole.model, resumed.model) == []
        assert equal(facts(run), facts(expected))


def test_a_failure_takes_no_checkpoint_and_the_last_one_is_gone_on_from(tmp_path):
    failing = {"at": STEPS + 3}

    def step(model: Any, batch: Any) -> Any:
        failing["at"] -= 1
        if failing["at"] == 0:
            raise RuntimeError("mine")
        x, y = batch
        return F.cross_entropy(model(x), y)

    whole = Kit(step=step)
    failing["at"] = -1
    whole.train()
    failing["at"] = STEPS + 3
    with pytest.raises(RuntimeError, match="mine"):
        Kit(step=step).train(checkpoint=tmp_path)
    assert [path.name for path in tmp_path.glob("*.pt")] == [f"checkpoint-{STEPS:08d}.pt"]
    resumed = Kit(step=step)
    resumed.train(seed=99, checkpoint=tmp_path, resume=True)
    assert differences(whole.model, resumed.model) == []


# -- what is found in the folder --


def test_a_run_that_was_over_is_handed_back_at_once(tmp_path):
    first = Kit(val=True)
    expected = first.train(checkpoint=tmp_path)
    after = torch.get_rng_state()
    again = Kit(val=True)
    records: list[Any] = []
    run = again.train(seed=3, checkpoint=tmp_path, resume=True, sink=records.append)
    assert run is hm.last_run
    assert (run.outcome, run.steps, run.samples_seen) == ("finished", 24, 180)
    assert equal(facts(run), facts(expected))
    assert run.seconds == pytest.approx(expected.seconds, abs=0.05)
    assert "the run was over already; raise --epochs, --steps or --minutes to go on" in run.notes
    assert [type(record).__name__ for record in records][:2] == ["StartRecord", "NoteRecord"]
    assert differences(first.model, again.model) == []
    assert torch.equal(torch.get_rng_state(), after)
    assert (
        again.optimizer.state_dict()["state"].keys() == first.optimizer.state_dict()["state"].keys()
    )


@pytest.mark.parametrize(
    ("short", "long"),
    [({"epochs": 2}, {"epochs": 3}), ({"steps": 11, "epochs": None}, {"epochs": 3})],
)
def test_an_end_that_is_moved_out_goes_on_as_if_it_had_been_there(short, long, tmp_path):
    whole = Kit(val=True)
    whole.train(**long)
    Kit(val=True).train(**short, checkpoint=tmp_path)
    resumed = Kit(val=True)
    run = resumed.train(seed=99, **long, checkpoint=tmp_path, resume=True)
    assert differences(whole.model, resumed.model) == []
    assert any(
        note.startswith("goes on with other options than before: --epochs") for note in run.notes
    )


def test_nothing_to_go_on_from_is_said_and_the_run_begins(tmp_path):
    whole = Kit()
    whole.train()
    begun = Kit()
    run = begun.train(checkpoint=tmp_path / "new", resume=True)
    assert f"nothing to go on from in {tmp_path / 'new'}: the run begins" in run.notes
    assert differences(whole.model, begun.model) == []


def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(tmp_path):
    whole = Kit()
    whole.train()
    Kit().train(STEPS + 3, checkpoint=tmp_path)
    newest = max(tmp_path.glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1000] + b"x" * 1000)
    resumed = Kit()
    run = resumed.train(seed=99, checkpoint=tmp_path, resume=True)
    assert f"{newest.name} is half-written or damaged; it was passed over" in run.notes
    assert f"went on from the checkpoint of step {STEPS}" in run.notes
    assert differences(whole.model, resumed.model) == []


def wider() -> nn.Module:
    return nn.Sequential(*list(cnn())[:-1], nn.Linear(216, 7))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "shapes": ({"model": wider}, "of another model: its 5.weight is [5, 216] float32, and here [7"),
    "names": ({"model": mlp}, "of another model: "),
    "dtype": ({"model": lambda: cnn().double()}, "float32, and here [6, 1, 3, 3] float64"),
    "optimizer": ({"optimizer": momentum}, "its optimizer is AdamW, and here SGD"),
    "groups": (
        {"optimizer": lambda p: torch.optim.AdamW([{"params": [q]} for q in p])},
        "its optimizer has groups of [6] parameters, and here of [1, 1, 1, 1, 1, 1]",
    ),
    "scheduler": ({"scheduler": milestones}, "its scheduler is none, and here MultiStepLR"),
    "samples": ({"samples": 61}, "its epochs had 60 samples, and here 61"),
    "generator": ({"generator": True}, "its loader had 0 generators of its own, and here 1"),
    "workers": ({"workers": 1}, "its loader had 0 worker processes, and here 1"),
    "data": ({"data": Stream}, "its data were read as a SampledFeed, and here SplitFeed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_that_run_is_refused_before_anything_is_changed(case, tmp_path):
    given, words = REFUSED[case]
    Kit().train(3, checkpoint=tmp_path)
    found = sorted(tmp_path.iterdir())
    other = Kit(**given)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    torch.manual_seed(1)
    random_state = torch.get_rng_state()
    with pytest.raises(HybridMagicError) as caught:
        other.train(seed=None, checkpoint=tmp_path, resume=True)
    message = str(caught.value)
    assert words in message
    assert message.startswith(f"checkpoint={str(tmp_path)!r}: ")
    assert "; wanted " in message
    assert message.endswith("; give another folder, or what that run was given")
    assert "\n" not in message
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    assert not other.optimizer.state
    assert torch.equal(torch.get_rng_state(), random_state)
    assert sorted(tmp_path.iterdir()) == found


def test_checkpoints_are_not_written_over_unasked(tmp_path):
    Kit().train(3, checkpoint=tmp_path)
    with pytest.raises(HybridMagicError) as caught:
        Kit().train(checkpoint=tmp_path)
    assert str(caught.value) == (
        f"checkpoint={str(tmp_path)!r} holds the checkpoints of a run at step 3, which "
        "would be written over; wanted an empty folder; add --resume to go on from them, or give "
        "another folder"
    )


def test_what_another_version_wrote_is_refused(tmp_path, monkeypatch):
    Kit().train(3, checkpoint=tmp_path)
    monkeypatch.setattr(keeper.resume, "CONTENT", 3)
    with pytest.raises(HybridMagicError, match="another version of hybrid_magic wrote; wanted"):
        Kit().train(checkpoint=tmp_path, resume=True)


class Bare:
    """A scheduler that cannot be kept."""

    interval = "batch"

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.param_groups[0]["lr"] *= 0.9


def test_what_no_checkpoint_can_hold_is_told_before_training(tmp_path):
    with pytest.raises(HybridMagicError, match=r"a Bare, has no state_dict\(\); wanted"):
        Kit(scheduler=Bare).train(checkpoint=tmp_path)
    made = Kit()
    made.train()
    with pytest.raises(ConfigError, match="and a run to replay"):
        Kit().train(checkpoint=tmp_path, replay=hm.last_run)
    assert not list(tmp_path.iterdir())


def test_other_options_are_said_and_those_that_come_too_late_passed_over(tmp_path):
    Kit().train(3, checkpoint=tmp_path)
    run = Kit(options={"seed": 8}).train(checkpoint=tmp_path, resume=True, micro=4, clip=1.0)
    assert (
        "goes on with other options than before: --micro auto -> 4, --clip None -> 1.0" in run.notes
    )
    assert "--seed 8 is passed over: the run goes on with its own random numbers" in run.notes
    assert "its batch is steered anew, from the loader's own" in run.notes
    assert {record.microbatch_size for record in run.history[3:]} == {4}
    assert run.samples_seen == EPOCHS * SAMPLES


def test_a_folder_that_is_in_use_or_a_file_is_refused_and_nothing_is_changed(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HybridMagicError, match="is a file; wanted a folder"):
        Kit().train(checkpoint=tmp_path / "file")
    store = keeper.Store(tmp_path / "used")
    store.check(1)
    made = Kit()
    try:
        with pytest.raises(HybridMagicError, match="is being written by a run in this process"):
            made.train(checkpoint=tmp_path / "used")
    finally:
        store.close()
    assert not made.optimizer.state


def test_a_disk_that_is_full_is_told_once_and_training_goes_on(tmp_path, monkeypatch):
    from hybrid_magic.engine import checkpoint_store

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_store, "write", full)
    whole, told = Kit(), Kit()
    whole.train()
    run = told.train(checkpoint=tmp_path)
    assert len([note for note in run.notes if "was not written" in note]) == 1
    assert differences(whole.model, told.model) == []
    assert run.outcome == "finished"


def test_checkpoints_change_nothing(tmp_path, monkeypatch, on):
    monkeypatch.setattr(keeper, "EVERY_S", 0.0)
    on(SteadyProbe(late=True))
    given = {"model": mlp, "samples": 80, "options": {"batch": "adaptive"}, "val": True}
    without, with_them = Kit(**given), Kit(**given)
    expected = without.train()
    assert equal(facts(with_them.train(checkpoint=tmp_path)), facts(expected))
    assert differences(without.model, with_them.model) == []


# -- the kernel is killed --

CHILD = """
import pathlib, sys
sys.path[:0] = [{here!r}]
import torch
import test_resume
from hybrid_magic.engine import keeper

keeper.EVERY_S = 0.0
test_resume.child(sys.argv[1], sys.argv[2], sys.argv[3])
"""

WORKS: dict[str, dict[str, Any]] = {
    "cnn": {"val": True, "scheduler": one_cycle},
    "workers": {"workers": 2, "optimizer": momentum},
    "goodput": {"model": mlp, "samples": 400, "options": {"batch": "adaptive"}},
    "stability": {
        "model": mlp, "samples": 400, "data": TensorDataset,
        "options": {"batch": "adaptive", "policy": "stability"},
    },
}  # fmt: skip


def child(work: str, folder: str, out: str) -> None:
    """Train in a process of its own and leave the weights in `out`."""
    from hybrid_magic.engine import train as training

    training.probe_for = lambda device: SteadyProbe()
    keeper.EVERY_S = 0.0
    kit = Kit(**WORKS[work])
    run = kit.train(seed=5, **({} if folder == "-" else {"checkpoint": folder, "resume": True}))
    torch.save([run.steps, kit.model.state_dict()], out + ".part")
    os.replace(out + ".part", out)


def forked(work: str, folder: str, out: str, kill_after_s: float | None = None) -> bool:
    """Run `child` in a fork; kill it after a while. Return whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            child(work, folder, out)
            code = 0
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.killpg(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == 0


def check_killed(tmp_path: pathlib.Path, work: str, kills: list[float]) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    began = time.perf_counter()
    assert forked(work, "-", str(whole))
    length = time.perf_counter() - began
    steps, weights = torch.load(whole)
    for number, share in enumerate(kills):
        folder = str(tmp_path / f"{number}")
        out.unlink(missing_ok=True)
        forked(work, folder, str(out), 0.05 + share * length)
        assert forked(work, folder, str(out))
        found_steps, found = torch.load(out)
        assert found_steps == steps
        assert all(torch.equal(value, found[name]) for name, value in weights.items()), share


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("work", ["cnn"])
def test_killed_at_a_random_moment_it_goes_on_from_the_last_whole_checkpoint(work, tmp_path):
    check_killed(tmp_path, work, [random.Random().uniform(0.1, 1.5) for _ in range(2)])


@pytest.mark.thorough
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("work", WORKS)
def test_killed_at_many_random_moments(work, tmp_path):
    check_killed(tmp_path, work, [random.Random(n).uniform(0.0, 2.0) for n in range(25)])


@pytest.mark.thorough
def test_a_new_process_goes_on(tmp_path):
    program = CHILD.format(here=str(pathlib.Path(__file__).parent))
    args = [sys.executable, "-c", program, "cnn"]
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([*args, "-", str(tmp_path / "whole")], check=True, cwd=root)
    Kit(**WORKS["cnn"]).train(STEPS + 3, checkpoint=tmp_path / "runs")
    subprocess.run([*args, str(tmp_path / "runs"), str(tmp_path / "out")], check=True, cwd=root)
    (_, one), (_, other) = torch.load(tmp_path / "whole"), torch.load(tmp_path / "out")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# -- a loop of the person's own --


class Loop:
    """What a cell with a loop of its own does, as it was rewritten."""

    def __init__(self, folder: Any = None, *, resume: bool = False, **given: Any) -> None:
        self.kit = Kit(**given)
        options = {"precision": "fp32", "batch": "fixed"} | given.get("options", {})
        if folder is not None:
            options |= {"checkpoint": str(folder), "resume": resume}
        self.control = RunControl()
        seed_everything(99 if resume else 5)
        self.session = Session(
            self.kit.model, self.kit.optimizer, TrainConfig(**options), loader=self.kit.loader,
            control=self.control,
        )  # fmt: skip
        optimizer = self.kit.optimizer
        self.per_batch = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, 3 * STEPS)
        self.per_epoch = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        self.bodies = 0

    def run(self, *, stop: int = -1, interrupt: int = -1, every: int = 1) -> hm.Run:
        session, kit = self.session, self.kit
        try:
            for _ in range(EPOCHS):
                kit.model.train()
                session.begin_pass()
                whole = False
                try:
                    for number, batch in enumerate(session.batches(kit.loader)):
                        self.bodies += 1
                        self._body(batch, steps=(number + 1) % every == 0)
                        if self.bodies == stop:
                            self.control.ask("stop")
                        if self.bodies == interrupt:
                            os.kill(os.getpid(), signal.SIGINT)
                    whole = True
                finally:
                    session.end_pass(whole=whole)
                if session.over:
                    break
                self.per_epoch.step()
                torch.rand(3)  # an evaluation draws
            return session.close()
        except BaseException as error:
            session.close(error)
            raise

    def _body(self, batch: Any, *, steps: bool) -> None:
        def work(values: dict[str, Any]) -> Any:
            return F.cross_entropy(self.kit.model(values["x"]), values["y"]), {}

        self.session.accumulate(work, {"x": batch[0], "y": batch[1]})
        if steps:
            self.session.apply()
            self.kit.optimizer.zero_grad()
            self.session.advance(self.per_batch)


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": momentum},
        {"data": TensorDataset, "generator": True, "options": {"micro": 3}},
        pytest.param({"workers": 2, "optimizer": momentum}, marks=pytest.mark.thorough),
    ],
    ids=["augmented", "generator", "workers"],
)
def test_a_loop_of_ones_own_goes_on_where_it_was(given, tmp_path):
    whole = Loop(**given)
    expected = whole.run()
    for bodies in (STEPS - 1, STEPS, EPOCHS * STEPS):
        place = tmp_path / f"{bodies}"
        with pytest.raises(KeyboardInterrupt):
            Loop(place, **given).run(interrupt=bodies)
        resumed = Loop(place, resume=True, **given)
        run = resumed.run()
        assert resumed.bodies == EPOCHS * STEPS - bodies
        assert differences(whole.kit.model, resumed.kit.model) == [], bodies
        assert equal(facts(run), facts(expected)), bodies
        assert (run.outcome, run.steps) == ("finished", expected.steps)
        assert resumed.per_batch.state_dict() == whole.per_batch.state_dict() or not resumed.bodies


def test_behind_a_whole_pass_what_stands_around_the_loop_runs_as_it_did(tmp_path):
    given = {"data": Augmented, "optimizer": momentum}
    whole = Loop(**given)
    whole.run()
    Loop(tmp_path, **given).run()
    os.unlink(max(tmp_path.glob("*.pt")))
    resumed = Loop(tmp_path, resume=True, **given)
    run = resumed.run()
    assert resumed.bodies == STEPS
    assert differences(whole.kit.model, resumed.kit.model) == []
    assert any("does not run for the 2 passes that were whole" in note for note in run.notes)


def test_a_loop_that_was_stopped_or_accumulates_by_hand_goes_on_at_a_step(tmp_path):
    given = {"data": Augmented, "optimizer": momentum, "samples": 64}
    whole = Loop(**given)
    whole.run(every=2)
    for stop in (4, 5):
        assert Loop(tmp_path / f"{stop}", **given).run(stop=stop, every=2).outcome == "stopped"
        resumed = Loop(tmp_path / f"{stop}", resume=True, **given)
        resumed.run(every=2)
        assert differences(whole.kit.model, resumed.kit.model) == []


def test_a_loop_whose_place_in_the_data_cannot_be_found_is_refused(tmp_path):
    with pytest.raises(HybridMagicError, match="this loop reads no DataLoader whose samples have "):
        Loop(tmp_path, data=Stream)
    loop = Loop(tmp_path)
    with pytest.raises(HybridMagicError, match="this loop trains on a second loader; wanted one"):
        next(loop.session.batches([1]))
    loop.session.close()
    Kit().train(3, checkpoint=tmp_path / "step")
    with pytest.raises(HybridMagicError, match="its run was a step, and this is a loop; wanted"):
        Loop(tmp_path / "step", resume=True)
    Loop(tmp_path)  # a session that was closed has let the folder go
