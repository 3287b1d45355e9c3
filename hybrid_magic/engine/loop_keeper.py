"""LoopKeeper: the checkpoints of a person's own loop, and how it is gone on with.

Passes that were whole are gone over: the loop's body does not run, what stands around it does. The
open one goes on behind the batches that were used. Between two batches all stands still: there
checkpoints are taken, and there an interrupt is answered. Knows no syntax.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import HybridMagicError
from ..records import Sink
from . import checkpoint, resume, schedule
from .data import NOTHING, Past, Plan, Recorded
from .keeper import Keeper
from .task import Task

if TYPE_CHECKING:
    from .adopted import AdoptedRun
    from .passes import Passes


class LoopKeeper(Keeper):
    """The checkpoints of one run of a loop."""

    _run: AdoptedRun
    _passes: Passes
    _pass = -1
    _owed = False  # the checkpoint of a pass's end

    def open_loop(self, run: AdoptedRun, task: Task, sink: Sink | None) -> None:
        """Find what there is to go on from, and make the folder ready.

        Raises:
            HybridMagicError: as `open`; or the loop reads no loader whose samples can be counted.
                Others may have the folder.
        """
        try:
            self._open_loop(run, task, sink)
        except BaseException:
            self._store.close()
            raise

    def _open_loop(self, run: AdoptedRun, task: Task, sink: Sink | None) -> None:
        if run.passes is None or run.state is None:
            raise HybridMagicError(
                f"--checkpoint {self._config.checkpoint} is given, and this loop reads no "
                "DataLoader "
                "whose samples have an index; wanted one, to find the place in the data again; "
                "leave it out"
            )
        self._run, self._passes, self._sink, state = run, run.passes, sink, run.state
        self._met: list[Any] = []  # schedulers that the loop's body steps
        self._unmet: list[Any] = []  # kind and state of those that it has not stepped again yet
        self._opening = self._start  # the random states as the open pass began
        self._at, self._at_step = self._passes.place, 0  # at the last moment between two batches
        self.open(task, run.optimizer, run.run, "loop")
        self.attach(state)
        if (tree := self.tree) is None:
            return
        run.uncut, self._at, self._trained = tree["uncut"], tree["handed"], tree["handed"][0]
        self._opening, self._unmet = tree["opening"], tree["schedulers"]
        found = resume.as_begun(resume.run_of(tree, over=False), run.run)
        vars(state.run).update(vars(found))
        state.run.steps, state.run.samples_seen = state.step, state.samples
        task.notes.append(
            f"the loop's body does not run for the {state.epoch} passes that were whole; what "
            "stands around it does, and what it counts by itself is yours to put back"
        )

    def batches(self, *, own: bool) -> Iterator[Any]:
        """Yield the batches of the next pass that are left to train; `own`: over the loader that
        the run began with.

        Raises:
            HybridMagicError: it is over another loader.
        """
        if not own:
            raise HybridMagicError(
                f"--checkpoint {self._config.checkpoint} is given, and this loop trains on a "
                "second "
                "loader; wanted one, to find the place in the data again; leave it out"
            )
        state, tree = self._run.state, self.tree
        assert state is not None
        self._pass += 1
        goes_on = tree is not None and self._run.step is None
        is_open = goes_on and self._pass == state.epoch and state.in_epoch > 0
        is_over = goes_on and self._pass < state.epoch
        if tree is not None and (is_open or is_over):
            checkpoint.put_weights_back(tree, self._run.model, self._run.optimizer)
        if is_over:
            if self._pass == state.epoch - 1:  # what stands behind it runs as it did
                self._passes.told(self._at)
                self._drawing.put_back(self._start)
            return
        self._epoch, self._planner, self._plans, past = self._pass, self._planned, [], NOTHING
        if is_open:
            self._drawing.put_back(self._opening)
            self._opened, past = time.perf_counter(), Past(self._trained, self._gone_past)
        else:
            self._opening = self._drawing.of_epoch()
        stream = self._passes.batches(self._plan, lambda: False, past)
        while True:
            if past is NOTHING:
                self._between()
            try:
                yield next(stream)
            except StopIteration:
                return
            past = NOTHING

    def _planned(self, remaining: int | None) -> Plan:
        """Return the policy's plan of the next batch; whole where batches cannot be cut."""
        assert self._run.state is not None
        base = self._passes.feed.base
        if self._run.uncut:
            return Recorded((base if remaining is None else min(base, remaining),))
        return self._run.state.sizing.plan(remaining)

    def _gone_past(self) -> None:
        self._passes.told(self._at)
        self._put_random_back()

    def _between(self) -> None:
        """Between two batches: answer an interrupt, take a checkpoint where it is time."""
        run = self._run
        if run.gathered is not None:  # the gradients of some batches wait for their step
            return
        self._at, self._at_step = self._passes.place, 0 if run.step is None else run.step.steps
        self._stands(self._drawing.between_steps())
        if run.step is None or run.state is None:
            return
        self._let_go()
        run.interrupts.at_once = True
        if run.interrupts.hit:
            raise KeyboardInterrupt
        if run.state.in_epoch and time.perf_counter() >= self._due:
            self.hold()
            self.save()

    def end_pass(self) -> None:
        """A pass has ended: it is over, and a checkpoint is taken, unless the run was stopped."""
        state, run = self._run.state, self._run
        if run.over:
            self._between()
            self.hold()
        elif run.gathered is None and run.step is not None and state is not None:
            state.epoch, state.in_epoch = self._pass + 1, 0
            self._at, self._at_step = [0, 0, 0, 0, self._passes.place[4]], run.step.steps
            self._owed = True
            self.save()
            self._owed = False

    def meet(self, scheduler: Any) -> None:
        """The loop's body is about to step this scheduler."""
        if any(met is scheduler for met in self._met):
            return
        self._met.append(scheduler)
        for number, (kind, state) in enumerate(self._unmet):
            if kind in (None, type(scheduler).__name__):
                del self._unmet[number]
                schedule.load(scheduler, state)
                return

    def _place(self, *args: Any) -> dict[str, Any]:
        return super()._place(*args) | {
            "handed": self._at,
            "opening": self._opening,
            "uncut": self._run.uncut,
            "schedulers": [
                *([type(each).__name__, each.state_dict()] for each in self._met),
                *self._unmet,
            ],
        }

    def end(self) -> None:
        step, state = self._run.step, self._run.state
        whole = step is not None and step.steps == self._at_step
        if not self._owed and (not whole or state is None or not state.in_epoch):
            self._ended = True  # in the midst of a body, or behind a pass: the last one counts
        super().end()

    def close(self) -> None:
        run, task = self._run.run, self._task
        nothing = self._run.step is None and run.outcome == "finished"
        if self.tree is not None and task is not None and nothing:
            notes = [*task.notes, "nothing was left to train"]
            resume.close_run(self.tree, run, notes, self._sink)
        super().close()
