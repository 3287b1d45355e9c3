"""What a device can do, measured: products of large matrices in a precision, and a large copy.

A second at most. Not the makers' numbers: those that this machine reaches now. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .device import DeviceProbe, attempt
from .precision import DTYPES

_ENOUGH_S = 0.02  # a measurement this long is told from the clock's own noise
_LARGEST = 8192
_COPIED_BYTES = 1 << 26


def flops_per_s(probe: DeviceProbe, precision: str) -> float | None:
    """Return the operations a second of a square matrix product, None where there is no room."""
    dtype = DTYPES.get(precision, torch.float32)
    size, best = 512, None
    while size <= _LARGEST:
        found, _ = attempt(_product_seconds, probe, size, dtype)
        if found is None:
            break
        rate = 2 * size**3 / found
        best = rate if best is None else max(best, rate)
        if found > _ENOUGH_S:
            break
        size *= 2
    return best


def _product_seconds(probe: DeviceProbe, size: int, dtype: torch.dtype) -> float:
    left = torch.ones(size, size, device=probe.device, dtype=dtype)
    out = torch.empty_like(left)
    return _fastest(probe, lambda: torch.mm(left, left, out=out))


def bytes_per_s(probe: DeviceProbe) -> float | None:
    """Return the bytes a second that a copy on the device reads and writes."""

    def copied() -> float:
        source = torch.ones(_COPIED_BYTES, device=probe.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * _COPIED_BYTES / _fastest(probe, lambda: target.copy_(source))

    return attempt(copied)[0]


def _fastest(probe: DeviceProbe, work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of three, after one that warms up."""
    work()
    found = []
    for _ in range(3):
        probe.synchronize()
        start = probe.mark()
        work()
        found.append(probe.seconds(probe.mark(), start))
    return max(min(found), 1e-9)
