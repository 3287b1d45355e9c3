"""A step that can be taken back: what it changes, kept until the step is whole.

`begin` keeps the random generators and the tensors of the model that no optimizer steps (buffers:
BatchNorm's statistics); `hold` keeps weights and optimizer state just before the optimizer changes
them, when the activations are gone. `roll_back` puts all of it back, bit for bit, whatever ended
the step. Knows no policy and no loader.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .device import is_out_of_memory
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

    def begin(self, number: int, precision: Precision) -> None:
        """Open step `number`: keep what its forward passes may change."""
        self._precision = precision
        self._random.take(number)
        if self._own is None:
            self._own = Own(self._model, self._params)
        self._own.take()
        self._holding = False
        self.number = number

    def hold(self) -> None:
        """Keep what the optimizer and the scaler are about to change."""
        optimizer, precision = self._optimizer, self._precision
        self._groups = list(map(dict, optimizer.param_groups))
        states = optimizer.state
        self._states = list(zip(states, states.values(), map(dict, states.values()), strict=True))
        tensors = list(self._params)
        for _, _, found in self._states:
            tensors += [value for value in found.values() if isinstance(value, Tensor)]
        self._stepped.take(tensors)
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

    def roll_back(self, done: int) -> None:
        """Undo the open step unless it is among the `done` first ones, which are whole.

        May be called again where it was itself interrupted.
        """
        if self.number != done:
            return
        for param in self._params:
            param.grad = None
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


class Held:
    """Copies of tensors, one flat piece for each device and dtype.

    On the host the pieces are made once; on an accelerator anew each time, where activations were,
    and `drop` gives them back. Where the device has no room they go to the host, slowly.
    """

    def __init__(self) -> None:
        self._at: list[int] | None = None
        self._views: list[list[Tensor]] = []
        self._flat: list[Tensor | None] = []
        self._odd: list[tuple[Tensor, Tensor]] = []  # not one dense piece: copied one by one
        self._no_room = False

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copy `tensors` as they are now."""
        try:
            at = list(map(Tensor.data_ptr, tensors))
        except RuntimeError:  # a sparse tensor has no one place
            at = None
        if at is None or at != self._at or self._odd:
            self._arrange(tensors)
            self._at = at
        for number, views in enumerate(self._views):
            self._flat[number] = self._joined(views, self._flat[number])

    def _arrange(self, tensors: Sequence[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._odd = []
        for tensor in tensors:
            flat = _flat_view(tensor)
            if flat is None:
                self._odd.append((tensor, tensor.detach().clone()))
            elif flat.numel():
                groups.setdefault((tensor.device, tensor.dtype), []).append(flat)
        self._views = list(groups.values())
        self._flat = [None] * len(self._views)

    def _joined(self, views: list[Tensor], flat: Tensor | None) -> Tensor:
        if views[0].device.type == "cpu":
            return torch.cat(views) if flat is None else torch.cat(views, out=flat)
        if not self._no_room:
            try:
                return torch.cat(views)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._no_room = True
        return torch.cat([view.cpu() for view in views])

    def put_back(self, where: Tensor | None = None) -> None:
        """Write the copies back, or only if the 0-dim bool tensor `where` is true."""
        for views, flat in zip(self._views, self._flat, strict=True):
            if flat is None:
                continue
            if where is not None:
                flat = torch.where(where, flat.to(views[0].device), torch.cat(views))
            torch._foreach_copy_(views, list(flat.split([view.numel() for view in views])))
        for tensor, copy in self._odd:
            tensor.copy_(copy if where is None else torch.where(where, copy, tensor))

    def drop(self) -> None:
        """Give back the memory of copies on an accelerator."""
        for number, views in enumerate(self._views):
            if views[0].device.type != "cpu":
                self._flat[number] = None


def _flat_view(tensor: Tensor) -> Tensor | None:
    """Return the tensor's memory as one row, None where it is not one dense piece."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        return None
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return None


class Own:
    """The tensors of a model that no optimizer steps: its buffers, and frozen weights.

    All are copied for every step, since what a step writes into cannot be seen (BatchNorm and
    `.data` do not count versions); buffers may be replaced and registered by a step, too. Frozen
    weights only up to twice what is trained: an averaged teacher is as large as its student, a
    frozen backbone far larger, and no step changes it.
    """

    def __init__(self, model: nn.Module, stepped: Sequence[Tensor]) -> None:
        ids = set(map(id, stepped))
        self._places = [module._buffers for module in model.modules()]
        self._frozen = [param for param in model.parameters() if id(param) not in ids]
        if sum(map(Tensor.numel, self._frozen)) > 2 * sum(map(Tensor.numel, stepped)):
            self._frozen = []
        self._seen: list[dict[str, Tensor | None] | None] = []
        self._held = Held()

    def take(self) -> None:
        self._seen = [dict(place) if place else None for place in self._places]
        tensors: list[Tensor | None] = list(self._frozen)
        for found in self._seen:
            if found:
                tensors += found.values()
        if tensors:
            self._held.take([tensor for tensor in tensors if tensor is not None])

    def put_back(self) -> None:
        for place, found in zip(self._places, self._seen, strict=False):
            if place or found:
                place.clear()
                place.update(found or {})
        self._held.put_back()

    def keep(self, where: Tensor) -> None:
        """Write back the values of the step's start if `where` is true; nothing without buffers."""
        if not any(self._seen):
            return
        self._held.put_back(where)
        for place, found in zip(self._places, self._seen, strict=True):
            for name, old in (found or {}).items():
                new = place.get(name)
                if new is not old and new is not None and old is not None:  # the step replaced it
                    place[name] = torch.where(where, old, new)
