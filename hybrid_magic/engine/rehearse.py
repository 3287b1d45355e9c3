"""Measuring without training: forward and backward passes that leave no trace.

Buffers, random state and gradients are put back, and the samples are trained on afterwards as if
nothing had been. Used where a real step cannot be measured: to choose a precision, and to size the
micro-batch of models with batch statistics.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import nested
from . import precision as precisions
from .copies import Own
from .data import StepData
from .device import attempt, is_out_of_memory
from .forward import forward
from .precision import Precision
from .prepare import attributes_kept
from .randomness import RandomState
from .reduction import Reduction, check, settle
from .sizing import Sizing
from .step import backward
from .step_state import StepState

GAIN = 1.15  # a reduced precision must be this much faster than fp32 to be chosen by measurement


def choose_precision(
    ready: StepState, asked: str, first: StepData, *, rehearses: bool = True
) -> tuple[Precision, str]:
    """Return the precision of the run and why, measuring where the device does not settle it and
    the step can be tried."""
    device = ready.device.device
    if asked != "auto":
        return Precision(asked, device), "asked for"
    if any(param.dtype == torch.float64 for param in ready.params):
        return Precision("fp32", device), "computing as the weights are, in float64"
    name, why = precisions.native(device)
    measured = precisions.worth_measuring(device) if rehearses else None
    if name is None and measured is not None:
        largest = first.batches[first.sizes.index(max(first.sizes))]
        name, times = faster_precision(ready, largest, measured)
        why = f"{why}, and {times}"
    return Precision(name or "fp32", device), f"chose {name or 'fp32'}: {why}"


def size_first_step(ready: StepState, sizing: Sizing, first: StepData) -> None:
    """Size the micro-batch of a model with batch statistics by passes that leave no trace.

    Its first real step cannot be cut into small micro-batches, since they would change what
    BatchNorm learns; on a device whose memory is the limit the sizes are therefore rehearsed.
    """
    alone = ready.together is None
    if not (ready.batch_statistics and ready.device.late and alone and len(first.sizes) == 1):
        return
    size, batch = first.sizes[0], first.batches[0]
    if nested.count(batch) != size or size < 16:
        return
    sizes = (max(2, size // 8), size // 4, size // 2)
    points, failed = measure_sizes(ready, batch, sizes)
    if failed is not None:
        sizing.ran_out(failed, 0)
    cut = sizing.learn(points, size)
    ends = list(itertools.accumulate(cut))
    first.batches = [nested.rows(batch, end - n, end) for n, end in zip(cut, ends, strict=True)]
    first.sizes = list(cut)


@contextlib.contextmanager
def leaving_no_trace(state: StepState) -> Iterator[None]:
    """Put buffers, random state, gradients and precision back at the end: a step taken back."""
    precision = state.precision
    state.transaction.begin(state.steps, precision)
    try:
        with attributes_kept(state.model):
            yield
    finally:
        state.precision = precision
        state.transaction.roll_back(state.steps)


def _pass_seconds(state: StepState, batch: Any) -> float | None:
    """Return the seconds of one forward and backward pass on a copy of a host batch, None where
    there is nothing to be trained on it."""
    batch = _copy(state, batch)
    state.device.synchronize()
    start = state.device.mark()
    loss, _ = forward(state, batch)
    if loss is None and state.adopted:
        return None
    check(loss)
    backward(state, loss)
    seconds = state.device.seconds(state.device.mark(), start)
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
        try:
            result, found = attempt(_compared, state, batch, name, rounds)
        except Exception as error:
            if not (state.adopted or precisions.refuses_autocast(error)):
                raise
            why = str(error).partition("\n")[0][:120]
            return "fp32", f"it could not be computed in {name} ({why})"
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
                seconds = _pass_seconds(state, batch)
                if seconds is None:
                    return "fp32", f"its first batch trains nothing, so {name} was not measured"
                taken[key] = seconds
                if turn > 0:  # the first pass warms up
                    best[key] = min(best[key], taken[key])
            wins += turn > 0 and taken["fp32"] > GAIN * taken[name]
    # by its best pass and in nearly every round: a busy machine disturbs now one, now the other
    chosen = name if best["fp32"] > GAIN * best[name] and wins >= rounds - 1 else "fp32"
    times = " and ".join(f"{key} {seconds * 1e3:.3g} ms" for key, seconds in best.items())
    near = chosen == "fp32" and best[name] < best["fp32"]
    return chosen, f"a micro-batch took {times}" + ", not surely 15 % less" * near


def settle_reduction(state: StepState, data: StepData, found: Reduction) -> Reduction:
    """Return how the loss is reduced, by computing it of a batch in one piece and in two.

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
    losses = _losses(state, [batch, *pieces])
    return found if losses is None else settle(found, pieces, sizes, losses)


def indivisible(state: StepState, data: StepData, factors: Sequence[float]) -> str | None:
    """Return why the losses of micro-batches do not make up their batch's loss, None where they do
    or it cannot be told.

    Args:
        data: the micro-batches of a batch; `factors` are their weights.

    A loss with dice in it is judged within thrice its own spread over three tries.
    """
    losses, _ = attempt(_losses, state, [nested.joined(*data.batches)] * 3 + data.batches)
    if losses is None or not all(map(math.isfinite, losses)):
        return None
    tries, parts = losses[:3], losses[3:]
    joined = math.fsum(map(operator.mul, factors, parts))
    allowed = 3 * (max(tries) - min(tries)) + 1e-4 * max(abs(tries[0]), 1e-12)
    if min(abs(joined - each) for each in tries) <= allowed:
        return None
    return (
        f"its loss is {tries[0]:.4g} in one piece and {joined:.4g} made up of {len(parts)} pieces "
        "(samples that are compared with each other, or targets that are left out)"
    )


def _losses(state: StepState, batches: Sequence[Any]) -> list[float] | None:
    """Return the losses of batches, in eval mode, in FP32 and without gradients, on copies; modes,
    buffers and random state are put back. None where the person's code cannot be tried so."""
    random, precision = RandomState(state.device.device), state.precision
    own = Own(state.model, state.params)
    own.take()
    state.precision = Precision("fp32", state.device.device)
    try:
        with attributes_kept(state.model), torch.no_grad():
            state.model.eval()
            return [float(forward(state, _copy(state, batch))[0]) for batch in batches]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None  # their code may want gradients here, or train nothing in eval mode
    finally:
        state.precision = precision
        own.put_back(changed=True)
        random.put_back()


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
            if seconds is None:
                return points, None
            points.append((size, seconds, state.device.peak()[0]))
        else:
            return points, None
    state.device.release()
    return points, size
