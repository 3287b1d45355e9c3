"""A run that is gone on with: where an interrupt struck, what its loader, its model and its
schedulers keep by themselves, and what it costs."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain import differences, mlp, vectors
from test_ablate import Seen
from test_resume import STEPS, Kit, Loop, SteadyProbe, check_resumes, momentum
from torch import nn
from torch.optim.lr_scheduler import LinearLR, StepLR
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

import hybrid_magic as hm
from hybrid_magic.config import TrainConfig
from hybrid_magic.engine import checkpoint, checkpoint_store, keeper, resume, rewind
from hybrid_magic.engine.checkpoint_store import Store
from hybrid_magic.engine.drawing import Drawing, generators_of
from hybrid_magic.engine.prefetch import Mover
from hybrid_magic.engine.session import Session
from hybrid_magic.errors import HybridMagicError
from hybrid_magic.launch import results
from hybrid_magic.run import Run

N = 60  # samples, in batches of 8


class Pressed:
    """A step that draws, and in its calls of some numbers presses Ctrl-C once."""

    def __init__(self, *at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, model: Any, batch: Any) -> Any:
        self.calls += 1
        if self.calls in self.at:
            os.kill(os.getpid(), signal.SIGINT)
        x, y = batch
        return F.cross_entropy(model(x) + 0.01 * torch.randn(1), y)


FIXED = {"micro": 8}


def pressed(folder: pathlib.Path, *at: int, more: Any = None, **given: Any) -> int:
    """Train until Ctrl-C in the step's calls `at`; return the steps that were whole."""
    with pytest.raises(KeyboardInterrupt):
        Kit(step=Pressed(*at), options=FIXED, **given).train(checkpoint=folder, **(more or {}))
    assert hm.last_run.outcome == "interrupted"
    return hm.last_run.steps


def same_end(folder: pathlib.Path, **given: Any) -> bool:
    whole, resumed = (Kit(step=Pressed(), options=FIXED, **given) for _ in range(2))
    whole.train()
    resumed.train(seed=99, checkpoint=folder, resume=True)
    return differences(whole.model, resumed.model) == []


@pytest.mark.parametrize(
    "given",
    [{}, {"data": TensorDataset, "generator": True}, {"data": TensorDataset}],
    ids=["dataset draws", "own generator", "model draws"],
)
def test_one_interrupt_inside_a_step_is_gone_on_from(given, tmp_path):
    assert pressed(tmp_path, 8, **given) > 2
    assert same_end(tmp_path, **given)


@pytest.mark.parametrize(
    "given", [{"data": TensorDataset}, {}], ids=["model draws", "dataset draws"]
)
def test_two_interrupts_in_one_epoch_are_gone_on_from(given, tmp_path):
    first = pressed(tmp_path, 5, **given)
    assert first < pressed(tmp_path, 2, more={"resume": True, "seed": 99}, **given) < STEPS
    assert same_end(tmp_path, **given)


def test_an_interrupt_some_steps_behind_a_checkpoint_is_gone_on_from(tmp_path, monkeypatch):
    before = keeper.Keeper.before_step

    def at_step_two(self: Any, now: float) -> None:
        self._due = 0.0 if self._state.step == 2 else float("inf")
        before(self, now)

    monkeypatch.setattr(keeper.Keeper, "before_step", at_step_two)
    assert pressed(tmp_path, 8, data=TensorDataset) > 3
    assert same_end(tmp_path, data=TensorDataset)


# -- what can be read only once --


@pytest.mark.parametrize("at", [5, 8], ids=["in the midst", "in the last step"])
def test_what_can_be_read_only_once_goes_on_behind_what_was_trained(at, tmp_path):
    x, y = vectors(64)
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]

    def trained(*at: int, **options: Any) -> nn.Module:
        model = mlp()
        hm.train(
            model, iter(batches), Pressed(*at), batch="fixed", micro=8, precision="fp32", seed=1,
            **options,
        )  # fmt: skip
        return model

    with pytest.raises(KeyboardInterrupt):
        trained(at, checkpoint=tmp_path)
    left = 8 - hm.last_run.steps
    assert left == (3 if at == 5 else 0)
    resumed = trained(checkpoint=tmp_path, resume=True)
    assert hm.last_run.samples_seen == 64
    assert differences(trained(), resumed) == []


