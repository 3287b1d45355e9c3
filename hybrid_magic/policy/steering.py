"""The steering: plans each step's sizes, observes what came of it, and says why anything changed.

The only room of the policy that the engine enters. `plan` is called in the order of issue, perhaps
several steps ahead of `observe`; both hand back the state they were given, changed in place (see
`state`). Reads no clock and no device. A step on which nothing can change costs a few comparisons;
timings are read ever more seldom, the loss is judged in blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from . import batch as cutting
from . import microbatch, observing
from . import noise_scale as noise
from . import state as states
from .facts import Settings, StepFacts, StepPlan
from .requests import apply
from .state import Changes, State

__all__ = [
    "Changes",
    "Settings",
    "State",
    "StepFacts",
    "StepPlan",
    "apply",
    "fits",
    "init",
    "lr_factor",
    "noise_scale",
    "observe",
    "oom",
    "plan",
    "recut",
    "rehearsed",
    "summed",
]

PROBE_EVERY = 4  # steps, until the window of the noise scale is full
PROBE_SELDOM = 8  # steps from then on, and while the cost of a probe is not known
PROBE_LEAST = 64  # never more seldom than this
PROBE_COST = 0.02  # most of the run's time that may go into probes
REVIEW = 8  # probes between two looks at how they are made and how often
STILL = 2 * noise.WINDOW  # probes without growth, after which they come ever more seldom

init = states.init


def plan(state: State, remaining: int | None = None) -> tuple[StepPlan, State]:
    """Return the next step's sizes and the state.

    Args:
        remaining: samples left in the epoch, None when not known.
    Raises:
        ValueError: no sample is left.
    """
    left = 0 if remaining is None else remaining - state.batch
    if state.until_probe > 0 and (left == 0 or left > 1):
        state.until_probe -= 1
        return state.whole, state
    return _plan(state, remaining), state


def recut(state: State, n: int) -> tuple[int, ...]:
    """Return the cut of exactly `n` samples as things stand.

    For a step that ran out of memory, or was planned before the micro-batch shrank. Where its
    largest size is one that failed already, nothing smaller is left.
    """
    return states.recut(state, n)


def fits(state: State, sizes: Iterable[int]) -> bool:
    """Return whether `sizes` are below those that failed, and those above the present one within
    the budget as far as they ran. A step planned before that was known has to be cut anew."""
    known, largest = state.sizes, max(sizes)
    if known.failed is not None and largest >= known.failed:
        return False
    peak, budget = known.peaks.get(largest), known.budget_bytes
    return largest <= state.micro or peak is None or budget is None or peak <= budget


def rehearsed(
    state: State, points: Iterable[tuple[int, float | None, int | None]]
) -> tuple[State, Changes]:
    """Return the state after passes that trained nothing, before the first step, and its changes.

    Nothing above the base batch is chosen yet: the optimizer's state is not in memory.

    Args:
        points: samples, seconds of forward and backward, peak bytes, in the order they ran.
    """
    for size, seconds, peak in points:
        state.sizes = microbatch.update(state.sizes, size, seconds, peak)
    return state, states.resize(state, 0, limit=state.settings.base)


def summed(state: State) -> State:
    """Return the state knowing that the loss is a sum over samples, as its first pass has shown."""
    state.settings = dataclasses.replace(state.settings, sum_reduction=True)
    state.factor_batch = 0
    return state


def observe(state: State, facts: StepFacts) -> tuple[State, Changes]:
    """Return the state after a step's facts, and what they changed; facts in the order of steps."""
    state.observed += 1
    if state.ramp_left and sum(facts.sizes) > state.ramp_batch:
        state.ramp_left -= 1
        state.factor_batch = 0
    changes: Changes = ()
    peak = facts.peak_bytes
    if facts.pressure or (peak is not None and peak > state.high_bytes):
        changes = observing.memory(state, facts)
    if state.sized or state.steered:
        changes += observing.speed(state, facts)
    if state.steered:
        changes += observing.statistics(state, facts)
    return state, changes


