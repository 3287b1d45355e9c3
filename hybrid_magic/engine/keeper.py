"""Keeper: when a run's checkpoints are taken, and its place in the data.

The place is where an epoch's random states began and what was planned since: the epoch is opened
again from there, and what was trained is gone past. Nothing of the loop waits for the disk.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..config import TrainConfig
from ..errors import HybridMagicError
from ..policy.steering import StepPlan
from ..records import NoteRecord, Sink
from ..run import Run
from . import checkpoint, ranks, resume, schedule
from .checkpoint_copy import size_bytes
from .checkpoint_store import NoStore, Store
from .data import Past, Plan, Planner, StepData
from .device import attempt
from .progress import TrainState
from .randomness import Boundary, all_states, put_all_back
from .rewind import generators_of
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
        group = self._group = ranks.current()
        writes = group is None or group.first
        self._config, self._store = config, Store(config.checkpoint) if writes else NoStore()
        self._generators = generators_of(loader)
        self._between_steps = Boundary(self._generators)
        self._start = all_states(self._generators)  # as the epoch began
        self._epoch = 0  # that it is of
        self._boundary: dict[str, Any] | None = None  # random states, where reading changes them
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
        if task.scheduler is not None and not hasattr(task.scheduler, "load_state_dict"):
            raise HybridMagicError(
                f"the scheduler, a {type(task.scheduler).__name__}, has no state_dict(); wanted "
                "one that a checkpoint can hold; give it state_dict() and load_state_dict()"
            )
        tree = checkpoint.begun(task.model, optimizer)
        tree["schedule"] = None if task.scheduler is None else task.scheduler.state_dict()
        needed = size_bytes(tree)
        if not optimizer.state_dict()["state"]:  # two moments, as most have
            needed += 2 * size_bytes(tree["model"]["parameters"])
        own = len(self._generators)

        def check(tree: dict[str, Any]) -> None:
            resume.check(tree, kind, task, optimizer, own)

        self.tree, notes = resume.find(self._store, self._config, check)
        if self._group is not None:
            self.tree = _of_first(self._group, self.tree)
        self._store.check(needed)
        task.notes[:0] = [*notes, *self._store.problems()]
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
        put_all_back(tree["random"], self._generators)
        resume.close_run(tree, run, [*task.notes, resume.OVER], sink)
        return run

    def attach(self, state: TrainState) -> None:
        """Take the run's state, which stands from now on where the checkpoint was taken."""
        assert self._task is not None
        self._state, tree = state, self.tree
        state.at_end = self._at_end
        self._holds = bool(self._generators) or not self._task.feed.drawn_apart
        if tree is None:
            return
        place = tree["state"]
        self._trained = place["step"] - place["epoch_from"] if place["in_epoch"] else 0
        plans = [
            StepPlan(tuple(sizes), probe) for sizes, probe, n in tree["plans"] for _ in range(n)
        ]
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
        put_all_back(self._start, self._generators)
        return feed.epoch(self._plan, Past(self._trained, self._put_random_back))

    def _put_random_back(self) -> None:
        assert self.tree is not None
        random = self._boundary = self.tree["random"]
        put_all_back(random, self._generators)
        if self._task is not None and self._state is not None:
            taken = time.perf_counter() - self._opened
            self._task.notes += resume.read_again(self._task.feed, self._state.in_epoch, taken)

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
        if now >= self._due if self._group is None else self._group.agreed.due:
            self.hold()
            self.save()
        elif self._holds:
            self._boundary = self._between_steps.states()

    def hold(self) -> None:
        """Keep the random states for a checkpoint that is taken before the next step is whole."""
        self._boundary = all_states(self._generators)

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
        self._start = all_states(self._generators)

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
        start = self._start
        now = start if not state.in_epoch else self._boundary or all_states(self._generators)
        return {
            "content": resume.CONTENT,
            "kind": self._kind,
            "ended": outcome and checkpoint.text_of(state.run),
            "config": self._config.as_json(),
            "data": resume.data_of(task, len(self._generators)),
            "start": start,
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
                self.save(state.run.outcome)
        self.close()

    def close(self) -> None:
        """Wait until all is written, and let others have the folder."""
        if self._state is None:
            self._store.close()
            return
        interrupts = self._state.interrupts
        found = interrupts.at_once, interrupts.ending
        interrupts.at_once, interrupts.ending = True, False
        try:
            self._store.close()
        finally:
            interrupts.at_once, interrupts.ending = found
            self._tell()


def _of_first(group: ranks.Ranks, tree: Any) -> Any:
    """Return the tree that the first of several processes has read."""
    held = io.BytesIO()
    if tree is not None:
        torch.save(tree, held)
    told = group.of_first(held.getvalue())
    return torch.load(io.BytesIO(told), weights_only=True) if told and not group.first else tree