# -- what the loader keeps by itself --


class Drawn(Sampler[int]):
    """Orders by a generator of its own, as it goes."""

    def __init__(self, make: Callable[[], Any] = lambda: np.random.default_rng(0)) -> None:
        self.rng = make()

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        left = list(range(N))
        while left:
            yield left.pop(self._number() % len(left))

    def _number(self) -> int:
        if isinstance(self.rng, torch.Generator):
            return int(torch.randint(2**30, (), generator=self.rng))
        if isinstance(self.rng, np.random.Generator):
            return int(self.rng.integers(2**30))
        return int(self.rng.random() * 2**30) if hasattr(self.rng, "gauss") else self._old()

    def _old(self) -> int:
        return int(self.rng.randint(2**30))


class Counting(Sampler[int]):
    """Another order in each epoch, which it counts by itself."""

    epoch = 0

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        yield from torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).tolist()


class Telling(Counting):
    """Its count is told by its state, as is how far it came: at an epoch's end it has nothing."""

    epoch = None
    passes = at = 0
    goes_on = None

    def __iter__(self) -> Iterator[int]:
        found, self.goes_on = self.goes_on, None
        self.passes, self.at = (self.passes + 1, 0) if found is None else found
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.passes)).tolist()
        for index in order[self.at :]:
            self.at += 1
            yield index

    def state_dict(self) -> Any:
        return {"passes": self.passes, "at": self.at}

    def load_state_dict(self, state: Any) -> None:
        self.goes_on = None if state["passes"] == 0 else (state["passes"], state["at"])
        self.passes = state["passes"]


class Silent(Counting):
    """Keeps what nobody can know of."""

    epoch = None
    count = 0

    def __iter__(self) -> Iterator[int]:
        self.count += 1
        yield from torch.randperm(N, generator=torch.Generator().manual_seed(self.count)).tolist()


class Noisy(Dataset[Any]):
    """Augments with a generator of its own."""

    def __init__(self, rng: Any) -> None:
        self.rng, (self.x, self.y) = rng, vectors(N)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.3 * float(self.rng.random()), self.y[index]


class Flips:
    def __init__(self) -> None:
        self.rng = random.Random(3)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return -x if self.rng.random() < 0.5 else x


class Flipped(TensorDataset):
    """Has a transform that draws."""

    def __init__(self) -> None:
        super().__init__(*vectors(N))
        self.transform = Flips()

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return self.transform(x), y


def loader_of(sampler: Any = None, dataset: Any = None) -> DataLoader[Any]:
    return DataLoader(dataset or TensorDataset(*vectors(N)), batch_size=8, sampler=sampler)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "sampler, NumPy": lambda: loader_of(Drawn()),
    "sampler, old NumPy": lambda: loader_of(Drawn(lambda: np.random.RandomState(1))),
    "sampler, Python": lambda: loader_of(Drawn(lambda: random.Random(2))),
    "sampler, torch": lambda: loader_of(Drawn(torch.Generator)),
    "sampler, epoch": lambda: loader_of(Counting()),
    "sampler, state_dict": lambda: loader_of(Telling()),
    "dataset": lambda: loader_of(dataset=Noisy(np.random.default_rng(1))),
    "subset": lambda: loader_of(dataset=Subset(Noisy(random.Random(1)), range(N))),
    "transform": lambda: loader_of(dataset=Flipped()),
    "batches": lambda: DataLoader(
        Noisy(np.random.default_rng(1)), batch_sampler=[[1, 2, 3], [4], [5, 6]] * 5
    ),
}


def trained(make: Callable[[], Any], **options: Any) -> nn.Module:
    model = mlp()
    hm.train(model, make(), batch="fixed", precision="fp32", seed=1, **options)
    return model


@pytest.mark.parametrize("case", LOADERS)
@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_what_a_loader_keeps_by_itself_goes_on(case, ahead, tmp_path, on):
    if ahead:  # as on a GPU
        on(SteadyProbe(), Mover(torch.device("cpu")))
    whole = trained(LOADERS[case], epochs=3)
    for steps in (11, 16):
        trained(LOADERS[case], steps=steps, checkpoint=tmp_path / f"{steps}")
        resumed = trained(LOADERS[case], epochs=3, checkpoint=tmp_path / f"{steps}", resume=True)
        assert differences(whole, resumed) == [], steps
        assert not [note for note in hm.last_run.notes if "in no checkpoint" in note]


