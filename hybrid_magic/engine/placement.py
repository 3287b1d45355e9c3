"""Where to train, and the person's things on their way there and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import HybridMagicError


def choose_device(asked: str | None, model: torch.nn.Module) -> torch.device:
    """Return where to train: as asked, else the accelerator that the model is on, else the best.

    Raises:
        HybridMagicError: a device that does not exist here, or parameters on several devices.
    """
    found = {parameter.device for parameter in model.parameters()}
    if asked is not None:
        try:
            return torch.empty(0, device=torch.device(asked)).device  # "cuda" gets its number
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            why = str(error).splitlines()[0]
            raise HybridMagicError(
                f"--device {asked} cannot be used here ({why}); wanted a device of this "
                "machine; try --device cpu"
            ) from None
    if len(found) > 1:
        raise HybridMagicError(
            f"the model's parameters are on {', '.join(sorted(map(str, found)))}; wanted one "
            "device; "
            "move the model to one, or name it with --device"
        )
    (device,) = found
    if device.type != "cpu":
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return device


def move(model: nn.Module, optimizer: Any, criterion: Any, device: torch.device) -> None:
    """Move the model and what must be where it is: criterion and optimizer state."""
    if next(model.parameters()).device == device:
        return
    model.to(device)
    if isinstance(criterion, nn.Module):
        criterion.to(device)
    for state in optimizer.state.values():
        for name, value in state.items():
            # Adam's step count stays on the host unless it was on the device before
            if isinstance(value, torch.Tensor) and (value.dim() > 0 or value.device.type != "cpu"):
                state[name] = value.to(device)
