"""What comes of a worker's training: written there, and put into the notebook's own things.

The same objects hold it afterwards as if they had been trained in the notebook, where they are.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from .. import run as runs
from ..engine import checkpoint, schedule
from ..engine.randomness import all_states, put_all_back
from ..engine.rewind import generators_of
from ..run import Run

NAME = "result.pt"


def write(folder: str, things: dict[str, Any], run: Run) -> None:
    """Write what the things of the parcel have become, and the Run.

    Raises:
        OSError, RuntimeError: it could not be written.
    """
    scheduler = things["scheduler"]
    tree = {
        **checkpoint.begun(things["model"], _stepped_by(things)),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "random": all_states(generators_of(things["loader"])),
        "run": checkpoint.text_of(run),
        "history_seen": run.history.seen,
    }
    torch.save(tree, os.path.join(folder, NAME))


def put_back(folder: str, things: dict[str, Any]) -> Run:
    """Give the person's `things` what a worker wrote, and return the Run, now the last one."""
    path = os.path.join(folder, NAME)
    tree = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    model = things["model"]
    checkpoint.put_weights_back(tree, model, _stepped_by(things))
    for parameter in model.parameters():
        parameter.grad = None
    if things["scheduler"] is not None:
        schedule.load(things["scheduler"], tree["scheduler"])
    put_all_back(tree["random"], generators_of(things["loader"]))
    runs.last_run = checkpoint.run_of(tree)
    return runs.last_run


def _stepped_by(things: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the person's optimizer; a run with a fresh one of its own leaves nothing of that, and
    has one without a state here."""
    optimizer = things["optimizer"]
    return torch.optim.SGD(things["model"].parameters()) if optimizer is None else optimizer
