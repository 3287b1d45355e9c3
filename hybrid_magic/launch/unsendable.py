"""What cannot be sent to another process, found by digging: `train_loader.dataset.file`.

Pickles piece by piece, into nowhere, and follows the piece that fails. Tensors and arrays are
passed over: they can be sent, and are large.
"""

from __future__ import annotations

import functools
import io
import pickle
import socket
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import HybridMagicError
from .pickling import Pickler

_LATER = "open it where it is first used (in __getitem__), so that every process has its own"
_LEAVE_OUT = "leave it out in the class's __getstate__, and make it anew where it is first used"
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event)
_KINDS: list[tuple[Any, str, str]] = [
    (io.IOBase, "an open file", _LATER),
    (socket.socket, "an open connection", _LATER),
    (types.GeneratorType, "a generator, which can be read once", "make it a list or a DataLoader"),
    (_LOCKS, "a lock", _LEAVE_OUT),
    (threading.Thread, "a running thread", _LEAVE_OUT),
]


def found_in(named: Iterable[tuple[str, Any]]) -> tuple[str, Any] | None:
    """Return the path of the first piece that cannot be pickled and the piece, None where there is
    none; `named` are the things, each after what the person calls it."""
    for name, thing in named:
        if not _goes(thing):
            return _dig(name, thing, set())
    return None


def refusal(found: tuple[str, Any] | None, error: BaseException) -> HybridMagicError:
    """Return what to tell the person of a piece that was found, and of the error it raised."""
    why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if found is None:
        return HybridMagicError(
            f"model and data could not be sent to the worker processes ({why}); wanted things "
            "that can be pickled; train without --processes"
        )
    path, piece = found
    kind, do = next(
        ((words, do) for types_, words, do in _KINDS if isinstance(piece, types_)),
        (f"a {type(piece).__name__}, which cannot be pickled ({why})", _LEAVE_OUT),
    )
    return HybridMagicError(
        f"{path} is {kind}; wanted something that can be sent to another process; {do}, or train "
        "without --processes"
    )


class _Trial(Pickler):
    def persistent_id(self, obj: Any) -> str | None:
        large = isinstance(obj, torch.Tensor) and type(obj) in (torch.Tensor, nn.Parameter)
        return "held" if (large and not obj._backward_hooks) or _is_array(obj) else None


def _is_array(thing: Any) -> bool:
    """Return whether this is a NumPy array of numbers."""
    kind = type(thing)
    return (kind.__module__, kind.__name__) == ("numpy", "ndarray") and not thing.dtype.hasobject


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


def _goes(thing: Any) -> bool:
    try:
        _Trial(_Nowhere(), pickle.HIGHEST_PROTOCOL).dump(thing)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - whatever a person's object raises: it does not go
        return False
    return True


def _dig(path: str, thing: Any, seen: set[int]) -> tuple[str, Any]:
    """Return the deepest piece of `thing` that does not go by itself, and its path."""
    seen.add(id(thing))
    for step, piece in _pieces(path, thing):
        if id(piece) not in seen and not _goes(piece):
            return _dig(step, piece, seen)
    return path, thing


def _pieces(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield what `thing` holds, with the path that a person would write for it."""
    if isinstance(thing, Mapping):
        yield from ((f"{path}[{key!r}]", value) for key, value in thing.items())
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield from ((f"{path}[{number}]", value) for number, value in enumerate(thing))
    elif isinstance(thing, types.FunctionType):
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        held = {name: cell.cell_contents for name, cell in cells}
        used = {n: thing.__globals__[n] for n in _names(thing.__code__) if n in thing.__globals__}
        yield from ((f"{name} (used by {path})", value) for name, value in {**held, **used}.items())
    elif isinstance(thing, types.MethodType):
        yield f"{path}.__self__", thing.__self__
    elif isinstance(thing, nn.Parameter):
        held = [*(thing._backward_hooks or {}).values()]
        yield from ((f"{path}'s hook", hook) for hook in held)
    elif isinstance(thing, functools.partial):
        yield from _pieces(path, [thing.func, *thing.args, *thing.keywords.values()])
    elif not isinstance(thing, type):
        held = dict(getattr(thing, "__dict__", {}))
        for store in (
            ("_modules", "_parameters", "_buffers") if isinstance(thing, nn.Module) else ()
        ):
            held |= held.pop(store, {})
        yield from ((f"{path}.{name}", value) for name, value in held.items())


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a function's code, and code within it, looks up outside."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)
