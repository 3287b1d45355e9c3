"""One optimizer step: the one `backward()` and the one `optimizer.step()` of the package.

A step's micro-batches are weighted so that its gradient is that of the mean loss over its samples,
however it is cut. A gradient that is not finite never reaches the weights. The host reads device
values at most once a step, and not at all when the optimizer can be told on the device to skip.
Knows no policy, no loader and no record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import HybridMagicError
from . import reduction
from .data import StepData
from .device import DeviceProbe
from .gradients import NoiseProbe, gradient_norms
from .precision import Precision
from .prefetch import Mover
from .reduction import LossWatch, Reduction
from .transaction import Transaction

Compute = Callable[[Any, Any], Any]  # (model, batch) -> loss, or (loss, {"name": value})


@dataclass(slots=True)
class StepState:
    """All that a step works on; lives as long as the run.

    `steps` and `samples` count what is whole, `running` is the size of the micro-batch in hand,
    `newest` the sizes and the learning-rate factor of the last step.
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


@dataclass(slots=True)
class StepResult:
    """What a step gave. `values` reads, from the device: a loss for each of `weights`, `gradients`
    norms, those of a noise measurement (`noise`: "cut" two, "pair" three), then `names`.
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
    marks: list[Any] = field(default_factory=list)
    peaks: list[int | None] | None = None


def train_step(
    state: StepState, data: StepData, lr_factor: float = 1.0, *, measure_peaks: bool = False
) -> StepResult:
    """Train one step on `data`; raised from, it is taken back by `state.transaction.roll_back`.

    Args:
        state: model, optimizer and the rest; gradients are None before and after.
        data: the step's micro-batches on the host.
        lr_factor: factor on the optimizer's learning rates for this step only.
        measure_peaks: read the device's memory peak after each micro-batch.
    Raises:
        Whatever the person's own step raises, and HybridMagicError when it returns no loss.
    """
    mark, marks = state.device.mark, []
    state.running = max(data.sizes)
    state.transaction.begin(state.steps, state.precision)
    probing = (data.probe or state.noise.waits) and state.noise.begin(state.steps)
    paired = probing and (state.batch_statistics or len(data.batches) == 1)
    kept = 0.0  # the weight of the first micro-batch, where its gradient was kept
    known = state.reduction
    weights = None if known is None else reduction.weights(known, data.batches, data.sizes)
    losses: dict[int, Tensor] = {}
    logged: dict[str, Tensor] = {}
    peaks: list[int | None] | None = [] if measure_peaks else None
    coming, mover = data.coming, state.mover
    if mover is not None and coming is None:
        coming = mover.send(data.batches[0])
    for number, batch in enumerate(data.batches):
        if peaks is not None:
            state.device.reset_peak()
        marks.append(mark())
        state.running, moved = data.sizes[number], batch
        if mover is not None:
            moved = mover.receive(coming)
            if number + 1 < len(data.batches):
                coming = mover.send(data.batches[number + 1])
        if weights is None:
            loss, extra, found = _watched_forward(state, data, moved)
            weights = reduction.weights(found, data.batches, data.sizes)
        else:
            loss, extra = forward(state, moved)
        marks.append(mark())
        if (weight := weights[number]) != 0.0:  # without a target that counts the mean is 0/0
            backward(state, loss, weight)
            losses[number] = loss.detach()
        if extra:
            _log(logged, extra, data.sizes[number] / sum(data.sizes), loss.device)
        if probing and not paired and number == 0 and 0.0 < weight < 1.0 and state.noise.keep():
            kept = weight
        if peaks is not None:
            peaks.append(state.device.peak()[0])
    assert weights is not None
    marks.append(mark())
    result = _apply(state, data, list(losses.values()), logged, kept, paired, lr_factor)
    marks.append(mark())
    result.marks, result.peaks, result.weights = marks, peaks, [weights[n] for n in losses]
    state.newest = data.sizes, lr_factor
    state.steps, state.samples = state.steps + 1, state.samples + sum(data.sizes)  # it is whole
    state.transaction.close()
    return result


def forward(state: StepState, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return (loss, logged values) of the person's step on a batch that is on the device."""
    if state.precision.mixed:
        with state.precision.autocast():
            result = state.compute(state.model, batch)
    else:
        result = state.compute(state.model, batch)
    return result if type(result) is tuple else (result, {})


def _log(logged: dict[str, Tensor], extra: dict[str, Any], share: float, device: Any) -> None:
    """Add `share` of each value to the step's mean of it, without reading it."""
    for name, value in extra.items():
        try:
            part = torch.as_tensor(value, dtype=torch.float32, device=device).detach().mean()
        except (TypeError, ValueError, RuntimeError):
            raise HybridMagicError(
                f"{name} to be logged is a {type(value).__name__}; wanted a number or a tensor; "
                "leave it out of --log"
            ) from None
        part = part * share
        logged[name] = part if name not in logged else logged[name] + part


