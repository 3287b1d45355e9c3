"""Sizing: what sizes the run's steps have. Asks the policy, or repeats what another run did.

The one place of the engine that holds the policy's state; emits its changes. Knows no tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..policy import plain, steering
from ..records import NoteRecord, Record
from ..sizes import StepSizes
from .data import Plan, Recorded


class Sizing:
    """The sizes of the steps to come; `pinned` where nothing that a step shows can change them."""

    def __init__(
        self,
        settings: steering.Settings,
        emit: Callable[[Record], None],
        replay: StepSizes | None = None,
    ) -> None:
        self.settings, self._emit = settings, emit
        self._state = steering.init(settings)
        self._planned: Iterator[tuple[tuple[int, ...], float]] = iter(replay or ())
        self._factors = iter(replay or ())
        self.tight = False  # a size ran out of memory
        self._replayed = 0 if replay is None else len(replay)  # 0: also when it is over
        self._passed_over = False  # something that was asked for by hand
        self._settled = (
            settings.batch != "adaptive"
            and (settings.micro or settings.accum) is not None
            and settings.warmup in ("auto", 0)
        )
        self.pinned = self.replaying or self._settled

    @property
    def replaying(self) -> bool:
        """Whether the next step repeats a recorded one."""
        return self._replayed > 0

    def plan(self, remaining: int | None) -> Plan:
        """Plan the next step, with `remaining` samples left in the epoch (None: unknown)."""
        again = next(self._planned, None)
        if again is not None:
            return Recorded(_fitted(again[0], remaining, pairs=self.settings.batch_statistics))
        plan, self._state = steering.plan(self._state, remaining)
        return plan

    def lr_factor(self, size: int) -> float:
        """Return the next step's factor on the learning rate; asked for once a step.

        One batch as it comes counts as planned.
        """
        if self._replayed:
            again = next(self._factors, None)
            if again is not None:
                return again[1]
            self._emit(NoteRecord(f"replayed all {self._replayed} steps; the next are as asked"))
            self._replayed, self.pinned = 0, self._settled
        planned = max(self._state.batch, self.settings.base)
        return steering.lr_factor(self._state, min(size, planned))

    def learn(self, points: Sequence[tuple[int, float, int | None]], size: int) -> tuple[int, ...]:
        """Tell the policy of passes (samples, seconds, peak bytes) that trained nothing.

        Returns the cut that it then makes of the first step's `size` samples.
        """
        self._state, changes = steering.rehearsed(self._state, points)
        self._tell(changes)
        return steering.recut(self._state, size)

    def observe(self, facts: steering.StepFacts) -> None:
        """Tell the policy of a step."""
        self._state, changes = steering.observe(self._state, facts)
        self._tell(changes)

    def by_hand(self, name: str, value: float | None, step: int) -> None:
        """Have the policy follow a setting, or "grow" or "shrink"; not while a run is replayed."""
        if self._replayed:
            if not self._passed_over:
                self._emit(NoteRecord(f"{name} is passed over: a replay repeats recorded sizes"))
            self._passed_over = True
            return
        self.pinned = False  # a ramp may have to be followed, or a size be chosen again
        self._state, changes = steering.apply(self._state, name, value, step)
        self._tell(changes)

    def summed(self) -> None:
        """Tell the policy that the loss is a sum over samples."""
        self._state = steering.summed(self._state)

    @property
    def noise_scale(self) -> float | None:
        return steering.noise_scale(self._state)

    @property
    def batch(self) -> int:
        """Samples in a full step as things stand."""
        return self._state.batch

    @property
    def learned(self) -> steering.State:
        """What the policy knows: of use to another run of the same model, through `go_on`."""
        return self._state

    def go_on(self, learned: steering.State) -> None:
        """Begin with what another run has learned."""
        self._state = learned

    def state(self) -> dict[str, Any]:
        """Return all that is known, as plain values, for `take_up`."""
        learned = plain.as_plain(self._state)
        return {"learned": learned, "tight": self.tight, "pinned": self.pinned}

    def take_up(self, state: dict[str, Any]) -> bool:
        """Go on where the sizing of another run stood, whose `state` this was; return whether that
        can be: it followed the same settings. The memory that others hold may have changed."""
        try:
            learned: steering.State = plain.from_plain(state["learned"])
        except ValueError:  # another version's
            return False
        asked, now = learned.asked, self.settings
        if asked != dataclasses.replace(now, budget_bytes=asked.budget_bytes):
            return False
        self._state, self.tight, self.pinned = learned, state["tight"], state["pinned"]
        return True

    # -- running out of memory --

    def fits(self, sizes: Sequence[int]) -> bool:
        """Return whether no size among these ran out of memory before."""
        return steering.fits(self._state, sizes)

    def ran_out(self, size: int, step: int) -> None:
        """Tell the policy that a micro-batch of `size` ran out of memory in `step`."""
        self.tight = True
        self._state, changes = steering.oom(self._state, size, step)
        self._tell(changes)

    def recut(self, n: int) -> list[int]:
        """Return the cut of exactly `n` samples as things stand."""
        return list(steering.recut(self._state, n))

    def _tell(self, changes: steering.Changes) -> None:
        for change in changes:
            self._emit(change)
            self.tight |= change.what == "micro"  # what is planned already may be too large now


def _fitted(sizes: tuple[int, ...], remaining: int | None, *, pairs: bool) -> tuple[int, ...]:
    """Return recorded `sizes` cut off after `remaining` samples, for data that has fewer.

    Where batch statistics want `pairs`, no sample is cut off alone or left for the next step.
    """
    n = total = sum(sizes)
    if remaining is not None:
        n = min(total, remaining)
        n -= pairs and remaining == n + 1 and n > 2
    if n == total:
        return sizes
    ends = itertools.accumulate(sizes)
    cut = [size - max(0, end - n) for size, end in zip(sizes, ends, strict=True)]
    kept = [size for size in cut if size > 0]
    if pairs and kept[-1] == 1 and len(kept) > 1:
        kept[-2:] = [kept[-2] - 1, 2] if kept[-2] > 2 else [kept[-2] + 1]
    return tuple(kept)
