"""From a checked task to a run that can begin: optimizer, limits, precision, the step's state.

Everything inferred here is said in a note. Trains nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import __version__
from .. import run as runs
from ..config import TrainConfig
from ..errors import ConfigError, HybridMagicError
from ..policy import steering
from ..records import BatchChangeRecord, NoteRecord, StartRecord
from ..run import Run
from . import checkpoint, lens, ranks, rehearse
from . import precision as precisions
from .data import StepData
from .device import DeviceProbe
from .gradients import NoiseProbe, family
from .optimizer_state import make_up_front, remove_unused
from .precision import Precision
from .prefetch import mover_for
from .prepare import use_fast_formats
from .progress import TrainState
from .schedule import ScheduleClock
from .step_state import StepState
from .task import Task, has_batch_statistics, infer_step
from .together import Together
from .transaction import Transaction
from .undo import Undo

GROWTH = 16  # --max-batch: how many times its own batch a loader's batch may grow to


def make_optimizer(task: Task, config: TrainConfig, probe: DeviceProbe) -> torch.optim.Optimizer:
    """Return the person's optimizer, or a fresh AdamW over the model's trainable parameters."""
    if task.optimizer is not None:
        return task.optimizer
    lr = 1e-3 if config.lr is None else config.lr
    trainable = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    task.notes.append(f"optimizer: a fresh AdamW with learning rate {lr:g}")
    return torch.optim.AdamW(trainable, lr=lr, fused=True if probe.device.type == "cuda" else None)


def replayed(config: TrainConfig, replay: Run | None) -> TrainConfig:
    """Return `config` with the precision of the run to be replayed.

    Raises:
        HybridMagicError: `replay` is no Run, kept no sizes, or a size is asked for as well.
    """
    if replay is None:
        return config
    if not isinstance(replay, Run) or not len(replay.sizes):
        held = "without a step" if isinstance(replay, Run) else "that is no Run"
        raise HybridMagicError(
            f"replay is a {type(replay).__name__} {held}; wanted a Run that trained; pass what "
            "hm.train returned, or hm.load_run(path)"
        )
    if config.checkpoint is not None:
        raise ConfigError(
            f"--checkpoint {config.checkpoint} was given and a run to replay, which is there to be "
            "replayed again; wanted one of the two; leave --checkpoint or replay out"
        )
    for name in ("batch", "accum", "micro"):
        if getattr(config, name) != TrainConfig.__dataclass_fields__[name].default:
            raise ConfigError(
                f"--{name} {getattr(config, name)} was given and a run to replay, which repeats "
                f"every size; wanted one of the two; leave --{name} or replay out"
            )
    if config.precision == "auto" and replay.start is not None:
        return dataclasses.replace(config, precision=replay.start.precision)
    return config


def settings_for(
    task: Task, config: TrainConfig, probe: DeviceProbe, optimizer: torch.optim.Optimizer
) -> steering.Settings:
    """Return what the policy may do in this run."""
    feed = task.feed
    if config.batch == "adaptive" and (config.max_batch or feed.base) < feed.base:
        raise ConfigError(
            f"--max-batch {config.max_batch} is below {feed.base}, the batch of "
            f"{task.names['loader']}, at which a run begins; wanted at least that; raise it, or "
            "make the loader's batch smaller"
        )
    if isinstance(config.accum, int) and config.accum > feed.base and config.micro == "auto":
        task.notes.append(
            f"--accum {config.accum} is above the loader's batch of {feed.base} samples: a step of "
            "that size is cut into single samples"
        )
    checked: Any = config  # its values were checked when it was made
    if feed.most is not None and isinstance(config.micro, int) and config.micro > feed.most:
        raise ConfigError(
            f"--micro {config.micro} is above {feed.most}, a batch of {task.names['loader']}; its "
            f"batches can be cut and not joined; use at most {feed.most}, or a map-style DataLoader"
        )
    return steering.Settings(
        base=feed.base,
        batch=checked.batch,
        policy=checked.policy,
        max_batch=config.max_batch or GROWTH * feed.base,
        efficiency=config.efficiency,
        accum=None if config.accum == "auto" else int(config.accum),
        micro=None if config.micro == "auto" else int(config.micro),
        micro_most=feed.most,
        budget_bytes=probe.budget_bytes(config.memory),
        device_bytes=probe.total_bytes,
        batch_statistics=has_batch_statistics(task.model),
        family=family(optimizer),
        lr_scale=checked.lr_scale,
        warmup=checked.warmup,
        sum_reduction=config.reduction == "sum",
        loss_scaling=precisions.may_scale_losses(config.precision, probe.device),
    )


def open_state(
    task: Task,
    config: TrainConfig,
    probe: DeviceProbe,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    first: StepData,
    undo: Undo,
    ended_by: Callable[[], BaseException | None],
    tree: dict[str, Any] | None = None,
) -> None:
    """Give `state` the step's state, for a model that is prepared; say what was chosen.

    Args:
        state: the run's state, which emits the start, the notes and the first change.
        first: the first step's samples; measured on when a choice needs it, and trained on later.
        undo: takes what must be undone when the run ends.
        ended_by: tells what is ending the run, None where nothing went wrong.
        tree: a checkpoint, which `state` goes on from.
    """
    began = time.perf_counter()
    ready = _step_state(task, config, probe, optimizer, state, first)
    state.schedule = _schedule(task, config, state, tree)
    if tree is not None:
        checkpoint.put_step_back(tree, ready)
        if not task.adopted:
            checkpoint.put_weights_back(tree, task.model, optimizer)
    made: list[torch.Tensor] = []
    undo.push(lambda: remove_unused(optimizer, made))
    undo.push(lambda: ready.transaction.roll_back(ready.steps))
    state.step_state = ready
    undo.push(lambda: state.close_books(ended_by()))
    runs.last_run = state.run  # from here on the person's own code is called
    with state.interrupts.interruptible():
        if task.precision is None:
            ready.precision, reason = rehearse.choose_precision(
                ready, config.precision, first, rehearses=task.rehearses
            )
        else:
            ready.precision, reason = task.precision, "as before"
        if ready.together is not None:
            ready.precision, reason = ready.together.of_first(ready.precision, reason, probe.device)
    images = use_fast_formats(undo, task.model, optimizer, ready, probe.device)
    if images and not task.adopted:
        ready.mover = mover_for(probe.device, channels_last=True)
    undo.push(lambda: ready.transaction.roll_back(ready.steps))  # before formats are put back
    make_up_front(optimizer, made)
    _let_skip_on_device(ready, tree)
    state.emit(_start(task, config, probe, optimizer, ready.precision.name, state.sizing.settings))
    for note in (note for note in task.notes if note not in state.run.notes):
        state.emit(NoteRecord(note))
    if config.precision == "auto" and tree is None:
        state.emit(BatchChangeRecord(0, "auto", ready.precision.name, "precision", reason))
    if task.rehearses and tree is None and not state.sizing.replaying:
        with state.interrupts.interruptible():
            rehearse.size_first_step(ready, state.sizing, first)
    if (look_away := lens.attach(state, task)) is not None:
        undo.push(look_away)
    state.run.opening_seconds += time.perf_counter() - began


def _step_state(
    task: Task,
    config: TrainConfig,
    probe: DeviceProbe,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    first: StepData,
) -> StepState:
    compute = task.compute
    if compute is None:
        compute, said = infer_step(task, first.batches[0])
        task.notes.append(said)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return StepState(
        model=task.model,
        compute=compute,
        optimizer=optimizer,
        params=params,
        precision=Precision("fp32", probe.device),
        device=probe,
        noise=NoiseProbe(optimizer, params),
        asked_reduction=config.reduction,
        clip=config.clip,
        batch_statistics=state.sizing.settings.batch_statistics,
        mover=None if task.adopted else mover_for(probe.device),
        settle=rehearse.settle_reduction if task.rehearses else None,
        transaction=Transaction(task.model, optimizer, params, probe.device),
        adopted=task.adopted,
        together=None if (group := ranks.current()) is None else Together(group),
    )


def _let_skip_on_device(ready: StepState, tree: dict[str, Any] | None) -> None:
    """Have a device that works ahead decide by itself whether to skip, where its optimizer can.

    Not before momentum was made: that of a first step that is skipped is no number.
    """
    groups = ready.optimizer.param_groups
    ready.may_skip_on_device = ready.device.late and all(group.get("fused") for group in groups)
    ready.skip_on_device = ready.may_skip_on_device and not any(g.get("momentum") for g in groups)
    if tree is not None:
        ready.skip_on_device = ready.may_skip_on_device and tree["step"]["skip_on_device"]


def _schedule(
    task: Task, config: TrainConfig, state: TrainState, tree: dict[str, Any] | None
) -> ScheduleClock | None:
    """Return the clock of the person's scheduler, None without one; say what it counts."""
    if task.scheduler is None:
        return None
    schedule = ScheduleClock(
        task.scheduler, task.feed, config.epochs, config.steps, lambda s: state.emit(NoteRecord(s))
    )
    other_end = config.steps is not None or config.minutes is not None
    epochs = None if other_end else config.passes
    if tree is None:
        schedule.check(epochs, task.val is not None)
        task.notes.append(schedule.note)
        return schedule
    found = copy.deepcopy(schedule.scheduler.state_dict())
    schedule.go_on(tree["schedule"])
    try:
        schedule.check(None if epochs is None else epochs - state.epoch, task.val is not None)
    except HybridMagicError:
        schedule.scheduler.load_state_dict(found)
        raise
    return schedule


