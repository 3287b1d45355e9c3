"""A person's loop body that runs once per micro-batch, just as it is written.

Their forward pass runs under `forwarding`, their `backward` is this one's, and the step's end waits
for the last piece. Nothing is tried again: their code cannot be taken back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from . import nested, reduction
from .adopted import AdoptedRun
from .data import StepData
from .device import is_out_of_memory
from .forward import learn_reduction
from .letting_go import let_go
from .merge import full_precision
from .reduction import LossWatch
from .step import add, begin, finish, gather
from .step_state import Gathered, StepState


class Verbatim:
    """The pieces of the batch in hand; `first` and `last` are True where there are none."""

    def __init__(self, run: AdoptedRun) -> None:
        self._run = run
        self.first = self.last = True
        self._in_pieces = False
        self._number = 0
        self._spanned = -1  # the piece whose time is taken already
        self._data: StepData | None = None  # of the step in hand
        self._in_hand: Gathered | None = None  # from its first loss on
        self._watch: LossWatch | None = None
        self._start: Any = None

    def pieces(self, batch: Any) -> Iterator[Any]:
        """Yield a batch in micro-batches."""
        step, data = self._run.ready(batch, nested.count(batch), rehearses=False)
        self._begin(step, data)
        self._in_pieces = True
        try:
            for number, piece in enumerate(data.batches):
                self._number = number
                self.first, self.last = number == 0, number + 1 == len(data.batches)
                step.running, self._start = data.sizes[number], step.device.mark()
                yield piece
        finally:
            self.first = self.last = True
            self._data, self._in_hand, self._in_pieces = None, None, False

    def _begin(self, step: StepState, data: StepData) -> None:
        self._run.hold()
        with self._failing():
            begin(step, data)
        self._data, self._in_hand = data, None
        self._number, self._spanned, self._start = 0, -1, step.device.mark()

    def _ready(self) -> tuple[StepState, StepData]:
        """Return what is in hand; without pieces a step begins here, on a batch that is not cut."""
        data, step, gathered = self._data, self._run.step, self._in_hand
        complete = gathered is not None and gathered.values is not None and not self._in_pieces
        if data is None or step is None or complete:
            step, data = self._run.ready(None, None, rehearses=False)
            self._begin(step, data)
        return step, data

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[Any]:
        """Run the person's forward pass as the run computes, watching how its loss is reduced.

        Gives a function that returns what the pass has made in float32.
        """
        step, _ = self._ready()
        with self._failing(), contextlib.ExitStack() as stack:
            if step.precision.mixed:
                stack.enter_context(step.precision.autocast())
            if step.reduction is None:
                self._watch = stack.enter_context(LossWatch())
            yield functools.partial(full_precision, reduced=step.precision.dtype)

    def add(self, loss: Any) -> None:
        """Add the gradient of a loss of the piece in hand, by the piece's weight."""
        step, data = self._ready()
        middle, number = step.device.mark(), self._number
        with self._failing():
            if isinstance(loss, Tensor) and loss.numel() == 1:
                loss = loss.reshape(())
            reduction.check(loss)
            gathered = self._in_hand
            if gathered is None:  # by now their gradients are cleared, where they clear them
                gathered = gather(step, data, self._run.window())
            elif gathered.values is not None:  # a second loss of the last piece
                gathered = self._again(step, gathered)
            self._in_hand = gathered
            if gathered.factors is None:
                gathered.factors = self._learned(step, gathered.data, loss)
            add(step, gathered, number, loss)
            self._take_time(step, gathered, middle)
            self._run.gathered = gathered
            if self.last:
                finish(step, gathered)

    def _again(self, step: StepState, gathered: Gathered) -> Gathered:
        """Return a sum to which another loss of the newest piece can be added."""
        again = gather(step, gathered.data, gathered)
        again.sizes, again.factors = gathered.sizes, gathered.factors
        return again

    def _learned(self, step: StepState, data: StepData, loss: Tensor) -> list[float]:
        """Return the weights of a step's pieces by what was seen of the first loss."""
        seen, self._watch = self._watch or LossWatch(), None
        found = reduction.read(seen, loss, data.batches[self._number], step.asked_reduction)
        found = dataclasses.replace(found, certain=True)  # there is nothing to try it out with
        return reduction.weights(learn_reduction(step, data, found), data.batches, data.sizes)

    def _take_time(self, step: StepState, gathered: Gathered, middle: Any) -> None:
        gathered.since = step.device.mark()
        if self._spanned == self._number:
            start, middle, _ = gathered.spans.pop()
        else:
            start = self._start
        gathered.spans.append((start, middle, gathered.since))
        self._spanned = self._number

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Take the step back where something is raised; remember a size that did not fit."""
        try:
            yield
        except BaseException as error:
            run = self._run
            if run.step is not None and run.state is not None:
                size, number = run.step.running, run.step.steps + 1
                run.take_back()
                if is_out_of_memory(error):
                    run.state.sizing.ran_out(size, number)
            self._data = self._in_hand = None
            let_go(error)
            raise
