"""What a checkpoint holds of a run, and how it is put back.

`tree_of` lists all of it, as plain values and tensors. Weights, buffers and the optimizer's state
come back bit for bit, and so does what later decisions rest on. Knows no file and no loader.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..run import Run, from_lines
from .optimizer_state import is_adam_like
from .precision import Precision
from .progress import TrainState
from .reading import Reading, read
from .reduction import Reduction
from .rewind import give, once
from .step_state import StepResult, StepState

_OF_STATE = (
    "step", "samples", "epoch", "in_epoch", "epoch_from", "epoch_loss", "validated", "noise_scale",
    "sums", "collapsed",
)  # fmt: skip


def tree_of(state: TrainState) -> dict[str, Any]:
    """Return all that a run needs to go on from where it stands, between two steps, but for its
    place in the data."""
    ready = state.step_state
    return {
        **begun(ready.model, ready.optimizer),
        **standing(state),
        "schedule": None if state.schedule is None else state.schedule.state(),
        "step": {
            "noise": ready.noise.state(),
            "reduction": None if ready.reduction is None else _fields(ready.reduction),
            "skip_on_device": ready.skip_on_device,
            "draws": ready.transaction.random.draws,
        },
    }


def standing(state: TrainState) -> dict[str, Any]:
    """Return the part that reading a step's values changes, which a device may be late with."""
    precision = state.step_state.precision
    return {
        "precision": {
            "name": precision.name,
            "scaler": None if precision.scaler is None else precision.scaler.state_dict(),
        },
        "state": {name: getattr(state, name) for name in _OF_STATE},
        "seconds": state.trained(),
        "pending": [_read_already(state, *taken) for taken in state.pending],
        "sizing": state.sizing.state(),
        "run": text_of(state.run),
        "history_seen": state.run.history.seen,
    }


def text_of(run: Run) -> str:
    """Return a Run as text: one value, however many records it has."""
    return "\n".join(run.lines())


def begun(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the part that is known, and nearly as large, before a run begins."""
    return {
        "model": {
            "kind": type(model).__name__,
            "parameters": dict(_weights(model, optimizer)),
            "buffers": dict(model.named_buffers()),
            "extra": {name: module.get_extra_state() for name, module in _with_extra(model)},
        },
        "optimizer": {"kind": type(optimizer).__name__, "state": optimizer.state_dict()},
    }


def _with_extra(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that tell a state beside their tensors, as `state_dict` would ask them."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield name, module


def _empty(model: nn.Module) -> set[str]:
    """Return the names of buffers that are None: a forward pass may make them."""
    return {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        for name, value in module._buffers.items()
        if value is None
    }


def _weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by name; those that are no module's, by their number in the optimizer."""
    seen: set[int] = set()
    for name, param in model.named_parameters():
        seen.add(id(param))
        yield name, param
    for number, param in enumerate(_stepped(optimizer)):
        if id(param) not in seen:
            yield f"weight {number} of the optimizer", param


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _fields(value: Any) -> dict[str, Any]:
    return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}


def _read_already(
    state: TrainState, step: int, samples: int, result: StepResult, *rest: Any
) -> Any:
    """Return a step whose values the policy has not seen yet, with its values, as plain ones."""
    result.reading = read(result, state.probe)
    return [step, samples, _plain_result(result), *rest]


def _plain_result(result: StepResult) -> dict[str, Any]:
    kept = ("sizes", "lr", "lr_factor", "skipped", "peaks")
    return {name: getattr(result, name) for name in kept} | {"reading": _fields(result.reading)}


# -- another model's? --


def other_kind(tree: dict[str, Any], model: nn.Module, optimizer: Any) -> str | None:
    """Return in what the checkpoint's model or optimizer is another one, "its ... here ...", None
    where it fits; nothing is changed."""
    held, here = tree["model"], dict(_weights(model, optimizer))
    parts: list[tuple[str, dict[str, Any], dict[str, Any]]]
    parts = [("parameters", held["parameters"], here)]
    empty = _empty(model)
    buffers = {name: value for name, value in held["buffers"].items() if name not in empty}
    parts.append(("buffers", buffers, dict(model.named_buffers())))
    parts.append(("states of modules", held["extra"], dict(_with_extra(model))))
    for what, saved, found in parts:
        for name in [*saved, *(name for name in found if name not in saved)]:
            there, now = saved.get(name), found.get(name)
            if there is None or now is None:
                where = "has none" if there is None else "has one"
                other = "there is none" if now is None else "there is one"
                return f"of the {what} it {where} called {name}, and here {other}"
            if what == "parameters" and (there.shape, there.dtype) != (now.shape, now.dtype):
                return f"its {name} is {_shown(there)}, and here {_shown(now)}"
    there, now = tree["optimizer"], type(optimizer).__name__
    if there["kind"] != now:
        return f"its optimizer is {there['kind']}, and here {now}"
    groups = [len(group["params"]) for group in there["state"]["param_groups"]]
    mine = [len(group["params"]) for group in optimizer.param_groups]
    if groups != mine:
        return f"its optimizer has groups of {groups} parameters, and here of {mine}"
    return None


