"""The global batch: when it grows or shrinks, and what that asks of the learning rate.

Knows losses, norms and the noise estimate as numbers; what a step costs is asked of a function that
the caller hands in. Knows no micro-batch and no step counter: when to ask is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .batch import rounded
from .noise_scale import NoiseEstimate

SPACING = 40  # least steps between two changes; also the patience of the stability policy
COOLDOWN = 120  # steps without growth after a safety shrink
BLOCK = 8  # losses behind each point of the smoothed curve
BLOCKS = 4  # points of it that are judged
NORMS = 64  # gradient norms behind the running median
FAR_ABOVE = 8.0  # times the median: a norm that says the step blew up
OSCILLATION = 2.0  # times the stability threshold: the spread at which the batch is halved
WORTH = 0.03  # least predicted gain in goodput
LEAST_GROWTH = 1.06  # a smaller change of the batch is not worth new kernels
SLACK = 1.5  # of the efficiency given up, before a grown batch shrinks again


@dataclass(frozen=True, slots=True)
class Health:
    """The last losses, as means of `BLOCK` steps, and the last gradient norms."""

    means: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    first_mean: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where the global batch stands and what bounds its next move.

    `factor` is the most it grows by, `least` the least efficiency of a grown batch, `may_grow`
    false while the run is not stable; `fits` tells whether a batch can be cut as the model needs.
    """

    batch: int
    base: int
    max_batch: int
    factor: float
    least: float
    may_grow: bool
    fits: Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Move:
    """A new global batch and the sentence that says why."""

    batch: int
    reason: str


def update(health: Health, losses: Sequence[float], norms: Sequence[float]) -> Health:
    """Return `health` with one more block of steps; values that were not read are simply absent."""
    means, first = health.means, health.first_mean
    if losses:
        mean = sum(losses) / len(losses)
        means, first = (*means[1 - BLOCKS :], mean), mean if first is None else first
    return Health(means, (*health.norms, *norms)[-NORMS:], first)


def forget_losses(health: Health) -> Health:
    """Return `health` without the curve, so that a change is judged by what follows it."""
    return Health((), health.norms, health.first_mean)


def spread(health: Health) -> float | None:
    """Return how much the loss swings, relative to its level; None until `BLOCK * BLOCKS` losses.

    The standard deviation of the smoothed curve, about its trend where that falls (a steady fall is
    no swing), over its level. The level counts as at least a tenth of the first one, so that a loss
    near zero does not look wild.
    """
    if len(health.means) < BLOCKS:
        return None
    centre = sum(health.means) / BLOCKS
    places = [i - (BLOCKS - 1) / 2 for i in range(BLOCKS)]
    slope = sum(x * y for x, y in zip(places, health.means, strict=True)) / sum(
        x * x for x in places
    )
    slope = min(slope, 0.0)
    residual = sum((y - centre - slope * x) ** 2 for x, y in zip(places, health.means, strict=True))
    level = max(abs(centre), 0.1 * abs(health.first_mean or 0.0))
    return math.sqrt(residual / (BLOCKS - 1)) / level if level > 0 else 0.0


