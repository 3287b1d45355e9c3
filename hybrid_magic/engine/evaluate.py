"""Validation: the step's own forward pass over a loader, in eval mode, without gradients.

Leaves modes as they were. The host reads nothing until the pass is over. Knows no record.
"""

from __future__ import annotations

from typing import Any

import torch

from . import nested
from .prepare import modes_kept
from .reduction import Reduction
from .step import StepState, forward


def evaluate(state: StepState, loader: Any) -> dict[str, float]:
    """Return the mean loss and the sample-weighted mean of every logged value over `loader`.

    Args:
        state: the run's step state; its model's modes are put back.
        loader: batches as the step takes them; read once, whole.
    """
    reduction = state.reduction or Reduction("mean", "")
    sums: dict[str, tuple[Any, float]] = {}
    with modes_kept(state.model), torch.no_grad():
        state.model.eval()
        for batch in loader:
            n = nested.count(batch) or 1
            moved = batch if state.mover is None else state.mover(batch)
            loss, logged = forward(state, moved)
            weight = 1.0 if reduction.kind == "sum" else reduction.counts([batch], [n])[0]
            share = n if reduction.kind == "sum" else weight
            for name, value, factor, count in [
                ("loss", loss, weight, share),
                *((name, value, n, n) for name, value in logged.items() if name != "loss"),
            ]:
                value = torch.as_tensor(value, dtype=torch.float32, device=loss.device).mean()
                total, seen = sums.get(name, (0.0, 0.0))
                # a batch in which nothing counts has no loss, and none is added
                sums[name] = (total + value * factor if factor else total, seen + count)
    return {name: float(total) / seen for name, (total, seen) in sums.items() if seen}
