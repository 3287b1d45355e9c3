"""What a loop trains, read off the frame that it runs in: the person's own names, looked at."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer


def value_of(expression: str, frame: FrameType) -> Any:
    """Return what a person's expression stands for in a frame of theirs."""
    __tracebackhide__ = True
    try:
        return eval(expression, frame.f_globals, frame.f_locals)
    except NameError as error:
        missing = str(error)
    raise NameError(missing)  # at the person's line


def model_of(optimizer: Optimizer, read: frozenset[str], frame: FrameType) -> tuple[nn.Module, str]:
    """Return the modules that hold what `optimizer` steps, and what the person calls them.

    Several, or one that only the loss is made with (a frozen teacher), come as a ModuleList; of
    loose tensors there is no module.
    """
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    found: dict[str, nn.Module] = {}
    for name, value in {**frame.f_globals, **frame.f_locals}.items():
        if isinstance(value, nn.Module):
            if name in read or name in frame.f_locals or not name.startswith("_"):
                found.setdefault(name, value)
        elif name in frame.f_locals and (name == "self" or name in read):
            for attribute, part in getattr(value, "__dict__", {}).items():
                if isinstance(part, nn.Module):
                    found.setdefault(f"{name}.{attribute}", part)
    taken = {
        name: module
        for name, module in found.items()
        if any(id(param) in own for param in module.parameters())
        or (name in read and any(True for _ in module.buffers()))
    }
    inner = {
        id(part) for module in taken.values() for part in module.modules() if part is not module
    }
    distinct = {id(module): name for name, module in reversed(taken.items())}
    names = [name for module, name in distinct.items() if module not in inner]
    if len(names) == 1:
        return taken[names[0]], names[0]
    if not names:
        return nn.Module(), "the model"
    return nn.ModuleList(taken[name] for name in reversed(names)), " and ".join(reversed(names))
