"""The steering: plans each step's sizes, observes what came of it, and says why anything changed.

The only room of the policy that the engine enters. `plan` is called in the order of issue, perhaps
several steps ahead of `observe`; both hand back the state they were given, changed in place (see
`state`). Reads no clock and no device. A step on which nothing can change costs a few comparisons;
timings are read ever more seldom, the loss is judged in blocks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..records import BatchChangeRecord
from . import batch as cutting
from . import growth, microbatch
from . import noise_scale as noise
from . import state as states
from .facts import Settings, StepFacts, StepPlan
from .microbatch import Timing
from .state import Changes, State

__all__ = [
    "Changes",
    "Settings",
    "State",
    "StepFacts",
    "StepPlan",
    "apply",
    "init",
    "lr_factor",
    "noise_scale",
    "observe",
    "oom",
    "plan",
    "recut",
]

PROBE_EVERY = 4  # steps, until the window of the noise scale is full
PROBE_SELDOM = 8  # from then on; half as often again once the batch has stood still for SETTLED steps
SETTLED = 200
TIME_ALL = 8  # steps timed after a change of sizes; of later ones every TIME_EVERY-th
TIME_EVERY = 16
LOOK_EVERY = 64  # steps between two looks at the micro-batch, in the long run

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
    """Return the cut of exactly `n` samples as things stand: for a step that ran out of memory, or was
    planned before the micro-batch shrank. Where its largest size is one that failed already, nothing
    smaller is left."""
    return states.recut(state, n)


def observe(state: State, facts: StepFacts) -> tuple[State, Changes]:
    """Return the state after a step's facts, and what they changed; facts come in the order of steps."""
    state.observed += 1
    if state.ramp_left and sum(facts.sizes) > state.ramp_batch:
        state.ramp_left -= 1
        state.factor_batch = 0
    changes: Changes = ()
    peak = facts.peak_bytes
    if facts.pressure or (peak is not None and peak > state.high_bytes):
        changes = _feel_memory(state, facts)
    if state.sized or state.steered:
        changes += _learn(state, facts)
    if state.steered:
        changes += _weigh(state, facts)
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
    state.sizes = microbatch.failed(state.sizes, size)
    return state, states.resize(state, step)


def apply(state: State, name: str, value: float | None, step: int) -> tuple[State, Changes]:
    """Return the state after a person's request, and what it changed: nothing where it changes nothing.

    Args:
        name: a setting of the run's control, or "grow" or "shrink".
        value: the setting; None gives it back: accum to auto, others to what the run began with.
    Raises:
        ValueError: no such request.
    """
    if name in ("grow", "shrink"):
        return state, _move_by_hand(state, name, step)
    field = "budget_bytes" if name == "memory" else name
    if field not in ("accum", "budget_bytes", "stability_threshold", "growth_factor", "max_batch", "lr_multiplier"):
        raise ValueError(f"there is no request {name!r}; wanted a setting of the control, grow or shrink")
    before: Any = getattr(state.settings, field)
    after: Any = value
    if value is None:
        after = None if name == "accum" else getattr(state.asked, field)
    elif name == "memory":
        after = None if state.settings.device_bytes is None else int(value * state.settings.device_bytes)
    elif name in ("accum", "max_batch"):
        after = int(min(value, 2**31))
    if after == before:
        return state, ()
    state.settings = dataclasses.replace(state.settings, **{field: after})
    changes = (BatchChangeRecord(step, before, after, "control", _control_clause(name, before, after)),)
    return state, changes + _follow(state, name, step)


def _control_clause(name: str, before: Any, after: Any) -> str:
    if name == "memory":
        before, after = (None if n is None else f"{n / 2**30:.3g} GiB" for n in (before, after))
    before, after = ("auto" if value is None else value for value in (before, after))
    return f"{name} set by hand: {before} -> {after}"


def _follow(state: State, name: str, step: int) -> Changes:
    """Bring the sizes in line with the settings after one of them was set by hand."""
    settings = state.settings
    state.steered = settings.steered
    state.sized = settings.micro is None and settings.accum is None
    state.factor_batch = 0
    state.until_probe = min(state.until_probe, PROBE_EVERY)
    if name == "memory":
        state.sizes = microbatch.rebudget(state.sizes, settings.budget_bytes)
    if name == "max_batch" and state.batch > settings.max_batch:
        reason = f"shrank {state.batch} -> {settings.max_batch}: the largest batch set by hand"
        return states.rebatch(state, settings.max_batch, step, "global", reason)
    return states.resize(state, step) if name in ("accum", "memory") else ()


