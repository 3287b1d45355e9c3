"""Four ways to find a batch that fits, on one simulated device: ours and the peers' own code.

The device is a model whose forward raises PyTorch's own out-of-memory error above N samples, and
which keeps a ledger and a clock. Each finder runs as its makers ship it, whole, and is told nothing
of N; what it cost is read from the ledger, not from what it says. Knows no goal and no report.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine import train as training
from hybrid_magic.engine.device import READ_EVERY_S, DeviceProbe
from hybrid_magic.engine.progress import TrainState
from hybrid_magic.policy import microbatch, steering

SAMPLE_BYTES = 2**20
FIXED_SHARE = 0.1  # of the device's memory: weights, gradients and the optimizer's state
SEED = 0
# What PyTorch says on a GPU; Accelerate and Lightning know the error by these words.
WORDS = "CUDA out of memory. Tried to allocate 2.00 MiB."


@dataclass(frozen=True)
class Clock:
    """Seconds of a micro-batch, forward and backward: overhead + per_sample * size."""

    overhead_s: float
    sample_s: float

    def seconds(self, size: int) -> float:
        return self.overhead_s + self.sample_s * size


UNFILLED = Clock(10e-3, 0.0)  # any micro-batch takes as long: the largest is the fastest
FILLED = Clock(2e-3, 10e-6)  # from some 6,500 samples on, less than 3 % are left to gain


@dataclass
class Device:
    """Memory for a forward pass of `limit` samples, and what was asked of it, in order."""

    limit: int
    clock: Clock = UNFILLED
    passes: list[int] = field(default_factory=list)  # samples of each forward pass that began
    failed: list[int] = field(default_factory=list)  # those that ran out of memory
    now_s: float = 0.0
    largest: int = 0  # since the last reset

    def run(self, size: int) -> None:
        """Account for a forward pass of `size` samples.

        Raises:
            torch.OutOfMemoryError: it has more than `limit`.
        """
        self.passes.append(size)
        self.now_s += self.clock.seconds(size)
        if size > self.limit:
            self.failed.append(size)
            raise torch.OutOfMemoryError(WORDS)
        self.largest = max(self.largest, size)

    @property
    def fixed_bytes(self) -> int:
        return int(FIXED_SHARE / (1 - FIXED_SHARE) * self.limit * SAMPLE_BYTES)

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.limit * SAMPLE_BYTES

    @property
    def peak_bytes(self) -> int:
        return self.fixed_bytes + self.largest * SAMPLE_BYTES


class Limited(nn.Module):
    """A linear model on that device; it begins at zero, where labels that say nothing leave it."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device, self.layer = device, nn.Linear(4, 2)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._device.run(len(x))
        return self.layer(x)


class Mute(DeviceProbe):
    """The device as one that tells the time and nothing of its memory."""

    late = True

    def __init__(self, device: Device) -> None:
        super().__init__(torch.device("cpu"))
        self.simulated = device

    def mark(self) -> float:  # type: ignore[override]
        return self.simulated.now_s


