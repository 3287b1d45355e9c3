"""Validation: the step's own forward pass over a loader, in eval mode, without gradients.

Leaves modes as they were. The host reads nothing until the pass is over. Knows no record.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import OutOfMemoryError
from . import nested, ranks, sharing
from .device import attempt
from .forward import forward
from .prepare import modes_kept
from .reduction import Reduction
from .step_state import StepState
from .summing import same_buffers


def evaluate(state: StepState, loader: Any) -> dict[str, float]:
    """Return the mean loss and the sample-weighted mean of every logged value over `loader`.

    Args:
        state: the run's step state; its model's modes are put back.
        loader: batches as the step takes them; read once, whole. One that does not fit into memory
            is cut, and those after it.
    Raises:
        HybridMagicError: a batch does not fit and cannot be cut any smaller.
    """
    sums: dict[str, tuple[Any, float]] = {}
    group = ranks.current()
    if group is not None:
        same_buffers(group, state.model)  # the model that is validated is the one that is kept
        loader = sharing.batches_of(loader, group)
    with modes_kept(state.model), torch.no_grad():
        state.model.eval()
        most = sys.maxsize
        for batch in loader:
            waiting = _pieces(batch, most)
            while waiting:
                piece = waiting.pop(0)
                values, found = attempt(_values, state, piece)
                if found is None:
                    for name, value, factor, count in values:
                        total, seen = sums.get(name, (0.0, 0.0))
                        # a batch in which nothing counts has no loss, and none is added
                        sums[name] = (total + value * factor if factor else total, seen + count)
                    continue
                state.device.release()
                most = (nested.count(piece) or 1) // 2
                if not most:
                    raise OutOfMemoryError(
                        f"out of memory on {state.device.name} in validation ({found}); wanted "
                        "room for a single sample, or a batch that can be cut between samples; "
                        "make the validation loader's batch smaller"
                    )
                waiting[:0] = _pieces(piece, most)
    read = {name: (float(total), seen) for name, (total, seen) in sums.items()}
    if group is not None:
        read = _added(group.of_all(read))
    return {name: total / seen for name, (total, seen) in read.items() if seen}


def _added(parts: Sequence[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Return the sums that several processes have found of their batches."""
    names = dict.fromkeys(name for part in parts for name in part)
    held = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: (sum(t for t, _ in each), sum(n for _, n in each)) for name, each in held.items()}


def _pieces(batch: Any, most: int) -> list[Any]:
    """Return a host batch in pieces of at most `most` samples; whole where it cannot be cut."""
    n = nested.count(batch)
    if n is None or n <= most:
        return [batch]
    return [nested.rows(batch, start, min(start + most, n)) for start in range(0, n, most)]


def _values(state: StepState, batch: Any) -> list[tuple[str, Any, float, float]]:
    """Return (name, value, factor, count) of the loss and of all that the step logs."""
    reduction = state.reduction or Reduction("mean", "")
    n = nested.count(batch) or 1
    moved = batch if state.mover is None else state.mover(batch)
    loss, logged = forward(state, moved)
    weight = 1.0 if reduction.kind == "sum" else reduction.counts([batch], [n])[0]
    share = n if reduction.kind == "sum" else weight
    found = [("loss", loss, weight, share)]
    found += [(name, value, n, n) for name, value in logged.items() if name != "loss"]
    return [
        (name, torch.as_tensor(value, dtype=torch.float32, device=loss.device).mean(), by, count)
        for name, value, by, count in found
    ]
