"""The gradients of a step once they are gathered: unscaled, measured, clipped.

Knows no loss, no loader and no optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gradients import gradient_norms
from .step_state import Gathered, StepState


def unscale(state: StepState, gathered: Gathered) -> None:
    """Divide the new gradients by the loss scale; what overflowed before still counts."""
    scaler: Any = state.precision.scaler
    scaler._per_optimizer_states.pop(id(state.optimizer), None)  # it refuses to do so twice
    scaler.unscale_(state.optimizer)
    stage = scaler._per_optimizer_states[id(state.optimizer)]
    gathered.found_inf = found = stage["found_inf_per_device"]
    if gathered.before is not None:
        for device, earlier in gathered.before.found_inf.items():
            found[device] = found[device] + earlier if device in found else earlier
    if state.precision.ours:  # the plain loop leaves these scaled
        state.transaction.unscale_others(scaler)


def noise_measured(state: StepState, gathered: Gathered) -> tuple[list[Tensor], str | None]:
    """Return the norms of a noise measurement, and of which kind they are; none on the first step
    of a pair."""
    if gathered.paired:
        pair = state.noise.pair(sum(gathered.sizes))
        return ([], None) if pair is None else (list(pair), "pair")
    factor: float | Tensor = 1.0 if gathered.shared else 1.0 / gathered.apart
    if state.precision.scaler is not None:  # what was kept is scaled
        one = torch.ones((), device=state.device.device)
        factor = factor / state.precision.scaler.scale(one)
    if gathered.shared:
        gathered.small = sum(gathered.sizes) / state.together.ranks.size
        return state.together.noise(state, factor), "cut"
    gathered.small = gathered.sizes[0]
    return list(state.noise.cut(factor)), "cut"


def clip(state: StepState, gathered: Gathered, most: float) -> None:
    """Scale the gradients down to a norm of `most`; the person may have changed theirs since."""
    grads = [param.grad for param in state.params if param.grad is not None]
    norms = gradient_norms(grads) if state.adopted else gathered.norms
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1.0))
