"""The steering's state as plain values, to be written to a file, and back.

Every class that occurs in it is named here. What another version wrote is told by its fields.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .facts import Settings, StepPlan
from .growth import Health
from .microbatch import MicroState
from .noise_scale import NoiseEstimate, NoiseState
from .state import State
from .timing import Timing

_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (State, Settings, StepPlan, Health, MicroState, NoiseEstimate, NoiseState, Timing)
}
_KIND = "is a"  # no field's name
_ROWS: tuple[Any, ...] = (list, tuple)


def as_plain(value: Any) -> Any:
    """Return `value` with a dict for each of the policy's own; numbers, text and None stay."""
    kind = _kind(value)
    if kind in _KINDS.values():
        fields = {name: as_plain(getattr(value, name)) for name in _fields(kind)}
        return {_KIND: kind.__name__, **fields}
    if kind in _ROWS:
        return kind(map(as_plain, value))
    return {key: as_plain(inner) for key, inner in value.items()} if kind is dict else value


def from_plain(value: Any) -> Any:
    """Return what `as_plain` was given.

    Raises:
        ValueError: another version wrote it: there is no such class, or it has other fields.
    """
    kind = _kind(value)
    if kind in _ROWS:
        return kind(map(from_plain, value))
    if kind is not dict:
        return value
    made = {key: from_plain(inner) for key, inner in value.items()}
    if _KIND not in made:
        return made
    name = made.pop(_KIND)
    if name not in _KINDS or _fields(_KINDS[name]) != list(made):
        raise ValueError(f"a {name} of {', '.join(map(str, made))}")
    return _KINDS[name](**made)


def _fields(kind: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)]


def _kind(value: object) -> Any:
    return type(value)
