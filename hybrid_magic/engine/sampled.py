"""A map-style DataLoader, read through its own sampler at any size.

Indices are taken in the sampler's order and handed, cut to the planned sizes, to a DataLoader with
the same dataset, collate_fn, workers, generator, pin_memory and worker_init_fn. For a GPU batches
are pinned as far as they lie on the host. Random numbers are drawn exactly when the plain loop
would draw them. A size is planned when its samples are asked for, so with worker processes a new
plan acts as many micro-batches later as the workers were asked for.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    default_collate,
)

from ..errors import HybridMagicError
from . import nested
from .data import NOTHING, Feed, Past, Planner, SplitFeed, StepData, behind


def open_feed(loader: Any, name: str, *, workers: int | None = None, pin: bool = False) -> Feed:
    """Return the feed of `loader`; `workers` replaces its number of worker processes.

    Raises:
        HybridMagicError: as `check_loader`.
    """
    check_loader(loader, name)
    return SampledFeed(loader, workers, pin) if is_standard(loader) else SplitFeed(loader, name)


def check_loader(loader: Any, name: str) -> None:
    """Raise HybridMagicError where `loader` is not something that yields batches, or has none."""
    try:
        empty = len(loader) == 0
    except (TypeError, NotImplementedError):
        empty = False
    if empty:
        raise HybridMagicError(
            f"{name} is empty; wanted at least one batch; check its dataset (and drop_last)"
        )
    if not hasattr(loader, "__iter__") or isinstance(loader, (torch.nn.Module, Mapping, str)):
        raise HybridMagicError(
            f"{name} is a {type(loader).__name__}; wanted a DataLoader or an iterable of batches; "
            "name your training loader"
        )


def is_standard(loader: Any) -> TypeGuard[DataLoader[Any]]:
    """Return whether this is a DataLoader over samples that can be had by their index."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and type(loader).__iter__ is DataLoader.__iter__
    )


