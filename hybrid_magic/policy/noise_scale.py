"""The gradient noise scale: how many samples a gradient needs before more of them stop helping.

Floats in, floats out. Knows no gradient, no optimizer and no batch policy: whoever measures decides
in which scaling the norms are taken (for Adam-likes, in Adam's own).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

WINDOW = (
    96  # probes in the sums; a decaying mean of few probes jumps by a factor of 80 within an epoch
)
WARMUP = 24  # probes before there is an estimate
BLOCKS = 8  # consecutive blocks that the standard errors are taken from
CLEARLY = 3  # standard errors that show a fall: it is looked for hundreds of times in a run


@dataclass(frozen=True, slots=True)
class NoiseState:
    """The last probes, oldest first, as the terms of the two sums and their weights."""

    signal: tuple[float, ...] = ()  # n_large |G_large|^2 - n_small |G_small|^2
    signal_weight: tuple[float, ...] = ()  # n_large - n_small
    spread: tuple[float, ...] = ()  # |G_small|^2 - |G_large|^2
    spread_weight: tuple[float, ...] = ()  # 1 / n_small - 1 / n_large


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseEstimate:
    """What the probes say.

    `noise_scale` (samples) is the lower end, (variance - one standard error) / (|G|^2 + one
    standard error): the number to act on when growing, zero where one wild probe is most of the
    variance. `middle` is variance / |G|^2, None while |G|^2 is within one standard
    error of zero. `grad_sq` estimates the squared norm of the true gradient and may be negative;
    `variance` the trace of the per-sample covariance.
    """

    noise_scale: float
    middle: float | None
    grad_sq: float
    grad_sq_error: float
    variance: float
    variance_error: float
    probes: int


def init() -> NoiseState:
    """Return the state before any probe."""
    return NoiseState()


def update(
    state: NoiseState, sq_norm_small: float, sq_norm_large: float, n_small: float, n_large: int
) -> NoiseState:
    """Return `state` with one more probe; a probe that is not finite is left out.

    Each term is unbiased whatever the two sizes are, so probes of different sizes add up; the
    weights (samples compared) give most to those that know most.

    Args:
        sq_norm_small: squared L2 norm of the mean gradient of `n_small` samples; or, far less
            noisy, sq_norm_large plus the squared norm of the difference of the two gradients.
        sq_norm_large: squared L2 norm of the mean gradient of `n_large` samples, the small ones
            among them.
        n_small, n_large: samples behind each norm; n_small < n_large.
    Raises:
        ValueError: n_small is not in 1..n_large-1.
    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.
    """
    if not 0 < n_small < n_large:
        raise ValueError(f"n_small={n_small}, n_large={n_large}; wanted 0 < n_small < n_large")
    if not (math.isfinite(sq_norm_small) and math.isfinite(sq_norm_large)):
        return state
    first = 1 if len(state.signal) >= WINDOW else 0
    return NoiseState(
        (*state.signal[first:], n_large * sq_norm_large - n_small * sq_norm_small),
        (*state.signal_weight[first:], float(n_large - n_small)),
        (*state.spread[first:], sq_norm_small - sq_norm_large),
        (*state.spread_weight[first:], 1 / n_small - 1 / n_large),
    )


def since_fall(state: NoiseState) -> NoiseState:
    """Return `state` without the probes from before a fall of the noise scale, if there was one.

    A rise is left to the window to follow: the luckiest of many looks at few probes would otherwise
    make the batch grow.
    """
    if len(state.signal) < 2 * WARMUP:
        return state
    newest = NoiseState(
        state.signal[-WARMUP:],
        state.signal_weight[-WARMUP:],
        state.spread[-WARMUP:],
        state.spread_weight[-WARMUP:],
    )
    now, whole = estimate(newest), estimate(state)
    if now is None or whole is None:
        return state
    most_variance = now.variance + CLEARLY * now.variance_error
    least_grad_sq = now.grad_sq - CLEARLY * now.grad_sq_error
    return newest if most_variance < whole.noise_scale * least_grad_sq else state


def estimate(state: NoiseState) -> NoiseEstimate | None:
    """Return what the last probes say, None before `WARMUP` of them or where all were zero."""
    probes = len(state.signal)
    if probes < WARMUP:
        return None
    grad_sq, grad_sq_error = _mean_and_error(state.signal, state.signal_weight)
    variance, variance_error = _mean_and_error(state.spread, state.spread_weight)
    lower = max(grad_sq, 0.0) + grad_sq_error
    if lower <= 0:
        return None
    return NoiseEstimate(
        noise_scale=max(variance - variance_error, 0.0) / lower,
        middle=max(variance, 0.0) / grad_sq if grad_sq > grad_sq_error else None,
        grad_sq=grad_sq,
        grad_sq_error=grad_sq_error,
        variance=variance,
        variance_error=variance_error,
        probes=probes,
    )


def _mean_and_error(terms: tuple[float, ...], weights: tuple[float, ...]) -> tuple[float, float]:
    """Return the weighted mean and its standard error from blocks of neighbours, which hold what
    consecutive probes have in common."""
    edges = [len(terms) * i // BLOCKS for i in range(BLOCKS + 1)]
    means = [sum(terms[a:b]) / sum(weights[a:b]) for a, b in pairwise(edges)]
    centre = sum(means) / BLOCKS
    error = math.sqrt(sum((mean - centre) ** 2 for mean in means) / (BLOCKS * (BLOCKS - 1)))
    return sum(terms) / sum(weights), error
