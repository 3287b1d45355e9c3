"""All that a worker needs to train as the notebook would: written by the one, read by the others.

One pickle, so that what is one thing in the notebook is one thing in the worker: the model that a
cell's step names is the model, the optimizer's parameters are the model's. cloudpickle carries
functions and classes that the notebook defines. Knows no process and no line.
"""

from __future__ import annotations

import linecache
import os
import re
import shutil
import sys
from typing import Any

import torch
from torch.serialization import default_restore_location

from ..engine.checkpoint_folder import in_words
from ..engine.drawing import generators_of
from ..engine.optimizer_state import is_adam_like
from ..engine.prepare import tf32_places
from ..engine.randomness import all_states, put_all_back
from ..errors import HybridMagicError
from .pickling import Pickler, is_full, save
from .unsendable import found_in, refusal

NAME = "parcel.pt"
_ONE_GPU = re.compile(r"cuda:\d+")


def pack(folder: str, things: dict[str, Any]) -> None:
    """Write `things`, the keywords of `engine.train.train`, for the workers.

    Raises:
        HybridMagicError: something in it cannot be sent, which is named; or the disk is full, or
            would be with what comes back.
    """
    loader = things["loader"]
    parcel = {
        "things": things,
        "random": all_states(generators_of(loader)),
        "seed": torch.initial_seed(),
        "switches": [read() for read, _ in _SWITCHES],
    }
    try:
        save(parcel, os.path.join(folder, NAME), Pickler)
    except Exception as error:  # noqa: BLE001 - whatever a person's object raises
        trouble = error
    else:
        back = _bytes_back(things["model"], things["optimizer"])
        if shutil.disk_usage(folder).free < back:
            raise _no_room(folder, f"{in_words(back)} for the trained weights, on their way back")
        return
    if is_full(trouble):
        raise _no_room(folder, "room for model and data, on their way to the worker processes")
    names = things["names"] or {}
    found = found_in((names.get(name, name), thing) for name, thing in things.items())
    raise refusal(found, trouble)


def _no_room(folder: str, wanted: str) -> HybridMagicError:
    return HybridMagicError(
        f"{folder} has {in_words(shutil.disk_usage(folder).free)} free; wanted {wanted}; free some "
        "space, or name a larger folder in the environment variable TMPDIR"
    )


def _bytes_back(model: torch.nn.Module, optimizer: Any) -> int:
    """Return about how much a worker writes: weights, buffers, and what the person's optimizer
    keeps of each weight that is trained, Adam two values, others one if any."""
    weights = list(model.parameters())
    held = [*weights, *model.buffers()]
    if optimizer is not None:
        values = 2 if is_adam_like(optimizer) else bool(optimizer.defaults.get("momentum", 1))
        held += values * [weight for weight in weights if weight.requires_grad]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


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
    if gpu != "cpu":
        _name_own_gpu(parcel["things"], gpu)
    return parcel["things"], {"seed": parcel["seed"], "states": parcel["random"]}


def _name_own_gpu(things: dict[str, Any], gpu: str) -> None:
    """Have "cuda:0" be this process's own GPU, `gpu`, in what the cells and the model hold, as a
    `torch.device` already is."""
    model, step = things["model"], things["step"]
    code = [step, *(type(part).forward for part in model.modules())]
    held = [vars(part) for part in model.modules()]
    for function in code:
        names = getattr(function, "__globals__", None)
        module = sys.modules.get((names or {}).get("__name__", ""))
        if names is not None and names is not getattr(module, "__dict__", None):  # a cell's
            held.append(names)
    for names in held:
        for name, value in names.items():
            if isinstance(value, str) and _ONE_GPU.fullmatch(value):
                names[name] = gpu


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


def _set_cudnn(values: tuple[bool, bool]) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = values


def _default_device() -> torch.device | None:
    try:
        found = torch.get_default_device()
    except AttributeError:  # torch 2.4, after one was taken back
        return None
    return None if found.type == "cpu" else found


def _set_default_device(device: torch.device | None) -> None:
    if device is not None or _default_device() is not None:
        torch.set_default_device(device)


def _tf32() -> Any:
    """Return how FP32 is computed, in the words that the person has used: torch mixes no two."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return [place.fp32_precision for place in tf32_places()]


def _set_tf32(found: Any) -> None:
    if isinstance(found, tuple):
        torch.set_float32_matmul_precision(found[0])
        torch.backends.cudnn.allow_tf32 = found[1]
        return
    for place, precision in zip(tf32_places(), found, strict=True):
        place.fp32_precision = precision


_SWITCHES: list[tuple[Any, Any]] = [
    (_default_device, _set_default_device),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_tf32, _set_tf32),
    (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    (
        lambda: (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        _set_cudnn,
    ),
]