def _move_by_hand(state: State, name: str, step: int) -> Changes:
    settings, batch = state.settings, state.batch
    if name == "grow":
        after = growth.grown(batch, max(settings.growth_factor, 1.5), settings.max_batch) or batch
    else:
        after = max(batch // 2, min(2 if settings.batch_statistics else 1, batch))
        state.cool_until = state.observed + growth.COOLDOWN
    if after == batch:
        return ()
    return states.rebatch(state, after, step, "control", f"{name} asked for by hand: {batch} -> {after}")


def _plan(state: State, remaining: int | None) -> StepPlan:
    """Return the plan of a step that is not simply the next full one."""
    if remaining is not None and remaining < 1:
        raise ValueError(f"remaining={remaining} samples; wanted at least 1; begin the next epoch first")
    settings = state.settings
    n = state.batch if remaining is None else min(state.batch, remaining)
    if settings.batch_statistics and settings.batch == "adaptive" and remaining == n + 1:
        n += -1 if n > 2 else 1  # never a last step of a single sample, whose statistics are none
    first, state.started = not state.started, True
    due = state.until_probe <= 0
    if first or due:
        state.until_probe = _until_probe(state)
    else:
        state.until_probe -= 1
    if first and state.sized and not settings.batch_statistics:
        return StepPlan(states.first_step(settings, n))
    if n != state.batch:
        return StepPlan(states.recut(state, n))
    if not due or first or not state.steered:
        return state.whole
    sizes = state.whole.sizes
    if len(sizes) == 1 and n > 1 and state.sized and not settings.batch_statistics:
        sizes = cutting.shares(n, 2)
    return StepPlan(sizes, probe=True)


def _until_probe(state: State) -> float:
    """Return the steps from a probe to the next one."""
    if not state.steered:
        return math.inf
    if len(state.noise.signal) < noise.WINDOW:
        return PROBE_EVERY - 1
    return PROBE_SELDOM * (2 if state.observed - state.changed_at > SETTLED else 1) - 1


def _feel_memory(state: State, facts: StepFacts) -> Changes:
    """Take in a new highest peak or an allocator under pressure; shrink at once where it is too much."""
    size = max(facts.sizes)
    if facts.peak_bytes is not None:
        state.high_bytes = max(state.high_bytes, facts.peak_bytes)
        state.sizes = microbatch.update(state.sizes, size, None, facts.peak_bytes)
    if facts.pressure and size > 1:
        state.sizes = microbatch.failed(state.sizes, size)
        return states.resize(state, facts.step)
    budget = state.sizes.budget_bytes
    over = budget is not None and facts.peak_bytes is not None and facts.peak_bytes > budget
    return states.resize(state, facts.step) if over and state.stepped else ()


def _learn(state: State, facts: StepFacts) -> Changes:
    """Take in a step's times, less and less often, and look whether the micro-batch should change."""
    ordinary = facts.sizes == state.whole.sizes
    state.seen += ordinary
    seen = state.seen
    if ordinary and seen > TIME_ALL and seen % TIME_EVERY:
        return ()
    if facts.optimizer_seconds is not None:
        state.optimizer = microbatch.timed(state.optimizer, facts.optimizer_seconds)
    times = facts.micro_seconds or (None,) * len(facts.sizes)
    peaks = facts.peaks or (None,) * len(facts.sizes)
    for size, seconds, peak in _points(facts.sizes, times, peaks, every=not state.stepped):
        state.sizes = microbatch.update(state.sizes, size, seconds, peak)
    if not state.stepped:
        state.stepped = not facts.skipped
        if state.stepped:
            state.sizes = microbatch.stepped(state.sizes)
            state.high_bytes = 0
        return ()
    look = ordinary and (seen & (seen - 1) == 0 or seen % LOOK_EVERY == 0)
    return states.resize(state, facts.step) if look and state.sized else ()
