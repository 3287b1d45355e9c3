"""train(): the loop. Owns the TrainState, emits records, obeys the control.

Plans a step, has it done, tells the policy what happened, and ends at a whole step whatever ends
it. Prints nothing and knows no widget; what must not be lost is put back by `undo`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..config import TrainConfig
from ..errors import HybridMagicError, OutOfMemoryError
from ..records import Sink
from ..run import Run
from . import ranks, together
from .control import RunControl
from .data import StepData, next_of
from .device import attempt, probe_for
from .keeper import Keeper
from .letting_go import let_go
from .prefetch import one_step_ahead
from .prepare import Interrupts, prepare
from .progress import TrainState
from .randomness import random_state_kept_on_error, seed_everything
from .resume import sample_of
from .retry import whole_step
from .setup import environment, make_optimizer, open_state, replayed, settings_for
from .step_state import Compute
from .task import Task, describe
from .undo import Undo
from .watch import Watch


def train(
    model: torch.nn.Module,
    loader: Any,
    step: Compute | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    val: Any = None,
    loss: Any = None,
    scheduler: Any = None,
    replay: Run | None = None,
    sink: Sink | None = None,
    control: RunControl | None = None,
    names: Mapping[str, str] | None = None,
    found: Sequence[str] = (),
    **options: Any,
) -> Run:
    """Train `model` on `loader` as a hybrid and return the Run.

    Args:
        model: the module to train; its weights are changed in place, everything else is put back.
        loader: a DataLoader, or anything that yields batches; never changed.
        step: `step(model, batch)` returns the loss (0-dim tensor), or `(loss, {"name": value})`,
            for a batch on the device; inferred when left out.
        optimizer: holds only parameters of `model`; a fresh AdamW when left out.
        val: loader to validate on after every epoch.
        loss: criterion(output, y) for an inferred step.
        scheduler: of `optimizer`; advanced by samples seen, as the plain loop would advance it.
            Whether that counts batches or epochs is read off it and noted; to say it, set
            `scheduler.interval = "batch"` or `"epoch"`.
        replay: a Run, also a loaded one, whose sizes, learning-rate factors and precision are
            repeated step by step; nothing is decided anew.
        sink: called with every Record.
        control: what may be asked of the run while it runs.
        names: what the person calls model, loader, val, optimizer and loss, for messages.
        found: what the caller inferred, a sentence each; recorded as notes.
        options: the fields of TrainConfig: epochs, precision, batch, ...
    Raises:
        HybridMagicError: a mistake that can be known before training (ConfigError, a ValueError,
            for an option); nothing was changed. Or memory that runs out at the smallest possible
            micro-batch: the model is left at a whole step.
        KeyboardInterrupt: after the run ended at a whole step; `hybrid_magic.last_run` holds it.
        Whatever the person's own code raises, its traceback without the tensors of the step.
    """
    given = {"optimizer": optimizer, "val": val, "loss": loss, "scheduler": scheduler}
    for name, value in given.items():
        if value is not None:
            options[name] = (names or {}).get(name) or type(value).__name__
    if options.get("device") is not None:
        options["device"] = str(options["device"])
    if isinstance(options.get("checkpoint"), os.PathLike):
        options["checkpoint"] = os.fspath(options["checkpoint"])
    if hasattr(loader, "__next__") and options.get("epochs") is None:
        options["epochs"] = 1  # there is no second epoch of what is read once
    config = replayed(TrainConfig.from_options(options), replay)
    try:
        run, memory = attempt(
            _train, model, loader, step, given, replay, config, sink, control, names, found
        )
    except BaseException as error:
        let_go(error)
        raise
    if memory is not None:
        raise OutOfMemoryError(
            f"out of memory outside a training step ({memory}); wanted room for the model; free "
            "the memory that others hold (%hybrid_free), or use a smaller model"
        )
    return run


def _train(
    model: torch.nn.Module,
    loader: Any,
    step: Compute | None,
    given: dict[str, Any],
    replay: Run | None,
    config: TrainConfig,
    sink: Sink | None,
    control: RunControl | None,
    names: Mapping[str, str] | None,
    found: Sequence[str],
) -> Run:
    """Check, prepare, train, and put back; the second `undo` answers an interrupt of the first."""
    undo, interrupts = Undo(), Interrupts()
    try:
        try:
            interrupts.catch(undo)
            with interrupts.interruptible(), random_state_kept_on_error():
                if config.seed is not None:
                    seed_everything(config.seed)
                group = ranks.join()
                keeper = None if config.checkpoint is None else Keeper(config, loader)
                task = describe(model, loader, step, config, names=names, **given)
                undo.push(task.feed.close)
                task.notes[:0] = found
                probe = probe_for(task.device)
                run = Run(config=config.as_json(), environment=environment(probe))
                optimizer = make_optimizer(task, config, probe)
                limits = settings_for(task, config, probe, optimizer)
                limits = together.begin(group, task, optimizer, limits)
                if keeper is not None:
                    undo.push(keeper.close)
                    run = keeper.open(task, optimizer, run)
                    if keeper.over:
                        return keeper.run_that_is_over(optimizer, run, sink)
                state = TrainState(run, sink, control, interrupts, config, probe, limits, replay)
                together.attach(group, state, keeper)
                if keeper is not None:
                    keeper.attach(state)
                stream, first = _first_step(task, state, keeper)
            watch = Watch(state)
            undo.push(watch.end)
            prepare(undo, model, optimizer, task.criterion, probe.device)
            tree = None if keeper is None else keeper.begin(undo)
            undo.push(lambda: together.end(model, undo.error))
            open_state(task, config, probe, optimizer, state, first, undo, lambda: undo.error, tree)
            watch.begin()
            _loop(task, state, watch, stream, keeper)
            if keeper is not None:
                keeper.hold()
            state.finish(task.val)
        finally:
            interrupts.ending = True
            undo()
    finally:
        undo()
    if interrupts.hit:  # while the run was closing its books
        raise KeyboardInterrupt
    return run


def _epoch(task: Task, state: TrainState, keeper: Keeper | None) -> Iterator[StepData]:
    plan = state.sizing.plan
    return task.feed.epoch(plan) if keeper is None else keeper.epoch(plan)


def _first_step(
    task: Task, state: TrainState, keeper: Keeper | None
) -> tuple[Iterator[StepData], StepData]:
    """Return the steps of the epoch, and the first one's samples, drawn before anything is changed:
    here a broken loader is told."""
    stream = _epoch(task, state, keeper)
    try:
        first = next(stream, None)
        if first is None and state.in_epoch:  # its last step was the last thing that was done
            return stream, sample_of(task)
        if first is not None and not first.batches:  # others have the samples of this step
            return itertools.chain([first], stream), sample_of(task)
    except Exception as error:
        why = str(error).strip().splitlines() or [""]
        raise HybridMagicError(
            f"{task.names['loader']} failed on its first batch ({type(error).__name__}: "
            f"{why[-1]}); wanted a loader that yields batches; look at it with next(iter(...))"
        ) from error
    if first is None:
        raise HybridMagicError(
            f"{task.names['loader']} yields nothing; wanted at least one batch; check its "
            "dataset and sampler"
        )
    return itertools.chain([first], stream), first


def _loop(
    task: Task,
    state: TrainState,
    watch: Watch,
    stream: Iterator[StepData],
    keeper: Keeper | None,
) -> None:
    """Train epoch after epoch until an end is reached."""
    mover = state.step_state.mover if task.feed.drawn_apart else None
    for epoch in itertools.count(state.epoch):
        state.begin_epoch(epoch)
        if mover is not None:
            stream = one_step_ahead(stream, mover)
        while True:
            start = time.perf_counter()
            if keeper is not None:
                keeper.before_step(start)
            data = _next(stream, state)
            if data is None:
                break
            waited = time.perf_counter() - start
            peaks = state.measures_peaks(data)
            result, retries = whole_step(state.step_state, state.sizing, data, measure_peaks=peaks)
            state.took(result, retries, waited, time.perf_counter() - start)
            if watch.readings:
                watch.tell()
            if state.obey():
                return
        if state.in_epoch == 0:
            raise HybridMagicError(
                f"{task.names['loader']} yielded nothing in epoch {epoch + 1}; wanted the same "
                "data again; "
                "make it a list or a DataLoader"
            )
        if keeper is not None:
            keeper.hold()
        over = state.end_epoch(task.val)
        if keeper is not None:
            keeper.epoch_over(save=not over)
        if over:
            return
        stream = _epoch(task, state, keeper)


def _next(stream: Iterator[StepData], state: TrainState) -> StepData | None:
    """Return the next step's data, None at the epoch's end; waiting for it can be interrupted.

    Raises:
        KeyboardInterrupt: also where an interrupt has ended the loader's workers first.
    """
    interrupts = state.interrupts
    interrupts.at_once = state.step_state.together is None  # all leave at the same step
    try:
        return next_of(stream, None)
    except Exception:
        if interrupts.hit:
            raise KeyboardInterrupt from None
        raise
    finally:
        interrupts.at_once = False
