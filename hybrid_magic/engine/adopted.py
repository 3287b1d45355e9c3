"""The run behind a person's loop: opened by its first step, closed once, whatever ends it.

Owns the records, the policy, the interrupts and what must be put back; does no step itself. Between
two steps nothing of the person's is held or changed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..config import TrainConfig
from ..records import BatchChangeRecord, Sink
from ..run import Run
from . import nested
from . import precision as precisions
from .checks import check_loop
from .control import RunControl
from .data import Feed, StepData
from .device import probe_for
from .gradients import NoiseProbe
from .loop_keeper import LoopKeeper
from .passes import AsItComes, Passes, cut, sizes_of
from .precision import Precision
from .prepare import Interrupts
from .progress import TrainState
from .remembered import Memory, remembered_precision
from .sampled import is_standard
from .setup import environment, open_state, settings_for
from .step_state import Gathered, StepResult, StepState
from .task import Task
from .transaction import Transaction
from .undo import Undo
from .watch import Watch


class AdoptedRun:
    """`state` and `step` are None until they are needed; `gathered` is what was accumulated since
    the last step; `uncut` says that batches cannot be cut, `over` that no step may begin."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        compute: Callable[[Any, Any], Any],
        loader: Any,
        epochs: int | None,
        names: Mapping[str, str] | None,
        found: Sequence[str],
        sink: Sink | None,
        control: RunControl | None,
        scaler: Any,
        own_precision: bool,
        before: Memory | None,
    ) -> None:
        """Check what can be checked.

        Raises:
            HybridMagicError: found, wanted, do.
        """
        called = {"model": "the model", "loader": "the loader", "optimizer": "the optimizer"}
        called |= dict(names or {})
        device = check_loop(model, optimizer, called)
        self.probe, self.optimizer, self.model = probe_for(device), optimizer, model
        self.run = Run(config=config.as_json(), environment=environment(self.probe))
        self._memory, notes = before or Memory(), list(found)
        passes = Passes(loader) if is_standard(loader) else None
        self.keeper = None if config.checkpoint is None else LoopKeeper(config, loader)
        self.passes = passes if self.keeper is not None or config.batch != "fixed" else None
        if self.passes is None:
            if isinstance(config.batch, int):
                notes.append(f"--batch {config.batch} is passed over: {called['loader']} is read "
                             "as it comes, and each of its batches is a step")  # fmt: skip
            config = dataclasses.replace(config, batch="fixed", max_batch=None)
        if own_precision:
            config = dataclasses.replace(config, precision="fp32")
        self._config = dataclasses.replace(config, epochs=epochs)
        feed: Feed = AsItComes(1) if passes is None else passes.feed
        self._task = Task(
            model, device, feed, compute, None, optimizer, None, None, called, notes, adopted=True,
            precision=remembered_precision(before, config, device, own_precision, scaler),
            loader=loader,
        )  # fmt: skip
        self._sink, self._control = sink, control
        self.interrupts, self._undo = Interrupts(), Undo()
        self.state: TrainState | None = None
        self._watch: Watch | None = None
        self.step: StepState | None = None
        self.gathered: Gathered | None = None
        self.uncut, self.over = self._memory.uncut, False
        self._error: BaseException | None = None
        self._closed = False
        self._pass, self._since, self._between = -1, 0.0, False
        self.retries, self.waited = 0, 0.0  # since the last step
        if passes is not None:
            self._settle()
        if self.keeper is not None:
            self.keeper.open_loop(self, self._task, sink)
            self._undo.push(self.keeper.close)

    # -- opening --

    def ready(self, batch: Any, n: int | None, *, rehearses: bool) -> tuple[StepState, StepData]:
        """Return what a step works on, and `batch` of `n` samples (None: it cannot be cut) cut as
        planned; the first one opens the run.

        Args:
            rehearses: the person's code can be called to try something out.
        """
        if self.state is None:
            self._task.feed = AsItComes(n or 1)
            self._settle()
        assert self.state is not None
        sizes, measures = sizes_of(self.passes, self.state.sizing, nested.count(batch), n or 1)
        data = StepData(cut(batch, sizes), sizes, measures)
        if self.step is None:
            self._task.rehearses = rehearses
            self._open(self.state, data)
        step = self.step
        assert step is not None
        if sum(len(group["params"]) for group in self.optimizer.param_groups) != len(step.params):
            step.params = [p for group in self.optimizer.param_groups for p in group["params"]]
            step.noise = NoiseProbe(self.optimizer, step.params)
            step.transaction = Transaction(
                step.model, self.optimizer, step.params, self.probe.device
            )
        return step, data

    def _settle(self) -> None:
        """Make the state of the run, for batches of the feed's size."""
        settings = settings_for(self._task, self._config, self.probe, self.optimizer)
        own = self._task.precision
        if own is not None and own.scaler is not None:
            settings = dataclasses.replace(settings, loss_scaling=True)
        self.state = TrainState(
            self.run, self._sink, self._control, self.interrupts, self._config, self.probe, settings
        )
        self._memory.lend(settings, self.state.sizing)

    def _open(self, state: TrainState, first: StepData) -> None:
        undo, optimizer = self._undo, self.optimizer
        undo.push(self._task.feed.close)
        self.interrupts.catch(undo)
        undo.push(self.forget_skips)
        self._watch = Watch(state)
        undo.push(self._watch.end)
        tree = None if self.keeper is None else self.keeper.begin(undo)
        open_state(
            self._task, self._config, self.probe, optimizer, state, first, undo,
            lambda: self._error, tree,
        )  # fmt: skip
        self.step = state.step_state
        if self._task.rehearses:
            self.step.settle = self._memory.settle
        state.begin_epoch(max(0, self._pass))
        self._watch.begin()
        self._since = time.perf_counter()

    def forget_skips(self) -> None:
        """Have the optimizer forget what a step of ours told it on the device."""
        if hasattr(self.optimizer, "found_inf"):
            del self.optimizer.found_inf  # type: ignore[attr-defined]

    # -- a step --

    def hold(self) -> None:
        """Hold interrupts back until the step is whole."""
        self.interrupts.at_once = self.interrupts.hit = False

    def window(self) -> Gathered | None:
        """Return what is in the gradients already, of batches since the last step."""
        assert self.step is not None
        found, self.gathered = self.gathered, None
        if (
            found is not None
            and found.values is not None
            and any(param.grad is not None for param in self.step.params)
        ):
            self.gathered = found
        return self.gathered

    def free(self) -> None:
        """No step is open: an interrupt need not wait any more.

        Raises:
            KeyboardInterrupt: one has waited.
        """
        waited = self.interrupts.hit and not self.interrupts.at_once
        self.interrupts.at_once = True
        if waited:
            raise KeyboardInterrupt

    def compute_in_fp32(self, error: Exception) -> bool:
        """Go on in FP32 where it was ours to choose and the person's code cannot do with less: at
        the first step whatever it raises, later where its loss says so. Return whether that is
        so."""
        step, state = self.step, self.state
        known = step is not None and (step.steps == 0 or precisions.refuses_autocast(error))
        if step is None or state is None or not known:
            return False
        found, ours = step.precision, self._config.precision == "auto"
        if found.mixed and ours:
            step.precision = Precision("fp32", self.probe.device)
            step.lay_out_plainly()
            why = str(error).partition("\n")[0][:120]
            reason = f"this loop does not compute in {found.name} ({why}); going on in fp32"
            state.emit(BatchChangeRecord(step.steps, found.name, "fp32", "precision", reason))
        return found.mixed and ours

    def take_back(self) -> None:
        """Take the open step back."""
        if self.step is not None:
            self.step.noise.forget()
            self.step.transaction.roll_back(self.step.steps)
        self.interrupts.at_once = True

    def took(self, result: StepResult) -> None:
        """Take in a step that is whole, and do what was asked meanwhile."""
        assert self.state is not None
        assert self._watch is not None
        now = time.perf_counter()
        self.state.took(result, self.retries, self.waited, now - self._since)
        self._since, self.waited, self.retries = now, 0.0, 0
        if self._watch.readings:
            self._watch.tell()
        try:
            self.over |= self.state.obey()
        except KeyboardInterrupt:
            if self.keeper is None:  # else it is answered where the run can be gone on with
                self.interrupts.at_once = True  # the person may catch it and go on
                raise
        if self.keeper is None:
            self.free()

    # -- passes and the end --

    def begin_pass(self) -> None:
        """Begin a loop over batches; between two of them no training time passes."""
        self._pass += 1
        self._between = False
        now, self.waited = time.perf_counter(), 0.0
        if self.step is not None and self.state is not None:
            self.state.paused(now - self._since)
            self.state.begin_epoch(self._pass)
            self.probe.reset_peak()
        self._since = now

    def stream(self, *, own: bool) -> Iterator[Any] | None:
        """Return the batches of a pass at sizes of ours, None where it is read as it comes."""
        if self.keeper is not None:
            return self.keeper.batches(own=own)
        if self.passes is None or self.state is None or not own:
            return None
        return self.passes.batches(self.state.sizing.plan, lambda: self.uncut)

    def end_pass(self, *, whole: bool) -> None:
        """End it: what follows may be an evaluation. `whole`: nothing was raised in it."""
        if self.step is not None and self.state is not None:
            if self.keeper is not None and whole:
                self.keeper.end_pass()
            self.state.catch_up()
            self.free()
        self._since, self._between = time.perf_counter(), True

    def memory(self) -> Memory:
        """Return what was learned."""
        if self.state is not None and self.step is not None:
            asked, sizing = self._config.precision, self.state.sizing
            self._memory.learn(sizing, self.step.precision, asked, uncut=self.uncut)
        return self._memory

    def close(self, error: BaseException | None) -> None:
        """Put everything back and close the books; `error` is what ended the run."""
        if self._closed:
            return
        self._closed, self._error, run = True, error, self.run
        self.interrupts.ending = True
        step, self.gathered, self.over = self.step, None, True
        if self._between and self.state is not None:  # what came after the last pass
            self.state.paused(time.perf_counter() - self._since)
        if error is None and run.outcome != "stopped":
            run.outcome = "finished"
        elif error is not None and step is None:
            stopped = isinstance(error, KeyboardInterrupt)
            run.outcome = "interrupted" if stopped else "failed"
        if step is not None and error is None:
            step.transaction.close()  # what is left over of a step is the person's to keep
        try:
            self._undo()
        finally:
            self._undo()
        if error is not None:
            held = [param for group in self.optimizer.param_groups for param in group["params"]]
            for param in (*held, *self._task.model.parameters()):
                param.grad = None