def test_of_a_sampler_that_nobody_can_see_into_the_notes_tell(tmp_path):
    told = (
        "what Silent, the loader's sampler, keeps by itself is in no checkpoint: the order of "
        "an epoch that is gone on with may be another one; to keep it, give it state_dict() "
        "and load_state_dict(), or have it draw from a torch.Generator that it holds"
    )
    trained(lambda: loader_of(Silent()), steps=11, checkpoint=tmp_path)
    assert hm.last_run.notes.count(told) == 1
    trained(lambda: loader_of(Silent()), epochs=3, checkpoint=tmp_path, resume=True)
    assert hm.last_run.notes.count(told) == 1
    trained(lambda: loader_of(Silent()), steps=2)
    assert told not in hm.last_run.notes


def test_another_kind_of_generator_or_sampler_is_refused(tmp_path):
    trained(LOADERS["sampler, NumPy"], steps=3, checkpoint=tmp_path)
    for case, kind in (("sampler, Python", "Random"), ("sampler, torch", "Generator")):
        with pytest.raises(HybridMagicError) as caught:
            trained(LOADERS[case], epochs=3, checkpoint=tmp_path, resume=True)
        assert f"its loader drew from ['PCG64'], and here ['{kind}']; wanted the same" in str(
            caught.value
        )


@pytest.mark.parametrize(
    "make",
    [
        *(
            lambda kind=kind: np.random.Generator(kind(7))
            for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64)
        ),
        lambda: np.random.RandomState(7),
        lambda: random.Random(7),
        lambda: torch.Generator().manual_seed(7),
    ],
)
def test_every_kind_of_generator_comes_back_from_a_file(make, tmp_path):
    sampler = Drawn(make)
    drawing, store = Drawing(loader_of(sampler)), Store(tmp_path)
    sampler._number()
    store.check(1000)
    store.save({"states": drawing.now()}, step=1)
    store.close()
    expected = [sampler._number() for _ in range(5)]
    found = Store(tmp_path).newest()
    assert found is not None
    drawing.put_back(found.tree["states"])
    assert [sampler._number() for _ in range(5)] == expected
    for _ in range(2):
        generators_of(loader_of(sampler))[0].manual_seed(3)
        seeded, expected = expected, [sampler._number() for _ in range(5)]
    assert seeded == expected


def test_every_variant_of_an_ablation_draws_the_same_from_what_the_loader_holds():
    dataset, sampler, seen = Noisy(np.random.default_rng(1)), Counting(), Seen()
    before = dataset.rng.bit_generator.state
    hm.ablate(
        mlp(), loader_of(sampler, dataset), seen.step, variants=["fp32", "ga"], precision="fp32",
        sink=seen.sink,
    )  # fmt: skip
    one, other = map(torch.cat, seen.runs[-2:])
    assert torch.equal(one, other)
    assert dataset.rng.bit_generator.state == before
    assert sampler.epoch == 0


# -- what the model keeps beside its tensors --


