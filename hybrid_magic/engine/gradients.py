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

    `keep` after the first micro-batch and `cut` after the last; or, for a step of one micro-batch
    and for models with batch statistics, `pair` over two consecutive whole steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
        self._optimizer, self._params = optimizer, params
        self._scaled = family(optimizer) == "adam"
        self._taken = 0
        self._first: list[tuple[Tensor, Tensor]] = []
        self._kept: tuple[list[Tensor], int] | None = None
        self._before = _steps_taken(optimizer)

    def begin(self, steps: int) -> bool:
        """Make ready to measure a step; False when the optimizer has no scaling yet.

        Args:
            steps: optimizer steps taken in this run, for Adam's bias correction.
        """
        self._first, self._taken = [], self._before + steps
        return not self._scaled or any(self._moment(param) is not None for param in self._params)

    def keep(self) -> bool:
        """Copy the gradients after the first micro-batch; False where there is none to measure."""
        self._kept = None
        self._first = [(param, grad.clone()) for param, grad in self._measurable()]
        return bool(self._first)

    def cut(self, factor: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return the norms of the first micro-batch's gradient less the whole step's, and of that.

        The difference alone carries the noise: it lacks the product of the two, whose own noise is
        the greater by far while the gradient is large.

        Args:
            factor: what turns the kept gradients into the mean over the first micro-batch, undoing
                its weight and the scale of the loss; a tensor is 0-dim.
        """
        kept, self._first = dict(self._first), []
        found = [(param, grad) for param, grad in self._measurable() if param in kept]
        grads, apart = [grad for _, grad in found], [kept[param] for param, _ in found]
        torch._foreach_mul_(apart, factor)
        torch._foreach_sub_(apart, grads)
        scale = self._scale([param for param, _ in found], grads, apart)
        if scale is None:
            return total_norm(apart), total_norm(grads)
        torch._foreach_div_(apart, scale)
        norm = total_norm(apart)
        del apart, kept
        return norm, total_norm(torch._foreach_div(grads, scale))

    def pair(self, size: int) -> Tensor | None:
        """Return the norms of this step, the one before and their mean; None on the first of two.

        Args:
            size: samples in this step; both steps must have had as many.
        """
        found = self._measurable()
        if not found:
            return None
        grads = [grad for _, grad in found]
        scale = self._scale([param for param, _ in found], grads)
        if scale is not None:
            grads = list(torch._foreach_div(grads, scale))
        kept, self._kept = self._kept, None
        if kept is None or kept[1] != size or len(kept[0]) != len(grads):
            self._kept = ([grad.clone() for grad in grads] if scale is None else grads, size)
            return None
        mean = torch._foreach_add(grads, kept[0])
        torch._foreach_mul_(mean, 0.5)
        return torch.stack([total_norm(grads), total_norm(kept[0]), total_norm(mean)])

    def state(self) -> dict[str, Any]:
        """Return what a probe of another run needs to go on, for `go_on`."""
        return {"before": self._before, "kept": self._kept}

    def go_on(self, state: dict[str, Any]) -> None:
        """Go on as the probe whose `state` this was; its tensors may be on the host."""
        self._before, self._kept = state["before"], None
        if state["kept"] is not None:
            grads, size = state["kept"]
            self._kept = [grad.to(self._params[0].device) for grad in grads], size

    def forget(self) -> None:
        """Give back the gradients that are held for a measurement."""
        self._first, self._kept = [], None

    @property
    def holds(self) -> bool:
        """Whether a gradient was kept of the step in hand."""
        return bool(self._first)

    @property
    def waits(self) -> bool:
        """Whether the first gradient of a pair is held and the next step completes it."""
        return self._kept is not None

    def _scale(self, params: Sequence[Tensor], *grads: list[Tensor]) -> list[Tensor] | None:
        """Return what the optimizer divides these gradients by, None where it does not.

        The step's own squares are in it, as in the optimizer's: a weight with its first gradient
        (the embedding of a rare word) would else be divided by nearly nothing and drown the others.
        """
        if not self._scaled:
            return None
        group = self._optimizer.param_groups[0]
        beta = group["betas"][1] if "betas" in group else group.get("alpha", 0.99)
        scale = list(torch._foreach_mul([self._moment(param) for param in params], beta))
        for each in grads:
            torch._foreach_addcmul_(scale, each, each, 1.0 - beta)
        torch._foreach_div_(scale, max(1.0 - beta ** (self._taken + 1), 1e-8))
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, group.get("eps", 1e-8))
        return scale

    def _measurable(self) -> list[tuple[Tensor, Tensor]]:
        """Return (weight, gradient) of all that are dense and whose scaling is known: a weight that
        no loss used yet has none."""
        return [
            (param, param.grad)
            for param in self._params
            if param.grad is not None
            and not param.grad.is_sparse
            and (not self._scaled or self._moment(param) is not None)
        ]

    def _moment(self, param: Tensor) -> Any:
        """Return the second moment of `param`, None before it has one."""
        state: Any = self._optimizer.state.get(param, {})
        return next((state[name] for name in _SECOND_MOMENTS if name in state), None)


def _steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Return how many steps the optimizer had taken before this run."""
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return 0-dim tensors as one, in float32 unless the loss is float64."""
    dtype = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    return torch.stack([part if part.dtype == dtype else part.to(dtype) for part in parts])
