"""The state that optimizers make lazily in their first step, made before it.

So the first step's memory is that of every later one, and running out of memory for it is found out
before anything was trained. Made by torch's own code; other optimizers make theirs when they like.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def make_up_front(optimizer: Any, made: list[Tensor]) -> None:
    """Make the state of torch's Adam-likes; note in `made` for which weights."""
    make = getattr(optimizer, "_init_group", None)
    if make is None or not is_adam_like(optimizer):
        return
    lists = len(inspect.signature(make).parameters) - 1  # beside the group
    for group in optimizer.param_groups:
        new = [p for p in group["params"] if p.requires_grad and not optimizer.state.get(p)]
        made += new
        found = [param.grad for param in new]
        try:
            for param in new:  # a gradient of zeros that takes no memory
                zero = torch.zeros((), dtype=param.dtype, device=param.device)
                param.grad = zero.expand_as(param)
            make({**group, "params": new}, *([] for _ in range(lists)))
        finally:
            for param, grad in zip(new, found, strict=True):
                param.grad = grad


def is_adam_like(optimizer: Any) -> bool:
    """Return whether this is one of torch's optimizers whose state is made up front."""
    known = "betas" in optimizer.defaults or "alpha" in optimizer.defaults
    return known and type(optimizer).__module__.startswith("torch.optim.")


def remove_unused(optimizer: Any, made: list[Tensor]) -> None:
    """Remove the state that no step has used, of weights that had no gradient, as the plain loop
    would not have it; an open step is taken back before."""
    for param in made:
        state = optimizer.state.get(param)
        if state is not None and (not state or not float(state.get("step", 1))):
            del optimizer.state[param]
