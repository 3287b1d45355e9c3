"""The data of a run of several processes: each reads its share of every step, in the same order.

The first process draws the order of an epoch and tells it. A step of n samples is cut into as many
runs as there are processes, so that every sample is used once. Steps are planned at the same place
of the loop everywhere, however many micro-batches a process reads ahead. Knows no model.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from ..errors import ConfigError, HybridMagicError
from ..policy import batch as cutting
from ..policy.facts import Settings
from . import nested
from .data import NOTHING, Past, Planner, SplitFeed, StepData, behind
from .drawing import generators_of
from .randomness import all_states, put_all_back, seed_everything
from .ranks import Ranks, current
from .sampled import SampledFeed, check_loader, is_standard


def settings(found: Settings, ranks: Ranks, samples: int | None, name: str) -> Settings:
    """Return what the policy may do over all processes: its sizes are of them together.

    Args:
        samples: those of an epoch, which are to be the same everywhere.
    Raises:
        HybridMagicError: fewer samples in a batch than processes, or data that are not alike.
    """
    ranks.least = least = ranks.size * (2 if found.batch_statistics else 1)
    pinned = None if found.micro is None else found.micro * ranks.size
    found = dataclasses.replace(found, micro=pinned)
    fewest = min(found.base, found.first_batch)
    if fewest < least:
        raise ConfigError(
            f"a step has {fewest} samples of {name}, and there are {ranks.size} processes; wanted "
            f"at least {least}, as each takes its share of every step; use fewer processes or a "
            "larger batch"
        )
    told = ranks.of_all((found.base, samples, found.budget_bytes, found.device_bytes))
    if len({each[:2] for each in told}) > 1:
        raise HybridMagicError(
            f"{name} is not the same in every process ({told[0][1]} and {told[-1][1]} samples an "
            "epoch); wanted the whole data in each, which take their shares of every step "
            "themselves; leave a DistributedSampler out"
        )
    budgets, totals = ([each[n] for each in told] for n in (2, 3))
    return dataclasses.replace(
        found,
        budget_bytes=None if None in budgets else min(budgets),
        device_bytes=None if None in totals else min(totals),
    )


def open_shared_feed(
    loader: Any, name: str, *, workers: int | None = None, pin: bool = False
) -> SharedSampledFeed | SharedSplitFeed:
    """Return the feed of this process's shares of `loader`; `workers` replaces its number of worker
    processes.

    Raises:
        HybridMagicError: data that cannot be shared.
    """
    ranks = current()
    assert ranks is not None
    check_loader(loader, name)
    if not is_standard(loader):
        return SharedSplitFeed(loader, name, ranks)
    check_sampler(loader, name)
    try:
        len(loader.sampler)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        raise HybridMagicError(
            f"the sampler of {name}, a {type(loader.sampler).__name__}, has no length; wanted one "
            "that ends, to tell every process its order; give it a __len__"
        ) from None
    return SharedSampledFeed(loader, workers, pin, ranks)


def check_sampler(loader: Any, name: str) -> None:
    """Raise HybridMagicError where the loader has been shared out by the person already."""
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise HybridMagicError(
            f"{name} has a DistributedSampler, which hands out samples by itself; wanted the plain "
            "loader, as each process takes its share of every step; leave the sampler out"
        )


@dataclasses.dataclass(slots=True)
class _Planned:
    """A step to come: `whole` over all processes, `pieces` of indices that are this one's."""

    whole: list[int]
    pieces: list[list[Any]]
    probe: bool


