"""Measuring without training: forward and backward passes that leave no trace.

Buffers, random state and gradients are put back, and the samples are trained on afterwards as if
nothing had been. Used where a real step cannot be measured: to choose a precision, and to size the
micro-batch of models with batch statistics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import nested
from .data import StepData
from .device import attempt
from .precision import Precision
from .prepare import modes_kept
from .randomness import RandomState
from .reduction import Reduction, check, settle
from .step import StepState, backward, forward
from .transaction import Own

GAIN = 1.15  # a reduced precision must be this much faster than fp32 to be chosen by measurement


@contextlib.contextmanager
def leaving_no_trace(state: StepState) -> Iterator[None]:
    """Put buffers, random state, gradients and precision back at the end: a step taken back."""
    precision = state.precision
    state.transaction.begin(state.steps, precision)
    try:
        yield
    finally:
        state.precision = precision
        state.transaction.roll_back(state.steps)


def _pass_seconds(state: StepState, batch: Any) -> float:
    """Return the seconds of one forward and backward pass on a copy of a host batch."""
    batch = _copy(state, batch)
    state.device.synchronize()
    start = state.device.mark()
    loss, _ = forward(state, batch)
    check(loss)
    backward(state, loss)
    seconds = state.device.seconds(start, state.device.mark())
    for param in state.params:
        param.grad = None
    return seconds


def faster_precision(
    state: StepState, batch: Any, name: str, *, rounds: int = 5
) -> tuple[str, str]:
    """Return the faster of fp32 and `name` on `batch`, and the measurement in words.

    The two take turns; the fastest pass of each counts. fp32 stays unless `name` is 15 % faster.
    A batch that does not fit into memory is halved.
    """
    found: Any = ""
    while found is not None:
        result, found = attempt(_compared, state, batch, name, rounds)
        if found is not None:
            state.device.release()
            n = nested.count(batch) or 1
            if n == 1:
                return "fp32", f"memory ran out before {name} could be measured"
            batch = nested.rows(batch, 0, n // 2)
    return result


def _compared(state: StepState, batch: Any, name: str, rounds: int) -> tuple[str, str]:
    candidates = {
        "fp32": Precision("fp32", state.device.device),
        name: Precision(name, state.device.device),
    }
    best = dict.fromkeys(candidates, float("inf"))
    wins = 0
    with leaving_no_trace(state):
        for turn in range(rounds + 1):
            taken = {}
            for key, precision in candidates.items():
                state.precision = precision
                taken[key] = _pass_seconds(state, batch)
                if turn > 0:  # the first pass warms up
                    best[key] = min(best[key], taken[key])
            wins += turn > 0 and taken["fp32"] > GAIN * taken[name]
    # by its best pass and in nearly every round: a busy machine disturbs now one, now the other
    chosen = name if best["fp32"] > GAIN * best[name] and wins >= rounds - 1 else "fp32"
    times = " and ".join(f"{key} {seconds * 1e3:.3g} ms" for key, seconds in best.items())
    return chosen, f"a micro-batch took {times}"


def settle_reduction(state: StepState, data: StepData, found: Reduction) -> Reduction:
    """Return how the loss is reduced, by computing it of a batch in one piece and in two.

    In eval mode, in FP32 and without gradients, on a copy; modes, buffers and random state are put
    back.
    `found` stays where no micro-batch of the first step can be cut.
    """
    n = max(data.sizes)
    batch = data.batches[data.sizes.index(n)]
    if n > 1 and nested.count(batch) == n:
        cut = max(1, n // 3)  # unequal parts, so that a mean of means is not taken for the mean
        pieces, sizes = [nested.rows(batch, 0, cut), nested.rows(batch, cut, n)], [cut, n - cut]
    else:
        pieces, sizes = data.batches[:2], data.sizes[:2]
        batch = nested.joined(*pieces) if len(pieces) == 2 else None
        if batch is None:
            return found
    random, precision = RandomState(state.device.device), state.precision
    own = Own(state.model, state.params)
    own.take()
    state.precision = Precision("fp32", state.device.device)
    try:
        with modes_kept(state.model), torch.no_grad():
            state.model.eval()
            losses = [float(forward(state, _copy(state, piece))[0]) for piece in (batch, *pieces)]
    finally:
        state.precision = precision
        own.put_back()
        random.put_back()
    return settle(found, pieces, sizes, losses)


def _copy(state: StepState, batch: Any) -> Any:
    """Return a copy of a host batch on the device, for a step that may write into it."""
    batch = nested.map_leaves(batch, lambda leaf: leaf.clone() if hasattr(leaf, "clone") else leaf)
    return batch if state.mover is None else state.mover(batch)


def measure_sizes(
    state: StepState, batch: Any, sizes: Sequence[int]
) -> tuple[list[tuple[int, float, int | None]], int | None]:
    """Return (samples, seconds, peak bytes) of a pass over the first `sizes` samples of `batch`,
    and the size that ran out of memory, None where none did; larger ones are not tried."""
    points: list[tuple[int, float, int | None]] = []
    with leaving_no_trace(state):
        for size in sizes:
            state.device.reset_peak()
            seconds, found = attempt(_pass_seconds, state, nested.rows(batch, 0, size))
            if found is not None:
                break
            points.append((size, seconds, state.device.peak()[0]))
        else:
            return points, None
    state.device.release()
    return points, size