class SampledFeed:
    """A map-style DataLoader, read through its own sampler at any size."""

    most: int | None = None
    note: str | None = None

    def __init__(self, loader: DataLoader[Any], workers: int | None, pin: bool) -> None:
        cut: Any = loader.batch_sampler
        self._sampler, self._drop_last, self.base = cut.sampler, cut.drop_last, cut.batch_size
        self._generator = loader.generator
        self._issued: deque[tuple[int, int, bool]] = (
            deque()
        )  # (micro-batches of its step, samples, probe)
        self._plan: Planner | None = None
        self._stream: Any = None
        self._past = NOTHING
        self._pin = pin
        try:
            total = len(self._sampler)
            self.samples = total // self.base * self.base if self._drop_last else total
        except (TypeError, NotImplementedError):
            self.samples = None
        self.batches = None if self.samples is None else -(-self.samples // self.base)
        workers = loader.num_workers if workers is None else workers
        self._tensors = _plain_tensors(loader) if workers == 0 else None
        self.workers = workers
        self.drawn_apart = workers > 0 or self._tensors is not None
        ours = pin and not loader.pin_memory and torch.cuda.is_available()
        self._loader = DataLoader(
            loader.dataset,
            batch_sampler=_Cut(self),
            num_workers=workers,
            collate_fn=_ToBePinned(loader.collate_fn) if ours else loader.collate_fn,
            pin_memory=loader.pin_memory or ours,
            timeout=loader.timeout if workers else 0,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context if workers else None,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor if workers else None,
            persistent_workers=loader.persistent_workers and workers > 0,
        )

    def epoch(self, planner: Planner, past: Past = NOTHING) -> Iterator[StepData]:
        if past.steps and self.workers:  # their random numbers go on with what they read
            return behind(self._steps(planner), past)
        self._past = past
        return self._steps(planner)

    def _steps(self, planner: Planner) -> Iterator[StepData]:
        self._plan, self._issued = planner, deque()
        stream = self._indexed() if self._tensors is not None else iter(self._loader)
        self._stream = stream
        batches: list[Any] = []
        sizes: list[int] = []
        left, probe = 0, False
        try:
            for batch in stream:
                count, size, asked_probe = self._issued.popleft()
                if not batches:
                    left, probe = count, asked_probe
                batches.append(batch)
                sizes.append(size)
                left -= 1
                if left == 0:
                    yield StepData(batches, sizes, probe)
                    batches, sizes = [], []
            if batches:
                yield StepData(batches, sizes, probe)
            self._stream = None
        finally:
            if not self._loader.persistent_workers:
                del stream  # its worker processes end with it

    def indices(self) -> Iterator[list[int]]:
        """Yield the indices of one micro-batch after the other, planning each step as it begins."""
        order: Iterator[int] = iter(self._sampler)
        if self._drop_last:
            order = _whole(order, self.base)
        left, planner, issued = self.samples, self._plan, self._issued
        assert planner is not None
        (over, gone), self._past = (self._past.steps, self._past.gone), NOTHING
        head: list[int] = []
        while True:
            if left is None:  # no step is planned that there is no sample for
                head = list(itertools.islice(order, 1))
                if not head:
                    return
            plan = planner(left)
            count, probe = len(plan.sizes), plan.probe
            for size in plan.sizes:
                taken = [*head, *itertools.islice(order, size - len(head))]
                head = []
                if not taken:
                    if over:  # they were all
                        gone()
                    return
                if not over:
                    issued.append((count, len(taken), probe))
                    yield taken
            if over:
                over -= 1
                if not over:
                    gone()
            if left is not None:
                left -= sum(plan.sizes)
                left = left if left > 0 else None  # a sampler may hold more than it says

    def _indexed(self) -> Iterator[Any]:
        """Yield what the loader would, by indexing whole tensors: the same values, far cheaper."""
        self._draw_base_seed()
        yield from self._rows()

    def _draw_base_seed(self) -> None:
        """Draw what a DataLoader's iterator draws when it is made: its workers' base seed."""
        torch.empty((), dtype=torch.int64).random_(generator=self._generator)

    def _rows(self) -> Iterator[Any]:
        tensors, order = self._tensors or ([], None)
        for taken in self.indices():
            if type(taken[0]) is not int:  # tensors or NumPy integers, which index otherwise
                taken = [int(index) for index in taken]
            at = taken if order is None else [order[index] for index in taken]
            batch = [tensor[at] for tensor in tensors]
            yield _pinned(batch) if self._pin else batch

    def ended(self, samples: int, *, over: bool = False) -> int:
        over = over or samples == self.samples  # the last batch may be short
        return -(-samples // self.base) if over else samples // self.base

    def close(self) -> None:
        iterators: list[Any] = [self._loader._iterator, self._stream]
        for iterator in iterators:
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()
                for worker in iterator._workers:
                    worker.join(5)  # where another one died they are ended, and not waited for
        self._loader._iterator = self._stream = None


def _pinned(batch: Any) -> Any:
    """Return `batch` with its tensors on the host pinned; torch refuses to pin others."""
    return nested.from_host(batch, torch.Tensor.pin_memory)


class _ToBePinned:
    """A collate_fn whose batches the loader pins our way: a batch that has a `pin_memory` of its
    own is handed on as what that returns."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> _Unpinned:
        return _Unpinned(self._collate(samples))


class _Unpinned:
    """A batch between its collate_fn and the loader's pinning."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def pin_memory(self) -> Any:
        return _pinned(self._batch)


class _Cut(Sampler[list[int]]):
    def __init__(self, feed: SampledFeed) -> None:
        self._feed = feed

    def __iter__(self) -> Iterator[list[int]]:
        return self._feed.indices()


def _whole(order: Iterator[int], size: int) -> Iterator[int]:
    """Yield `order` in whole groups of `size`, as drop_last leaves it."""
    while len(group := list(itertools.islice(order, size))) == size:
        yield from group


def _plain_tensors(loader: DataLoader[Any]) -> tuple[list[torch.Tensor], list[int] | None] | None:
    """Return the tensors that the loader indexes and its subset's order, None for others."""
    dataset, order = loader.dataset, None
    if loader.collate_fn is not default_collate:
        return None
    if type(dataset) is Subset:
        dataset, order = dataset.dataset, [int(index) for index in dataset.indices]
    if type(dataset) is not TensorDataset or any(tensor.is_sparse for tensor in dataset.tensors):
        return None
    return list(dataset.tensors), order
