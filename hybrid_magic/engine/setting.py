"""What holds where a profiled run takes its steps, as far as advice depends on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..findings import Setting
from . import precision as precisions
from .lens import Lens
from .task import has_batch_statistics

_ADAM = (torch.optim.Adam, torch.optim.AdamW)
_FUSED = {"cuda": (*_ADAM, torch.optim.SGD, torch.optim.Adagrad), "cpu": _ADAM}  # worth it there


def setting_of(lens: Lens) -> Setting:
    """Return what holds in the run that `lens` looks at; what its ledgers tell is still 0."""
    state, task, step = lens.state, lens.task, lens.state.step_state
    probe = state.probe
    device = probe.device
    cores = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 7
    base = None if step.adopted and state.sizing.settings.base == 1 else state.sizing.settings.base
    return Setting(
        device_type=device.type,
        works_ahead=probe.late,
        precision=step.precision.name,
        native=precisions.native(device)[0] or precisions.worth_measuring(device),
        tensor_cores=cores,
        channels_last=_channels_last(step.model),
        convolution_flops=0,
        attention_bytes=0,
        attention_scores=None,
        optimizer=type(step.optimizer).__name__,
        fused=_fused(step.optimizer, device),
        batch_statistics=has_batch_statistics(step.model),
        loader_batch=base,
        grows=task.feed.most is None and hasattr(task.loader, "dataset"),
        retries=0,
    )


def _channels_last(model: nn.Module) -> bool | None:
    """Return whether image convolutions compute in channels_last, None where there are none."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    wide = [weight for weight in weights if weight.shape[1] > 1]  # else both formats are one
    if not wide:
        return None
    return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in wide)


def _fused(optimizer: Any, device: torch.device) -> bool | None:
    if type(optimizer) not in _FUSED.get(device.type, ()):
        return None
    return all(bool(group.get("fused")) for group in optimizer.param_groups)