class Counted(nn.Module):
    """Its output rests on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = mlp(), 0

    def get_extra_state(self) -> Any:
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Any) -> None:
        self.calls = int(state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return self.inner(x) * min(1.0, self.calls / 20)


class Lazy(nn.Module):
    """Makes a buffer in its first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("mask", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            self.mask = torch.rand(x.shape[1])
        return self.inner(x * self.mask)


class Expanded(nn.Module):
    """Has a buffer whose elements share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("scale", torch.full((1, 12), 2.0).expand(64, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.scale[: len(x)])


@pytest.mark.parametrize("model", [Counted, Lazy, Expanded])
def test_what_a_model_keeps_beside_its_weights_goes_on(model, tmp_path):
    check_resumes(
        tmp_path,
        [2, STEPS + 3],
        model=lambda: model(),
        data=TensorDataset,
        step=_flat,
        options=FIXED,
    )


def _flat(model: Any, batch: Any) -> Any:
    return F.cross_entropy(model(batch[0].flatten(1)[:, :12]), batch[1])


@pytest.mark.parametrize("model", [Counted, Lazy, Expanded])
def test_what_a_model_keeps_comes_back_from_worker_processes_too(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_magic.run.last_run", None)
    there, here = ({"model": model(), "optimizer": None, "scheduler": None, "loader": []}
                   for _ in range(2))  # fmt: skip
    x, _ = vectors(8)
    there["model"](x)
    held = there["model"].state_dict()
    if model is Expanded:
        there["model"].scale = torch.full((1, 12), 3.0).expand(64, -1)
    results.write(str(tmp_path), there, Run(config={}, environment={}))
    results.put_back(str(tmp_path), here)
    found = here["model"].state_dict()
    assert found.keys() == held.keys()
    assert torch.equal(here["model"].eval()(x), there["model"].eval()(x))
    if model is Expanded:
        assert here["model"].scale.stride() == (0, 1)


def test_an_expanded_buffer_that_a_model_made_anew_as_it_went_on_comes_back(tmp_path):
    there, here = Expanded(), Expanded()
    there.scale = torch.rand(64, 12)
    for each in (there, here):
        each.given = {"model": each, "optimizer": None, "scheduler": None, "loader": []}
    results.write(str(tmp_path), there.__dict__.pop("given"), Run(config={}, environment={}))
    results.put_back(str(tmp_path), here.__dict__.pop("given"))
    assert torch.equal(here.scale, there.scale)


def test_a_model_with_an_expanded_buffer_can_be_rewound():
    model = Expanded()
    put_back = rewind.beginning([model], torch.device("cpu"))
    scale = model.scale
    scale[0, 0] = 5.0
    model.scale = torch.zeros(1)
    put_back()
    assert model.scale is scale
    assert (scale == 2.0).all()


def test_a_state_that_no_checkpoint_can_hold_is_told_before_training(tmp_path):
    class Odd(Counted):
        def get_extra_state(self) -> Any:
            return object()

    with pytest.raises(HybridMagicError, match=r"\['extra'\]\[''\] is a object; wanted numbers"):
        Kit(model=lambda: Odd(), data=TensorDataset, step=_flat).train(checkpoint=tmp_path)


def test_a_checkpoint_of_the_content_before_this_one_is_gone_on_from(tmp_path, monkeypatch):
    save = Store.save

    def as_before(self: Any, tree: Any, *, step: int) -> None:
        tree = tree | {"content": 1}
        tree["model"] = {key: value for key, value in tree["model"].items() if key != "extra"}
        tree["data"] = {key: value for key, value in tree["data"].items() if key != "drawn"}
        for name in ("start", "random", "opening"):
            if name in tree:
                tree[name] = {k: v for k, v in tree[name].items() if k != "places"}
        if "schedulers" in tree:
            tree["schedulers"] = [state for _, state in tree["schedulers"]]
        save(self, tree, step=step)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "save", as_before)
        check_resumes(tmp_path / "step", [STEPS + 3], data=TensorDataset)
        with pytest.raises(KeyboardInterrupt):
            Loop(tmp_path / "loop", optimizer=momentum).run(interrupt=STEPS - 1)
    assert _loops_alike(tmp_path / "loop", optimizer=momentum)
    with monkeypatch.context() as patched:
        patched.setattr(Store, "save", as_before)
        Kit(model=lambda: Counted(), step=_flat).train(3, checkpoint=tmp_path / "extra")
    with pytest.raises(HybridMagicError, match="of the states of modules it has none called "):
        Kit(model=lambda: Counted(), step=_flat).train(checkpoint=tmp_path / "extra", resume=True)


# -- a loop of the person's own --


def _loops_alike(folder: pathlib.Path, **given: Any) -> bool:
    whole = Loop(**given)
    whole.run()
    resumed = Loop(folder, resume=True, **given)
    resumed.run()
    return differences(whole.kit.model, resumed.kit.model) == []


def loop(folder: Any = None, *, stop: int = -1, **given: Any) -> tuple[nn.Module, list[float]]:
    """Train two passes with one scheduler for the first five steps, and another behind them."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warm, later = LinearLR(optimizer, 0.1, 1.0, total_iters=5), StepLR(optimizer, 4, 0.5)
    loader = DataLoader(TensorDataset(*vectors(N)), batch_size=8)
    options: Any = {"batch": "fixed", "micro": 8, "precision": "fp32"}
    if folder is not None:
        options |= {"checkpoint": str(folder), "resume": given.pop("resume", False)}
    session = Session(model, optimizer, TrainConfig(**options), loader=loader, **given)
    rates: list[float] = []
    try:
        for _ in range(2):
            session.begin_pass()
            for batch in session.batches(loader):

                def work(values: dict[str, Any]) -> Any:
                    return F.cross_entropy(model(values["x"]), values["y"]), {}

                optimizer.zero_grad()
                session.accumulate(work, {"x": batch[0], "y": batch[1]})
                session.apply()
                session.advance(warm if session.steps <= 5 else later)
                rates.append(optimizer.param_groups[0]["lr"])
                if session.steps == stop:
                    os.kill(os.getpid(), signal.SIGINT)
            session.end_pass()
        session.close()
    except BaseException as error:
        session.close(error)
        raise
    return model, rates


def test_schedulers_that_are_met_in_another_order_keep_their_own_states(tmp_path):
    whole, rates = loop()
    for stop, resumes in ((2, False), (6, True), (10, True), (11, True)):
        with pytest.raises(KeyboardInterrupt):
            loop(tmp_path, stop=stop, resume=resumes)
    resumed, last = loop(tmp_path, resume=True)
    assert last == rates[11:]
    assert differences(whole, resumed) == []
    kept = Store(tmp_path).newest()
    assert kept is not None
    assert [kind for kind, _ in kept.tree["schedulers"]] == ["StepLR", "LinearLR"]


@pytest.mark.parametrize("before", [None, {"enabled": False}], ids=["none", "disabled"])
def test_a_loss_scale_that_was_added_begins_anew(before, tmp_path):
    scaler = None if before is None else torch.amp.GradScaler("cpu", **before)
    given = {} if before is None else {"scaler": scaler, "own_precision": True}
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path, stop=3, **given)
    added = torch.amp.GradScaler("cpu", init_scale=8.0)
    loop(tmp_path, resume=True, scaler=added, own_precision=True)
    assert hm.last_run.outcome == "finished"
    assert added.get_scale() == 8.0