class Telling(Mute):
    """The device as a GPU: all its memory, and now and then the peak since the last reset."""

    @property
    def total_bytes(self) -> int:
        return self.simulated.total_bytes

    def peak(self) -> tuple[int, int]:
        return self.simulated.peak_bytes, self.simulated.peak_bytes

    def peak_if_due(self) -> tuple[int | None, int | None]:
        now = self.simulated.now_s
        if now < self._due:
            return None, None
        self._due = now + READ_EVERY_S
        return self.peak()

    def reset_peak(self) -> None:
        self.simulated.largest = 0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a finder did on a device of `limit` samples; simulated seconds.

    Attributes:
        size: samples of the pass (ours: the micro-batch) that it settled on.
        ran: what had run at that size when the search was over: "a step" that trains, "a trial"
            that is undone, or "nothing".
        errors: forward passes that ran out of memory.
        passes_lost, samples_lost: forward passes, and samples in them, that no step trained on.
        restarts: how often training began again, or the model was put back.
        steps: optimizer steps that stay, until the size was settled.
        search_s: time until then, less what the samples trained on take at that size.
        batch: ours: samples in a step at the end.
        predicted: ours: the largest size that fits by its readings, None without readings.
    """

    limit: int
    size: int
    ran: str
    errors: int
    passes_lost: int
    samples_lost: int
    restarts: int
    steps: int
    search_s: float
    batch: int | None = None
    predicted: int | None = None


def searched(device: Device, size: int, ran: str, restarts: int) -> Found:
    """Return what a search cost that came before training and left nothing of itself."""
    return Found(
        limit=device.limit, size=size, ran=ran, errors=len(device.failed),
        passes_lost=len(device.passes), samples_lost=sum(device.passes), restarts=restarts,
        steps=0, search_s=device.now_s,
    )  # fmt: skip


def ours(
    device: Device,
    data: TensorDataset,
    steps: int,
    *,
    loader_batch: int,
    tells: bool = True,
    **options: Any,
) -> Found:
    """Train with `hm.train` for `steps` steps, on a device that tells of its memory or does not."""
    torch.manual_seed(SEED)
    model, opened = Limited(device), list[Any]()
    probe = Telling(device) if tells else Mute(device)

    def open_state(*given: Any) -> Any:
        opened.append(TrainState(*given))
        return opened[0]

    with (
        mock.patch.object(training, "probe_for", return_value=probe),
        mock.patch.object(training, "TrainState", open_state),
    ):
        run = hm.train(
            model,
            DataLoader(data, batch_size=loader_batch),
            loss=nn.CrossEntropyLoss(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            steps=steps,
            precision="fp32",
            lr_scale="none",
            **options,
        )
    return _account(device, run, opened[0].sizing.learned, tells)


def _account(device: Device, run: hm.Run, learned: steering.State, tells: bool) -> Found:
    moves = [change.step for change in run.changes if change.what in ("micro", "global")]
    settled = max(moves, default=0) + 1  # this step and those before it
    size = learned.micro
    trained = [sizes for sizes, _ in run.sizes]
    early = [n for sizes in trained[:settled] for n in sizes]
    lost = Counter(device.passes) - Counter(n for sizes in trained for n in sizes)
    lost_s = sum(count * device.clock.seconds(n) for n, count in lost.items())
    at_best_s = sum(early) * device.clock.seconds(size) / size
    return Found(
        limit=device.limit,
        size=size,
        ran="a step" if any(size in sizes for sizes in trained) else "nothing",
        errors=len(device.failed),
        passes_lost=lost.total(),
        samples_lost=sum(count * n for n, count in lost.items()),
        restarts=0,
        steps=settled,
        search_s=sum(map(device.clock.seconds, early)) + lost_s - at_best_s,
        batch=learned.batch,
        predicted=microbatch.ceiling(learned.sizes) if tells else None,
    )


def accelerate(device: Device, data: TensorDataset, start: int) -> Found:
    """Train under Accelerate's `find_executable_batch_size`, which the HF Trainer uses too.

    Raises:
        ImportError: Accelerate is not installed.
    """
    from accelerate.utils import find_executable_batch_size

    begun: list[int] = []

    @find_executable_batch_size(starting_batch_size=start)
    def train(batch_size: int) -> int:
        begun.append(batch_size)
        torch.manual_seed(SEED)
        model = Limited(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = next(iter(DataLoader(data, batch_size=batch_size)))
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        return batch_size

    size: Any = train()  # type: ignore[call-arg]
    device.now_s -= device.clock.seconds(device.passes.pop())  # a step that trains, and stays
    return searched(device, size, "a step", len(begun) - 1)


def lightning(device: Device, data: TensorDataset, mode: str, **options: Any) -> Found:
    """Search with Lightning's `Tuner.scale_batch_size`, from its default of 2 samples.

    Raises:
        ImportError: Lightning is not installed.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.tuner import Tuner

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.batch_size, self.put_back = Limited(device), 2, 0

        def train_dataloader(self) -> Any:
            return DataLoader(data, batch_size=self.batch_size)

        def training_step(self, batch: Any, _: int) -> Any:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_load_checkpoint(self, _: Any) -> None:
            self.put_back += 1

    torch.manual_seed(SEED)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        still: Any = dict.fromkeys(silent, False)
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, **still)
        module = Module()
        size = Tuner(trainer).scale_batch_size(module, mode=mode, **options)
    assert size == module.batch_size
    ran = Counter(device.passes) - Counter(device.failed)
    return searched(device, size, "a trial" if size in ran else "nothing", module.put_back)
