"""Beginnings: what training changes of a person's things, to be put back any number of times.

Copies lie on the host, so that they take nothing of the memory that is being compared. Knows no
training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .drawing import Own, Place
from .prepare import attributes
from .randomness import RandomState

PutBack = Callable[[], None]


def beginning(things: Iterable[Any], device: torch.device) -> PutBack:
    """Return what puts `things` and the random generators back to how they are now.

    Args:
        things: modules, optimizers, generators, a sampler's Place, and whatever else has a
            `state_dict` (schedulers, a GradScaler); others are passed over, and so is None.
        device: the one that trains.
    """
    works = [work for thing in things if (work := _of(thing)) is not None]
    works.append(RandomState(device).put_back)

    def put_back() -> None:
        for work in works:
            work()

    return put_back


def undone(put_back: PutBack) -> None:
    """Put back, and once more where an interrupt cuts that short."""
    try:
        put_back()
    except BaseException:
        put_back()
        raise


def _of(thing: Any) -> PutBack | None:
    if isinstance(thing, nn.Module):
        return _module(thing)
    if isinstance(thing, torch.optim.Optimizer):
        return _optimizer(thing)
    if isinstance(thing, (torch.Generator, Own, Place)):
        state = thing.get_state()
        return lambda: _ignore(thing.set_state(state))
    if hasattr(thing, "load_state_dict") and not isinstance(thing, type):
        held = copy.deepcopy(thing.state_dict())
        return lambda: _ignore(thing.load_state_dict(copy.deepcopy(held)))
    return None


def _ignore(_: object) -> None:
    """Return nothing, of whatever."""


def _module(model: nn.Module) -> PutBack:
    put_attributes_back = attributes(model)
    own = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    places: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (place, dict(place)) for module in own for place in (module._parameters, module._buffers)
    ]
    filled = [
        (value, value.copy())
        for module in own
        for value in vars(module).values()
        if type(value) in (list, dict, set)
    ]
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    held = [(t, _on_host(t), t.requires_grad, t.grad) for t in tensors.values()]

    def put_back() -> None:
        put_attributes_back()
        for value, found in filled:
            value.clear()
            value.extend(found) if isinstance(value, list) else value.update(found)
        for place, found in places:
            place.clear()
            place.update(found)
        with torch.no_grad():
            for tensor, kept, trained, grad in held:
                give(tensor.detach(), kept)
                tensor.requires_grad_(trained)
                tensor.grad = grad

    return put_back


def give(tensor: Tensor, value: Tensor) -> None:
    """Copy `value` into `tensor`; memory that several elements share (`expand`) is written once."""
    once(tensor, tensor).copy_(once(tensor, value))


def once(tensor: Tensor, value: Tensor) -> Tensor:
    """Return the part of `value` that has one element for each place in the memory of `tensor`."""
    if tensor.layout == torch.strided:
        for dim, (n, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            value = value.narrow(dim, 0, 1) if n > 1 and not step else value
    return value


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _optimizer(optimizer: torch.optim.Optimizer) -> PutBack:
    groups = [(group, _copied(group)) for group in optimizer.param_groups]
    states = [
        (param, {name: _host_copy(value) for name, value in state.items()})
        for param, state in optimizer.state.items()
    ]

    def put_back() -> None:
        optimizer.param_groups[:] = [group for group, _ in groups]
        for group, found in groups:
            group.clear()
            group.update(_copied(found))
        optimizer.state.clear()
        for param, state in states:
            optimizer.state[param] = {name: _given(value) for name, value in state.items()}

    return put_back


def _copied(group: dict[str, Any]) -> dict[str, Any]:
    params = list(group["params"])
    rest = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
    return {"params": params, **rest}


def _host_copy(value: Any) -> Any:
    """Return a value of an optimizer's state and where it is to be."""
    if isinstance(value, Tensor):
        return value.device, _on_host(value)
    return None, copy.deepcopy(value)


def _given(held: tuple[torch.device | None, Any]) -> Any:
    device, value = held
    return copy.deepcopy(value) if device is None else value.to(device, copy=True)
