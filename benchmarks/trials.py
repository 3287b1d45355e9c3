"""One run of the accuracy benchmark: what is trained, in which of three ways, and what came out.

`plain` is a PyTorch loop written out below, which never meets hybrid_magic; `fixed` is `hm.train`
with the batch and FP32 kept; `hybrid` is `hm.train` as it comes. All start from the same weights,
see the same order of samples and are judged by the same evaluation. Knows no file and no report.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm

from . import data, models

BASE = 32
OPTIMIZERS = ("sgd", "adamw")
VARIANTS = ("plain", "fixed", "hybrid")
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One thing to train: its data, its model, its epochs and the learning rate per optimizer."""

    name: str
    split: Callable[[], data.Split]
    model: Callable[[], nn.Module]
    epochs: int
    lr: dict[str, float]


WORKS = {
    "cnn": Work("cnn", cache(data.images), models.batchnorm_cnn, 10, {"sgd": 0.02, "adamw": 3e-3}),
    "transformer": Work(
        "transformer",
        cache(data.reviews),
        lambda: models.TextTransformer(data.VOCABULARY, data.LENGTH),
        8,
        {"sgd": 0.05, "adamw": 1e-3},
    ),
}


def train(work: Work, optimizer: str, variant: str, seed: int, epochs: int) -> Row:
    """Return what one run did: test accuracy, loss, optimizer steps, seconds, decisions."""
    split = work.split()
    torch.manual_seed(seed)
    model = work.model()
    loader = DataLoader(
        TensorDataset(split.x_train, split.y_train),
        batch_size=BASE,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    steps = make_optimizer(optimizer, model, work.lr[optimizer])
    scheduler = CosineAnnealingLR(steps, T_max=epochs * len(loader))
    run = None
    wall, cpu = time.perf_counter(), time.process_time()
    if variant == "plain":
        taken = plain_loop(model, loader, steps, scheduler, epochs)
    else:
        kept = {"batch": "fixed", "micro": BASE, "precision": "fp32"} if variant == "fixed" else {}
        run = hm.train(
            model, loader, step, optimizer=steps, scheduler=scheduler, epochs=epochs, **kept
        )
        taken = run.steps
    spent = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    accuracy, loss = evaluate(model, split.x_test, split.y_test)
    row = {"accuracy": accuracy, "test_loss": loss, "optimizer_steps": taken, **spent}
    return row | (decisions(run) if run is not None else {})


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)


def plain_loop(
    model: nn.Module,
    loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    scheduler: CosineAnnealingLR,
    epochs: int,
) -> int:
    """Train as a notebook does by hand, in FP32; return the optimizer steps taken."""
    steps = 0
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            steps += 1
    return steps


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the accuracy in percent and the mean loss on the test split, in FP32."""
    model.eval()
    logits = torch.cat([model(part) for part in x.split(250)])
    return 100 * (logits.argmax(1) == y).double().mean().item(), F.cross_entropy(logits, y).item()


def decisions(run: hm.Run) -> Row:
    """Return what steered the run: precision, skips, noise scale by tenths, every global change."""
    seen = [record.noise_scale for record in run.history]
    return {
        "outcome": run.outcome,
        "precision": run.start.precision if run.start else None,
        "skipped_steps": run.skipped_steps,
        "noise_scale": [seen[at * (len(seen) - 1) // 10] for at in range(11)] if seen else [],
        "changes": [
            [change.step, change.what, change.before, change.after, change.reason]
            for change in run.changes
        ],
        "notes": run.notes,
    }
