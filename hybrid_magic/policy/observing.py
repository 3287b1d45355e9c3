"""What the facts of a step do to the state: memory, then times, then statistics.

Each function takes in its part and answers with the changes that follow. They run on every step, so
each does little: a peak counts when it is the highest, times are read ever more seldom, losses and
norms are judged in blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from statistics import median

from . import batch as cutting
from . import growth, microbatch, timing
from . import noise_scale as noise
from . import state as states
from .facts import StepFacts
from .state import Changes, State

TIME_ALL = 8  # steps timed after a change of sizes; of later ones every TIME_EVERY-th
TIME_EVERY = 16
PRESSED = 64  # steps within which the allocator's second retry at a size counts: the first may come
# of an evaluation, or of a failure that was answered already
LOOK_EVERY = 64  # steps between two looks at the micro-batch, in the long run


def memory(state: State, facts: StepFacts) -> Changes:
    """Take in a new highest peak or an allocator under pressure, and shrink where too much."""
    size = max(facts.sizes)
    if facts.peak_bytes is not None and (state.stepped or facts.peaks is None):
        state.high_bytes = max(state.high_bytes, facts.peak_bytes)
        state.sizes = microbatch.update(state.sizes, size, None, facts.peak_bytes)
    if facts.pressure:
        pressed, at = state.pressed
        state.pressed = size, state.observed
        again = pressed == size and state.observed - at <= PRESSED
        if again and size > min(2, state.sizes.floor):
            state.sizes = microbatch.failed(state.sizes, size, error=False)
            return states.resize(state, facts.step)
    budget = state.sizes.budget_bytes
    over = budget is not None and facts.peak_bytes is not None and facts.peak_bytes > budget
    return states.resize(state, facts.step) if over and state.stepped else ()


def speed(state: State, facts: StepFacts) -> Changes:
    """Take in a step's times, ever less often, and look whether the micro-batch should change."""
    ordinary = facts.sizes == state.whole.sizes
    state.seen += ordinary
    seen = state.seen
    if facts.noise is not None and facts.optimizer_seconds is not None:
        state.probe = timing.timed(state.probe, facts.optimizer_seconds)
    if ordinary and seen > TIME_ALL and seen % TIME_EVERY:
        return ()
    if facts.noise is None and facts.optimizer_seconds is not None:
        state.optimizer = timing.timed(state.optimizer, facts.optimizer_seconds)
    for size, seconds, peak in _points(facts, every=not state.stepped):
        state.sizes = microbatch.update(state.sizes, size, seconds, peak)
    if not state.stepped:
        state.stepped = not facts.skipped
        if state.stepped:
            state.sizes = microbatch.stepped(state.sizes)
            state.high_bytes = 0
        return ()
    look = ordinary and (seen & (seen - 1) == 0 or seen % LOOK_EVERY == 0)
    return states.resize(state, facts.step) if look and state.sized else ()


def _points(facts: StepFacts, *, every: bool) -> Iterator[tuple[int, float | None, int | None]]:
    """Yield (size, seconds, peak) of every micro-batch, or once a size with the median: the lower
    of two would make halves look faster than the whole."""
    times = facts.micro_seconds or (None,) * len(facts.sizes)
    peaks = facts.peaks or (None,) * len(facts.sizes)
    if every or len(facts.sizes) == 1:
        yield from zip(facts.sizes, times, peaks, strict=True)
        return
    for size in set(facts.sizes):
        mine = [i for i, one in enumerate(facts.sizes) if one == size]
        known = [time for i in mine if (time := times[i]) is not None]
        typical = median(known) if known else None
        highest = max((peak for i in mine if (peak := peaks[i]) is not None), default=None)
        yield size, typical, highest


