"""What an exception keeps alive, let go of: the tensors in the frames of its traceback.

A notebook holds on to the last exception, its traceback, and so every variable of every function
that it passed, on the GPU too. Here these variables are replaced by a few words about them, unless
they are plain values or live elsewhere anyway. The frames stay, with their lines, so that a
debugger still works on them. Knows no IPython.

Only finished frames are written to, and only what nobody else can read: no frame that runs or
waits, no module or notebook cell, no variable that a living function shares.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import (
    AsyncGeneratorType,
    CellType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    TracebackType,
)
from typing import Any

import torch

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range,
          torch.device, torch.dtype, torch.layout, torch.memory_format)  # fmt: skip
_MOST_LOOKED_THROUGH, _DEEPEST = 32, 3  # items of a plain list or dict, and lists in lists
_GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_OWN_FRAME: dict[type, str] = {
    GeneratorType: "gi_frame",
    CoroutineType: "cr_frame",
    AsyncGeneratorType: "ag_frame",
}
# From 3.14 on a frame keeps what is overwritten in it: there its variables can only go altogether.
_CAN_OVERWRITE = sys.version_info < (3, 14)


class Gone(str):
    """What is left of a variable: a description of the value that was given back."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def let_go(*held: BaseException | TracebackType | None) -> int:
    """Free what errors, the errors before them, and tracebacks hold.

    What an error says stays the same. Costs a garbage collection.

    Returns:
        How many values were given back (each may have been a list of many).
    """
    try:
        return _let_go(held)
    except KeyboardInterrupt as interrupt:  # it struck here: done anew, with what it holds itself
        _let_go((*held, interrupt))
        raise


def _let_go(held: Iterable[BaseException | TracebackType | None]) -> int:
    errors = list(_chain(item for item in held if isinstance(item, BaseException)))
    tracebacks = [item for item in held if isinstance(item, TracebackType)]
    frames = _finished([*(error.__traceback__ for error in errors), *tracebacks])
    emptied: list[_Emptied] = []
    for frame in frames:
        emptied += _empty_frame(frame)
    for error in errors:
        emptied += _empty_error(error)
    for cell in _cells_of_none_but(frames):
        emptied += _empty_cell(cell)
    gc.collect()
    return sum(not each.put_back() for each in emptied)


class _Emptied:
    """A variable that was emptied, to be filled again if its value lives on elsewhere."""

    __slots__ = ("_fill", "_value")

    def __init__(self, value: Any, fill: Callable[[Any], None] | None) -> None:
        self._fill = fill
        try:
            self._value = None if _is(value, torch.Tensor) else weakref.ref(value)
        except TypeError:  # a list, a generator's frame: no way to tell
            self._value = None

    def put_back(self) -> bool:
        value = None if self._value is None else self._value()
        if value is not None and self._fill is not None:
            self._fill(value)
        return value is not None


def _chain(errors: Iterable[BaseException]) -> Iterator[BaseException]:
    """Yield errors and every one that they were raised from, during, or as a group of."""
    waiting: list[Any] = list(errors)
    seen = set[int]()
    while waiting:
        each = waiting.pop()
        if isinstance(each, BaseException) and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [each.__cause__, each.__context__]
            if "BaseExceptionGroup" in (kind.__name__ for kind in type(each).__mro__):
                waiting += each.exceptions  # type: ignore[attr-defined] - 3.11, or its back-port


def _finished(tracebacks: Iterable[TracebackType | None]) -> list[FrameType]:
    """Return the functions' frames that have ended, of those that tracebacks hold."""
    running = set[int]()
    for frame in sys._current_frames().values():
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back
    found: dict[int, FrameType] = {}
    for traceback in tracebacks:
        while traceback is not None:
            frame = traceback.tb_frame
            while frame is not None and id(frame) not in running and id(frame) not in found:
                if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
                    break  # a module or a cell: its variables are the person's own
                found[id(frame)] = frame
                frame = frame.f_back  # also one that a traceback was cut off from
            traceback = traceback.tb_next
    generators = [each for each in found.values() if each.f_code.co_flags & _GENERATORS]
    for holder in gc.get_referrers(*generators) if generators else ():
        own = _OWN_FRAME.get(type(holder))
        if own is not None:  # it waits: one that has ended holds no frame
            found.pop(id(getattr(holder, own)), None)
    return list(found.values())


def _empty_frame(frame: FrameType) -> list[_Emptied]:
    """Replace the variables that are this frame's alone."""
    shared = {*frame.f_code.co_cellvars, *frame.f_code.co_freevars}
    values = {
        name: value
        for name, value in frame.f_locals.items()
        if name not in shared and not _light(value)
    }
    if not _CAN_OVERWRITE:
        if values:
            frame.clear()
        return [_Emptied(value, None) for value in values.values()]
    _write(frame, {name: _words(value) for name, value in values.items()})
    return [
        _Emptied(value, lambda value, name=name: _write(frame, {name: value}))
        for name, value in values.items()
    ]


