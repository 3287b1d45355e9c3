"""P4: whatever ends a run, and wherever, the model is at a whole step and nothing is left over."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any

import pytest
import torch
from faults import Odd, everything, seed, step_by_hand, unequal
from plain import mlp, vectors
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import hybrid_magic as hm
from hybrid_magic.config import TrainConfig
from hybrid_magic.engine.control import RunControl
from hybrid_magic.engine.session import Session
from hybrid_magic.engine.undo import Undo

HOUSE = str(pathlib.Path(hm.__file__).parent)
WATCHED = (HOUSE, str(pathlib.Path(torch.optim.__file__).parent))
SCHEDULERS = "lr_scheduler.py"
HELD = {"_count", "end_epoch"}  # the functions in which no signal strikes
STEPS = 3

# An interrupt between a file's opening and its `with` leaves it to the collector to close.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _little_to_look_through() -> Iterator[None]:
    """Every exit collects what it left; what is there before is not looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


class Samples(Dataset[Any]):
    """A person's data set, read in the main process; `trap` is called with every index."""

    def __init__(self, n: int) -> None:
        self.x, self.y = vectors(n)
        self.trap: Any = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        if self.trap is not None:
            self.trap(index)
        return self.x[index], self.y[index]


def my_step(model: Any, batch: Any) -> Any:
    x, y = batch
    scores = model(x)
    loss = torch.nn.functional.cross_entropy(scores, y)
    hits = scores.argmax(1) == y
    return loss, {"acc": hits.float().mean()}


