"""How a person's things are pickled: cloudpickle's way, and that of torch's things in use.

`save` writes them to a file and tells what really went wrong.
"""

from __future__ import annotations

import copyreg
import errno
import io
import os
import pickle
import sys
import types
from collections import OrderedDict
from typing import Any

import cloudpickle
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data.dataloader import _BaseDataLoaderIter

_STANDARD = sys.__stdin__, sys.__stdout__, sys.__stderr__
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Pickler(cloudpickle.Pickler):
    """Carries functions and classes that a notebook defines, random generators, what torch leaves
    out (hooks of weights, an optimizer's own), and loaders whose workers run; a GPU becomes the one
    that the process which reads has to itself."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _BaseDataLoaderIter):  # persistent workers: each process has its own
            return type(None), ()
        if isinstance(obj, torch.Generator):
            return _generator, (obj.device.type, obj.get_state())
        if isinstance(obj, torch.device) and obj.type == "cuda" and obj.index is not None:
            return _own_device, ()
        if isinstance(obj, io.TextIOWrapper) and not obj.closed and obj not in _STANDARD:
            raise pickle.PicklingError("an open file")  # cloudpickle would send all that is in it
        if type(obj) is nn.Parameter and obj._backward_hooks:
            made = obj.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
            return *made[:2], OrderedDict(obj._backward_hooks), None, None, _hook
        if isinstance(obj, Optimizer) and type(obj).__getstate__ is Optimizer.__getstate__:
            return copyreg.__newobj__, (type(obj),), _state_of(obj)  # type: ignore[attr-defined]
        return super().reducer_override(obj)


def _generator(kind: str, state: torch.Tensor) -> torch.Generator:
    made = torch.Generator(_own_device() if kind == "cuda" else kind)
    made.set_state(state)
    return made


def _own_device() -> torch.device:
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _hook(parameter: nn.Parameter, hooks: Any) -> None:
    parameter._backward_hooks = hooks


def _state_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return all that an optimizer holds but for its `step` as a scheduler has wrapped it."""
    held = dict(vars(optimizer))
    if hasattr(held.get("step"), "_wrapped_by_lr_sched"):
        del held["step"]
    return held


def save(thing: Any, path: str, pickler: type[cloudpickle.Pickler]) -> None:
    """Write `thing` for `torch.load`.

    Raises:
        Exception: whatever a person's object raises; OSError where the file could not be written.
    """
    pickling = types.SimpleNamespace(__name__="cloudpickle", Pickler=pickler)
    with open(path, "wb", buffering=0) as file:
        out: Any = _Told(file)
        try:
            torch.save(thing, out, pickle_module=pickling, pickle_protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            if out.fault is not None and out.fault is not error:
                raise out.fault from None
            raise


def is_full(error: BaseException) -> bool:
    """Return whether a disk, or the room that one may take of it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


class _Told:
    """A file that keeps its own fault: torch tells of another one on its way out."""

    def __init__(self, file: Any) -> None:
        self._file, self.fault = file, None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:  # an unbuffered file may take a part
                left = left[self._file.write(left) :]
        except OSError as error:
            self.fault = error
            raise
        return size

    def flush(self) -> None:
        """Nothing waits here."""
