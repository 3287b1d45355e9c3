"""A step of data, and batches as they come.

Custom batch samplers, IterableDatasets, generators and lists of batches are read as they come and
their batches are cut, never joined. (`sampled` reads map-style DataLoaders, at any size.) The
person's loader is never changed. Knows no model and no policy.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import HybridMagicError
from . import nested


class Plan(Protocol):
    """The sizes of one step's micro-batches, and whether the step measures the noise scale."""

    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def probe(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Recorded:
    """The plan of a step that is repeated: no batch as it comes stands in for its sizes."""

    sizes: tuple[int, ...]
    probe: bool = False


Planner = Callable[[int | None], Plan]


@dataclass(frozen=True, slots=True)
class Past:
    """The first `steps` of an epoch were trained before. `gone` is called when they are gone past
    and nothing behind them is read yet."""

    steps: int = 0
    gone: Callable[[], None] = lambda: None


NOTHING = Past()
_WORD_S = 1.0  # within which a worker's end is told


def next_of(stream: Iterator[Any], *default: Any) -> Any:
    """Return `next(stream, *default)`; a worker killed as it hands a batch over is named.

    Its connection breaks some moments before torch, called by a signal, can tell which one died.

    Raises:
        RuntimeError: torch's word on that worker, from the handler of that signal.
    """
    try:
        return next(stream, *default)
    except (EOFError, ConnectionError):
        time.sleep(_WORD_S)
        raise


@dataclass(slots=True)
class StepData:
    """The micro-batches of one step, on the host. `sizes` are the samples that each truly holds.

    `coming` is the first one on its way to the device, when its copy has begun already. `whole` are
    the sizes over all processes where several train and these are the share of one, which may have
    fewer micro-batches in a step of few samples, or none.
    """

    batches: list[Any]
    sizes: list[int]
    probe: bool
    coming: Any = None
    whole: list[int] | None = None

    @property
    def everyones(self) -> list[int]:
        """The sizes over all processes."""
        return self.sizes if self.whole is None else self.whole


def behind(steps: Iterator[StepData], past: Past) -> Iterator[StepData]:
    """Yield the steps that come behind those that are `past`, which are read."""
    for number, step in enumerate(steps, start=1 - past.steps):
        if number > 0:
            yield step
        del step
        if number == 0:
            past.gone()


class Feed(Protocol):
    """Steps of data, an epoch at a time.

    `base` is the loader's batch, `samples` those of an epoch (None: unknown), `most` the largest
    possible micro-batch (None: any), `batches` the loader's own batches of an epoch (None:
    unknown), `workers` the processes that read, `drawn_apart` says that reading on draws nothing
    from the random generators that the model shares.
    """

    base: int
    samples: int | None
    batches: int | None
    workers: int
    most: int | None
    note: str | None
    drawn_apart: bool

    def epoch(self, planner: Planner, past: Past = NOTHING) -> Iterator[StepData]:
        """Yield the steps of one pass over the loader, each planned with the samples then left,
        but for those that are `past`: they are planned, and read only where that has to be."""
        ...

    def ended(self, samples: int, *, over: bool = False) -> int:
        """Return how many loader batches end within the first `samples` of an epoch; `over`: with
        them it ends, and so does a short batch."""
        ...

    def close(self) -> None:
        """End the worker processes that this feed started."""
        ...


class SplitFeed:
    """Batches as the person's iterable yields them, cut where they can be."""

    samples: int | None = None
    workers = 0  # of ours
    most: int | None
    drawn_apart = False

    def __init__(self, loader: Any, name: str) -> None:
        self._loader = loader
        self.note: str | None = None
        stream = iter(loader)
        self._once = stream is loader  # what was read of it cannot be read again
        try:
            first = next(stream)
        except StopIteration:
            raise HybridMagicError(
                f"{name} yields nothing; wanted at least one batch; check its dataset "
                "(a generator can be read only once)"
            ) from None
        self.sample = first if self._once else None  # for those who look at one later
        # What was read is not read twice: the first epoch goes on from here.
        self._opened: Iterator[Any] | None = itertools.chain([first], stream)
        size = nested.count(first)
        if not size:
            self.note = (
                f"a batch of {name} cannot be cut between samples ({type(first).__name__}); "
                "each is trained whole and counts as one sample"
            )
        self.base = self.most = size or 1
        self._ended = 0  # batches of this epoch that were handed out whole
        try:
            self.batches: int | None = len(loader)
        except (TypeError, NotImplementedError):
            self.batches = None

    def epoch(self, planner: Planner, past: Past = NOTHING) -> Iterator[StepData]:
        steps = self._steps(planner)
        return behind(steps, past) if past.steps else steps

    def _steps(self, planner: Planner) -> Iterator[StepData]:
        stream, self._opened = self._opened or iter(self._loader), None
        step = StepData([], [], False)
        queue: deque[int] = deque()
        want = micro = self._ended = 0
        for batch in stream:
            n = nested.count(batch)
            start, end = 0, n or self.base
            while start < end:
                if not step.batches:
                    plan = planner(None)
                    queue, want, micro = deque(plan.sizes), sum(plan.sizes), max(plan.sizes)
                    step.probe = plan.probe
                    if start == 0 and want == self.base and not isinstance(plan, Recorded):
                        want = end  # the base batch is one batch as it comes, whatever its size
                size = (
                    end
                    if n is None
                    else min(queue.popleft() if queue else micro, want, end - start)
                )
                step.batches.append(
                    batch if size == end else nested.rows(batch, start, start + size)
                )
                step.sizes.append(size)
                start, want = start + size, want - size
                self._ended += start >= end
                if want <= 0:
                    yield step
                    step = StepData([], [], False)
        if step.batches:
            yield step

    def ended(self, samples: int, *, over: bool = False) -> int:
        del samples, over  # batches are never read ahead of the step in hand
        return self._ended

    def close(self) -> None:
        if not self._once:
            self._opened = None