class Scene:
    """A small training run, and what a plain loop has after each of its steps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.val: Any = DataLoader(Samples(3), batch_size=2)
        self.plain = [self._by_hand(steps) for steps in range(STEPS + 1)]
        self.fresh()

    def fresh(self) -> None:
        """Start anew."""
        seed(5)
        inner: Any = mlp()
        inner[3].eval()  # as the person left it
        self.first = inner[0]
        self.model = inner if self.name == "adamw" else Odd(inner, always=False)
        if self.name == "adamw":
            self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 0.02, total_steps=10
        )
        self.loader: Any = DataLoader(Samples(4 * STEPS), batch_size=4)
        seed(6)

    def _by_hand(self, steps: int) -> dict[str, Any]:
        self.fresh()
        scaler = torch.amp.GradScaler("cpu") if self.name != "adamw" else None
        model = self.model
        for batch in list(self.loader)[:steps]:
            step_by_hand(model, self.optimizer, batch, [2, 2], scaler=scaler)
            self.scheduler.step()
        return everything(model, self.optimizer)

    def train(self, **options: Any) -> Any:
        return hm.train(
            self.model,
            self.loader,
            my_step,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            batch="fixed",
            micro=2,
            precision="fp32" if self.name == "adamw" else "fp16",
            **options,
        )


# -- strikes --


class Tracer:
    """Does `strike` when a watched line runs for the `occurrence`th time; notes all the lines."""

    def __init__(
        self, line: tuple[str, int] | None = None, occurrence: int = 1, strike: Any = None
    ) -> None:
        self.line, self.left, self.strike = line, occurrence, strike
        self.lines: dict[tuple[str, int], int] = {}
        self.function: str | None = None  # how its name starts; any of its lines will do
        self.within: set[str] = set()  # the functions that ran when it struck
        self.then: tuple[int, Any] | None = None  # lines to go, and what is then done

    def __enter__(self) -> Tracer:
        sys.settrace(self.enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def enter(self, frame: Any, event: str, arg: Any) -> Any:
        return self.trace if _watched(frame) else None

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        if event != "line":
            return self.trace
        if self.function is not None:
            self.line = (frame.f_code.co_filename, frame.f_lineno)
            if not frame.f_code.co_name.startswith(self.function):
                return self.trace
        if self.then is not None:
            left, strike = self.then
            self.then = (left - 1, strike) if left else None
            if not left:
                strike()
        where = (frame.f_code.co_filename, frame.f_lineno)
        if self.line is None:
            self.lines[where] = self.lines.get(where, 0) + 1
        elif where == self.line:
            self.left -= 1
            if self.left == 0:
                self.within = set(_names(frame))
                self.strike(self)
        return self.trace


def _watched(frame: Any) -> bool:
    code = frame.f_code
    if code.co_filename == __file__:  # the person's own code
        return code.co_name in ("__getitem__", "__len__", "my_step")
    return code.co_filename.startswith(WATCHED)


def _names(frame: Any) -> Iterator[str]:
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back


def raised(_: Tracer) -> None:
    raise KeyboardInterrupt


def sent(_: Tracer) -> None:
    signal.raise_signal(signal.SIGINT)


def sent_twice(lines: int) -> Callable[[Tracer], None]:
    def strike(tracer: Tracer) -> None:
        tracer.then = (lines, lambda: signal.raise_signal(signal.SIGINT))
        signal.raise_signal(signal.SIGINT)

    return strike


@functools.cache
def scene(name: str) -> Scene:
    return Scene(name)


@functools.cache
def lines_of(name: str) -> list[tuple[tuple[str, int], int]]:
    """Every line that a run executes, with how often."""
    made = scene(name)
    for _ in range(2):  # the first run executes what is kept for later ones
        made.fresh()
        with Tracer() as tracer:
            made.train(val=made.val)
    return sorted(tracer.lines.items())


def check(made: Scene, before: Any, where: str, *, counting: bool = False) -> None:
    """What P4 says, after a run that began when `hm.last_run` was `before`; then the next run.

    `counting`: what struck did so where a whole step is counted, which no signal does.
    """
    run = hm.last_run
    steps = 0 if run is before or run is None else run.steps
    got, wanted = everything(made.model, made.optimizer), dict(made.plain[steps])
    if counting:
        got["groups"] = wanted["groups"]
    assert unequal(got, wanted) == [], where
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, where
    assert torch.is_grad_enabled(), where
    assert not torch.is_autocast_enabled("cpu"), where
    assert torch.autocast_increment_nesting() == 1, where
    assert torch.autocast_decrement_nesting() == 0, where
    if run is not before and run is not None:
        assert run.outcome == "interrupted" or (run.outcome, run.steps) == ("finished", STEPS), (
            where
        )
        assert counting or len(run.sizes) == run.steps, where
    made.scheduler = None
    again = made.train()
    assert (again.outcome, again.steps) == ("finished", STEPS), where


def strikes(name: str, kind: str, every: int) -> int:
    """Strike at every `every`th line of a run; return at how many lines."""
    made, count = scene(name), 0
    for number, (line, often) in enumerate(lines_of(name)):
        if number % every or (kind == "raised" and SCHEDULERS in line[0]):
            continue
        strike = {"raised": raised, "sent": sent}.get(kind) or sent_twice(number % 40)
        occurrence = 1 + zlib.crc32(repr(line[1]).encode()) % often
        made.fresh()
        before, struck = hm.last_run, False
        tracer = Tracer(line, occurrence, strike)
        try:
            with tracer:
                made.train(val=made.val)
        except KeyboardInterrupt:
            struck = True
        where = f"{kind} at {line[0]}:{line[1]}, the {occurrence}th time of {often}"
        check(made, before, where, counting=kind == "raised" and bool(HELD & tracer.within))
        assert struck or tracer.left > 0, where  # what is due by the clock may not run again
        count += struck
    return count


@pytest.mark.parametrize(
    ("name", "kind", "every", "least"),
    [
        ("adamw", "raised", 12, 100),
        ("adamw", "sent", 18, 65),
        ("adamw", "sent twice", 14, 85),
        ("fp16", "raised", 50, 22),
        ("fp16", "sent twice", 50, 22),
    ],
)
def test_an_interrupt_at_any_line_leaves_a_whole_step(
    name: str, kind: str, every: int, least: int
) -> None:
    assert strikes(name, kind, every) >= least


@pytest.mark.thorough
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["raised", "sent", "sent twice"])
@pytest.mark.parametrize("name", ["adamw", "fp16"])
def test_an_interrupt_at_truly_any_line_leaves_a_whole_step(name: str, kind: str) -> None:
    assert strikes(name, kind, 1) >= 1200


PLACES = {  # where the first strike falls, and how often that line has run by then
    "in the optimizer": ("_single_tensor_adam", 20),  # torch 2.4: _single_tensor_adamw
    "in the step": ("my_step", 30),
    "in validation": ("_values", 3),
    "in the data": ("__getitem__", 10),
    "between steps": ("took", 3),
}


@pytest.mark.parametrize("kind", ["raised", "sent"])
@pytest.mark.parametrize("place", PLACES)
def test_a_second_interrupt_while_everything_is_put_back_cuts_nothing_short(
    place: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is raised; the second strikes each line of what puts things back."""
    made = scene("adamw")
    function, nth = PLACES[place]
    real, calls, seen = Undo.__call__, [0], [0]

    def put_back(self: Undo) -> None:
        calls[0] += 1
        if calls[0] > 1:
            return real(self)

        def trace(frame: Any, event: str, arg: Any) -> Any:
            if event == "line":
                seen[0] += 1
                if seen[0] == target:
                    signal.raise_signal(signal.SIGINT) if kind == "sent" else raised(tracer)
            return trace

        sys.settrace(lambda frame, *_: trace if _watched(frame) else None)
        try:
            return real(self)
        finally:
            sys.settrace(None)

    monkeypatch.setattr(Undo, "__call__", put_back)
    target, struck = 0, 0
    while True:
        target += 3
        made.fresh()
        before, calls[0], seen[0] = hm.last_run, 0, 0
        tracer = Tracer(None, nth, raised)
        tracer.function = function
        with pytest.raises(KeyboardInterrupt), tracer:
            made.train(val=made.val)
        calls[0] = 1
        check(made, before, f"{place}, then at line {target} of {seen[0]}")
        if seen[0] < target:
            break
        struck += 1
    assert struck > 20


