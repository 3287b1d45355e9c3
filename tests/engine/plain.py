"""Plain PyTorch to compare with: models, batches, and the loop that a person writes by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hybrid_magic.engine.data import StepData
from hybrid_magic.engine.device import probe_for
from hybrid_magic.engine.gradients import NoiseProbe
from hybrid_magic.engine.precision import Precision
from hybrid_magic.engine.rehearse import settle_reduction
from hybrid_magic.engine.step_state import StepState
from hybrid_magic.engine.transaction import Transaction

CPU = torch.device("cpu")


def mlp(classes: int = 5, *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, 16),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, classes),
    )


def cnn(*, dropout: float = 0.2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(216, 5),
    )


class Transformer(nn.Module):
    """A small encoder over tokens [n, length]; per-sequence classes, or per-token ones."""

    def __init__(self, *, tokens: bool = False, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = tokens
        self.embed = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True),
            2,
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(self.embed(x))
        return self.head(hidden if self.tokens else hidden.mean(1))


def vectors(n: int, *, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=generator), torch.randint(0, 5, (n,), generator=generator)


def images(n: int, *, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(
        0, 5, (n,), generator=generator
    )


def sentences(n: int, *, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 20, (n, 7), generator=generator), torch.randint(
        0, 5, (n,), generator=generator
    )


def by_hand(
    model: nn.Module,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int = 1,
    per_batch: Any = None,
    per_epoch: Any = None,
    clip: float | None = None,
) -> None:
    """The loop that a person writes."""
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if per_batch is not None:
                per_batch.step()
        if per_epoch is not None:
            per_epoch.step()


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """Names of parameters and buffers that are not bit-equal."""
    theirs = other.state_dict()
    return [
        name for name, value in one.state_dict().items() if not torch.equal(value, theirs[name])
    ]


def step_state(
    model: nn.Module,
    compute: Any,
    optimizer: torch.optim.Optimizer,
    *,
    reduction: str = "auto",
    precision: str = "fp32",
    clip: float | None = None,
) -> StepState:
    """The state that `train_step` works on, without a run around it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return StepState(
        model=model,
        compute=compute,
        optimizer=optimizer,
        params=params,
        precision=Precision(precision, CPU),
        device=probe_for(CPU),
        noise=NoiseProbe(optimizer, params),
        asked_reduction=reduction,
        clip=clip,
        batch_statistics=False,
        mover=None,
        settle=settle_reduction,
        transaction=Transaction(model, optimizer, params, CPU),
    )


def cut(batch: Any, sizes: list[int], rows: Any) -> StepData:
    """The batch cut into micro-batches of these sizes."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return StepData(
        [rows(batch, start, start + size) for start, size in zip(starts, sizes, strict=True)],
        list(sizes),
        False,
    )
