"""A person's loader, read in whole steps: each batch as large as the step that was planned for it.

Their own loop goes over these batches, so `len` and schedulers are told the truth about them. The
person's loader is never changed. Knows no model.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from . import nested
from .data import NOTHING, Past, Plan, Recorded
from .sampled import SampledFeed
from .sizing import Sizing


class AsItComes:
    """A stand-in for the feed of a loop whose batches are not read by us, `base` samples each."""

    samples: int | None = None
    most: int | None = None
    batches: int | None = None
    workers = 0
    note: str | None = None
    drawn_apart = False

    def __init__(self, base: int) -> None:
        self.base = base

    def epoch(self, planner: Any, past: Any = None) -> Iterator[Any]:
        del planner, past
        return iter(())

    def ended(self, samples: int, *, over: bool = False) -> int:
        del over
        return samples // self.base

    def close(self) -> None:
        pass


class Passes:
    """Passes over a map-style DataLoader at planned sizes.

    `newest` is the plan of the batch that was handed out last, None where it has another size.
    """

    newest: Plan | None = None

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.feed = SampledFeed(loader, None, loader.pin_memory)
        self._planned: deque[Plan] = deque()  # drawn ahead by the loader's workers
        self._steps = self._samples = 0  # handed out in the newest pass
        self._told = self._told_steps = 0  # loader batches, and steps, that a scheduler was told of
        self._due = 0.0  # what it is still to be told
        self._under_way = self._begun = False

    def batches(
        self,
        planner: Callable[[int | None], Plan],
        uncut: Callable[[], bool],
        past: Past = NOTHING,
    ) -> Iterator[Any]:
        """Yield the batches of one pass but for those that are `past`; while they are `uncut` they
        keep the loader's size."""
        planned = self._planned = deque()
        self._steps = self._samples = self._told = self._told_steps = 0
        self._under_way = self._begun = True

        def gone() -> None:
            for _ in range(past.steps):
                self._samples += sum(planned.popleft().sizes)
            self._steps = past.steps
            past.gone()

        def plan(remaining: int | None) -> Plan:
            base = self.feed.base if remaining is None else min(self.feed.base, remaining)
            planned.append(Recorded((base,)) if uncut() else planner(remaining))
            return Recorded((sum(planned[-1].sizes),))

        try:
            for data in self.feed.epoch(plan, Past(past.steps, gone)):
                found, (n,) = planned.popleft(), data.sizes
                self.newest = found if sum(found.sizes) == n else None
                self._steps, self._samples = self._steps + 1, self._samples + n
                yield data.batches[0]
        finally:
            self._under_way = False

    @property
    def place(self) -> list[Any]:
        """Where the pass stands: batches and samples handed out, what schedulers were told of."""
        return [self._steps, self._samples, self._told, self._told_steps, self._due]

    def told(self, place: list[Any]) -> None:
        """Have schedulers been told what they were at a `place`."""
        self._told, self._told_steps, self._due = place[2:]

    def length(self, whole: int, batch: int) -> int:
        """Return how many batches a pass has: `whole` before the first one, those handed out and
        those to come at `batch` samples during one, those handed out after it."""
        if not self._begun or self.feed.samples is None:
            return whole
        if not self._under_way:
            return self._steps
        ahead = [sum(plan.sizes) for plan in self._planned]
        left = max(0, self.feed.samples - self._samples - sum(ahead))
        return self._steps + len(ahead) - (-left // batch)

    def due(self) -> int:
        """Return how often a scheduler is to be stepped where the plain loop steps it once a batch:
        for each loader batch of the samples since it was last asked, over the steps since then."""
        ended = self.feed.ended(self._samples)
        steps = max(1, self._steps - self._told_steps)
        self._due += (ended - self._told) / steps
        self._told, self._told_steps = ended, self._steps
        times = int(self._due + 1e-9)
        self._due -= times
        return times


def cut(batch: Any, sizes: list[int]) -> list[Any]:
    """Return a batch in pieces of `sizes`; itself where there is one."""
    if len(sizes) == 1:
        return [batch]
    ends = itertools.accumulate(sizes)
    return [nested.rows(batch, end - n, end) for n, end in zip(sizes, ends, strict=True)]


def sizes_of(
    passes: Passes | None, sizing: Sizing, countable: int | None, n: int
) -> tuple[list[int], bool]:
    """Return the sizes of the micro-batches of a step of `n` samples, and whether it measures the
    noise; `countable` is None where the batch cannot be cut."""
    if countable is None:
        return [n], False
    if passes is not None:
        plan, passes.newest = passes.newest, None
    else:
        plan = sizing.plan(None)
    if plan is not None and sum(plan.sizes) == n:
        return list(plan.sizes), plan.probe
    return sizing.recut(n), False
