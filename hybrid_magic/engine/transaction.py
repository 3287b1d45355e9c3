"""A step that can be taken back: what it changes, kept until the step is whole.

`begin` keeps the random generators and the tensors of the model that no optimizer steps (buffers:
BatchNorm's statistics); `hold` keeps weights and optimizer state just before the optimizer changes
them, when the activations are gone. `roll_back` puts all of it back, bit for bit, whatever ended
the step. Gradients that were there before are set aside, never written into, and joined to the new
ones. Knows no policy and no loader.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .copies import Held, Own
from .precision import Precision
from .randomness import StepRandom


class Transaction:
    """One for a run; `number` is the step that is open, None while none is."""

    _precision: Precision

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        params: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self.number: int | None = None
        self._optimizer, self._params = optimizer, params
        self._random = StepRandom(device)
        self._model = model
        self._own: Own | None = None  # made by the first step: devices and formats are settled then
        self._stepped = Held()
        self._holding = False
        self._states: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
        self._groups: list[dict[str, Any]] = []
        self._scale: list[Tensor] | None = None
        self._frozen: list[Tensor] | None = None  # weights that are not stepped
        self._others: list[Tensor] = []  # weights that get gradients and are not stepped
        self._aside: list[tuple[Tensor, Tensor]] | None = []  # weights and the gradients they had

    @property
    def random(self) -> StepRandom:
        """What the open step draws from."""
        return self._random

    def begin(self, number: int, precision: Precision, *, found: bool = False) -> None:
        """Open step `number`: keep what its forward passes may change.

        Args:
            found: gradients that are there stay, until they are `set_aside`.
        """
        self._precision = precision
        self._aside = None if found else []
        if self.number is not None:
            self._random.done()  # of a batch that no step followed
            self.number = None  # and which cannot be taken back any more
        self._random.take(number)
        if self._own is None:
            self._own = Own(self._model, self._params)
        self._own.take()
        self._holding = False
        self.number = number

    def set_aside(self) -> bool:
        """Set the gradients that are there aside; return whether any is of a weight that is
        stepped."""
        if self._frozen is None:
            stepped = set(map(id, self._params))
            self._frozen = [p for p in self._model.parameters() if id(p) not in stepped]
        self._others = [param for param in self._frozen if param.requires_grad]
        found = [(param, param.grad) for param in self._params if param.grad is not None]
        others = [(param, param.grad) for param in self._others if param.grad is not None]
        self._aside = [*found, *others]
        for param, _ in self._aside:
            param.grad = None
        return bool(found)

    def join(self) -> None:
        """Add the gradients that were set aside to the new ones, in these."""
        new: list[Tensor] = []
        old: list[Tensor] = []
        for param, found in self._aside or ():
            if param.grad is None:
                param.grad = found
            elif param.grad.is_sparse or found.is_sparse:
                param.grad = param.grad + found
            else:
                new.append(param.grad)
                old.append(found)
        if new:
            with torch.no_grad():
                torch._foreach_add_(new, old)

    def unscale_others(self, scaler: Any) -> None:
        """Divide the new gradients of weights that are not stepped by the loss scale, too: the
        person may clip by all of them."""
        grads = [param.grad for param in self._others if param.grad is not None]
        if grads:
            torch._foreach_mul_(grads, scaler._scale.reciprocal())

    def hold(self) -> None:
        """Keep what the optimizer and the scaler are about to change."""
        optimizer, precision = self._optimizer, self._precision
        self._groups = list(map(dict, optimizer.param_groups))
        states = optimizer.state
        self._states = [(key, state, dict(state)) for key, state in states.items()]
        found = [
            value
            for _, _, held in self._states
            for value in held.values()
            if isinstance(value, Tensor)
        ]
        self._stepped.take([*self._params, *found])
        scaler: Any = precision.scaler
        if scaler is not None and scaler._scale is not None:
            self._scale = [scaler._scale.clone(), scaler._growth_tracker.clone()]
        self._holding = True

    def keep_buffers(self, where: Tensor | None = None) -> None:
        """Give buffers their values of the step's start, or only if the 0-dim `where` is true."""
        if self._own is not None:
            with torch.no_grad():
                self._own.put_back() if where is None else self._own.keep(where)

    def close(self) -> None:
        """The step is whole: nothing of it can be taken back any more."""
        self.number = None
        self._stepped.drop()
        self._random.done()
        self._aside = []

    def leave(self) -> None:
        """End a step of which nothing is to be trained, as its forward passes have left it."""
        self.join()
        self.close()

    def put_back(self) -> None:
        """Undo what was done since `hold`: the gradients stay. The next copies go to the host."""
        with torch.no_grad():
            if self._holding:
                self._put_back_optimizer()
        self._holding = False
        self._stepped.leave_device()

    def roll_back(self, done: int) -> None:
        """Undo the open step unless it is among the `done` first ones, which are whole.

        May be called again where it was itself interrupted.
        """
        if self.number != done:
            return
        if self._aside is not None:
            for param in (*self._params, *self._others):
                param.grad = None
            for param, found in self._aside:
                param.grad = found
        with torch.no_grad():
            if self._holding:
                self._put_back_optimizer()
            if self._own is not None:
                self._own.put_back()
        scaler: Any = self._precision.scaler
        if scaler is not None:
            scaler._per_optimizer_states.clear()  # it would say: unscale_() was called already
        self._random.put_back()
        self.number = None
        self._stepped.drop()

    def _put_back_optimizer(self) -> None:
        states = self._optimizer.state
        for key in states.keys() - {key for key, _, _ in self._states}:
            del states[key]
        for key, state, found in self._states:
            states[key] = state
            state.clear()
            state.update(found)
        for group, found in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(found)
        self._stepped.put_back()
        scaler: Any = self._precision.scaler
        if scaler is not None and self._scale is not None:
            scaler._scale.copy_(self._scale[0])
            scaler._growth_tracker.copy_(self._scale[1])
