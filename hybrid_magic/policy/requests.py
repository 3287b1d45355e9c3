"""What a person asks of the steering by hand: each request, what follows from it, its records.

Knows the names of the run's controls, not where they are drawn.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..records import BatchChangeRecord
from . import growth, microbatch
from . import state as states
from .state import Changes, State

_FIELDS = {
    "accum": "accum",
    "memory": "budget_bytes",
    "stability_threshold": "stability_threshold",
    "growth_factor": "growth_factor",
    "max_batch": "max_batch",
    "lr_multiplier": "lr_multiplier",
}


def apply(state: State, name: str, value: float | None, step: int) -> tuple[State, Changes]:
    """Return the state after a person's request, and what it changed.

    Args:
        name: a setting of the run's control, or "grow" or "shrink".
        value: the setting; None gives it back: accum to auto, others to what the run began with.
    Raises:
        ValueError: no such request.
    """
    if name in ("grow", "shrink"):
        return state, _move_by_hand(state, name, step)
    if name not in _FIELDS:
        raise ValueError(
            f"there is no request {name!r}; wanted a setting of the control, grow or shrink"
        )
    field = _FIELDS[name]
    before: Any = getattr(state.settings, field)
    after = _read(state, name, value)
    if after == before:
        return state, ()
    state.settings = dataclasses.replace(state.settings, **{field: after})
    old, new = ("auto" if found is None else found for found in (before, after))
    reason = f"{name} set by hand: {_shown(name, old)} -> {_shown(name, new)}"
    change = BatchChangeRecord(step, old, new, "control", reason)
    return state, (change, *_follow(state, name, step))


def _read(state: State, name: str, value: float | None) -> Any:
    """Return the value that the setting takes; a memory mark needs a device whose size is known."""
    if name == "memory" and state.settings.device_bytes is None:
        return state.settings.budget_bytes
    if value is None:
        return None if name == "accum" else getattr(state.asked, _FIELDS[name])
    if name == "memory":
        return int(value * (state.settings.device_bytes or 0))
    return int(min(value, 2**31)) if name in ("accum", "max_batch") else value


def _shown(name: str, value: Any) -> str:
    return f"{value / 2**30:.3g} GiB" if name == "memory" and value != "auto" else f"{value}"


def _follow(state: State, name: str, step: int) -> Changes:
    """Bring the sizes in line with the settings after one of them was set by hand."""
    settings = state.settings
    state.steered = settings.steered
    state.sized = settings.micro is None and settings.accum is None
    state.factor_batch = 0
    if state.steered and state.until_probe == math.inf:
        state.until_probe = 1
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
    return states.rebatch(
        state, after, step, "control", f"{name} asked for by hand: {batch} -> {after}"
    )
