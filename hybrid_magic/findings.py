"""What a profile finds, one frozen fact each. Seconds, bytes, operations; unknown is None.

Standard library only, so that a saved profile reads without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("data", "copy", "forward", "backward", "optimizer", "rest")
KINDS = ("parameters", "gradients", "optimizer state", "activations", "input", "rest")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a step, on average over `n` steps.

    `seconds` are the device's where it works ahead of the host, whose own are `host_seconds` (None:
    there is one clock). `spread` is the standard deviation over the steps. "data" is waiting for
    the loader, "copy" from host to device (it may overlap with others), "rest" what is left of the
    step: on the host, the copies for undoing it, gradient norms and records.
    """

    name: str
    seconds: float
    spread: float | None
    host_seconds: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the model in a step, with the modules in it; `path` is empty for the model.

    Seconds are of all its calls in a step, and as long as they are without hooks: shares measured
    with them, scaled to the stage's own time. `parameter_bytes` hold buffers too;
    `activation_bytes` are what its forward pass leaves for the backward pass; `peak_bytes` the most
    that was in use on the device while its forward pass ran.
    """

    path: str
    kind: str
    calls: int
    forward_s: float | None
    backward_s: float | None
    parameter_bytes: int
    activation_bytes: int | None
    peak_bytes: int | None
    flops: int | None

    @property
    def depth(self) -> int:
        return self.path.count(".") + 1 if self.path else 0

    @property
    def seconds(self) -> float | None:
        known = [value for value in (self.forward_s, self.backward_s) if value is not None]
        return sum(known) if known else None


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes of the device in use in a stage, and what they were, by kind.

    "rest" are temporaries, the engine's copies for undoing a step, workspaces and rounding.
    """

    stage: str
    total_bytes: int
    kinds: dict[str, int]


@dataclass(frozen=True, slots=True)
class Size:
    """A micro-batch size that was tried: seconds of its fastest forward and backward pass, peak
    bytes."""

    samples: int
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Fit:
    """The largest micro-batch that fits a device, by `fixed + per sample * size`; None: not even
    one sample does. `budget_bytes` is what `--memory` leaves of `total_bytes`."""

    device: str
    total_bytes: int
    budget_bytes: int
    largest: int | None


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """`peak = fixed_bytes + per_sample_bytes * samples` of a micro-batch, least squares."""

    fixed_bytes: float
    per_sample_bytes: float
    fits: tuple[Fit, ...]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The loader alone against the model alone, in samples a second."""

    loader_samples_per_s: float | None
    model_samples_per_s: float
    batches: int  # that the loader alone was timed over
    workers: int | None  # processes of the loader; None: it is no DataLoader
    cores: int  # that this process may use
    pinned: bool | None  # whether the batch arrived in pinned memory; None: nothing is copied


@dataclass(frozen=True, slots=True)
class Work:
    """The arithmetic of a step against what the device can do (the roofline).

    Operations are counted by formula, `flops` by the precision they were done in; `traffic_bytes`
    are what every operation reads and writes, as if nothing stayed in a cache. What the device can
    do was measured beside: products of large matrices, a large copy.
    """

    flops: dict[str, int]
    traffic_bytes: int
    seconds: float  # forward and backward of a step
    peak_flops_per_s: dict[str, float]
    bandwidth_bytes_per_s: float | None

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @property
    def achieved_flops_per_s(self) -> float | None:
        return self.total_flops / self.seconds if self.seconds and self.total_flops else None

    @property
    def main_precision(self) -> str | None:
        """The precision in which most operations are done."""
        return max(self.flops, key=lambda name: self.flops[name]) if self.total_flops else None

    @property
    def peak(self) -> float | None:
        """Operations a second that the device does in the step's main precision."""
        return self.peak_flops_per_s.get(self.main_precision or "")

    @property
    def intensity(self) -> float | None:
        """Operations a byte of traffic."""
        return self.total_flops / self.traffic_bytes if self.traffic_bytes else None

    @property
    def ridge(self) -> float | None:
        """The intensity from which arithmetic, and no longer memory, is the limit."""
        known = self.peak is not None and self.bandwidth_bytes_per_s
        return self.peak / self.bandwidth_bytes_per_s if known else None  # type: ignore[operator]

    @property
    def attainable_flops_per_s(self) -> float | None:
        """What the roofline allows at this intensity."""
        if self.peak is None or self.intensity is None or self.bandwidth_bytes_per_s is None:
            return None
        return min(self.peak, self.intensity * self.bandwidth_bytes_per_s)


@dataclass(frozen=True, slots=True)
class HostRead:
    """A line that makes the host wait for the device: how often a micro-batch, how long a step."""

    where: str
    times: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What holds where the steps were taken, as far as advice depends on it."""

    device_type: str
    works_ahead: bool  # the device is told what to do, and the host goes on
    precision: str
    native: str | None  # reduced precision that the device computes natively
    tensor_cores: bool
    channels_last: bool | None  # None: no convolution over images
    convolution_flops: int
    attention_bytes: int  # of the scores of an attention that is written out by hand
    attention_scores: str | None  # their shape, "8 x 12 x 512 x 512"
    optimizer: str
    fused: bool | None  # None: it has no fused form that is worth it here
    batch_statistics: bool
    loader_batch: int | None
    grows: bool  # the batch can be made larger by an option
    retries: int  # steps that ran out of memory and were cut smaller


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing worth doing. `saves` is the share of the step's time that it should take away,
    `frees` the share of the peak memory; None where it brings nothing there."""

    what: str
    evidence: str
    do: str
    saves: float | None = None
    frees: float | None = None
