"""The loops that benchmarks.loop compares: what is trained, by hand and by `hm.train`.

Both sides run in FP32 with the batch kept, from the same weights on the same order of samples, so
that the same weights must come out. Knows no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm

from . import models

BASE, BATCHES = 32, 200  # samples in a loader batch, loader batches in an epoch
MLP_STEPS = 2000  # loader batches in a block of the MLP
SEED = 0
Loop = Callable[..., Any]


@dataclass(frozen=True)
class Work:
    """A loop to run: its model and inputs, how it is fed, and its goals (None: none set)."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    ready: bool  # batches made before the clock starts, else a shuffled DataLoader
    accumulate: int
    steps: int  # loader batches in a block
    ratio_goal: float
    calls_goal: int | None = None
    counted: bool = False  # count Python calls and host reads

    def fresh(self) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
        """Return a new model, loader and optimizer; the same every time, seeds and all."""
        torch.manual_seed(SEED)
        model, samples = self.model(), BASE * BATCHES
        data = TensorDataset(self.inputs(samples), torch.randint(0, 2, (samples,)))
        loader = DataLoader(data, batch_size=BASE, shuffle=True)
        return model, list(loader) if self.ready else loader, self.optimizer(model.parameters())

    def epochs(self, steps: int) -> int:
        return max(1, steps // BATCHES)


def _mlp(name: str, ready: bool, accumulate: int, ratio: float, calls: int | None) -> Work:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    def inputs(n: int) -> Tensor:
        return torch.randn(n, 64)

    return Work(name, models.mlp, inputs, sgd, ready, accumulate, MLP_STEPS, ratio, calls, True)


WORKS = (
    _mlp("MLP, ready batches", True, 1, 1.10, 190),
    _mlp("MLP, ready batches, accumulation 4", True, 4, 1.05, 380),
    _mlp("MLP, DataLoader", False, 1, 1.10, None),
    _mlp("MLP, DataLoader, accumulation 4", False, 4, 1.05, None),
    Work(
        "small Transformer, DataLoader",
        lambda: models.TextTransformer(1000, 64, layers=2),
        lambda n: torch.randint(1, 1000, (n, 64)),
        torch.optim.AdamW,
        ready=False,
        accumulate=1,
        steps=MLP_STEPS // 10,
        ratio_goal=1.005,
    ),
)


def by_hand(
    model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer, accumulate: int, epochs: int
) -> None:
    """Train as a notebook does; nothing is read, logged or clipped."""
    model.train()
    for _ in range(epochs):
        for number, (x, y) in enumerate(loader, start=1):
            loss = F.cross_entropy(model(x), y)
            if accumulate > 1:
                loss = loss / accumulate
            loss.backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()


def ours(
    model: nn.Module,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    accumulate: int,
    epochs: int | None,
    **options: Any,
) -> hm.Run:
    """Train with `hm.train` so that the weights of `by_hand` must come out; `options` go on top."""
    kept = {"batch": BASE * accumulate if accumulate > 1 else "fixed", "micro": BASE}
    exact = {"precision": "fp32", "lr_scale": "none", **kept}
    return hm.train(model, loader, _step, optimizer=optimizer, epochs=epochs, **(exact | options))


def _step(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)
