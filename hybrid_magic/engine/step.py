"""One optimizer step: the one `backward()` and the one `optimizer.step()` of the package.

A step's micro-batches are weighted so that its gradient is that of the mean loss over its samples,
however it is cut. A gradient that is not finite never reaches the weights. The host reads device
values at most once a step, and not at all when the optimizer can be told on the device to skip.
In a loop that is the person's the two halves, `accumulate` and `apply`, have their own statements
between them. Knows no policy, no loader and no record.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import HybridMagicError
from . import reduction
from .data import StepData
from .forward import forward, log, watched_forward
from .gradients import gradient_norms, stacked
from .step_gradients import clip, noise_measured, unscale
from .step_state import Gathered, StepResult, StepState


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
    gathered = accumulate(state, data, measure_peaks=measure_peaks)
    if state.together is None:
        return apply(state, gathered, lr_factor)
    return state.together.sure(apply, state, gathered, lr_factor)


# -- the first half: gradients --


def accumulate(
    state: StepState,
    data: StepData,
    *,
    before: Gathered | None = None,
    measure_peaks: bool = False,
) -> Gathered:
    """Return the gradients of `data`, gathered and unscaled, for `apply`.

    Args:
        before: what is in the sum already, of batches since the last step.
    Raises:
        As `train_step`; also HybridMagicError when some micro-batches have a loss and others none.
    """
    begin(state, data)
    gathered = gather(state, data, before)
    gathered.peaks = [] if measure_peaks and before is None else None
    if state.together is None:
        _passes(state, data, gathered)
        return finish(state, gathered)
    state.together.passes(state, data, gathered, lambda: _passes(state, data, gathered))
    return state.together.sure(finish, state, gathered)


def _passes(state: StepState, data: StepData, gathered: Gathered) -> None:
    """Do the forward and backward passes of a step's micro-batches."""
    mark, spans, peaks = state.device.mark, gathered.spans, gathered.peaks
    coming, mover = data.coming, state.mover
    if mover is not None and coming is None and data.batches:
        coming = mover.send(data.batches[0])
    for number, batch in enumerate(data.batches):
        if peaks is not None:
            state.device.reset_peak()
        start = gathered.since if number else mark()
        state.running, moved = data.sizes[number], batch
        if mover is not None:
            moved = mover.receive(coming)
            if number + 1 < len(data.batches):
                coming = mover.send(data.batches[number + 1])
        if gathered.factors is None:
            loss, extra, found = watched_forward(state, data, moved)
            gathered.reduction = found
            if found is not None:
                gathered.factors = reduction.weights(found, data.batches, data.sizes)
        else:
            loss, extra = forward(state, moved)
        middle = mark()
        if loss is None and state.adopted:
            gathered.idle += 1
        else:
            add(state, gathered, number, loss)
        if state.adopted:
            gathered.kept.append(extra)
        elif extra:
            log(gathered.logged, extra, data.sizes[number] / sum(data.sizes), loss.device)
        if peaks is not None:
            peaks.append(state.device.peak()[0])
        gathered.since = mark()
        spans.append((start, middle, gathered.since))


def begin(state: StepState, data: StepData) -> None:
    """Open a step on `data`: from here on it can be taken back."""
    state.running = max(data.sizes, default=0)
    if state.together is not None:
        state.together.ranks.draw_apart(1, state.steps)
    state.transaction.begin(state.steps, state.precision, found=state.adopted)
    if state.lens is not None:
        state.lens.begin(state, data)


def gather(state: StepState, data: StepData, before: Gathered | None = None) -> Gathered:
    """Make ready for the gradients of `data`; those that are there go into the sum at its end."""
    found = state.adopted and state.transaction.set_aside()
    if found:
        state.noise.forget()
    probing = not found and (data.probe or state.noise.waits) and state.noise.begin(state.steps)
    gathered = Gathered(data, None, before, probing)
    if state.together is not None:
        gathered.shared, gathered.probing, probing = probing, False, False
    gathered.paired = probing and (state.batch_statistics or len(data.batches) == 1)
    if before is None:
        gathered.sizes = data.everyones
    else:
        gathered.sizes = [*before.sizes, *data.sizes]
        gathered.weights, gathered.losses = list(before.weights), list(before.losses)
        gathered.spans, gathered.ends = list(before.spans), list(before.ends)
    gathered.reduction = state.reduction
    if state.reduction is not None:
        gathered.factors = reduction.weights(state.reduction, data.batches, data.sizes)
    return gathered


