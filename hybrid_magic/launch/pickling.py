"""How a person's things are pickled: cloudpickle's way, and that of torch's things in use."""

from __future__ import annotations

import io
import os
import pickle
import sys
from typing import Any

import cloudpickle
import torch
from torch.utils.data.dataloader import _BaseDataLoaderIter

_STANDARD = sys.__stdin__, sys.__stdout__, sys.__stderr__


class Pickler(cloudpickle.Pickler):
    """Carries functions and classes that a notebook defines, random generators, and loaders whose
    workers run; a GPU becomes the one that the process which reads has to itself."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _BaseDataLoaderIter):  # persistent workers: each process has its own
            return type(None), ()
        if isinstance(obj, torch.Generator):
            return _generator, (obj.device.type, obj.get_state())
        if isinstance(obj, torch.device) and obj.type == "cuda" and obj.index is not None:
            return _own_device, ()
        if isinstance(obj, io.TextIOWrapper) and not obj.closed and obj not in _STANDARD:
            raise pickle.PicklingError("an open file")  # cloudpickle would send all that is in it
        return super().reducer_override(obj)


def _generator(kind: str, state: torch.Tensor) -> torch.Generator:
    made = torch.Generator(_own_device() if kind == "cuda" else kind)
    made.set_state(state)
    return made


def _own_device() -> torch.device:
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
