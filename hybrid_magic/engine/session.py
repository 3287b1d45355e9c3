"""A run whose loop is the person's: their code goes over the batches and calls this for each step.

`accumulate` has the forward and backward passes of a batch done in micro-batches, `apply` takes the
optimizer step; in between the person's own statements run. Code that cannot be called for a
micro-batch runs once for each as it is written (`verbatim`). Gradients are the person's to clear.
Knows no syntax and no notebook.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..config import TrainConfig
from ..errors import HybridMagicError, OutOfMemoryError
from ..records import NoteRecord, Sink
from ..run import Run
from . import nested, rehearse
from .adopted import AdoptedRun
from .control import RunControl
from .data import StepData, next_of
from .device import attempt
from .letting_go import let_go
from .merge import Unmergeable, full_precision, merged
from .prepare import switches
from .remembered import Memory
from .retry import until_it_fits
from .step import accumulate, apply, finish, take_step
from .step_state import Gathered, StepState
from .verbatim import Verbatim

# The values of one micro-batch by name -> its loss (None: nothing to be trained), values to keep.
Work = Callable[[dict[str, Any]], tuple[Any, dict[str, Any]]]


class Session:
    """One run of a person's loop."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        *,
        loader: Any = None,
        epochs: int | None = None,
        names: Mapping[str, str] | None = None,
        found: Sequence[str] = (),
        sink: Sink | None = None,
        control: RunControl | None = None,
        scaler: Any = None,
        own_precision: bool = False,
        before: Memory | None = None,
    ) -> None:
        """Check what can be checked; nothing is changed before the first step.

        Args:
            model: what the loop trains, on the device of the optimizer's parameters, which may be
                of no module.
            loader: the loop's loader; a map-style DataLoader is read at other sizes unless the
                batch is fixed.
            epochs: how many passes are expected, None where that is not known.
            scaler: the person's GradScaler, with `own_precision`: they enter autocast themselves.
            before: what an earlier session of this optimizer has learned.
            names, found, sink, control: as for `train`.
        Raises:
            HybridMagicError: found, wanted, do.
        """
        self._run = AdoptedRun(
            model, optimizer, config, self._compute, loader, epochs, names, found, sink, control,
            scaler, own_precision, before,
        )  # fmt: skip
        self._loader, self._verbatim = loader, Verbatim(self._run)
        self._work: Work | None = None
        self._hint: int | None = None  # samples of the batch that was handed out last
        self._whole: set[str] = set()  # names that a step did not cut
        self._proved = False  # a batch was cut, and all went well

    @property
    def run(self) -> Run:
        """The run so far."""
        return self._run.run

    @property
    def steps(self) -> int:
        """Steps taken."""
        return 0 if self._run.step is None else self._run.step.steps

    @property
    def over(self) -> bool:
        """Whether no further step may begin."""
        return self._run.over

    @property
    def first(self) -> bool:
        """Whether the piece in hand is the first of its step; True when there are no pieces."""
        return self._verbatim.first

    @property
    def last(self) -> bool:
        """Whether it is the last of its step; True when there are no pieces."""
        return self._verbatim.last

    # -- passes --

    def begin_pass(self) -> None:
        """Begin a loop over batches; between loops no training time passes."""
        self._run.begin_pass()

    def end_pass(self, *, whole: bool = True) -> None:
        """End it; what follows may be an evaluation. `whole`: nothing was raised in it."""
        self._run.end_pass(whole=whole)

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yield the batches of one pass, a step each, until the run is over."""
        run = self._run
        stream = run.stream(own=loader is self._loader) or iter(loader)
        while not run.over:
            start = time.perf_counter()
            try:
                batch = next_of(stream)
            except StopIteration:
                return
            run.waited += time.perf_counter() - start
            self._hint = nested.count(batch)
            yield batch

    def length(self, loader: Any) -> int:
        """Return what `len(loader)` is now, in batches as `batches` yields them."""
        passes, state = self._run.passes, self._run.state
        if passes is None or state is None or loader is not self._loader:
            return len(loader)
        return passes.length(len(loader), state.sizing.batch)

    def advance(self, scheduler: Any, *args: Any) -> None:
        """Step the person's scheduler as often as their loop would have by the newest sample."""
        if self._run.keeper is not None:
            self._run.keeper.meet(scheduler)
        times = 1 if self._run.passes is None else self._run.passes.due()
        for _ in range(times):
            scheduler.step(*args)

    # -- a step --

    def accumulate(self, work: Work, values: dict[str, Any]) -> dict[str, Any]:
        """Have `work` done on a batch, cut into micro-batches, and its gradients added up.

        Args:
            work: values of a micro-batch by name -> its loss, or None, and values to keep.
            values: the batch by name; what has a row or an item a sample is cut.
        Returns:
            The kept values as they are of the whole batch.
        Raises:
            HybridMagicError: the smallest micro-batch runs out of memory.
            Whatever `work` raises; the step is taken back.
        """
        run, batch = self._run, nested.named(values, self._hint, self._whole)
        if (n := batch.size) is not None:
            self._whole |= values.keys() - batch.cut.keys()
        if run.uncut:
            batch = nested.Named(values, None, {})
        self._work = work
        put_switches_back = switches(run.probe.device.type)
        try:
            step, data = run.ready(batch, n, rehearses=True)
            run.hold()
            before = run.window()
            gathered, kept = self._gather(step, data, before)
            if gathered.values is None:  # nothing to be trained
                step.transaction.leave()
        except BaseException as error:
            run.take_back()
            put_switches_back()
            let_go(error)
            raise
        finally:
            self._work = None
        if gathered.values is not None:
            run.gathered = gathered
        elif before is None:
            run.free()
        return kept

    def _gather(
        self, step: StepState, data: StepData, before: Gathered | None
    ) -> tuple[Gathered, dict[str, Any]]:
        """Return the gradients and the kept values of a batch, uncut where it cannot be cut."""
        state = self._run.state
        assert state is not None

        def work(data: StepData) -> tuple[Gathered, dict[str, Any]]:
            measures = state.measures_peaks(data)
            gathered = accumulate(step, data, before=before, measure_peaks=measures)
            kept, gathered.kept = gathered.kept, []
            shares = gathered.factors or [n / sum(data.sizes) for n in data.sizes]
            found = merged(kept, data.sizes, shares)
            found = {n: full_precision(v, step.precision.dtype) for n, v in found.items()}
            if len(data.sizes) > 1 and not self._proved:
                if why := rehearse.indivisible(step, data, shares):
                    raise Unmergeable(why)
                self._proved = True
            return gathered, found

        try:
            found, retries = until_it_fits(step, state.sizing, data, work)
            self._run.retries += retries
            return found
        except Unmergeable as found:
            why = str(found)
        except Exception as error:
            why = None
            if not self._run.compute_in_fp32(error):
                if self._proved or len(data.sizes) == 1 or isinstance(error, HybridMagicError):
                    raise
                why = f"{type(error).__name__}: {error}"
            let_go(error)
        self._run.take_back()
        self._run.hold()
        if why is None:
            return self._gather(step, data, before)
        self._run.uncut = True
        state.emit(NoteRecord(f"batches are not cut into micro-batches from here on: {why}"))
        whole = nested.Named(nested.joined(*data.batches), None, {})
        return self._gather(step, StepData([whole], [sum(data.sizes)], False), before)

    def apply(self) -> None:
        """Take the optimizer step for what was accumulated; nothing was: the optimizer's own.

        Raises:
            KeyboardInterrupt: the kernel was interrupted since the step began, which is whole.
        """
        run, step, state = self._run, self._run.step, self._run.state
        gathered, run.gathered = run.gathered, None
        if step is None or state is None or gathered is None:
            run.forget_skips()
            take_step(run.optimizer)
            return
        try:
            if gathered.values is None:  # verbatim, and its last piece went without
                finish(step, gathered)
            gathered.ends.append((gathered.since, gathered.until))
            if len(gathered.spans) != len(gathered.sizes):  # verbatim, and a piece went without
                gathered.spans = []
            gathered.since = run.probe.mark()
            factor = state.sizing.lr_factor(sum(gathered.data.sizes))
            result, words = attempt(apply, step, gathered, factor)
            if words is not None:  # the gradients are there: the person's code has seen them
                run.retries += 1
                step.transaction.put_back()
                run.probe.release()
                result, words = attempt(apply, step, gathered, factor)
            if words is not None:
                raise OutOfMemoryError(
                    f"out of memory on {run.probe.name} in the optimizer's step ({words}); "
                    "wanted room for its state; free the memory that others hold (%hybrid_free), "
                    "or use an optimizer with less state"
                )
        except BaseException as error:
            run.take_back()
            let_go(error)
            raise
        run.took(result)

    # -- verbatim --

    def pieces(self, batch: Any) -> Iterator[Any]:
        """Yield a batch in micro-batches; `first` and `last` tell which is in hand."""
        return self._verbatim.pieces(batch)

    def forwarding(self) -> AbstractContextManager[Any]:
        """Return what the person's forward pass runs under; it gives what undoes its precision."""
        return self._verbatim.forwarding()

    def backward(self, loss: Any) -> None:
        """Add the gradient of the loss of the piece in hand; the last one completes the sum."""
        self._verbatim.add(loss)

    # -- the end --

    def memory(self) -> Memory:
        """Return what was learned, for the next session of this optimizer."""
        return self._run.memory()

    def close(self, error: BaseException | None = None) -> Run:
        """Put back all that is ours and return the Run; `error` is what ended the loop: the open
        step is taken back, and gradients are cleared."""
        self._run.close(error)
        return self._run.run

    def _compute(self, _: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert self._work is not None
        loss, kept = self._work(dict(batch))
        if isinstance(loss, torch.Tensor) and loss.dim() and loss.numel() == 1:
            loss = loss.reshape(())
        return loss, kept
