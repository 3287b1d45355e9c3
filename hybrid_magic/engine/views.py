"""Whether a person's code asks for `.view`, which a tensor in channels_last may refuse.

Read off the compiled code of their modules, their step, and the functions that these name: nothing
is run. What torch and torchvision have written takes both layouts.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_TAKES_BOTH = ("torch.", "torchvision.", "hybrid_magic.")


def asks_for_views(*things: Any) -> bool:
    """Return whether modules, functions or other callables (None: nothing) ask for views."""
    waiting, seen = list(things), set[int]()
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or _is_known(thing):
            continue
        seen.add(id(thing))
        if isinstance(thing, types.CodeType):
            if "view" in thing.co_names:
                return True
            waiting += [each for each in thing.co_consts if isinstance(each, types.CodeType)]
        else:
            waiting += _parts(thing)
    return False


def _is_known(thing: Any) -> bool:
    where = thing if isinstance(thing, type | types.FunctionType) else type(thing)
    return f"{where.__module__}.".startswith(_TAKES_BOTH) and not isinstance(thing, nn.Module)


def _parts(thing: Any) -> Iterator[Any]:
    """Yield what runs where `thing` is called."""
    if isinstance(thing, types.FunctionType):
        yield thing.__code__
        named = (thing.__globals__.get(name) for name in thing.__code__.co_names)
        held = (_content(cell) for cell in thing.__closure__ or ())
        yield from (each for each in (*named, *held) if isinstance(each, _FOLLOWED))
    elif isinstance(thing, types.MethodType):
        yield from (thing.__func__, thing.__self__)
    elif isinstance(thing, nn.Module):
        yield from {type(part) for part in thing.modules()}
    elif isinstance(thing, type):
        own: dict[str, Any] = {}
        for kind in reversed(thing.__mro__):
            own.update(vars(kind))
        yield from (each for each in own.values() if isinstance(each, _FOLLOWED))
    elif callable(thing):
        held = getattr(thing, "__dict__", {}).values()
        yield from (type(thing), *(each for each in held if isinstance(each, _FOLLOWED)))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None


_FOLLOWED = (types.FunctionType, types.MethodType, types.CodeType)
