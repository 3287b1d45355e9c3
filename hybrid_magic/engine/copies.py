"""Copies of what a step may change, to be put back: a list of tensors, or a model's own ones.

Knows no step and no optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .device import is_out_of_memory


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

    def put_back(self, where: Tensor | None = None, *, changed: bool = False) -> None:
        """Write the copies back, or only if the 0-dim bool tensor `where` is true; `changed`: only
        what is different, for a graph that is still to be used counts what is written into."""
        for views, flat in zip(self._views, self._flat, strict=True):
            if flat is None or (
                changed and torch.equal(torch.cat(views), flat.to(views[0].device))
            ):
                continue
            if where is not None:
                device = views[0].device  # a part of the model may be elsewhere
                flat = torch.where(where.to(device), flat.to(device), torch.cat(views))
            torch._foreach_copy_(views, list(flat.split([view.numel() for view in views])))
        for tensor, copy in self._odd:
            if changed and torch.equal(tensor, copy):
                continue
            tensor.copy_(
                copy if where is None else torch.where(where.to(tensor.device), copy, tensor)
            )

    def leave_device(self) -> None:
        """Give back the copies on an accelerator; the next ones go to the host."""
        self.drop()
        self._no_room = True

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

    def put_back(self, *, changed: bool = False) -> None:
        for place, found in zip(self._places, self._seen, strict=False):
            if place or found:
                place.clear()
                place.update(found or {})
        self._held.put_back(changed=changed)

    def keep(self, where: Tensor) -> None:
        """Write back the values of the step's start if `where` is true; nothing without buffers."""
        if not any(self._seen):
            return
        self._held.put_back(where)
        for place, found in zip(self._places, self._seen, strict=True):
            for name, old in (found or {}).items():
                new = place.get(name)
                if new is not old and new is not None and old is not None:  # the step replaced it
                    place[name] = torch.where(where.to(new.device), old.to(new.device), new)
