"""A step that runs out of memory starts over, in smaller micro-batches, as if it had begun so.

The exception is dropped before anything is tried again, so that the failed tensors are gone by
then. Which sizes failed is the policy's to remember.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..errors import HybridMagicError, OutOfMemoryError
from ..policy import batch as cutting
from . import nested
from .data import StepData
from .device import attempt
from .sizing import Sizing
from .step import train_step
from .step_state import StepResult, StepState

Done = TypeVar("Done")


def whole_step(
    state: StepState, sizing: Sizing, data: StepData, *, measure_peaks: bool = False
) -> tuple[StepResult, int]:
    """Train one step on `data`, however often its micro-batches must shrink; return the number of
    times it started over, too.

    Raises:
        HybridMagicError: the smallest possible micro-batch ran out of memory; nothing of the step
            is left.
    """
    factor = sizing.lr_factor(sum(data.everyones))

    work = functools.partial(train_step, state, lr_factor=factor, measure_peaks=measure_peaks)
    return until_it_fits(state, sizing, data, work)


def until_it_fits(
    state: StepState, sizing: Sizing, data: StepData, work: Callable[[StepData], Done]
) -> tuple[Done, int]:
    """Return what `work` makes of `data`, however often its micro-batches must shrink, and the
    number of times it started over.

    Raises:
        As `whole_step`.
    """
    if sizing.tight and not sizing.fits(data.everyones):  # planned before such a size failed
        data = recut(data, _sizes(state, sizing, data)) or data
    retries = 0
    while True:
        before = _versions(data.batches)
        result, found = attempt(work, data)
        if found is None:
            return result, retries
        data = _smaller(state, sizing, data, before, found)
        retries += 1


def _smaller(
    state: StepState, sizing: Sizing, data: StepData, before: list[int], found: str
) -> StepData:
    """Take the failed step back and return its samples in smaller micro-batches."""
    size, step = state.running, state.steps + 1
    state.noise.forget()
    state.transaction.roll_back(state.steps)
    state.device.release()
    sizing.ran_out(size, step)
    why = (
        f"out of memory on {state.device.name} in step {step}, at a micro-batch of {size} "
        f"sample{'s' * (size > 1)} ({found})"
    )
    if _versions(data.batches) != before:
        raise HybridMagicError(
            f"{why}; wanted to start the step over, but it writes into its batch; let it write "
            "into a copy, e.g. x = x.clone()"
        )
    smaller = recut(data, _sizes(state, sizing, data))
    if smaller is None:
        raise OutOfMemoryError(
            f"{why}; wanted to cut it smaller, and this batch cannot be cut between samples; make "
            "the loader's batch smaller"
        )
    if max(smaller.everyones) >= max(data.everyones):
        raise OutOfMemoryError(
            f"{why}; wanted room for the smallest micro-batch there can be; free the memory that "
            "others hold (%hybrid_free), or use --precision bf16, shorter samples, activation "
            "checkpointing, or an optimizer with less state"
        )
    return smaller


def recut(data: StepData, sizes: Sequence[int]) -> StepData | None:
    """Return a step's samples in micro-batches of `sizes`, None where they cannot be cut.

    Where the old micro-batches cannot be joined (they are padded to different lengths) each is cut
    by itself, into none above the largest of `sizes`. Where several processes train, `sizes` are
    over all of them, and these samples are cut in proportion.
    """
    everyones = None if data.whole is None else list(sizes)
    if everyones is not None:
        sizes = cutting.proportional(sum(data.sizes), everyones)
    if any(nested.count(batch) != n for batch, n in zip(data.batches, data.sizes, strict=True)):
        return None
    batches, lengths, wanted = data.batches, data.sizes, list(sizes)
    if not {*itertools.accumulate(lengths)} <= {*itertools.accumulate(wanted)}:
        whole = nested.joined(*batches)
        if whole is not None and nested.count(whole) == sum(sizes):
            batches, lengths = [whole], [sum(sizes)]
        else:
            wanted = [part for n in lengths for part in cutting.split(n, max(sizes))]
    # a step that asked for the gradient of its input finds it as the loader made it
    batches = [nested.map_leaves(batch, _detached) for batch in batches]
    pieces: list[Any] = []
    ends = iter(wanted)
    for batch, n in zip(batches, lengths, strict=True):
        start = 0
        while start < n:
            size = next(ends)
            pieces.append(nested.rows(batch, start, start + size))
            start += size
    return StepData(pieces, wanted, data.probe and len(everyones or wanted) > 1, whole=everyones)


def _sizes(state: StepState, sizing: Sizing, data: StepData) -> Sequence[int]:
    """Return how a step's samples are to be cut as things stand, over all processes."""
    sizes = sizing.recut(sum(data.everyones))
    return sizes if state.together is None else cutting.merged(sizes, state.together.ranks.least)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _versions(batches: Sequence[Any]) -> list[int]:
    """Return how often each tensor of the step was written into."""
    found: list[int] = []
    for batch in batches:
        pair = type(batch) in (list, tuple) and len(batch) == 2
        if pair and type(batch[0]) is type(batch[1]) is Tensor:
            found += (batch[0]._version, batch[1]._version)  # (x, y), as most loaders yield it
        else:
            found += [leaf._version for leaf in nested.leaves(batch) if isinstance(leaf, Tensor)]
    return found