def norm_limit(health: Health) -> float:
    """Return the gradient norm above which a step blew up; infinite while few norms were seen."""
    if len(health.norms) < NORMS // 4:
        return math.inf
    median = sorted(health.norms)[len(health.norms) // 2]
    return FAR_ABOVE * median if median > 0 else math.inf


def efficiency(batch: int, base: int, noise: float) -> float:
    """Return what a sample teaches in steps of `batch`, relative to steps of `base`.

    Source:
        Qiao et al. 2021 (Pollux), OSDI, eq. 7; noise scale as in McCandlish et al. 2018.
    """
    return (noise + base) / (noise + batch)


def largest_efficient(base: int, noise: float, least: float) -> float:
    """Return the largest batch whose efficiency is at least `least`."""
    return math.inf if least <= 0 else (noise + base) / least - noise


def lr_factor(rule: str, family: str, batch: int, base: int, noise: float | None) -> float:
    """Return the learning rate of a step of `batch` over that of the base batch, where it is 1.

    Args:
        rule: "none", "linear", "sqrt", or "auto": AdaScale's gain for SGD, else the root.
        family: "sgd" or "adam".
        noise: noise scale in samples; None (not measured) takes the root, halfway between the gains
            of no noise (1) and of nothing but noise (linear).
    Source:
        Johnson et al. 2020 (AdaScale), arXiv:2007.05105, section 3; Malladi et al. 2022,
        arXiv:2205.10287, for the root.
    """
    if rule == "none" or batch == base:
        return 1.0
    ratio = batch / base
    if rule == "linear":
        return ratio
    if rule == "auto" and family == "sgd" and noise is not None:
        return ratio * efficiency(batch, base, noise)
    return math.sqrt(ratio)


def ramp_steps(before: float, after: float) -> int:
    """Return the steps over which the learning rate rises: as long as the rise asks for, a step for
    each 2.5 % of it, so that a ramp is over before the next growth may come."""
    return max(0, min(SPACING, math.ceil(SPACING * (after / before - 1)))) if before > 0 else 0


def grown(batch: int, factor: float, ceiling: float) -> int | None:
    """Return the next larger batch, rounded for kernels: at most `factor` times `batch` (or one
    sample more) and at most `ceiling`; None when that is too little to be worth it."""
    most = min(max(batch + 1, int(batch * factor + 1e-9)), ceiling)
    wanted = rounded(int(most)) if most >= LEAST_GROWTH * batch else 0
    return wanted if wanted >= LEAST_GROWTH * batch else None


def by_goodput(
    now: Standing, noise: NoiseEstimate, seconds: Callable[[int], float | None]
) -> Move | None:
    """Return the move of the goodput policy, None to stay: throughput(B) x efficiency(B), among the
    batches whose efficiency is at least `least`.

    Growing is judged by the lower end of the noise scale: to the best of the next batches, or on
    the way to the furthest. Shrinking is judged by the middle, where clearly too much was lost.

    Args:
        seconds: predicted seconds of a step, None when not known: then one growth is tried.
    Source:
        Qiao et al. 2021 (Pollux), OSDI, section 3.
    """
    lower = noise.noise_scale
    ceiling = min(now.max_batch, largest_efficient(now.base, lower, now.least))
    choices = _next(now, ceiling)
    if not choices:
        return _back(now, noise)
    clause = f"noise scale {lower:.0f} samples"
    present = seconds(now.batch)
    taken = {batch: found for batch in choices if (found := seconds(batch)) is not None}
    if present is None or not taken:
        return Move(choices[-1], f"{clause}, to learn what a larger step costs")
    gains = {batch: _gain(now, batch, lower, present, then) for batch, then in taken.items()}
    wanted = max(gains, key=lambda batch: gains[batch])
    if gains[wanted] >= WORTH:
        return Move(wanted, f"{clause}, +{100 * gains[wanted]:.0f} % goodput")
    far = rounded(int(ceiling))
    at_far = seconds(far) if far > wanted and now.fits(far) else None
    further = 0.0 if at_far is None else _gain(now, far, lower, present, at_far)
    if gains[wanted] > 0 and further >= WORTH:
        return Move(wanted, f"{clause}, +{100 * further:.0f} % goodput on the way to {far}")
    return None


def by_stability(
    now: Standing,
    noise: NoiseEstimate | None,
    seconds: Callable[[int], float | None],
    swing: float,
) -> Move | None:
    """Return the move of the paper's rule, None to stay: grow by the factor once the loss has been
    stable for `SPACING` steps, though not to a batch that memory would cut into slower pieces.
    `least` bounds the efficiency here too; 0 leaves the rule alone."""
    if noise is None and now.least > 0:
        return None
    efficient = (
        math.inf if noise is None else largest_efficient(now.base, noise.noise_scale, now.least)
    )
    present = seconds(now.batch)
    for wanted in reversed(_next(now, min(now.max_batch, efficient))):
        then = seconds(wanted)
        if present is not None and then is not None and now.batch * then > wanted * present:
            continue
        return Move(wanted, f"loss stable for {SPACING} steps, its spread {100 * swing:.0f} %")
    return None if noise is None else _back(now, noise)


def _next(now: Standing, ceiling: float) -> list[int]:
    """Return the next larger batches that the rules and the model allow, ascending."""
    most = grown(now.batch, now.factor, ceiling) if now.may_grow else None
    if most is None:
        return []
    least = math.ceil(LEAST_GROWTH * now.batch)
    sizes = sorted({rounded(size) for size in range(least, most + 1)})
    return [size for size in sizes if size >= least and now.fits(size)]


def _gain(now: Standing, batch: int, noise: float, present: float, then: float) -> float:
    """Return the relative gain in goodput of `batch` over the present one, from both's seconds."""
    throughput = (batch / then) / (now.batch / present)
    return (
        throughput * efficiency(batch, now.base, noise) / efficiency(now.batch, now.base, noise) - 1
    )


def _back(now: Standing, noise: NoiseEstimate) -> Move | None:
    """Return the shrink of a batch that has clearly become too large for its noise scale."""
    if now.batch <= now.base or noise.middle is None:
        return None
    found = efficiency(now.batch, now.base, noise.middle)
    if found >= 1 - SLACK * (1 - now.least):
        return None
    efficient = rounded(int(largest_efficient(now.base, noise.middle, now.least)))
    wanted = max(now.base, efficient)
    percent = f"efficiency {100 * found:.0f} %, wanted {100 * now.least:.0f} %"
    return (
        Move(wanted, f"noise scale {noise.middle:.0f} samples, {percent}")
        if wanted < now.batch
        else None
    )
