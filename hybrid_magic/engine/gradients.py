"""Norms of gradients: the whole step's, and the pairs that the gradient noise scale is made from.

For Adam-likes the noise is measured in the optimizer's own scaling, gradient over the root of its
second moment, as AdaptDL does. Everything stays on the device; nothing here reads a value back.
Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1; Qiao et al. 2021 (Pollux), OSDI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

_SECOND_MOMENTS = ("exp_avg_sq", "square_avg")


def gradient_norms(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the L2 norm of each gradient, 0-dim; a sparse gradient counts by its values."""
    for grad in grads:
        if grad.is_sparse:
            grads = [each.coalesce().values() if each.is_sparse else each for each in grads]
            break
    return list(torch._foreach_norm(list(grads), 2.0))


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients as one 0-dim tensor."""
    return torch.linalg.vector_norm(torch.stack(gradient_norms(grads)))


def family(optimizer: torch.optim.Optimizer) -> Literal["sgd", "adam"]:
    """Return "adam" for optimizers that divide by the root of a second moment, else "sgd"."""
    defaults = optimizer.defaults
    return (
        "adam" if "betas" in defaults or ("alpha" in defaults and "centered" in defaults) else "sgd"
    )


class NoiseProbe:
    """Measures the gradients of one step in two sizes, in the optimizer's own scaling.

    `small` after the first micro-batch, `large` after the last; or, for models with batch
    statistics, `pair` over two consecutive whole steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
        self._optimizer, self._params = optimizer, params
        self._scaled = family(optimizer) == "adam"
        self._scale: list[Tensor] | None = None
        self._kept: tuple[list[Tensor], int] | None = None
        self._before = _steps_taken(optimizer)

    def begin(self, steps: int) -> bool:
        """Take the optimizer's scaling for this probe; False when it has none yet.

        Args:
            steps: optimizer steps taken in this run, for Adam's bias correction.
        """
        self._scale = None
        if not self._scaled:
            return True
        roots = []
        for param in self._params:
            state: Any = self._optimizer.state.get(param, {})
            name = next((name for name in _SECOND_MOMENTS if name in state), None)
            if name is None:
                return False
            roots.append(state[name])
        group = self._optimizer.param_groups[0]
        beta = group["betas"][1] if "betas" in group else group.get("alpha", 0.99)
        scale = torch._foreach_div(roots, max(1.0 - beta ** (self._before + steps), 1e-8))
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, group.get("eps", 1e-8))
        self._scale = list(scale)
        return True

    def norm(self) -> Tensor:
        """Return the L2 norm of the present gradients in that scaling."""
        return total_norm(self._grads())

    def pair(self, size: int) -> Tensor | None:
        """Return the norms of this step, the one before and their mean; None on the first of two.

        Args:
            size: samples in this step; both steps must have had as many.
        """
        grads = self._grads()
        kept, self._kept = self._kept, None
        if kept is None or kept[1] != size:
            self._kept = ([grad.clone() for grad in grads] if self._scale is None else grads, size)
            return None
        mean = torch._foreach_add(grads, kept[0])
        torch._foreach_mul_(mean, 0.5)
        return torch.stack([total_norm(grads), total_norm(kept[0]), total_norm(mean)])

    @property
    def waits(self) -> bool:
        """Whether the first gradient of a pair is held and the next step completes it."""
        return self._kept is not None

    def forget(self) -> None:
        """Drop what is held of a pair."""
        self._kept = None

    def _grads(self) -> list[Tensor]:
        grads: list[Tensor] = []
        scale: list[Tensor] = []
        for number, param in enumerate(self._params):
            if param.grad is not None and not param.grad.is_sparse:
                grads.append(param.grad)
                if self._scale is not None:
                    scale.append(self._scale[number])
        return list(torch._foreach_div(grads, scale)) if scale else grads


def _steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Return how many steps the optimizer had taken before this run."""
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0
