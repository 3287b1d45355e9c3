"""The facts that leave the engine, one frozen record each, and their JSON lines.

Records go out, requests come in: a sink can only read. A quantity that is not known is `None`.
Units: seconds end in `_s`, bytes in `_bytes`. Standard library only, so that a saved run reads
without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StartRecord:
    """What a run is about to do; the first record of a run.

    `samples_per_epoch` is None when the loader cannot tell; `epochs`, `steps` and `minutes` are the
    ends asked for, None where not asked. `memory_budget_bytes` is what `--memory` allows and
    `device_bytes` what the device has; both None where the device cannot tell. `steered` says
    whether the global batch is; the next three are what the policy begins with. Each of
    `processes` trains its share of every step.
    """

    model: str
    device: str
    precision: str
    optimizer: str
    base_batch_size: int
    samples_per_epoch: int | None
    epochs: int | None
    steps: int | None
    minutes: float | None
    memory_budget_bytes: int | None
    device_bytes: int | None
    parameters: int
    steered: bool = True
    max_batch_size: int | None = None
    growth_factor: float | None = None
    stability_threshold: float | None = None
    processes: int = 1


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step; `loss` is the mean over its samples (valid targets where counted).

    Of several processes, `microbatch_size` is what each holds at once, times and memory are those
    of the first, and in `optimizer_s` is what they exchange.
    """

    step: int
    samples_seen: int
    loss: float | None
    grad_norm: float | None
    lr: float
    global_batch_size: int
    microbatch_size: int
    accumulation_steps: int
    skipped: bool
    retries: int
    data_s: float | None
    forward_s: float | None
    backward_s: float | None
    optimizer_s: float | None
    step_s: float | None
    allocated_peak_bytes: int | None
    reserved_peak_bytes: int | None
    noise_scale: float | None
    logged: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class BatchChangeRecord:
    """One decision: `what` (global, micro, control, precision) went from `before` to `after`.

    `reason` is one sentence with its numbers. A control names itself in it.
    """

    step: int
    before: int | float | str | bool | None
    after: int | float | str | bool | None
    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """One pass over the validation loader: `epoch`, `loss` and every logged mean."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class NoteRecord:
    """One sentence that the person should read: what was inferred, or could not be done."""

    text: str


@dataclass(frozen=True, slots=True)
class TelemetryRecord:
    """What the machine's gauges showed `at_s` seconds into the run, after `step` steps.

    `energy_j` is what the GPU has drawn since the run began, validation and pauses included, and
    `gpu_used_bytes` what is taken of it, by whomever. `host_rss_bytes` is the resident memory of
    this process and its children. A `cpu_utilization_ratio` of 1 is one core, busy all the time.
    """

    step: int
    at_s: float
    energy_j: float | None = None
    gpu_used_bytes: int | None = None
    gpu_utilization_ratio: float | None = None
    gpu_power_w: float | None = None
    gpu_temperature_c: float | None = None
    gpu_clock_mhz: float | None = None
    gpu_max_clock_mhz: float | None = None
    host_rss_bytes: int | None = None
    host_available_bytes: int | None = None
    cpu_utilization_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class TrialStartRecord:
    """One run of an ablation begins: the `number`th of `total`, or steps to warm `variant` up
    (`number` is None), outside the clock."""

    number: int | None
    total: int
    variant: str
    seed: int


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """What one run of an ablation gave.

    `outcome` is "finished" or "oom". `seconds` is training as a person waits for it, measuring
    included, validation not. `peak_allocated_bytes` is that of the steps. `accuracy` is a share, as
    the step or the cell gives it.
    """

    variant: str
    seed: int
    outcome: str
    seconds: float | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    accuracy: float | None = None
    loss: float | None = None
    steps: int = 0
    samples_seen: int = 0
    precision: str | None = None
    error: str | None = None


Record = (
    StartRecord | StepRecord | BatchChangeRecord | ValidationRecord | NoteRecord
    | TelemetryRecord | TrialStartRecord | TrialRecord
)  # fmt: skip
Sink = Callable[[Record], None]


def both(one: Sink, other: Sink | None) -> Sink:
    """Return a sink that hands every record to both; it holds nothing else."""

    def emit(record: Record) -> None:
        one(record)
        if other is not None:
            other(record)

    return emit


_KINDS: dict[str, type] = {
    "start": StartRecord,
    "step": StepRecord,
    "change": BatchChangeRecord,
    "validation": ValidationRecord,
    "note": NoteRecord,
    "telemetry": TelemetryRecord,
    "trial_start": TrialStartRecord,
    "trial": TrialRecord,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def as_json(record: Record) -> dict[str, Any]:
    """Return the record as a dict of plain JSON values; its `kind` names its type."""
    names = type(record).__slots__  # every field and nothing else; `asdict` takes ten times as long
    return {"kind": _NAMES[type(record)], **{name: getattr(record, name) for name in names}}


def from_json(values: dict[str, Any]) -> Record | None:
    """Return the record that `as_json` wrote, None for a kind that this version does not know."""
    kind = _KINDS.get(values.get("kind", ""))
    if kind is None:
        return None
    names = {item.name for item in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})
