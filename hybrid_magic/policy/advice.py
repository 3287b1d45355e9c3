"""What is worth changing about a training, from what a few of its steps showed.

A rule is a pure function from a Profile to one Advice or None; the rules stand in the three files
beside this one. Here is only the choice among them. Knows no device and runs nothing.
"""

from __future__ import annotations

from ..findings import Advice
from ..profiles import Profile
from .advice_on_compute import channels_last, fuse_attention, fuse_optimizer, reduce_precision
from .advice_on_input import load_faster, pin_memory, read_less
from .advice_on_sizes import enlarge_batch, enlarge_micro, recompute, shrink_micro
from .evidence import LEAST, memory_hurts

MOST = 3
RULES = (
    *(load_faster, read_less, pin_memory),
    *(enlarge_micro, enlarge_batch, shrink_micro, recompute),
    *(reduce_precision, fuse_attention, channels_last, fuse_optimizer),
)


def advise(profile: Profile) -> tuple[Advice, ...]:
    """Return what is most worth doing: at most three, most worth first; empty where nothing is.

    Worth is the share of the step's time that is saved, and where memory is short the share of the
    peak that is freed, too. Less than a twentieth of both is left out; a thing that is wrong, but
    cannot be counted (neither number is known), comes last.
    """
    if not profile.step_s > 0:
        return ()
    short = memory_hurts(profile)

    def worth(advice: Advice) -> float:
        return (advice.saves or 0.0) + (advice.frees or 0.0 if short else 0.0)

    def counts(advice: Advice) -> bool:
        freed = advice.frees or 0.0 if short else 0.0
        uncounted = advice.saves is None and advice.frees is None
        return uncounted or max(advice.saves or 0.0, freed) >= LEAST

    found = [advice for rule in RULES if (advice := rule(profile)) and counts(advice)]
    return tuple(sorted(found, key=lambda advice: -worth(advice))[:MOST])