def lr_factor(state: State, batch: int) -> float:
    """Return what the person's learning rate is multiplied by for a step of `batch` samples.

    A remainder smaller than the base batch has the factor of the base, as in the person's own loop.
    """
    if batch == state.factor_batch:
        return state.factor
    settings = state.settings
    n = max(batch, min(settings.base, state.batch))
    factor = states.gain(state, n) * settings.lr_multiplier
    if settings.sum_reduction and settings.family == "sgd" and settings.lr_scale != "none":
        factor *= settings.base / n
    state.factor, state.factor_batch = factor, 0 if state.ramp_left else batch
    return factor


def noise_scale(state: State) -> float | None:
    """Return the noise scale acted on, in samples; None while it is not known."""
    return None if state.estimate is None else state.estimate.noise_scale


def oom(state: State, size: int, step: int) -> tuple[State, Changes]:
    """Return the state after a micro-batch of `size` ran out of memory, and what that changed."""
    state.sizes = microbatch.failed(state.sizes, size, error=True)
    return state, states.resize(state, step)


def _plan(state: State, remaining: int | None) -> StepPlan:
    """Return the plan of a step that is not simply the next full one."""
    if remaining is not None and remaining < 1:
        raise ValueError(
            f"remaining={remaining} samples; wanted at least 1; begin the next epoch first"
        )
    settings = state.settings
    n = state.batch if remaining is None else min(state.batch, remaining)
    if settings.batch_statistics and settings.batch == "adaptive" and remaining == n + 1:
        n += -1 if n > 2 else 1  # never a last step of a single sample, whose statistics are none
    if not state.planned:
        state.planned = True
        state.until_probe = PROBE_SELDOM - 1 if state.steered else math.inf
        if state.sized and not settings.batch_statistics:
            return StepPlan(states.first_step(settings, n))
    if n != state.batch:
        return StepPlan(states.recut(state, n))
    if state.until_probe > 0:
        state.until_probe -= 1
        return state.whole
    if not state.steered:
        state.until_probe = math.inf
        return state.whole
    found = state.probing
    if found is None or state.still % REVIEW == 0:
        sizes, extra = _probe(state)
        found = StepPlan(sizes, probe=True), _steps_to_probe(state, extra)
        state.probing = None if extra is None else found
    plan, steps = found
    state.until_probe = steps - 1
    return plan


def _steps_to_probe(state: State, extra: float | None) -> int:
    """Return the steps from a probe to the next one: as seldom as its cost asks for (`extra`, in
    steps; None: not known), and ever more seldom where the base batch could not grow for long."""
    steps = PROBE_EVERY if extra is not None else PROBE_SELDOM
    if state.still >= STILL and state.batch == state.settings.base:
        steps *= 2 ** min(6, 1 + (state.still - STILL) // noise.WARMUP)
    return min(max(steps, math.ceil((extra or 0.0) / PROBE_COST)), PROBE_LEAST)


def _probe(state: State) -> tuple[tuple[int, ...], float | None]:
    """Return the sizes of a step that measures the noise, and what that costs beyond the step.

    A single micro-batch is cut in two. Where it may not be cut, or the cut costs too much, it is
    compared with the next step, which costs norms alone but holds a gradient longer. The cost is in
    steps, None while it was not timed. Norms are timed with the optimizer.
    """
    whole, settings = state.whole.sizes, state.settings
    uncut = settings.batch_statistics or settings.sum_reduction or not state.sized
    single = len(whole) == 1
    halves = None if uncut or not single or state.batch < 2 else cutting.shares(state.batch, 2)
    seconds = observing.step_seconds(state, state.batch, whole)
    if seconds is None:
        return halves or whole, None
    cut = (observing.step_seconds(state, state.batch, halves) or 0.0) / seconds - 1 if halves else 1
    if cut > PROBE_COST * PROBE_SELDOM:
        halves, cut = None, 0.0
    if state.probe is None or state.optimizer is None or not state.probe.later:
        return halves or whole, None
    norms = max(0.0, state.probe.typical - state.optimizer.typical) / seconds
    if halves is not None:
        return halves, norms + cut
    return whole, 2 * norms if single else norms
