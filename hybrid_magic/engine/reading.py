"""What a step's values and marks say: loss, norms, seconds by stage, the pair for the noise scale.

Reads the device, once, when asked to; keeps nothing.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from .device import DeviceProbe
from .step_state import StepResult


@dataclass(slots=True)
class Reading:
    """One step, read. `noise` is (|g_small|^2, |g_large|^2, n_small, n_large) where measured."""

    loss: float
    norm: float
    skipped: bool
    forward_s: float
    backward_s: float
    optimizer_s: float
    micro_s: tuple[float, ...]
    noise: tuple[float, float, float, int] | None
    logged: dict[str, float] | None


def read(result: StepResult, probe: DeviceProbe) -> Reading:
    """Return what `result` says, waiting for the device if it is not done with the step yet."""
    if result.reading is not None:
        return result.reading
    values, span = result.values(), probe.seconds
    weights = result.weights
    cuts = len(weights)
    loss = values[0] if cuts == 1 else math.fsum(map(operator.mul, weights, values))
    norm = math.hypot(*values[cuts : cuts + result.gradients])
    skipped = result.skipped
    if skipped is None:  # the device decided, by the same rule
        check = loss + norm
        skipped = check - check != 0.0
    forward = backward = 0.0
    micro = []
    for start, middle, end in result.spans:
        ahead, back = span(middle, start), span(end, middle)
        forward, backward = forward + ahead, backward + back
        micro.append(ahead + back)
    logged = None
    if result.names:
        logged = dict(zip(result.names, values[-len(result.names) :], strict=True))
    noise = None if result.noise is None else _noise_pair(result, values)
    optimizer = math.fsum([span(end, start) for start, end in result.ends])
    return Reading(loss, norm, skipped, forward, backward, optimizer, tuple(micro), noise, logged)


def _noise_pair(result: StepResult, values: list[float]) -> tuple[float, float, float, int]:
    """Return (|g_small|^2, |g_large|^2, n_small, n_large) of a step that measured them.

    For a step that is cut, or shared by processes, the first is |g_large|^2 + |g_small -
    g_large|^2: the same on average and far less noisy. Of two steps compared the mean of their two
    norms is just that.
    """
    size = sum(result.sizes)
    if result.noise == "pair":
        this, before, both = values[len(result.weights) + result.gradients :][:3]
        return (this**2 + before**2) / 2, both**2, size, 2 * size
    apart, large = values[len(result.weights) + result.gradients :][:2]
    return large**2 + apart**2, large**2, result.small, size
