"""What comes of a worker's training: written there, and put into the notebook's own things.

Weights, optimizer, scheduler, the generators of torch, Python and NumPy, and those that the loader
holds are afterwards as if they had been trained in the notebook, where they are. What else was
written to, such as a list or a counter, stays as it was.
"""

from __future__ import annotations

import os
import types
from typing import Any

import cloudpickle
import torch

from .. import run as runs
from ..engine import checkpoint, schedule
from ..engine.drawing import generators_of
from ..engine.randomness import all_states, put_all_back
from ..run import Run
from .pickling import save
from .unsendable import found_in, refusal

NAME = "result.pt"
_OWN = (types.FunctionType, types.MethodType, torch.nn.Module, torch.optim.Optimizer)


def write(folder: str, things: dict[str, Any], run: Run) -> None:
    """Write what the things of the parcel have become, and the Run.

    Raises:
        OSError: it could not be written.
        HybridMagicError: something in it cannot be sent, which is named.
        Exception: as before, where it is not known what.
    """
    scheduler = things["scheduler"]
    tree = {
        **checkpoint.begun(things["model"], _stepped_by(things)),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "random": all_states(generators_of(things["loader"])),
        "run": checkpoint.text_of(run),
        "history_seen": run.history.seen,
    }
    try:
        save(tree, os.path.join(folder, NAME), cloudpickle.Pickler)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a person's object raises
        states = (("scheduler", tree["scheduler"]), ("optimizer", tree["optimizer"]["state"]))
        found = found_in((f"{name}.state_dict()", state) for name, state in states)
        raise error if found is None else refusal(found, error) from None


def put_back(folder: str, things: dict[str, Any]) -> Run:
    """Give the person's `things` what a worker wrote, and return the Run, now the last one."""
    path = os.path.join(folder, NAME)
    tree = torch.load(path, map_location="cpu", weights_only=False)  # mapped it would stay
    model = things["model"]
    checkpoint.put_weights_back(tree, model, _stepped_by(things))
    for parameter in model.parameters():
        parameter.grad = None
    if things["scheduler"] is not None:
        scheduler = things["scheduler"]
        schedule.load(scheduler, _with_own(tree["scheduler"], scheduler.state_dict()))
    put_all_back(tree["random"], generators_of(things["loader"]))
    runs.last_run = checkpoint.run_of(tree)
    return runs.last_run


def _with_own(value: Any, now: Any) -> Any:
    """Return `value` with the functions and models that `now` has in their places: those of the
    notebook look into the notebook, and are the ones that it trains."""
    if isinstance(value, _OWN):
        return now if isinstance(now, _OWN) else value
    if type(value) is dict and isinstance(now, dict):
        return {key: _with_own(inner, now.get(key)) for key, inner in value.items()}
    if type(value) is list and isinstance(now, list) and len(value) == len(now):
        return [_with_own(*pair) for pair in zip(value, now, strict=True)]
    return value


def _stepped_by(things: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the person's optimizer; a run with a fresh one of its own leaves nothing of that, and
    has one without a state here."""
    optimizer = things["optimizer"]
    return torch.optim.SGD(things["model"].parameters()) if optimizer is None else optimizer
