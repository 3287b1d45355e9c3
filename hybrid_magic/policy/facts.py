"""What passes between the engine and the steering: settings and facts in, plans out.

Sizes are samples, times seconds, memory bytes; None is a reading that was not taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What was asked of the run and what is known of the model.

    Attributes:
        base: the loader batch, which the learning rate was chosen for.
        batch: "adaptive" (steered), "fixed" (the base), or a number of samples.
        accum, micro: pinned accumulation steps, pinned micro-batch; None is auto.
        micro_most: the most a micro-batch can hold, for data that can only be split.
        budget_bytes: what a step's peak may be; device_bytes: all that there is, which the control
            `memory` is a fraction of.
        batch_statistics: the model has layers that see the micro-batch (BatchNorm).
        stability_threshold: relative spread of the loss under which it counts as stable.
        sum_reduction: the loss sums over samples, so the gradient itself grows with the batch.
        loss_scaling: a step skipped with a finite loss is the loss scale finding its place.
    """

    base: int
    max_batch: int
    batch: Literal["adaptive", "fixed"] | int = "adaptive"
    policy: Literal["goodput", "stability"] = "goodput"
    efficiency: float = 0.9
    accum: int | None = None
    micro: int | None = None
    micro_most: int | None = None
    budget_bytes: int | None = None
    device_bytes: int | None = None
    batch_statistics: bool = False
    family: Literal["sgd", "adam"] = "adam"
    lr_scale: Literal["auto", "none", "linear", "sqrt"] = "auto"
    warmup: Literal["auto"] | int = "auto"
    stability_threshold: float = 0.25
    growth_factor: float = 1.5
    lr_multiplier: float = 1.0
    sum_reduction: bool = False
    loss_scaling: bool = False

    @property
    def steered(self) -> bool:
        """Whether the global batch may change by itself."""
        pinned = self.accum is not None and self.micro is not None
        return (
            self.batch == "adaptive"
            and self.efficiency < 1
            and self.max_batch > self.base
            and not pinned
        )

    @property
    def first_batch(self) -> int:
        """The global batch that the run starts with."""
        if isinstance(self.batch, int):
            return self.batch
        if self.accum is None or self.micro is None:
            return self.base
        product = self.accum * self.micro
        return (
            self.base
            if self.batch == "fixed" and 0 <= product - self.base < self.micro
            else product
        )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The micro-batch sizes of a step.

    `probe`: measure the noise scale on it. With several sizes, the first micro-batch's gradient
    against the whole step's, small = large + the squared norm of their difference. With one, this
    step's gradient against the mean of it and the next step's, if that has as many samples:
    n_small = B with the mean of the two squared norms, n_large = 2 B.
    """

    sizes: tuple[int, ...]
    probe: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What was seen of one step.

    Attributes:
        skipped: the optimizer did not step, as a gradient was not finite.
        micro_seconds: forward and backward of each micro-batch.
        peaks: peak bytes of each micro-batch, where measured singly.
        peak_bytes: over the whole step.
        pressure: the allocator had to try again.
        noise: sq_norm_small, sq_norm_large, n_small, n_large as in `noise_scale.update`.
    """

    step: int
    sizes: tuple[int, ...]
    loss: float | None = None
    grad_norm: float | None = None
    skipped: bool = False
    micro_seconds: tuple[float, ...] | None = None
    optimizer_seconds: float | None = None
    peaks: tuple[int | None, ...] | None = None
    peak_bytes: int | None = None
    pressure: bool = False
    noise: tuple[float, float, float, int] | None = None
