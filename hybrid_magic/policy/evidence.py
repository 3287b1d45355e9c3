"""What every rule of the advice reads off a profile, and how it says a number.

Knows no rule. What is not known counts as nothing: a rule then has no ground to speak on.
"""

from __future__ import annotations

from ..findings import Fit
from ..profiles import Profile

LEAST = 0.05  # of the time or the memory: what brings less is not worth a line
UNITS = (("GiB", 30), ("MiB", 20), ("KiB", 10))
FULL = 0.95  # of the budget: one longer batch, and it is over


def stage_share(profile: Profile, *names: str) -> float:
    """Return the share of a step's time that these stages take, from 0 to 0.99."""
    stages = (profile.stage(name) for name in names)
    return bounded(sum(stage.seconds for stage in stages if stage) / profile.step_s)


def pass_share(profile: Profile) -> float:
    """Return the share of a step's time that its forward and backward passes take."""
    return stage_share(profile, "forward", "backward")


def this_device(profile: Profile) -> Fit | None:
    """Return what fits the device that was measured."""
    return profile.line.fits[0] if profile.line and profile.line.fits else None


def peak_bytes(profile: Profile, kind: str | None = None) -> int:
    """Return the bytes in use at the peak, or those of one kind among them; 0 where not known."""
    peak = profile.peak
    if peak is None:
        return 0
    return peak.total_bytes if kind is None else peak.kinds.get(kind, 0)


def peak_share(profile: Profile, held_bytes: float) -> float:
    """Return the share of the peak that these bytes are; 0 where the peak is not known."""
    peak = peak_bytes(profile)
    return bounded(held_bytes / peak) if peak else 0.0


def memory_hurts(profile: Profile) -> bool:
    """Return whether steps ran out of memory, the peak is at the budget or above it, or memory
    makes batch statistics those of fewer samples than the loader gives."""
    fit, setting = this_device(profile), profile.setting
    if setting.retries:
        return True
    if fit is None:
        return False
    least = min(profile.micro, profile.batch)
    if setting.batch_statistics:
        least = max(least, setting.loader_batch or 0)
    full = peak_bytes(profile) >= FULL * fit.budget_bytes
    return full or fit.largest is None or fit.largest < least


def bounded(share: float) -> float:
    """Return `share` between 0 and 0.99: nothing takes all, and nothing saves all."""
    return min(0.99, max(0.0, share))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def count(number: float) -> str:
    """Return a count: 12,345; below 10 with its first decimal, where it has one."""
    return f"{number:.1f}" if number < 10 and number % 1 else f"{number:,.0f}"


def counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a time in ms or s, to two digits or more: 0.25 ms, 12 ms, 1.4 s."""
    amount, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    digits = 0 if amount >= 10 else 1 if amount >= 1 else 2
    return f"{amount:.{digits}f} {unit}"


def size(number: float) -> str:
    """Return bytes as the policies say them: 5.1 GiB, 312 MiB."""
    unit, power = next((one for one in UNITS if number >= 2 ** one[1]), UNITS[-1])
    amount = number / 2**power
    return f"{amount:.0f} {unit}" if amount >= 100 else f"{amount:.3g} {unit}"