def statistics(state: State, facts: StepFacts) -> Changes:
    """Take in a step's loss, norm and noise; halve the batch at once where the step blew up."""
    if facts.noise is not None:
        state.noise = noise.update(state.noise, *facts.noise)
        state.probed = True
        state.still += 1
    loss, norm, alarm = facts.loss, facts.grad_norm, None
    if loss is not None:
        if math.isfinite(loss):
            state.losses.append(loss)
        else:
            alarm = "the loss is not finite"
    if norm is not None and math.isfinite(norm):
        state.norms.append(norm)
        if norm > state.norm_limit:
            median = state.norm_limit / growth.FAR_ABOVE
            times = f"{norm / median:.0f} times its median {median:.3g}"
            alarm = alarm or f"gradient norm {norm:.3g}, {times}"
    elif (norm is not None or facts.skipped) and not state.settings.loss_scaling:
        alarm = alarm or "the gradient is not finite"
    changes = _retreat(state, facts, alarm) if alarm else ()
    state.unfolded += 1
    if state.unfolded < growth.BLOCK:
        return changes
    return changes + _judge(state, facts)


def _retreat(state: State, facts: StepFacts, why: str) -> Changes:
    """Halve the batch and cool down; not the base batch, nor for a step of a larger one."""
    base, batch = state.settings.base, state.batch
    state.cool_until = state.observed + growth.COOLDOWN
    if batch <= base or sum(facts.sizes) > batch:
        return ()
    after = max(base, cutting.rounded(batch // 2))
    reason = f"shrank {batch} -> {after}: {why}; no growth for {growth.COOLDOWN} steps"
    return states.rebatch(state, after, facts.step, "global", reason)


def _judge(state: State, facts: StepFacts) -> Changes:
    """Fold a block of steps into the health of the run, and let the policy move where it may."""
    state.health = growth.update(state.health, state.losses, state.norms)
    state.losses.clear()
    state.norms.clear()
    state.unfolded = 0
    state.norm_limit = growth.norm_limit(state.health)
    fresh = state.probed
    if fresh:
        state.noise = noise.since_fall(state.noise)
        state.estimate, state.probed = noise.estimate(state.noise), False
        state.factor_batch = 0
    swing = growth.spread(state.health)
    threshold = state.settings.stability_threshold
    if swing is None:
        return ()
    if swing > growth.OSCILLATION * threshold and state.batch > state.settings.base:
        why = f"the loss oscillates, spread {100 * swing:.0f} % of its level"
        return _retreat(state, facts, why)
    if state.observed - state.changed_at < growth.SPACING:
        return ()
    if not fresh and state.settings.policy == "goodput":
        return ()
    return _move(state, facts.step, swing)


def _move(state: State, step: int, swing: float) -> Changes:
    """Ask the policy for the global batch, and go there."""
    settings, batch, estimate = state.settings, state.batch, state.estimate
    stable = swing < settings.stability_threshold and state.observed >= state.cool_until
    now = growth.Standing(
        batch=batch,
        base=settings.base,
        max_batch=settings.max_batch,
        factor=settings.growth_factor,
        least=settings.efficiency,
        may_grow=stable,
        fits=functools.partial(_cuttable, state),
    )
    seconds = functools.partial(step_seconds, state)
    if settings.policy == "stability":
        move = growth.by_stability(now, estimate, seconds, swing)
    else:
        move = None if estimate is None else growth.by_goodput(now, estimate, seconds)
    if move is None:
        return ()
    reason = f"{'grew' if move.batch > batch else 'shrank'} {batch} -> {move.batch}: {move.reason}"
    return states.rebatch(state, move.batch, step, "global", reason)


def step_seconds(state: State, batch: int, sizes: tuple[int, ...] | None = None) -> float | None:
    """Return the predicted seconds of a step of `batch` samples with its optimizer step, cut into
    `sizes` or, without them, as the settings ask for; None while not known."""
    settings = state.settings
    if sizes is None and settings.accum is not None:
        sizes = cutting.shares(batch, settings.accum)
    elif sizes is None and settings.micro is not None:
        sizes = cutting.split(batch, settings.micro, floor=state.sizes.floor)
    seconds = microbatch.step_seconds(state.sizes, batch, sizes)
    optimizer = state.optimizer.typical if state.optimizer else 0.0
    return None if seconds is None else seconds + optimizer


def _cuttable(state: State, batch: int) -> bool:
    """Return whether `batch` can be cut as the model needs: without batch statistics any, with them
    only one whose micro-batches are not below the loader batch, or what memory made of it."""
    floor = min(state.sizes.floor, *state.whole.sizes)
    top = max(state.micro, microbatch.ceiling(state.sizes))
    return floor < 2 or batch // -(-batch // top) >= floor