def test_a_loop_that_fails_to_go_on_lets_the_folder_go(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path, stop=3)
    with monkeypatch.context() as patched:
        patched.setattr(resume, "moved", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop(tmp_path, resume=True)
    loop(tmp_path, resume=True)
    assert hm.last_run.outcome == "finished"


# -- what it costs --


class SlowDisk:
    """Writes the checkpoint of step 2 when it is told to; meanwhile Ctrl-C is pressed as often as
    something waits for that. The model is so large that no second copy is made."""

    def __init__(
        self, presses: int, monkeypatch: pytest.MonkeyPatch, *, last: bool = False
    ) -> None:
        """`last`: of those that time takes."""
        self.presses, self.ignored, self._newest = presses, 0, -1
        self.last, self._patched, self.early = last, monkeypatch, False
        self._told, self._write = threading.Event(), checkpoint_store.write
        self._save, self._until = Store.save, Store._until
        monkeypatch.setattr(checkpoint_store, "SECOND_COPY_BYTES", 0)
        monkeypatch.setattr(checkpoint_store, "write", self.write)
        monkeypatch.setattr(Store, "save", lambda *args, **named: self.save(*args, **named))
        monkeypatch.setattr(Store, "_until", lambda *args: self.until(*args))
        monkeypatch.setattr(keeper, "EVERY_S", 0.0)

    def save(self, store: Store, tree: Any, *, step: int) -> None:
        if self.early and self._newest == 2:
            self.early = False
            self.press()
        self._save(store, tree, step=step)
        while store._job is not None:  # the next one would replace it
            time.sleep(0.0001)
        self._newest = step
        if step == 2 and self.last:
            self._patched.setattr(keeper, "EVERY_S", float("inf"))

    def write(self, path: Any, tree: Any, label: Any, moved: Callable[[], None]) -> None:
        while label.step == 2 and not self._told.wait(0.005):
            moved()
        self._write(path, tree, label, moved)

    def press(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            time.sleep(0.0001)

    def until(self, store: Store, done: Callable[[], bool]) -> bool:
        if self._newest == 2 and not done():
            if self.presses:
                self.presses -= 1
                self.press()
                self.ignored += 1
            if not store._stop:
                self._told.set()
        return self._until(store, done)


def steps_in(folder: pathlib.Path) -> list[int]:
    return [int(path.stem.partition("-")[2]) for path in sorted(folder.glob("*.pt"))]


@pytest.mark.parametrize(("presses", "kept"), [(0, [1, 2, 3]), (1, [1, 2, 3]), (2, [0, 1])])
def test_ctrl_c_is_answered_while_a_large_checkpoint_waits(presses, kept, tmp_path, monkeypatch):
    given = {"data": TensorDataset, "step": Pressed(), "options": FIXED}
    with monkeypatch.context() as patched:
        disk = SlowDisk(presses, patched)
        disk.early = presses == 0  # pressed a moment before the waiting begins
        with pytest.raises(KeyboardInterrupt):
            Kit(**given).train(checkpoint=tmp_path)
    assert (disk.presses, disk.ignored) == (0, 0)
    assert (hm.last_run.outcome, hm.last_run.steps) == ("interrupted", 3)
    assert steps_in(tmp_path) == kept
    left_out = "the checkpoint of step 3 was left out: interrupted"
    assert (left_out in hm.last_run.notes) == (presses == 2)
    assert same_end(tmp_path, data=TensorDataset)


@pytest.mark.parametrize(("presses", "kept"), [(1, [1, 2, 3]), (2, [0, 1])])
@pytest.mark.parametrize("last", [False, True], ids=["between two batches", "behind the pass"])
def test_ctrl_c_is_answered_in_a_loop_too(presses, kept, last, tmp_path, monkeypatch):
    given = {"data": TensorDataset, "samples": 24, "optimizer": momentum}  # three steps a pass
    with monkeypatch.context() as patched:
        disk = SlowDisk(presses, patched, last=last)
        with pytest.raises(KeyboardInterrupt):
            Loop(tmp_path, **given).run()
    assert (disk.presses, disk.ignored) == (0, 0)
    assert steps_in(tmp_path) == kept[-len(steps_in(tmp_path)) :]
    assert max(steps_in(tmp_path)) == kept[-1]
    assert _loops_alike(tmp_path, **given)


@pytest.mark.parametrize("form", ["step", "loop"])
def test_a_resumed_run_does_not_hold_the_checkpoint_that_it_goes_on_from(
    form, tmp_path, monkeypatch
):
    loaded: list[Any] = []
    find = resume.find

    def found(*args: Any) -> Any:
        tree, notes = find(*args)
        loaded.extend(map(weakref.ref, tree["model"]["parameters"].values()))
        return tree, notes

    alive: list[int] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            alive.append(sum(each() is not None for each in loaded))
            return self.inner(x.flatten(1)[:, :12])

    given = {"model": lambda: Watched(), "data": TensorDataset, "step": _flat,
             "options": FIXED}  # fmt: skip
    if form == "step":
        Kit(**given).train(3, checkpoint=tmp_path)
        monkeypatch.setattr(resume, "find", found)
        Kit(**given).train(checkpoint=tmp_path, resume=True)
    else:
        with pytest.raises(KeyboardInterrupt):
            Loop(tmp_path, **given).run(interrupt=3)
        monkeypatch.setattr(resume, "find", found)
        Loop(tmp_path, resume=True, **given).run()
    assert loaded
    assert alive[-1] == 0
    assert alive[len(alive) // 4] == 0


def test_what_an_optimizer_keeps_lies_as_its_weights_do_where_it_comes_back() -> None:
    def stepped(memory_format: Any) -> tuple[nn.Module, Any]:
        model = nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
        return model, optimizer

    _, saved = stepped(torch.channels_last)
    model, optimizer = stepped(torch.contiguous_format)
    checkpoint._put_optimizer_back(saved.state_dict(), optimizer)
    for name in ("exp_avg", "exp_avg_sq"):
        value = optimizer.state[model.weight][name]
        assert value.stride() == model.weight.stride()
        assert torch.equal(value, saved.state[saved.param_groups[0]["params"][0]][name])
