"""Keeper: when a run's checkpoints are taken, and its place in the data.

The place is where an epoch's random states began and what was planned since: the epoch is opened
again from there, and what was trained is gone past. Nothing of the loop waits for the disk.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..config import TrainConfig
from ..errors import HybridMagicError
from ..records import NoteRecord, Sink
from ..run import Run
from . import checkpoint, ranks, resume, schedule
from .checkpoint_store import NoStore, Store
from .data import Past, Plan, Planner, StepData
from .device import attempt
from .drawing import Drawing
from .progress import TrainState
from .summing import same_buffers
from .task import Task
from .undo import Undo

EVERY_S = 300.0  # between two checkpoints inside an epoch


class Keeper:
    """The checkpoints of one run; `tree` is the one that it goes on from, None where it begins."""

    tree: dict[str, Any] | None = None

    def __init__(self, config: TrainConfig, loader: Any) -> None:
        """Keep the random states before anything is read of the loader."""
        assert config.checkpoint is not None
        self._config, self._group = config, ranks.current()
        writes = self._group is None or self._group.first
        self._store = Store(config.checkpoint, waiting=self._waiting) if writes else NoStore()
        self._drawing = Drawing(loader)
        self._start = self._drawing.of_epoch()  # as the epoch began
        self._epoch = 0  # that it is of
        self._boundary: dict[str, Any] | None = None  # random states between two steps
        self._boundary_of = -1  # the steps that were whole then
        self._plans: list[tuple[Plan, int]] = []  # of the epoch's steps, and how many are alike
        self._again: Iterator[Plan] = iter(())
        self._planner: Planner | None = None
        self._task: Task | None = None
        self._state: TrainState | None = None
        self._holds = self._reopens = self._ended = False
        self._standing: dict[str, Any] = {}  # at the end
        self._due = float("inf")
        self._opened = 0.0
        self._trained = 0  # steps of the epoch that is gone on with

    # -- the beginning --

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint is to be taken before the next step."""
        return time.perf_counter() >= self._due

    def open(
        self, task: Task, optimizer: torch.optim.Optimizer, run: Run, kind: str = "step"
    ) -> Run:
        """Find what there is to go on from, and make the folder ready; return the Run to go on
        with, `run` where there is none.

        Raises:
            HybridMagicError: a folder that cannot be used, a checkpoint that is not this run's, or
                a model or scheduler that no checkpoint can hold; nothing was changed.
        """
        self._task, self._kind = task, kind
        needed = resume.needed_bytes(task, optimizer, self._start)
        self.tree, notes = resume.find(
            self._store, self._group, self._config,
            lambda tree: resume.check(tree, kind, task, optimizer, self._drawing),
        )  # fmt: skip
        self._store.check(needed)
        task.notes[:0] = [*notes, *self._drawing.notes(), *self._store.problems()]
        if self.tree is None:
            return run
        task.notes += resume.changed_options(self.tree, self._config)
        if self._config.precision in ("auto", self.tree["precision"]["name"]):
            task.precision = checkpoint.precision_of(self.tree, task.device, task.precision)
        found = resume.run_of(self.tree, over=self.over)
        task.notes += resume.moved(found, run, task.loader)
        return resume.as_begun(found, run)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to train."""
        return self.tree is not None and resume.is_over(self.tree, self._config)

    def run_that_is_over(
        self, optimizer: torch.optim.Optimizer, run: Run, sink: Sink | None
    ) -> Run:
        """Leave everything as at the end of a run that has nothing left to train; return it."""
        tree, task = self.tree, self._task
        assert tree is not None
        assert task is not None
        checkpoint.put_weights_back(tree, task.model, optimizer)
        if task.scheduler is not None:
            schedule.load(task.scheduler, tree["schedule"]["scheduler"])
        self._drawing.put_back(tree["random"])
        resume.close_run(tree, run, [*task.notes, resume.OVER], sink)
        return run

    def attach(self, state: TrainState) -> None:
        """Take the run's state, which stands from now on where the checkpoint was taken."""
        assert self._task is not None
        self._state, tree = state, self.tree
        state.at_end = self._at_end
        self._holds = bool(self._drawing.generators) or not self._task.feed.drawn_apart
        if tree is None:
            return
        place = tree["state"]
        self._trained = place["step"] - place["epoch_from"] if place["in_epoch"] else 0
        plans = resume.plans_of(tree)
        if not checkpoint.put_state_back(tree, state):
            plans = plans[: self._trained]
            self._task.notes.append("its batch is steered anew, from the loader's own")
        self._start, self._epoch = tree["start"], state.epoch
        self._again, self._reopens = iter(plans), True

    def epoch(self, planner: Planner) -> Iterator[StepData]:
        """Return the steps of the epoch that begins, or is gone on with."""
        assert self._task is not None
        feed, self._planner, self._plans = self._task.feed, planner, []
        if not self._reopens:
            return feed.epoch(self._plan)
        self._reopens = False
        feed.close()  # what was read of it already was read with other random states
        self._opened = time.perf_counter()
        self._drawing.put_back(self._start)
        return feed.epoch(self._plan, Past(self._trained, self._put_random_back))

    def _put_random_back(self) -> None:
        assert self.tree is not None
        assert self._task is not None
        assert self._state is not None
        feed, taken = self._task.feed, time.perf_counter() - self._opened
        self._stands(self.tree["random"])
        self._drawing.put_back(self.tree["random"], ordered=feed.drawn_apart)
        self._task.notes += resume.read_again(feed, self._state.in_epoch, taken)

    def _plan(self, remaining: int | None) -> Plan:
        """Return the plan of the next step: as it was planned before, or by the policy."""
        assert self._planner is not None
        plan = next(self._again, None) or self._planner(remaining)
        if self._plans and self._plans[-1][0] is plan:
            self._plans[-1] = plan, self._plans[-1][1] + 1
        else:
            self._plans.append((plan, 1))
        return plan

    # -- taking them --

    def begin(self, undo: Undo) -> dict[str, Any] | None:
        """The run begins: from here on the time counts; return what it goes on from.

        Args:
            undo: takes the end, which comes when the step in hand was made whole or taken back.
        """
        undo.push(self.end)
        self._due = time.perf_counter() + EVERY_S
        return self.tree

    def before_step(self, now: float) -> None:
        """Between two steps, before anything is read for the next one, at `now`."""
        self._let_go()
        if now >= self._due if self._group is None else self._group.agreed.due:
            self.hold()
            self.save()
        elif self._holds:
            self._stands(self._drawing.between_steps())

    def _let_go(self) -> None:
        """What the run goes on from was put back: it takes no memory any more, whoever holds it."""
        if self.tree is not None:
            self.tree.clear()
        self.tree = None

    def hold(self) -> None:
        """Keep the random states for a checkpoint that is taken before the next step is whole."""
        self._stands(self._drawing.now())

    def _stands(self, states: dict[str, Any]) -> None:
        self._boundary = states
        self._boundary_of = -1 if self._state is None else self._state.step

    def epoch_over(self, *, save: bool) -> None:
        """The epoch is over, validated and all; the next one begins with the random states of now.

        Args:
            save: take a checkpoint; not where the run ends here, which takes one itself.
        """
        self._begin_epoch()
        if save:
            self.save()

    def _begin_epoch(self) -> None:
        assert self._state is not None
        self._epoch, self._plans, self._boundary = self._state.epoch, [], None
        self._start = self._drawing.of_epoch()

    def save(self, outcome: str | None = None) -> None:
        """Take a checkpoint of where the run stands; `outcome`: how it ended, None: it goes on."""
        state, task = self._state, self._task
        assert state is not None
        assert task is not None
        if state.epoch != self._epoch:
            self._begin_epoch()
        if self._group is not None and outcome is None:
            same_buffers(self._group, state.step_state.model)
        with state.interrupts.held():
            try:
                tree = checkpoint.tree_of(state) | self._standing
                tree |= self._place(state, task, outcome)
                _, words = attempt(self._store.save, tree, step=state.step)
            except HybridMagicError as error:  # of a state that no step had made at the beginning
                words = str(error)
        if words is not None:
            self._say(f"the checkpoint of step {state.step} was left out: {words}")
        self._tell()
        self._due = time.perf_counter() + EVERY_S

    def _place(self, state: TrainState, task: Task, outcome: str | None) -> dict[str, Any]:
        here = self._boundary if self._boundary_of == state.step else None
        now = self._start if not state.in_epoch else here or self._drawing.now()
        return {
            "content": resume.CONTENT,
            "kind": self._kind,
            "ended": outcome and checkpoint.text_of(state.run),
            "config": self._config.as_json(),
            "data": resume.data_of(task, self._drawing),
            "start": self._start,
            "random": now,
            "plans": [[list(plan.sizes), plan.probe, count] for plan, count in self._plans],
        }

    def _tell(self) -> None:
        for sentence in self._store.problems():
            self._say(sentence)

    def _say(self, sentence: str) -> None:
        if self._state is not None and sentence not in self._state.run.notes:
            self._state.emit(NoteRecord(sentence))

    # -- the end --

    def _at_end(self) -> None:
        """Keep where the run stands before its last values are read, as it would not have been."""
        if not self._standing and self._state is not None:
            self._standing = checkpoint.standing(self._state)

    def end(self) -> None:
        """Take the last checkpoint, unless the run failed, and wait until it is written; an
        interrupt ends the waiting."""
        state = self._state
        if state is not None and not self._ended and state.step:
            self._ended = True
            if state.run.outcome != "failed":
                try:
                    self.save(state.run.outcome)
                except KeyboardInterrupt:
                    self._store.stop()
                    self._say(f"the checkpoint of step {state.step} was left out: interrupted")
                    raise
        self.close()

    def close(self) -> None:
        """Wait until all is written, and let others have the folder."""
        self._ended = True
        try:
            with self._waiting():
                self._store.close()
        finally:
            self._tell()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """For the disk: an interrupt ends that, unless other processes know nothing of it yet."""
        state = self._state
        if state is None or (self._group is not None and not self._ended):
            yield
            return
        interrupts = state.interrupts
        found = interrupts.at_once, interrupts.ending
        interrupts.at_once, interrupts.ending = True, False
        try:
            if interrupts.hit and not self._ended:
                raise KeyboardInterrupt
            yield
        finally:
            interrupts.at_once, interrupts.ending = found
