"""What to train: the person's model, data, step, optimizer and the rest, checked.

`describe` looks and changes nothing: every mistake of the person's that can be known before
training is told here, in one line. A step that was not given is inferred: Transformers models are
called with the batch as keywords, other models with (x, y) and a criterion. Knows no loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import TrainConfig
from ..errors import ConfigError, HybridMagicError
from . import ranks, sharing
from .checks import check_model, check_optimizer, check_scheduler, check_val
from .data import Feed
from .placement import choose_device
from .precision import Precision
from .sampled import open_feed
from .step_state import Compute


@dataclass(slots=True)
class Task:
    """A checked job. `notes` say what was inferred; `names` what the person calls things."""

    model: nn.Module
    device: torch.device
    feed: Feed
    compute: Compute | None  # None: to be inferred from the first batch
    criterion: Any
    optimizer: torch.optim.Optimizer | None  # None: a fresh AdamW
    scheduler: Any
    val: Any
    names: dict[str, str]
    notes: list[str] = field(default_factory=list)
    adopted: bool = False  # the loop is the person's: they move data and clear gradients
    rehearses: bool = True  # the step can be called to try something out
    precision: Precision | None = None  # None: to be chosen
    loader: Any = None  # the person's


def describe(
    model: Any,
    loader: Any,
    step: Compute | None,
    config: TrainConfig,
    *,
    optimizer: Any = None,
    val: Any = None,
    loss: Any = None,
    scheduler: Any = None,
    names: Mapping[str, str] | None = None,
) -> Task:
    """Return the task, checked; nothing of the person's is changed.

    Raises:
        HybridMagicError: found, wanted, do.
    """
    called = {"model": "the model", "loader": "the loader", "val": "the validation loader"}
    called |= {"optimizer": "the optimizer"} | dict(names or {})
    check_model(model, called["model"])
    if optimizer is not None:
        check_optimizer(optimizer, model, called)
    if step is not None and not callable(step):
        raise ConfigError(
            f"step is {step!r}; wanted a function step(model, batch) that returns the loss"
        )
    if loss is not None and not callable(loss):
        raise ConfigError(
            f"loss is a {type(loss).__name__}; wanted a criterion such as nn.CrossEntropyLoss()"
        )
    if scheduler is not None:
        check_scheduler(scheduler, optimizer)
    if val is not None:
        check_val(val, called["val"], config.epochs or 1)
    if optimizer is not None and config.lr is not None:
        raise ConfigError(
            f"--lr {config.lr:g} is for a fresh AdamW, but {called['optimizer']} is used and "
            "has its own "
            "learning rate; leave --lr out, or set it in the optimizer"
        )
    if hasattr(loader, "__next__") and (config.epochs or 1) > 1:
        raise HybridMagicError(
            f"{called['loader']} can be read only once, and --epochs is {config.epochs}; wanted "
            "something that can be read again; make it a list or a DataLoader"
        )
    device = choose_device(ranks.device_of(config.device), model)
    pin = device.type == "cuda"
    opened = open_feed if ranks.current() is None else sharing.open_shared_feed
    feed = opened(loader, called["loader"], workers=config.workers, pin=pin)
    task = Task(model, device, feed, step, loss, optimizer, scheduler, val, called, loader=loader)
    if feed.note:
        task.notes.append(feed.note)
    return task


def infer_step(task: Task, batch: Any) -> tuple[Compute, str]:
    """Return the step of a bare cell, read off the first batch, and what it is in words.

    Raises:
        HybridMagicError: a batch that is neither keywords nor (x, y).
    """
    if isinstance(batch, Mapping):
        return _keyword_step, f"step: {task.names['model']}(**batch).loss"
    if not (
        isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[1], torch.Tensor)
    ):
        kind = type(batch).__name__
        held = f"{kind} of {len(batch)}" if isinstance(batch, (list, tuple)) else kind
        raise HybridMagicError(
            f"a batch of {task.names['loader']} is a {held}; wanted (x, y) with a tensor y, or "
            "keywords of a "
            "Transformers model; write the step in the cell: the lines that compute loss from batch"
        )
    classes = not (
        batch[1].is_floating_point() or batch[1].is_complex() or batch[1].dtype == torch.bool
    )
    if task.criterion is not None:
        criterion = task.criterion
        name = task.names.get("loss") or type(criterion).__name__
    elif classes:
        criterion, name = F.cross_entropy, "cross-entropy, for integer class targets"
    else:
        criterion, name = _mean_squared_error, "mean squared error, for floating targets"
    return _pair_step(criterion, classes), f"step: x, y = batch; loss: {name}"


def _keyword_step(model: Any, batch: Any) -> Any:
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise HybridMagicError(
            f"the batch is a {type(batch).__name__} of {', '.join(map(str, batch))}, and the "
            "model's output "
            "has no loss for it; wanted labels in the batch; or write the step in the cell"
        )
    labels, logits = batch.get("labels"), getattr(output, "logits", None)
    if (
        model.training
        or labels is None
        or logits is None
        or labels.dim() != 1
        or labels.is_floating_point()
    ):
        return loss
    return loss, {"accuracy": _accuracy(logits, labels)}


def _pair_step(criterion: Any, classes: bool) -> Compute:
    def step(model: Any, batch: Any) -> Any:
        x, y = batch
        output = model(x)
        if torch.is_autocast_enabled(y.device.type):  # some losses are not safe in half precision
            with torch.autocast(y.device.type, enabled=False):
                full = output.float() if isinstance(output, torch.Tensor) else output
                loss = criterion(full, y)
        else:
            loss = criterion(output, y)
        if model.training or not classes or not isinstance(output, torch.Tensor):
            return loss
        if output.dim() < 2 or output.shape[0] != y.shape[0]:
            return loss
        return loss, {"accuracy": _accuracy(output, y)}

    return step


def _accuracy(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the share of `y` [n, ...] that is the largest of `output` [n, classes, ...]."""
    kept = y != -100
    return (
        (output.argmax(1)[kept] == y[kept]).float().mean()
        if output.shape[2:] == y.shape[1:]
        else y.new_tensor(float("nan"), dtype=torch.float32)
    )


def _mean_squared_error(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(output, y.reshape(output.shape) if output.numel() == y.numel() else y)


def has_batch_statistics(model: nn.Module) -> bool:
    """Return whether a layer learns, once training, statistics of the batch it sees (BatchNorm).

    A layer in eval mode of a model in train mode was frozen by the person and stays so.
    """
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return any(norm.training or not model.training for norm in norms)
