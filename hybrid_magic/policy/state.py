"""The steering's state, and the changes of it that leave a record.

The state is changed in place: it is touched on every step of loops whose steps take 300 us, where
copying thirty fields costs more than deciding. Everything in it is frozen. Knows nothing of when a
change is due: that is `steering`, the only caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..records import BatchChangeRecord
from . import batch as cutting
from . import growth, microbatch, noise_scale
from .facts import Settings, StepPlan
from .growth import Health
from .microbatch import MicroState
from .noise_scale import NoiseEstimate, NoiseState
from .timing import Timing

Changes = tuple[BatchChangeRecord, ...]


@dataclass(slots=True)
class State:
    """All that the steering knows between two steps."""

    settings: Settings  # as the controls have left them
    asked: Settings  # as the run began
    batch: int
    micro: int
    sizes: MicroState
    whole: StepPlan  # the plan of a full step
    steered: bool
    sized: bool  # the micro-batch is chosen, not pinned
    noise: NoiseState = field(default_factory=noise_scale.init)
    estimate: NoiseEstimate | None = None
    probed: bool = False  # a probe came since the estimate
    until_probe: float = 0  # steps; 0 before the first plan, infinite where nothing is measured
    planned: bool = False  # the first step was
    observed: int = 0
    seen: int = 0  # steps observed at the present sizes
    stepped: bool = False  # the optimizer has made its state
    changed_at: int = 0  # `observed` at the last change of the global batch
    cool_until: int = 0
    pressed: tuple[int, int] = (0, 0)  # the size of the allocator's last retry, `observed` then
    high_bytes: int = 0  # highest peak at the present sizes
    optimizer: Timing | None = None
    probe: Timing | None = None  # the optimizer's part of a step that measured the noise
    probing: tuple[StepPlan, int] | None = None  # the plan of a probe, the steps to the next one
    still: int = 0  # probes since the global batch changed
    health: Health = field(default_factory=Health)
    losses: list[float] = field(default_factory=list[float])
    norms: list[float] = field(default_factory=list[float])
    norm_limit: float = math.inf
    unfolded: int = 0  # steps since losses and norms went into `health`
    ramp_from: float = 0.0
    ramp_batch: int = 0  # the batch before the ramp: only larger steps move it on
    ramp_left: int = 0
    ramp_total: int = 0
    factor: float = 1.0
    factor_batch: int = 0  # the batch that `factor` holds for; 0 is none


def init(settings: Settings) -> State:
    """Return the state before the first step."""
    batch = settings.first_batch
    first = (
        min(batch, settings.base) if settings.batch_statistics else max(first_step(settings, batch))
    )
    micro = pinned(settings, batch) or min(first, settings.micro_most or first)
    sizes = microbatch.init(
        budget_bytes=settings.budget_bytes,
        current=micro,
        floor=max(2, settings.base) if settings.batch_statistics else 1,
        most=settings.micro_most,
    )
    sized = settings.micro is None and settings.accum is None
    state = State(settings, settings, batch, micro, sizes, StepPlan(()), settings.steered, sized)
    state.whole = StepPlan(recut(state, batch))
    if isinstance(settings.warmup, int) and settings.warmup > 0:
        state.ramp_left = state.ramp_total = settings.warmup
    return state


def pinned(settings: Settings, batch: int) -> int | None:
    """Return the micro-batch that the settings pin for steps of `batch`, None where they do not."""
    wanted = settings.micro if settings.accum is None else -(-batch // settings.accum)
    return wanted if wanted is None else min(wanted, settings.micro_most or wanted)


def first_step(settings: Settings, n: int) -> tuple[int, ...]:
    """Return the rising sizes of the first step: to a quarter of the loader batch, which may not
    fit, or up to all of it where a huge step would become hundreds of micro-batches."""
    few = 3 if n > 4 else 1  # with 2, the fewest in one, that makes two sizes and so a line
    top = max(min(n, settings.base) // 4, min(n // 64, settings.base), few)
    most = settings.micro_most or top + 1
    least = 2 if most > 2 or not settings.micro_most else 1  # one left over joins its neighbour
    return cutting.rising(n, max(1, min(top, most + 1 - least)), least=least)


def recut(state: State, n: int) -> tuple[int, ...]:
    """Return the cut of exactly `n` samples as things stand."""
    accum = state.settings.accum
    if accum is not None and n == state.batch and state.micro == -(-n // accum):
        pieces = max(1, n // 2) if state.settings.batch_statistics else n
        return cutting.shares(n, min(accum, pieces))
    sizes = cutting.split(n, state.micro, floor=state.sizes.floor)
    if state.sized and len(sizes) > 1 and sizes[-1] == 1 and sizes[-2] > 2:
        return (*sizes[:-2], sizes[-2] - 1, 2)  # people's code does not expect a single sample
    return sizes


def gain(state: State, n: int) -> float:
    """Return the learning-rate factor of a step of `n` samples, on the ramp if there is one."""
    settings = state.settings
    noise = state.estimate.noise_scale if state.estimate is not None else None
    target = growth.lr_factor(settings.lr_scale, settings.family, n, settings.base, noise)
    if not state.ramp_left or target <= state.ramp_from:
        return target
    done = 1 - (state.ramp_left - 1) / state.ramp_total
    return state.ramp_from + (target - state.ramp_from) * done


def rebatch(state: State, after: int, step: int, what: str, reason: str) -> Changes:
    """Change the global batch: ramp the learning rate, watch anew, size the micro-batch."""
    before = state.batch
    old_gain = gain(state, before)
    state.batch = after
    state.changed_at, state.still = state.observed, 0
    state.health = growth.forget_losses(state.health)
    state.losses.clear()
    state.ramp_left = 0
    if after > before:
        warmup = state.settings.warmup
        state.ramp_total = (
            warmup if isinstance(warmup, int) else growth.ramp_steps(old_gain, gain(state, after))
        )
        state.ramp_from, state.ramp_batch, state.ramp_left = old_gain, before, state.ramp_total
    state.factor_batch = 0
    was_whole = state.micro == before
    changes = resize(state, step, same_limit=False)
    if was_whole and state.micro == after:
        changes = ()
    if after > before:
        reason += microbatch.peak_clause(state.sizes, state.micro)
    return BatchChangeRecord(step, before, after, what, reason), *changes


def resize(
    state: State, step: int, *, limit: int | None = None, same_limit: bool = True
) -> Changes:
    """Size the micro-batch by what is known now, for steps of at most `limit` samples; a pinned one
    gives way to memory only."""
    before, batch, sizes = state.micro, state.batch, state.sizes
    wanted = pinned(state.settings, batch)
    if wanted is not None and (sizes.failed is None or wanted < sizes.failed):
        after, why = wanted, "pinned"
    else:
        after, why = microbatch.choose(sizes, min(batch, limit or batch))
    changes: Changes = ()
    if after != before:
        state.sizes = microbatch.take(sizes, after, same_limit=same_limit)
        state.micro = after
        if state.sizes.floor > after and after < min(before, batch):
            why += (
                f"; below the loader's batch of {state.settings.base}, so batch statistics see less"
            )
        changes = (
            BatchChangeRecord(
                step, before, after, "micro", f"micro-batch {before} -> {after}: {why}"
            ),
        )
    whole = StepPlan(recut(state, batch))
    if whole != state.whole:
        state.whole, state.seen, state.high_bytes, state.probing = whole, 0, 0, None
    return changes