def _start(
    task: Task,
    config: TrainConfig,
    probe: DeviceProbe,
    optimizer: torch.optim.Optimizer,
    precision: str,
    settings: steering.Settings,
) -> StartRecord:
    held = (param for group in optimizer.param_groups for param in group["params"])
    parameters = {id(param): param for param in (*task.model.parameters(), *held)}.values()
    return StartRecord(
        model=type(task.model).__name__,
        device=f"{n} x {probe.name}" if (n := ranks.count()) > 1 else probe.name,
        precision=precision,
        optimizer=type(optimizer).__name__,
        base_batch_size=task.feed.base,
        samples_per_epoch=task.feed.samples,
        epochs=config.epochs if task.adopted else config.passes,
        steps=config.steps,
        minutes=config.minutes,
        memory_budget_bytes=probe.budget_bytes(config.memory),
        device_bytes=probe.total_bytes,
        parameters=sum(parameter.numel() for parameter in parameters),
        steered=settings.steered,
        max_batch_size=settings.max_batch,
        growth_factor=settings.growth_factor,
        stability_threshold=settings.stability_threshold,
        processes=n,
    )


def environment(probe: DeviceProbe) -> dict[str, Any]:
    """Return what a number of this run depends on: versions, machine, device."""
    return {
        "hybrid_magic": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": probe.name,
        "processes": ranks.count(),
    }
