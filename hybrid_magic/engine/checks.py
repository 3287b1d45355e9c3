"""Mistakes of the person's that can be known before training, each told in one line.

Looks and changes nothing. Knows no loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import HybridMagicError


def check_model(model: Any, name: str) -> None:
    """Raise HybridMagicError unless this is a module that can be trained."""
    check_module(model, name)
    check_parameters(list(model.parameters()), name)


def check_module(model: Any, name: str) -> None:
    """Raise HybridMagicError unless this is a module."""
    if not isinstance(model, nn.Module):
        raise HybridMagicError(
            f"{name} is a {type(model).__name__}; wanted a torch.nn.Module; name your model"
        )


def check_parameters(parameters: list[torch.Tensor], name: str) -> None:
    """Raise HybridMagicError unless these can be trained; `name` is what holds them."""
    if not any(parameter.requires_grad for parameter in parameters):
        found = "no parameters" if not parameters else "only frozen parameters"
        raise HybridMagicError(
            f"{name} has {found}; wanted at least one with requires_grad=True; unfreeze what "
            "should be trained"
        )
    check_ready(parameters, name)
    half = [
        p.dtype
        for p in parameters
        if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)
    ]
    if half:
        raise HybridMagicError(
            f"{name} has {len(half)} parameters of {half[0]}; wanted FP32 weights, from which "
            "mixed precision "
            f"works; call {name if name.isidentifier() else 'model'}.float() and make its "
            "optimizer anew"
        )


def check_ready(parameters: list[torch.Tensor], name: str) -> None:
    """Raise HybridMagicError unless every parameter has its values."""
    if any(parameter.is_meta for parameter in parameters):
        raise HybridMagicError(
            f"{name} is on the meta device, without weights; wanted real ones; move it with "
            "to_empty() and initialise it"
        )
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in parameters):
        raise HybridMagicError(
            f"{name} has lazy parameters without a shape yet; wanted real ones; run one batch "
            "through it first"
        )


def check_loop(model: Any, optimizer: Any, names: Mapping[str, str]) -> torch.device:
    """Return the device of a person's own loop, whose optimizer may hold tensors of no module.

    Raises:
        HybridMagicError: found, wanted, do.
    """
    check_optimizer_kind(optimizer, names["optimizer"])
    check_module(model, names["model"])
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    check_parameters(held, names["optimizer"])
    check_ready(list(model.parameters()), names["model"])
    devices = sorted({str(parameter.device) for parameter in held})
    if len(devices) > 1:
        raise HybridMagicError(
            f"the parameters of {names['optimizer']} are on {', '.join(devices)}; wanted one "
            "device; move the model to one, and make its optimizer anew"
        )
    return held[0].device


def check_val(val: Any, name: str, epochs: int) -> None:
    """Raise HybridMagicError unless this can be validated on after each epoch."""
    if not hasattr(val, "__iter__") or isinstance(val, (nn.Module, Mapping, str)):
        raise HybridMagicError(
            f"{name} is a {type(val).__name__}; wanted a DataLoader or an iterable of batches; "
            "name your validation loader"
        )
    if hasattr(val, "__next__") and epochs > 1:
        raise HybridMagicError(
            f"{name} can be read only once, and is validated on after each of {epochs} epochs; "
            "wanted something that can be read again; make it a list or a DataLoader"
        )
    if hasattr(val, "__len__") and len(val) == 0:
        raise HybridMagicError(
            f"{name} is empty; wanted at least one batch; check its dataset (and drop_last)"
        )


def check_optimizer(optimizer: Any, model: nn.Module, called: Mapping[str, str]) -> None:
    """Raise HybridMagicError unless this is an optimizer of `model` alone."""
    name = called["optimizer"]
    check_optimizer_kind(optimizer, name)
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    others = sum(id(parameter) not in own for parameter in held)
    if others:
        raise HybridMagicError(
            f"{name} holds {others} of {len(held)} parameters that are not {called['model']}'s; "
            "wanted an "
            f"optimizer of this model; make it anew after the model: {type(optimizer).__name__}"
            f"({called['model'] if called['model'].isidentifier() else 'model'}.parameters(), ...)"
        )


def check_optimizer_kind(optimizer: Any, name: str) -> None:
    """Raise HybridMagicError unless this is an optimizer whose step needs no closure."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise HybridMagicError(
            f"{name} is a {type(optimizer).__name__}; wanted a torch.optim.Optimizer"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise HybridMagicError(
            f"{name} is LBFGS, which asks for the loss many times a step; wanted an optimizer "
            "whose "
            "step() needs no closure; use AdamW or SGD"
        )


def check_scheduler(scheduler: Any, optimizer: Any) -> None:
    """Raise HybridMagicError unless this is a scheduler of `optimizer`."""
    if not callable(getattr(scheduler, "step", None)):
        raise HybridMagicError(
            f"the scheduler is a {type(scheduler).__name__}; wanted one of torch.optim.lr_scheduler"
        )
    held = getattr(scheduler, "optimizer", optimizer)
    if optimizer is None or held is not optimizer:
        raise HybridMagicError(
            "the scheduler belongs to another optimizer than the one that trains; wanted one "
            "made with it; "
            "name the optimizer with --optimizer, or make the scheduler anew"
        )
