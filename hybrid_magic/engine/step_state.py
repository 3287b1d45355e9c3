"""What one optimizer step works on, what it gathers on the way, and what it gives.

Plain holders: `step` fills them, `progress` and `reading` read them. Knows no policy and no record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .data import StepData
from .device import DeviceProbe
from .gradients import NoiseProbe
from .precision import Precision
from .prefetch import Mover
from .reduction import Reduction
from .transaction import Transaction

Compute = Callable[[Any, Any], Any]  # (model, batch) -> loss, or (loss, {"name": value})


@dataclass(slots=True)
class StepState:
    """All that a step works on; lives as long as the run.

    `steps` and `samples` count what is whole, `running` is the size of the micro-batch in hand,
    `newest` the sizes and the learning-rate factor of the last step. `adopted`: the loop is the
    person's, who clear the gradients, may find some there, and are handed back what a step gives
    beside its loss.
    """

    model: torch.nn.Module
    compute: Compute
    optimizer: torch.optim.Optimizer
    params: list[Tensor]
    precision: Precision
    device: DeviceProbe
    noise: NoiseProbe
    asked_reduction: str
    clip: float | None
    batch_statistics: bool
    mover: Mover | None  # host batch -> device batch; None: it is there already
    transaction: Transaction
    steps: int = 0
    samples: int = 0
    running: int = 0
    newest: tuple[list[int], float] = field(default_factory=lambda: ([], 1.0))
    reduction: Reduction | None = None
    skip_on_device: bool = False
    may_skip_on_device: bool = False  # from the first step that was taken on
    settle: Callable[[StepState, StepData, Reduction], Reduction] | None = None
    scales: dict[float, Tensor] = field(default_factory=dict)
    adopted: bool = False
    lens: Any = None  # an open `lens.Lens`, told where a step begins and where it is whole
    together: Any = None  # a `together.Together`, where several processes train the model
    lay_out_plainly: Callable[[], None] = lambda: None  # weights that are channels_last by us


@dataclass(slots=True)
class Gathered:
    """The gradients of a step on their way: what its micro-batches gave.

    `sizes`, `weights`, `losses` and `spans` are also those of `before`, whose gradients are in the
    sum. `values` reads from the device what `told` holds; None while it is not complete.
    """

    data: StepData
    since: Any  # the mark at which what follows the newest micro-batch begins
    before: Gathered | None = None
    probing: bool = False  # the noise is measured
    paired: bool = False  # over two steps
    apart: float = 0.0  # the weight of the first micro-batch, where its gradient was kept
    shared: bool = False  # over several processes
    small: float = 0.0  # samples behind the smaller gradient
    count: float = 0.0  # what this process's micro-batches count for in the mean
    aligned: bool = True  # every process has as many micro-batches
    reduction: Reduction | None = None  # how the losses are reduced
    factors: list[float] | None = None  # of each micro-batch's loss
    sizes: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    logged: dict[str, Tensor] = field(default_factory=dict)
    kept: list[dict[str, Any]] = field(default_factory=list)
    idle: int = 0  # micro-batches of which nothing is to be trained
    spans: list[tuple[Any, Any, Any]] = field(default_factory=list)
    ends: list[tuple[Any, Any]] = field(default_factory=list)
    until: Any = None  # the mark at which the sum was complete, where the loop is the person's
    peaks: list[int | None] | None = None
    norms: list[Tensor] = field(default_factory=list)
    noise: str | None = None
    told: Tensor | None = None
    values: Callable[[], list[float]] | None = None
    found_inf: Any = None  # what unscaling found, by device


@dataclass(slots=True)
class StepResult:
    """What a step gave. `values` reads, from the device: a loss for each of `weights`, `gradients`
    norms, those of a noise measurement (`noise`: "cut" two, "pair" three), then `names`.

    `spans` are the marks at which each micro-batch began, had its loss and had its gradient; `ends`
    those between which the rest of the step was done.
    """

    sizes: list[int]
    lr: float
    lr_factor: float
    values: Callable[[], list[float]]
    weights: list[float]
    gradients: int
    noise: str | None
    names: Sequence[str]
    skipped: bool | None  # None: decided on the device, to be read with the values
    spans: list[tuple[Any, Any, Any]] = field(default_factory=list)
    ends: list[tuple[Any, Any]] = field(default_factory=list)
    peaks: list[int | None] | None = None
    small: float = 0.0  # samples behind the smaller gradient of a noise measurement
    aligned: bool = True  # `spans` are of all the sizes
    reading: Any = None  # what was read of it already
