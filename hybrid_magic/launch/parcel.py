"""All that a worker needs to train as the notebook would: written by the one, read by the others.

One pickle, so that what is one thing in the notebook is one thing in the worker: the model that a
cell's step names is the model, the optimizer's parameters are the model's. cloudpickle carries
functions and classes that the notebook defines. Knows no process and no line.
"""

from __future__ import annotations

import errno
import linecache
import os
import pickle
import shutil
import types
from typing import Any

import torch
from torch.serialization import default_restore_location

from ..engine.checkpoint_folder import in_words
from ..engine.randomness import all_states, put_all_back
from ..engine.rewind import generators_of
from ..errors import HybridMagicError
from .pickling import Pickler
from .unsendable import found_in, refusal

NAME = "parcel.pt"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def pack(folder: str, things: dict[str, Any]) -> None:
    """Write `things`, the keywords of `engine.train.train`, for the workers.

    Raises:
        HybridMagicError: something in it cannot be sent, which is named; or the disk is full.
    """
    loader = things["loader"]
    parcel = {
        "things": things,
        "random": all_states(generators_of(loader)),
        "seed": torch.initial_seed(),
        "switches": [read() for read, _ in _SWITCHES],
    }
    pickling = types.SimpleNamespace(__name__="cloudpickle", Pickler=Pickler)
    path, trouble = os.path.join(folder, NAME), None
    with open(path, "wb", buffering=0) as file:
        out: Any = _Told(file)
        try:
            torch.save(parcel, out, pickle_module=pickling, pickle_protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # noqa: BLE001 - whatever a person's object raises
            trouble = out.fault or error
    if trouble is None:
        return
    if isinstance(trouble, OSError) and trouble.errno in _FULL:
        raise HybridMagicError(
            f"{folder} has {in_words(shutil.disk_usage(folder).free)} free; wanted room for model "
            "and data, on their way to the worker processes; free some space, or name a larger "
            "folder in the environment variable TMPDIR"
        )
    names = things["names"] or {}
    found = found_in((names.get(name, name), thing) for name, thing in things.items())
    raise refusal(found, trouble)


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


def unpack(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the things, and the random states to be put into place before training; set torch's
    switches as they are in the notebook. Tensors on a GPU come to this process's own, if it has
    one."""
    here = int(os.environ["LOCAL_RANK"])
    gpu = f"cuda:{here}" if here < torch.cuda.device_count() else "cpu"

    def put(storage: Any, location: str) -> Any:
        return default_restore_location(storage, gpu if location.startswith("cuda") else location)

    if gpu != "cpu":
        torch.cuda.set_device(here)
    # Mapped: what is not written to, such as a dataset, is in memory once for all workers.
    parcel = torch.load(os.path.join(folder, NAME), map_location=put, mmap=True, weights_only=False)
    for (_, write), value in zip(_SWITCHES, parcel["switches"], strict=True):
        write(value)
    return parcel["things"], {"seed": parcel["seed"], "states": parcel["random"]}


def draw_as_there(held: dict[str, Any], loader: Any) -> None:
    """Have every generator draw on as it would have in the notebook."""
    torch.manual_seed(held["seed"])
    if held["states"]["cuda"] and torch.cuda.is_available():
        torch.cuda.init()
    put_all_back(held["states"], generators_of(loader))


def sources() -> dict[str, str]:
    """Return the text of the notebook's cells, by the name under which tracebacks look for it."""
    cells = {}
    for name, entry in list(linecache.cache.items()):
        if len(entry) == 4 and not os.path.exists(name):
            cells[name] = "".join(entry[2])
    return cells


def show_sources(cells: dict[str, str]) -> None:
    """Have tracebacks of this process show the lines of `cells`."""
    for name, text in cells.items():
        linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name


def _set_cudnn(values: tuple[bool, bool, bool]) -> None:
    cudnn = torch.backends.cudnn
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = values


_SWITCHES: list[tuple[Any, Any]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    (
        lambda: (
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.allow_tf32,
        ),
        _set_cudnn,
    ),
]