# -- the other ways out --


def check_failed(made: Scene, steps: int, found: Any, words: str) -> None:
    run = hm.last_run
    assert run is not None
    assert (run.outcome, run.steps, run.error) == ("failed", steps, words)
    assert run is not found
    assert unequal(everything(made.model, made.optimizer), made.plain[steps]) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not multiprocessing.active_children()
    made.scheduler = None
    assert made.train().outcome == "finished"


class Mine(KeyError):
    """An error of the person's own."""


def after(calls: int) -> Callable[..., None]:
    """Something to call that raises at its `calls`th call."""
    left = iter(range(calls - 1))

    def call(*_: Any) -> None:
        if next(left, None) is None:
            raise Mine("mine")

    return call


@pytest.mark.parametrize(
    ("where", "calls", "steps"),
    [("forward", 4, 1), ("backward", 4, 1), ("optimizer", 2, 1), ("scheduler", 2, 2),
     ("sink", 4, 1), ("poll", 2, 2), ("dataset", 10, 2), ("validation", 1, 3)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["adamw", "fp16"])
def test_an_error_of_the_persons_own_leaves_a_whole_step(
    name: str, where: str, calls: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(name)
    made.fresh()
    fail, found = after(calls), hm.last_run
    options: dict[str, Any] = {"val": made.val}
    first = made.first
    if where == "forward":
        first.register_forward_hook(fail)
    elif where == "backward":
        first.weight.register_hook(fail)
    elif where == "optimizer":
        made.optimizer.register_step_post_hook(fail)
    elif where == "scheduler":
        real = made.scheduler.step
        made.scheduler.step = lambda: (real(), fail())
    elif where == "sink":
        options["sink"] = lambda record: fail() if hasattr(record, "loss") else None
        fail = after(steps)
    elif where == "poll":
        options["control"] = RunControl(poll=fail)
    elif where == "dataset":
        made.loader.dataset.trap = fail
    else:
        made.val.dataset.trap = fail
    try:
        with pytest.raises(Mine):
            made.train(**options)
    finally:
        made.val.dataset.trap = None
        first._forward_hooks.clear()
        first.weight._backward_hooks = None
        made.optimizer._optimizer_step_post_hooks.clear()
        made.loader.dataset.trap = None
    check_failed(made, steps, found, "Mine: 'mine'")


class Doomed(Dataset[Any]):
    """A data set that fails, or takes its worker with it, at one of its samples."""

    def __init__(self, n: int, at: int, how: str) -> None:
        self.x, self.y = vectors(n)
        self.at, self.how = at, how

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        if index == self.at and self.how == "error":
            raise Mine("mine")
        if index == self.at and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[index], self.y[index]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("how", ["error", "killed", "interrupt", "stop", "nothing"])
def test_no_worker_process_outlives_a_run(how: str, persistent: bool) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(
        Doomed(80, 50, how), batch_size=4, num_workers=2, persistent_workers=persistent
    )
    control = RunControl()

    def sink(record: Any) -> None:
        if getattr(record, "samples_seen", 0) == 20:
            if how == "interrupt":
                signal.raise_signal(signal.SIGINT)
            elif how == "stop":
                control.ask("stop")

    options: dict[str, Any] = {"batch": "fixed", "micro": 4, "precision": "fp32"}
    run: Any = None
    try:
        hm.train(model, loader, optimizer=optimizer, sink=sink, control=control, **options)
    except (Mine, KeyboardInterrupt, RuntimeError) as error:
        found: Any = error
    else:
        found = None
    run = hm.last_run
    assert not multiprocessing.active_children()
    expected = {"error": Mine, "killed": RuntimeError, "interrupt": KeyboardInterrupt}
    assert isinstance(found, expected.get(how, type(None)))
    ends = {"interrupt": "interrupted", "stop": "stopped", "nothing": "finished"}
    assert run.outcome == ends.get(how, "failed")
    least, most = {"error": (0, 12), "killed": (0, 12), "nothing": (20, 20)}.get(how, (5, 5))
    assert least <= run.steps <= most
    got = everything(model, optimizer)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = DataLoader(TensorDataset(*vectors(80)), batch_size=4)
    for _, batch in zip(range(run.steps), batches, strict=False):
        step_by_hand(model, optimizer, batch, [4])
    got["modes"] = []
    assert unequal(got, everything(model, optimizer) | {"modes": []}) == []


@pytest.mark.parametrize("form", ["train", "loop"])
def test_a_worker_killed_as_it_hands_a_batch_over_is_named(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks first, and only then the system tells that the process is dead."""

    def broken(*_: Any, **__: Any) -> Any:
        (worker,) = multiprocessing.active_children()
        threading.Timer(0.2, os.kill, (worker.pid, signal.SIGKILL)).start()
        raise EOFError

    def strike(*_: Any) -> None:
        monkeypatch.setattr(connection, "Client", broken)

    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(Doomed(80, 50, "nothing"), batch_size=4, num_workers=1)

    def looped() -> None:
        session = Session(model, optimizer, TrainConfig(batch="fixed"), loader=loader)
        for _ in session.batches(loader):
            strike()

    def trained() -> None:
        hm.train(model, loader, optimizer=optimizer, sink=strike, batch="fixed")

    with pytest.raises(RuntimeError, match="worker .* is killed by signal"):
        looped() if form == "loop" else trained()


class Stream(IterableDataset[Any]):
    """Samples without an index."""

    def __iter__(self) -> Any:
        yield from zip(*vectors(40), strict=True)


@pytest.mark.parametrize("how", ["interrupt", "error"])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_no_worker_of_another_loader_outlives_a_run(where: str, how: str) -> None:
    def step(model: Any, batch: Any) -> Any:
        if model.training == (where == "training") and len(calls) > 2:
            signal.raise_signal(signal.SIGINT) if how == "interrupt" else after(1)()
        calls.append(1)
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    calls: list[int] = []
    stream = DataLoader(Stream(), batch_size=4, num_workers=1)
    held_out = DataLoader(TensorDataset(*vectors(40)), batch_size=4, num_workers=2)
    model = mlp()
    with pytest.raises(KeyboardInterrupt if how == "interrupt" else Mine):
        hm.train(model, stream, step, val=held_out, batch="fixed", micro=4, precision="fp32")
    assert not multiprocessing.active_children()
    assert model.training
    assert all(param.grad is None for param in model.parameters())


def test_a_run_inside_an_except_block_is_no_failure() -> None:
    made = scene("adamw")
    made.fresh()
    try:
        raise Mine("an error that the person handles by training again")
    except Mine:
        run = made.train()
    assert (run.outcome, run.error) == ("finished", None)


def test_what_puts_things_back_is_done_again_where_an_error_struck_it_from_outside() -> None:
    done: list[str] = []
    undo = Undo()
    undo.push(lambda: done.append("first"))
    undo.push(after_once(lambda: done.append("second")))
    undo()  # a worker's death, say, raised by torch's handler in the midst of it
    assert done == ["second", "first"]
    undo.push(after(1))
    with pytest.raises(Mine):
        undo()


def after_once(work: Callable[[], object]) -> Callable[[], object]:
    calls: list[int] = []

    def call() -> object:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        return work()

    return call


def test_nothing_here_ends_the_process() -> None:
    for path in pathlib.Path(HOUSE).rglob("*.py"):
        if path.parts[-2:] in (("launch", "worker.py"), ("launch", "link.py")):
            continue  # in a process of its own, and nobody's but ours
        text = path.read_text()
        assert "sys.exit" not in text, path
        assert "os._exit" not in text, path
        assert "SystemExit" not in text, path
