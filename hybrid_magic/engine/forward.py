"""One forward pass of the person's step: under autocast, and the first one of a run watched.

Knows no gradient, no optimizer and no record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import HybridMagicError
from . import reduction
from .data import StepData
from .reduction import LossWatch, Reduction
from .step_state import StepState


def forward(state: StepState, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return (loss, logged values) of the person's step on a batch that is on the device."""
    if state.precision.mixed:
        with state.precision.autocast():
            result = state.compute(state.model, batch)
    else:
        result = state.compute(state.model, batch)
    return result if type(result) is tuple else (result, {})


def watched_forward(
    state: StepState, data: StepData, batch: Any
) -> tuple[Tensor, dict[str, Any], Reduction | None]:
    """Run the first forward pass of a run, learning from it how the loss is reduced; None where
    there is nothing to be trained.

    Raises:
        HybridMagicError: the step gives no loss, or beside it what has no names.
    """
    with LossWatch() as watch:
        loss, extra = forward(state, batch)
    if loss is None and state.adopted:
        return loss, extra, None
    reduction.check(loss)
    if not isinstance(extra, Mapping):
        raise HybridMagicError(
            f"the step gave (loss, {type(extra).__name__}); wanted the loss, or (loss, a dict of "
            "numbers to record); name what is to be recorded"
        )
    found = reduction.read(watch, loss, batch, state.asked_reduction)
    return loss, extra, learn_reduction(state, data, found)


def learn_reduction(state: StepState, data: StepData, found: Reduction) -> Reduction:
    """Return how the loss is reduced, tried out where the criterion did not tell; remember it."""
    if not found.certain and state.settle is not None:
        found = state.settle(state, data, found)
    state.reduction = found if found.certain else None  # else it is looked at again
    return found


def log(logged: dict[str, Tensor], extra: dict[str, Any], share: float, device: Any) -> None:
    """Add `share` of each value to the step's mean of it, without reading it.

    Raises:
        HybridMagicError: a value is no number.
    """
    for name, value in extra.items():
        try:
            part = torch.as_tensor(value, dtype=torch.float32, device=device).detach().mean()
        except (TypeError, ValueError, RuntimeError):
            raise HybridMagicError(
                f"{name} to be logged is a {type(value).__name__}; wanted a number or a tensor; "
                "leave it out of --log"
            ) from None
        part = part * share
        logged[name] = part if name not in logged else logged[name] + part