def backward(state: StepState, loss: Tensor, weight: float = 1.0) -> None:
    """Add the gradient of `weight` times `loss` to the parameters', scaled for fp16."""
    scaler = state.precision.scaler
    scaled = loss if scaler is None else scaler.scale(loss)
    scaled.backward(None if weight == 1.0 else _gradient(state, weight, scaled))


def _watched_forward(
    state: StepState, data: StepData, batch: Any
) -> tuple[Tensor, dict[str, Any], Reduction]:
    """Run the first forward pass of a run, learning from it how the loss is reduced."""
    with LossWatch() as watch:
        loss, extra = forward(state, batch)
    reduction.check(loss)
    if not isinstance(extra, Mapping):
        raise HybridMagicError(
            f"the step gave (loss, {type(extra).__name__}); wanted the loss, or (loss, a dict of "
            "numbers to record); name what is to be recorded"
        )
    found = reduction.read(watch, loss, batch, state.asked_reduction)
    if not found.certain and state.settle is not None:
        found = state.settle(state, data, found)
    state.reduction = found if found.certain else None  # else it is looked at again
    return loss, extra, found


def _gradient(state: StepState, weight: float, loss: Tensor) -> Tensor:
    """Return `weight` as the gradient to start from: saves a multiplication in the graph."""
    gradient = state.scales.get(weight)
    if gradient is None:
        if len(state.scales) > 64:
            state.scales.clear()
        gradient = state.scales[weight] = torch.full(
            (), weight, dtype=loss.dtype, device=loss.device
        )
    return gradient


def _apply(
    state: StepState,
    data: StepData,
    losses: list[Tensor],
    logged: dict[str, Tensor],
    kept: float,
    paired: bool,
    lr_factor: float,
) -> StepResult:
    """Take the optimizer step unless a gradient is not finite; clear the gradients."""
    state.running = max(data.sizes)  # what is left of the step is no micro-batch's
    optimizer: Any = state.optimizer
    scaler = state.precision.scaler
    if scaler is not None:
        scaler.unscale_(optimizer)
    grads = [param.grad for param in state.params if param.grad is not None]
    if not grads:
        raise HybridMagicError(
            "the loss depends on no parameter of the model; wanted one that does; "
            "compute it from the model that is being trained"
        )
    norms = gradient_norms(grads)
    measured: list[Tensor] = []
    noise = None
    if paired or kept:
        measured, noise = _measured(state, sum(data.sizes), kept, paired)
    judged = len(losses) + len(norms)  # what must be finite
    told = _stack([*losses, *norms, *measured, *logged.values()])
    values = state.device.fetch(told)
    skipped: bool | None = None
    read: list[float] = []
    if not state.skip_on_device:
        read = values()
        check = sum(read[:judged])
        skipped = check - check != 0.0  # true of inf and nan alone
        values = read.copy
    state.transaction.hold()
    if skipped:
        if not math.isfinite(sum(read[: len(losses)])):  # a NaN in statistics would stay for ever
            state.transaction.keep_buffers()
    else:
        if state.clip is not None:
            norm = torch.linalg.vector_norm(torch.stack(norms))
            torch._foreach_mul_(grads, (state.clip / (norm + 1e-6)).clamp(max=1.0))
        if state.skip_on_device:
            optimizer.found_inf = (~torch.isfinite(told[:judged]).all()).float()
            state.transaction.keep_buffers(~torch.isfinite(told[: len(losses)]).all())
        _optimizer_step(optimizer, lr_factor)
        state.skip_on_device |= state.may_skip_on_device
    if scaler is not None:
        scaler.update()
    lr = float(optimizer.param_groups[0]["lr"]) * lr_factor
    for param in state.params:
        param.grad = None
    return StepResult(
        data.sizes, lr, lr_factor, values, [], len(norms), noise, tuple(logged), skipped
    )


def _measured(
    state: StepState, size: int, kept: float, paired: bool
) -> tuple[list[Tensor], str | None]:
    """Return the norms of a noise measurement, and of which kind they are; none on the first step
    of a pair."""
    if paired:
        pair = state.noise.pair(size)
        return ([], None) if pair is None else (list(pair), "pair")
    factor: float | Tensor = 1.0 / kept
    if state.precision.scaler is not None:  # what was kept is scaled
        one = torch.ones((), device=state.device.device)
        factor = factor / state.precision.scaler.scale(one)
    return list(state.noise.cut(factor)), "cut"


def _optimizer_step(optimizer: torch.optim.Optimizer, lr_factor: float) -> None:
    """Step the optimizer once, its learning rates scaled for this step only."""
    groups = optimizer.param_groups
    found = None if lr_factor == 1.0 else [group["lr"] for group in groups]
    try:
        if found is not None:
            for group, lr in zip(groups, found, strict=True):
                group["lr"] = lr * lr_factor
        optimizer.step()
    finally:
        if found is not None:
            for group, lr in zip(groups, found, strict=True):
                group["lr"] = lr


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Return 0-dim tensors as one, in float32 unless the loss is float64."""
    dtype = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    return torch.stack([part if part.dtype == dtype else part.to(dtype) for part in parts])
