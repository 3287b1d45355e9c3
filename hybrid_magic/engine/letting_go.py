"""What an exception keeps alive, let go of: the tensors in the frames of its traceback.

A notebook holds on to the last exception, its traceback, and so every local of every frame that it
passed, on the GPU too. Here tensors and whatever may hold some are replaced in these frames by a
few words about them. The frames stay, with their lines and their plain values, so that a debugger
still works on them. Knows no IPython.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

_KEPT = (
    bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, types.FunctionType,
    types.BuiltinFunctionType, types.MethodType, torch.nn.Module, torch.optim.Optimizer,
    torch.device, torch.dtype, torch.utils.data.DataLoader, torch.utils.data.Dataset,
)  # fmt: skip


def let_go(error: BaseException | None) -> None:
    """Free what `error`, and the errors before it, hold by their tracebacks.

    Frames that still run, and those of modules and notebook cells, whose variables are the
    person's own, are left alone.
    """
    for each in _chain(error):
        traceback = each.__traceback__
        while traceback is not None:
            _lighten(traceback.tb_frame)
            traceback = traceback.tb_next
    gc.collect()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error` and every error that it was raised from or during."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]


def _lighten(frame: types.FrameType) -> None:
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED or _runs(frame):
        return
    # what is shared with an enclosing function (co_freevars) is not this frame's alone
    own = {*frame.f_code.co_varnames, *frame.f_code.co_cellvars}
    variables = frame.f_locals
    heavy = [name for name in own if name in variables and not _light(variables[name])]
    for name in heavy:
        variables[name] = _words(variables[name])
    if heavy and sys.version_info < (3, 13):  # later ones write through
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def _runs(frame: types.FrameType) -> bool:
    running: types.FrameType | None = sys._getframe()
    while running is not None:
        if running is frame:
            return True
        running = running.f_back
    return False


def _light(value: Any) -> bool:
    """Return whether `value` is known to hold no tensor that would not live without it."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 32 and all(map(_light, value))
    if isinstance(value, dict):
        return len(value) <= 32 and all(map(_light, value.values()))
    return isinstance(value, _KEPT)


class Gone(str):
    """What is left of a variable: a description of the value that was given back."""

    def __repr__(self) -> str:
        return str(self)


def _words(value: Any) -> Gone:
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return Gone(f"<Tensor {kind} {list(value.shape)} on {value.device}, given back>")
    return Gone(f"<{type(value).__name__}, given back>")