def add(state: StepState, gathered: Gathered, number: int, loss: Tensor) -> None:
    """Add the gradient of micro-batch `number`, by its weight."""
    assert gathered.factors is not None
    weight = gathered.factors[number]
    if weight != 0.0:  # without a target that counts the mean is 0/0
        backward(state, loss, weight)
        gathered.losses.append(loss.detach())
        gathered.weights.append(weight)
    if (
        gathered.probing
        and not gathered.paired
        and number == 0
        and 0.0 < weight < 1.0
        and state.noise.keep()
    ):
        gathered.apart = weight


def backward(state: StepState, loss: Tensor, weight: float = 1.0) -> None:
    """Add the gradient of `weight` times `loss` to the parameters', scaled for fp16."""
    scaler = state.precision.scaler
    scaled = loss if scaler is None else scaler.scale(loss)
    scaled.backward(None if weight == 1.0 else _gradient(state, weight, scaled))


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


def finish(state: StepState, gathered: Gathered) -> Gathered:
    """Unscale the gradients, join them to those that were there, and ask for their norms.

    Where nothing is to be trained `values` stays None, and the step is to be closed.
    """
    data = gathered.data
    state.running = max(data.sizes, default=0)  # what is left of the step is no micro-batch's
    if gathered.idle:
        if gathered.idle < len(data.batches):
            raise HybridMagicError(
                f"{gathered.idle} of {len(data.batches)} micro-batches of a batch have no loss to "
                "be trained; wanted all of them or none; decide it for the whole batch"
            )
        return gathered
    if state.precision.scaler is not None:
        unscale(state, gathered)
    if state.adopted:
        state.transaction.join()
    if state.lens is not None:
        state.lens.gathered(state)
    grads = [param.grad for param in state.params if param.grad is not None]
    if not grads:
        raise HybridMagicError(
            "the loss depends on no parameter of the model; wanted one that does; "
            "compute it from the model that is being trained"
        )
    gathered.norms = norms = gradient_norms(grads)
    measured: list[Tensor] = []
    if gathered.paired or gathered.apart or gathered.shared:
        measured, gathered.noise = noise_measured(state, gathered)
    gathered.before = None
    gathered.told = stacked([*gathered.losses, *norms, *measured, *gathered.logged.values()])
    gathered.values = state.device.fetch(gathered.told)
    if state.adopted:
        gathered.until = state.device.mark()
    return gathered


# -- the second half: weights --


def apply(state: StepState, gathered: Gathered, lr_factor: float = 1.0) -> StepResult:
    """Take the optimizer step unless a gradient is not finite; clear gradients that are ours.

    Raised from, `state.transaction.put_back` makes it possible to try again.
    """
    optimizer: Any = state.optimizer
    scaler: Any = state.precision.scaler
    losses, told, values = len(gathered.losses), gathered.told, gathered.values
    assert told is not None
    assert values is not None
    judged = losses + len(gathered.norms)  # what must be finite
    skipped: bool | None = None
    read: list[float] = []
    if not state.skip_on_device:
        read = values()
        check = sum(read[:judged])
        skipped = check - check != 0.0  # true of inf and nan alone
        values = read.copy
    state.transaction.hold()
    if skipped:
        if not math.isfinite(sum(read[:losses])):  # a NaN in statistics would stay for ever
            state.transaction.keep_buffers()
    else:
        if state.clip is not None:
            clip(state, gathered, state.clip)
        if state.skip_on_device:
            optimizer.found_inf = (~torch.isfinite(told[:judged]).all()).float()
            state.transaction.keep_buffers(~torch.isfinite(told[:losses]).all())
        take_step(optimizer, lr_factor)
        state.skip_on_device |= state.may_skip_on_device
    if scaler is not None:
        scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = gathered.found_inf
        scaler.update()
    lr = float(optimizer.param_groups[0]["lr"]) * lr_factor
    if not state.adopted:
        for param in state.params:
            param.grad = None
    gathered.ends.append((gathered.since, state.device.mark()))
    state.newest = gathered.sizes, lr_factor
    state.steps, state.samples = state.steps + 1, state.samples + sum(gathered.sizes)  # it is whole
    state.transaction.close()
    result = StepResult(
        gathered.sizes, lr, lr_factor, values, gathered.weights, len(gathered.norms),
        gathered.noise, tuple(gathered.logged), skipped, gathered.spans, gathered.ends,
        gathered.peaks, gathered.small, gathered.aligned,
    )  # fmt: skip
    if state.lens is not None:
        state.lens.took(state, result)
    return result


def take_step(optimizer: torch.optim.Optimizer, lr_factor: float = 1.0) -> None:
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
