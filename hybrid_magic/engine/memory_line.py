"""The line over micro-batch sizes: what memory a size takes, and the largest that fits where.

Takes no step.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ..config import ProfileConfig
from ..findings import Fit, MemoryLine, Size
from .device import DeviceProbe
from .lens import Look
from .occupancy import Occupancy

# Memory that torch reports of a card, rounded down, and what its CUDA context takes of it.
CARDS = {
    "T4 16 GB": 14.7,
    "P100 16 GB": 15.8,
    "L4 24 GB": 22.0,
    "A100 40 GB": 39.3,
    "A100 80 GB": 79.1,
}
_GIB, _CONTEXT_GIB = 1 << 30, 0.5


def sizes_of(
    looks: Sequence[Look], peaks: Mapping[int, int], probe: DeviceProbe
) -> tuple[Size, ...]:
    """Return what was seen of each micro-batch size: the fastest pass, the peak.

    Of the first micro-batch of a step only: those that follow it find everything warm. The fastest,
    since sizes are compared: other programs make a pass slower, and none faster.
    """
    seconds: dict[int, float] = {}
    for look in looks:
        size, (start, _, end) = look.sizes[0], look.spans[0]
        taken = probe.seconds(end.device, start.device)
        seconds[size] = min(taken, seconds.get(size, taken))
    return tuple(Size(size, seconds[size], peaks.get(size)) for size in sorted(seconds))


def line_of(
    ledgers: Sequence[Occupancy], probe: DeviceProbe, config: ProfileConfig
) -> tuple[MemoryLine | None, dict[int, int]]:
    """Return the line over micro-batch sizes and its points.

    The peak of a micro-batch is the higher of two: at the end of its forward pass, without
    gradients, and within its backward pass. Each is a line; the one that lets fewer samples fit is
    told.
    """
    found = []
    for stage in ("forward", "backward"):
        points = {o.look.sizes[0]: o.first_peaks[stage] for o in ledgers if stage in o.first_peaks}
        if len(points) > 1:
            slope, fixed = statistics.linear_regression(list(points), list(points.values()))
            if slope > 0:
                found.append((slope, fixed, points))
    if not found:
        highest = {o.look.sizes[0]: max(o.first_peaks.values(), default=0) for o in ledgers}
        return None, {size: peak for size, peak in highest.items() if peak}
    places = _places(probe, config)
    kept = 0 if probe.late else ledgers[0].kept_bytes  # a GPU gives it back until the step's end
    slope, fixed, points = min(found, key=lambda one: _largest(places[0][2], one[1], one[0]))
    fits = []
    for name, total, budget in places:
        room = budget + (kept if name in CARDS else 0)
        largest = min(_largest(room, each[1], each[0]) for each in found)
        fits.append(Fit(name, total, budget, largest if largest >= 1 else None))
    return MemoryLine(fixed, slope, tuple(fits)), points


def _largest(room: int, fixed: float, slope: float) -> int:
    return int((room - fixed) // slope)


def _places(probe: DeviceProbe, config: ProfileConfig) -> list[tuple[str, int, int]]:
    """Return (name, bytes, budget) of this device, where it tells, and of common cards."""
    share, found = config.memory, []
    own, budget = probe.total_bytes, probe.budget_bytes(share)
    if own is not None and budget is not None:
        found.append(("this device", own, min(budget, own)))
    for card, gib in CARDS.items():
        total, room = int(gib * _GIB), int((gib - _CONTEXT_GIB) * _GIB)
        wanted = share if isinstance(share, int) and share > 1 else int(share * room)
        found.append((card, total, min(wanted, room)))
    return found