def _write(frame: FrameType, values: dict[str, Any]) -> None:
    """Give variables of a finished frame other values."""
    variables: Any = frame.f_locals
    variables.update(values)
    if sys.version_info < (3, 13):  # a copy, that stays in the frame; later ones write through
        for name in (*frame.f_code.co_cellvars, *frame.f_code.co_freevars):
            variables.pop(name, None)
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def _cells_of_none_but(frames: list[FrameType]) -> list[CellType]:
    """Return the cells of closures that nothing else refers to than `frames`, and functions that
    nothing else refers to than these.

    Found as the garbage collector finds what is unreachable: references from within are taken off
    each count, and what has some left, or is reached from such, is somebody else's.
    """
    nodes, within = _linked(frames)
    fresh = [object()]
    usual = sys.getrefcount(fresh[0])
    waiting = [
        nodes[at]
        for at in range(len(frames), len(nodes))
        if sys.getrefcount(nodes[at]) > usual + within[id(nodes[at])]
    ]
    others = set(map(id, waiting))
    while waiting:
        for part in _parts(waiting.pop()):
            if id(part) not in others:
                others.add(id(part))
                waiting.append(part)
    return [node for node in nodes if type(node) is CellType and id(node) not in others]


def _linked(frames: list[FrameType]) -> tuple[list[Any], Counter[int]]:
    """Return `frames` and what links them to cells, and how often each is referred to by these."""
    nodes: list[Any] = list(frames)
    seen = set(map(id, nodes))
    within: Counter[int] = Counter()
    for holder in nodes:  # grows as it goes
        for part in _parts(holder):
            within[id(part)] += 1
            if id(part) not in seen:
                seen.add(id(part))
                nodes.append(part)
    return nodes, within


def _parts(holder: Any) -> list[Any]:
    """Return what links a frame to cells: its functions, their closures, and functions in these."""
    if type(holder) is FunctionType:
        return [] if holder.__closure__ is None else [holder.__closure__]
    return [part for part in gc.get_referents(holder) if type(part) in (CellType, FunctionType)]


def _empty_cell(cell: CellType) -> list[_Emptied]:
    try:
        value = cell.cell_contents
    except ValueError:  # empty
        return []
    if _light(value):
        return []

    def fill(value: Any) -> None:
        cell.cell_contents = value

    cell.cell_contents = _words(value)
    return [_Emptied(value, fill)]


def _empty_error(error: BaseException) -> list[_Emptied]:
    """Replace the tensors among an error's arguments and attributes; it says the same as before."""
    emptied: list[_Emptied] = []
    if any(_holds_tensor(value) for value in error.args):
        emptied += [_Emptied(value, None) for value in error.args if _holds_tensor(value)]
        error.args = tuple(
            _as_said(value) if _holds_tensor(value) else value for value in error.args
        )
    attributes = error.__dict__
    for name, value in list(attributes.items()):
        if _holds_tensor(value):
            attributes[name] = _words(value)
            emptied.append(_Emptied(value, None))
    if isinstance(error, StopIteration) and _holds_tensor(error.value):
        error.value = _words(error.value)
    if isinstance(error, AttributeError) and not _light(error.obj):
        # its class, so that "did you mean" still finds what there is
        emptied.append(_Emptied(error.obj, lambda value: setattr(error, "obj", value)))
        error.obj = type(error.obj)
    return emptied


def _holds_tensor(value: Any, depth: int = _DEEPEST) -> bool:
    if _is(value, torch.Tensor):
        return True
    if depth and _is(value, (list, tuple, set, frozenset)):
        return any(_holds_tensor(item, depth - 1) for item in value)
    if depth and _is(value, dict):
        return any(_holds_tensor(item, depth - 1) for item in value.values())
    return False


def _light(value: Any, depth: int = _DEEPEST) -> bool:
    """Return whether `value` is plain: a number, a word, or a few of them."""
    if type(value).__dictoffset__:  # it can hold anything, whatever it is derived from
        return False
    if type(value) in (list, dict, set, frozenset) or _is(value, tuple):
        if not depth or len(value) > _MOST_LOOKED_THROUGH:
            return False
        items = [*value, *value.values()] if type(value) is dict else list(value)
        return all(_light(item, depth - 1) for item in items)
    return _is(value, _PLAIN)


def _is(value: Any, kinds: Any) -> bool:
    """`isinstance`, without asking `value` itself, which may lie, work or fail."""
    return issubclass(type(value), kinds)


def _words(value: Any) -> Gone:
    name = type(value).__name__
    if _is(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return Gone(f"<{name} {kind} {list(value.shape)} on {value.device}, given back>")
    if type(value) in (list, tuple, dict, set):
        return Gone(f"<{name} of {len(value)}, given back>")
    return Gone(f"<{name}, given back>")


def _as_said(value: Any) -> Gone:
    try:
        return Gone(str(value))
    except Exception:  # noqa: BLE001 - a device that has failed cannot show what it holds
        return _words(value)
