"""A lens over the steps of a run: what each one took, as closely as is asked for.

Ambient, as torch's own modes are: the run that opens within it is looked at, whoever runs it. It
takes the moments that the engine takes anyway, and for single steps follows modules, writes a
ledger or a trace. The person's things are not changed. Decides nothing about what is found.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import nested
from .data import StepData
from .ledger import Ledger
from .module_watch import ModuleWatch
from .prefetch import Mover
from .step_state import StepResult, StepState

_opened: Lens | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment: on the device's clock, on the host's, in the ledger, in the order of all marks."""

    device: Any
    host: float
    moment: int
    peak_bytes: int | None  # most allocated since the mark before, where it was asked for


@dataclass(slots=True)
class Look:
    """One step that was looked at, how closely (`mode`), and what was seen.

    `period_s` is the time since the end of the step before, None for the first one of a run.
    `spans` and `ends` are a StepResult's; `switches` say from when on which module had its turn.
    """

    mode: str
    step: int
    run: int
    sizes: list[int]
    spans: list[tuple[Mark, Mark, Mark]]
    ends: list[tuple[Mark, Mark]]
    period_s: float | None
    switches: list[tuple[str | None, Mark]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    ledger: Ledger | None = None
    input_bytes: int = 0  # of the first micro-batch
    retried: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """A micro-batch's copy to the device: from when to when there, what it took of the host."""

    start: Any
    end: Any
    host_s: float
    pinned: bool


class Lens:
    """`with lens:` around a run. `choose` is given the newest Look (None before the first step) and
    returns how closely to look at the next one: "pass", "time", "modules", "ledger" or "trace".
    """

    def __init__(
        self,
        choose: Callable[[Look | None], str],
        trace: Callable[[bool], None],
    ) -> None:
        """`trace` is told where a traced step begins (True), and where it ends."""
        self.state: Any = None  # the run's TrainState, and its task
        self.task: Any = None
        self.runs = 0
        self.sends: list[Sent] = []
        self._choose, self._trace = choose, trace
        self._mode = "pass"
        self._begun = self._retried = False
        self._input_bytes = 0
        self._mover: _TimedMover | None = None
        self._ended: float | None = None
        self._watch: ModuleWatch | None = None
        self._ledger: Ledger | None = None
        self._switches: list[tuple[str | None, Mark]] = []
        self._marking: Callable[[], Any] = time.perf_counter
        self._turn = False  # a pass begins or ends at the next mark

    def __enter__(self) -> Lens:
        global _opened
        assert _opened is None, "a lens is open already"
        _opened = self
        return self

    def __exit__(self, *_: Any) -> None:
        global _opened
        _opened = None
        self._stop()

    # -- the run --

    def attach(self, state: Any, task: Any) -> Callable[[], None]:
        """Look at the steps of `state`, a TrainState that is ready; return what ends it."""
        step: StepState = state.step_state
        self.state, self.task, self._ended = state, task, None
        self.runs += 1
        probe = step.device
        self._marking, seconds = probe.mark, probe.seconds
        probe.mark = self._mark
        probe.seconds = lambda end, start: seconds(_device(end), _device(start))
        if step.mover is not None:
            step.mover = self._mover = _TimedMover(step.mover, self._marking, self.sends)
        step.lens = self
        self._mode = self._choose(None)

        def detach() -> None:
            self._stop()
            step.lens = None
            del probe.mark, probe.seconds

        return detach

    def _mark(self) -> Mark:
        device, host = self._marking(), time.perf_counter()
        peak, moment, probe = None, 0, self.state.probe
        if self._ledger is not None:
            moment = self._ledger.moment()
            if probe.late:
                peak = probe.peak()[0]
                probe.reset_peak()
        if self._watch is not None and self._turn:
            self._watch.turn()
        return Mark(device, host, moment, peak)

    # -- a step --

    def begin(self, step: StepState, data: StepData) -> None:
        """A step begins, or begins again after it ran out of memory."""
        self._retried = self._begun
        self._stop()
        self._begun = True
        if self._mode in ("modules", "ledger", "trace"):
            traced = self._mode == "trace"
            self._watch = ModuleWatch(step.model, self._switch, ranges=traced)
            self._watch.open()
        if self._mode == "ledger":
            self._input_bytes = _size(data.batches[0])
            self._ledger = ledger = Ledger(step.device.device, self._marking)
            ledger.note((*step.params, *step.model.parameters()), "parameters")
            ledger.note(step.model.buffers(), "parameters")
            states = (value for state in step.optimizer.state.values() for value in state.values())
            ledger.note(states, "optimizer state")
            ledger.note(nested.leaves([data.batches, data.coming]), "input")
            if self._mover is not None:  # the next step's first micro-batch, sent ahead
                ledger.note(self._mover.newest(), "input")
            ledger.__enter__()
        elif self._mode == "trace":
            self._trace(True)
        self._turn = True

    def _switch(self, path: str | None) -> None:
        if self._ledger is not None:
            self._ledger.path = path
        self._turn = False
        self._switches.append((path, self._mark()))
        self._turn = True

    def gathered(self, step: StepState) -> None:
        """The gradients are there."""
        if self._ledger is not None:
            trained = (*step.params, *step.model.parameters())
            self._ledger.note((param.grad for param in trained), "gradients")

    def took(self, step: StepState, result: StepResult) -> None:
        """A step is whole."""
        if self._mode == "trace":
            self._trace(False)
        now = time.perf_counter()
        period = None if self._ended is None else now - self._ended
        look = Look(
            self._mode, step.steps, self.runs, result.sizes, list(result.spans),
            list(result.ends), period, self._switches,
            {} if self._watch is None else dict(self._watch.calls), self._ledger,
            self._input_bytes, self._retried,
        )  # fmt: skip
        self._stop()
        self._begun = False
        self._mode = self._choose(look)
        self._ended = time.perf_counter() if look.mode in ("pass", "time") else None

    def _stop(self) -> None:
        """End looking closely."""
        self._turn = False
        if self._ledger is not None:
            with contextlib.suppress(RuntimeError, AssertionError):
                self._ledger.__exit__(None, None, None)
            self._ledger.close()
        if self._watch is not None:
            self._watch.close()
        self._watch = self._ledger = None
        self._switches = []


def attach(state: Any, task: Any) -> Callable[[], None] | None:
    """Have the lens that is open, if one is, look at a run; return what ends it."""
    return None if _opened is None else _opened.attach(state, task)


def _size(batch: Any) -> int:
    found = (leaf for leaf in nested.leaves(batch) if isinstance(leaf, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def _device(mark: Any) -> Any:
    return mark.device if isinstance(mark, Mark) else mark


class _TimedMover(Mover):
    """A mover whose copies are timed, where they run."""

    def __init__(self, mover: Mover, mark: Callable[[], Any], sends: list[Sent]) -> None:
        self._mover, self._mark, self._sends = mover, mark, sends
        self._newest: list[weakref.ref[torch.Tensor]] = []

    def send(self, batch: Any) -> Any:
        host = (x for x in nested.leaves(batch) if nested.is_plain(x) and x.device.type == "cpu")
        leaf = next(host, None)
        pinned = leaf is not None and leaf.is_pinned()
        began = time.perf_counter()
        with self._mover.copying():
            before = self._mark()
            moved = self._mover.send(batch)
            after = self._mark()
        if leaf is not None:  # else nothing was copied yet
            self._sends.append(Sent(before, after, time.perf_counter() - began, pinned))
        self._newest = [weakref.ref(x) for x in nested.leaves(moved) if nested.is_plain(x)]
        return moved

    def newest(self) -> list[torch.Tensor]:
        """Return the tensors of what was sent last, as far as they are still there."""
        return [tensor for ref in self._newest if (tensor := ref()) is not None]

    def receive(self, moved: Any) -> Any:
        return self._mover.receive(moved)