class SharedSampledFeed(SampledFeed):
    """This process's shares of a map-style DataLoader."""

    def __init__(
        self, loader: DataLoader[Any], workers: int | None, pin: bool, ranks: Ranks
    ) -> None:
        super().__init__(loader, workers, pin)
        self._ranks = ranks
        # workers read this many micro-batches ahead, and so at most this many steps
        self._lead = self.workers * (self._loader.prefetch_factor or 0)
        if self.workers and not ranks.first:
            self._loader.worker_init_fn = _Apart(ranks.rank, loader.worker_init_fn)
        self._order: list[Any] | None = None
        self._at = self._step = 0
        self._to_read: deque[list[Any]] = deque()
        self._to_come: deque[_Planned] = deque()

    def epoch(self, planner: Planner, past: Past = NOTHING) -> Iterator[StepData]:
        self._order, self._at, self._step = None, 0, 0
        self._to_read, self._to_come = deque(), deque()
        if past.steps and self.workers:
            return behind(self._steps(planner), past)
        self._past = past
        return self._steps(planner)

    def _steps(self, planner: Planner) -> Iterator[StepData]:
        self._plan = planner
        if self._tensors is not None:
            self._draw_base_seed()
        stream = self._rows() if self._tensors is not None else iter(self._loader)
        self._stream = stream
        try:
            self._draw_order()
            while True:
                self._plan_ahead(1 + self._lead - len(self._to_come))
                if not self._to_come:
                    break
                step = self._to_come.popleft()
                self._ranks.draw_apart(0, self._step)
                self._step += 1
                batches = [next(stream) for _ in step.pieces]
                sizes = [len(piece) for piece in step.pieces]
                yield StepData(batches, sizes, step.probe, whole=step.whole)
            self._stream = None
        finally:
            if not self._loader.persistent_workers:
                del stream

    def indices(self) -> Iterator[list[int]]:
        """Yield the indices of one micro-batch of this process after the other."""
        self._draw_order()
        while self._to_read:
            yield self._to_read.popleft()

    def _draw_order(self) -> None:
        """Learn the order of the epoch, which the first process draws, once; plan the first steps,
        and go past those that were trained before."""
        if self._order is not None:
            return
        ranks, found = self._ranks, None
        if ranks.first:
            salt = zlib.crc32(torch.get_rng_state().numpy().tobytes())
            found = list(self._sampler), salt
        order, ranks.salt = ranks.of_first(found)
        if self._drop_last:
            del order[len(order) // self.base * self.base :]
        self._order = order
        (over, gone), self._past = (self._past.steps, self._past.gone), NOTHING
        self._plan_ahead(over + 1 + self._lead)
        for _ in range(min(over, len(self._to_come))):
            for _ in self._to_come.popleft().pieces:
                self._to_read.popleft()
            self._step += 1
        if over:
            gone()

    def _plan_ahead(self, steps: int) -> None:
        """Plan so many steps more, as far as there are samples."""
        order, planner, ranks = self._order, self._plan, self._ranks
        assert order is not None
        assert planner is not None
        for _ in range(steps):
            left = len(order) - self._at
            if left <= 0:
                return
            plan = planner(left)
            n = sum(plan.sizes)
            whole = cutting.merged(plan.sizes, ranks.least)
            start, end = cutting.share(n, ranks.rank, ranks.size)
            mine = order[self._at + start : self._at + end]
            ends = [0, *itertools.accumulate(cutting.proportional(len(mine), whole))]
            pieces = [mine[a:b] for a, b in itertools.pairwise(ends)]
            self._at += n
            self._to_read += pieces
            self._to_come.append(_Planned(whole, pieces, plan.probe))


class SharedSplitFeed(SplitFeed):
    """This process's rows of batches as they come: every process reads all of them alike."""

    def __init__(self, loader: Any, name: str, ranks: Ranks) -> None:
        generators = generators_of(loader)
        _alike(ranks, generators)
        super().__init__(loader, name)
        self._ranks, self._generators = ranks, generators
        if self.note is not None:
            raise HybridMagicError(
                f"{self.note}; wanted batches that can be shared by {ranks.size} processes; leave "
                "--processes out"
            )

    def epoch(self, planner: Planner, past: Past = NOTHING) -> Iterator[StepData]:
        steps = super().epoch(planner, past)
        ranks = self._ranks
        while True:
            _alike(ranks, self._generators)  # what is read may draw from them
            step = next(steps, None)
            if step is None:
                return
            rows = [cutting.share(n, ranks.rank, ranks.size) for n in step.sizes]
            held = [
                (nested.rows(batch, start, end), end - start)
                for batch, (start, end) in zip(step.batches, rows, strict=True)
                if end > start
            ]
            yield StepData([b for b, _ in held], [n for _, n in held], step.probe, whole=step.sizes)


def batches_of(loader: Any, ranks: Ranks) -> Iterator[Any]:
    """Yield this process's share of the batches of a loader to validate on: every so manieth."""
    _alike(ranks, generators_of(loader))
    if not is_standard(loader):
        yield from itertools.islice(loader, ranks.rank, None, ranks.size)
        return
    cut: Any = loader.batch_sampler
    batches = ranks.of_first(list(cut) if ranks.first else None)
    yield from DataLoader(
        loader.dataset,
        batch_sampler=batches[ranks.rank :: ranks.size],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
    )


def _alike(ranks: Ranks, generators: Sequence[torch.Generator]) -> None:
    """Have every process draw what the first one draws, until it is told otherwise."""
    states = ranks.of_first(all_states(generators) if ranks.first else None)
    ranks.salt = zlib.crc32(states["torch"].numpy().tobytes())
    if not ranks.first:
        put_all_back({**states, "cuda": [], "mps": None}, generators)


class _Apart:
    """Has the loader's workers of another process than the first draw other random numbers."""

    def __init__(self, rank: int, own: Callable[[int], Any] | None) -> None:
        self._rank, self._own = rank, own

    def __call__(self, worker: int) -> None:
        seed_everything(zlib.crc32(repr((torch.initial_seed(), self._rank)).encode()))
        if self._own is not None:
            self._own(worker)