def _shown(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


# -- putting back --


def put_weights_back(tree: dict[str, Any], model: nn.Module, optimizer: Any) -> None:
    """Give model and optimizer the checkpoint's values, on the devices where they are."""
    saved = tree["model"]
    with torch.no_grad():
        for name, param in _weights(model, optimizer):
            param.copy_(saved["parameters"][name])
        here, home = dict(model.named_buffers()), next(model.parameters(), None)
        for name, value in saved["buffers"].items():
            buffer = here.get(name)
            if buffer is not None and _fits(buffer, value):
                give(buffer, value)
            else:  # the model made it, or made it anew, as it went on
                owner, _, last = name.rpartition(".")
                near = home if buffer is None else buffer
                made = value.to("cpu" if near is None else near.device, copy=True)
                model.get_submodule(owner)._buffers[last] = made
        for name, module in _with_extra(model):
            module.set_extra_state(copy.deepcopy(saved["extra"][name]))
    _put_optimizer_back(tree["optimizer"]["state"], optimizer)


def _fits(tensor: Tensor, value: Tensor) -> bool:
    """Return whether `value` can be copied into `tensor`: elements that share memory are alike."""
    if (tensor.shape, tensor.dtype) != (value.shape, value.dtype):
        return False
    part = once(tensor, value)
    return part is value or torch.equal(part.expand_as(value), value)


def _put_optimizer_back(saved: dict[str, Any], optimizer: Any) -> None:
    held = saved["state"]
    if is_adam_like(optimizer):  # of weights that never had a gradient: made up front, and again
        held = {key: values for key, values in held.items() if float(values.get("step", 1))}
    optimizer.load_state_dict({**saved, "state": held})
    params = _stepped(optimizer)
    # torch gives what it loads the dtype of the weight, and leaves it laid out as it was saved
    for number, values in held.items():
        weight = params[number] if isinstance(number, int) else None
        now = {} if weight is None else optimizer.state.get(weight, {})
        for name, value in values.items():
            if not isinstance(value, Tensor) or weight is None:
                continue
            if value.dtype != now[name].dtype:
                now[name] = value.to(now[name].device)
            if value.shape == weight.shape:
                now[name] = _laid_out_as(weight, now[name])


def _laid_out_as(weight: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the strides of its weight, as fused optimizers want it: it may have been
    saved where convolutions were channels_last, and come back where they are not."""
    if value.layout != torch.strided or value.stride() == weight.stride():
        return value
    return torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)


def precision_of(
    tree: dict[str, Any], device: torch.device, own: Precision | None = None
) -> Precision:
    """Return the precision of the checkpoint, its loss scale as it was; `own` is the person's."""
    held = tree["precision"]
    precision = Precision(held["name"], device) if own is None else own
    if precision.scaler is not None and held["scaler"]:  # it had one, which was not disabled
        precision.scaler.load_state_dict(held["scaler"])
    return precision


def run_of(tree: dict[str, Any], ended: str | None = None) -> Run:
    """Return the Run as it was; `ended` is its text where that is another one."""
    run = from_lines((tree["run"] if ended is None else ended).splitlines())
    run.history.seen = tree["history_seen"]
    return run


def put_state_back(tree: dict[str, Any], state: TrainState) -> bool:
    """Have a state that has no step yet stand where the checkpoint was taken; return whether the
    steering goes on with what it knew."""
    for name in _OF_STATE:
        setattr(state, name, tree["state"][name])
    state.paused(-tree["seconds"])  # they count as trained
    state.pending = deque(_taken(*taken) for taken in tree["pending"])
    return state.sizing.take_up(tree["sizing"])


def _taken(step: int, samples: int, result: dict[str, Any], *rest: Any) -> tuple[Any, ...]:
    reading = Reading(**result.pop("reading"))
    made = StepResult(
        **result, values=list, weights=[], gradients=0, noise=None, names=(), reading=reading
    )
    return step, samples, made, *rest


def put_step_back(tree: dict[str, Any], ready: StepState) -> None:
    """Have the step's own state go on where the checkpoint's stood; weights are put back apart."""
    held = tree["step"]
    ready.steps, ready.samples = tree["state"]["step"], tree["state"]["samples"]
    ready.noise.go_on(held["noise"])
    ready.reduction = None if held["reduction"] is None else Reduction(**held["reduction"])
    ready.transaction.random.draws = held["draws"]
