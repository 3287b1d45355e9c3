"""The ways in which `benchmarks.processes` trains a model: by hand, around DDP, by `hm.train`.

All start from the same weights and take the same global batches, of which each process has its
share. A way of one process takes them whole. Knows no turn and no page.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine import ranks
from hybrid_magic.records import StepRecord

from . import models

WARM = 5  # steps outside the clock: DDP lays its buckets anew, the engine looks at the first step
OURS, LISTED, AS_IT_COMES = "hybrid", "hybrid, list of batches", "hybrid, as it comes"
DDP, SMALL, ONE = "DDP", "DDP, small buckets", "DDP, one bucket"
DESIGN = "met and summed after, by hand"
OURS_ALONE, ALONE = "hybrid, one process", "by hand, one process"
TIMED = (OURS, LISTED, DDP, SMALL, ONE, DESIGN, OURS_ALONE, ALONE)
BY_ONE = (OURS_ALONE, ALONE)


@dataclass(frozen=True)
class Work:
    """A model, its samples, and the `steps` of a turn; a step has `batch` samples over all."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch: int
    steps: int

    def fresh(self, steps: int, seed: int, *, double: bool) -> tuple[nn.Module, Tensor, Tensor]:
        """Return a new model and the samples of so many steps, the same every time."""
        torch.manual_seed(seed)
        model, n = self.model(), steps * self.batch
        x, y = self.inputs(n), torch.randint(0, 2, (n,))
        if double:
            return model.double(), x.double() if x.is_floating_point() else x, y
        return model, x, y


WORKS = (
    Work("MLP", lambda: models.mlp(64, 256, 3), lambda n: torch.randn(n, 64), 64, 200),
    Work(
        "Transformer",
        lambda: models.TextTransformer(2000, 64, width=64, layers=4, heads=4, dropout=0.0),
        lambda n: torch.randint(1, 2000, (n, 64)),
        32,
        20,
    ),
    Work("wide MLP", lambda: models.mlp(256, 2048, 4), lambda n: torch.randn(n, 256), 32, 12),
)


class Clock:
    """Seconds at the end of each step of a run that is to have `steps`, and of this process's CPUs
    at both ends of what is timed: asking for those may take longer than a small step."""

    def __init__(self, steps: int) -> None:
        self.ends: list[float] = []
        self._steps = steps
        self._cpu: list[float] = []

    def __call__(self) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) in (WARM, self._steps):
            self._cpu.append(time.process_time())

    def told(self, record: Any) -> None:
        """Hear the records of a run."""
        if isinstance(record, StepRecord):
            self()

    def step(self) -> tuple[float, float | None]:
        """Return the mean seconds of a step after the first ones: on the clock, and of CPUs (None
        of a run that had other steps)."""
        n = len(self.ends) - WARM
        cpu = self._cpu[1] - self._cpu[0] if len(self._cpu) == 2 else None
        return (self.ends[-1] - self.ends[WARM - 1]) / n, None if cpu is None else cpu / n


def train(way: str, work: Work, steps: int, seed: int, clock: Clock, double: bool) -> nn.Module:
    """Return what `way` has trained; `clock` is told the end of every step."""
    model, x, y = work.fresh(steps, seed, double=double)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    size = 1 if way in BY_ONE else dist.get_world_size()
    if way.startswith("hybrid"):
        with alone() if size == 1 else contextlib.nullcontext():
            _ours(way, work, size, model, optimizer, x, y, clock)
        return model
    n = work.batch // size
    first = 0 if size == 1 else dist.get_rank() * n
    shares = [(x[at : at + n], y[at : at + n]) for at in range(first, len(x), work.batch)]
    fed = model
    if way.startswith("DDP"):
        held = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        bucket = {DDP: None, SMALL: held / 8, ONE: 2 * held}[way]
        fed = DistributedDataParallel(model, bucket_cap_mb=bucket)  # type: ignore[arg-type]
    after = met_and_summed if way == DESIGN else lambda _: None
    parameters = list(model.parameters())
    for inputs, targets in shares:
        F.cross_entropy(fed(inputs), targets).backward()
        after(parameters)
        optimizer.step()
        optimizer.zero_grad()
        clock()
    return model


def met_and_summed(parameters: Sequence[Tensor]) -> None:
    """What the engine does, and no more: hear that all are well, then add all gradients up."""
    size = dist.get_world_size()
    row = torch.zeros(27, dtype=torch.float64)
    rows = [torch.empty_like(row) for _ in range(size)]
    dist.all_gather(rows, row)
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads]).div_(size)
    dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])


def _ours(
    way: str,
    work: Work,
    size: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    clock: Clock,
) -> None:
    loader: Any = DataLoader(TensorDataset(x, y), batch_size=work.batch)
    if way == LISTED:
        loader = list(zip(x.split(work.batch), y.split(work.batch), strict=True))
    options: dict[str, Any] = {"precision": "fp32"}
    if way != AS_IT_COMES:
        options |= {"batch": "fixed", "micro": work.batch // size, "lr_scale": "none"}
    hm.train(model, loader, _loss, optimizer=optimizer, sink=clock.told, **options)


def _loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Have `hm.train` train in this process as if there were no other."""
    here, name = ranks._here, os.environ.pop("TORCHELASTIC_RUN_ID")
    ranks._here = None
    try:
        yield
    finally:
        ranks._here = here
        os.environ["TORCHELASTIC_RUN_ID"] = name
