"""Training in new processes: packs, starts, follows, and puts back what came of it.

The loop is the engine's, in every worker. Whatever happens, no process and no folder is left.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from ..engine.control import RunControl
from ..engine.drawing import generators_of
from ..engine.randomness import all_states, put_all_back
from ..engine.task import describe
from ..errors import ConfigError, HybridMagicError
from ..records import Sink
from ..run import Run
from . import faults, parcel, results
from .agent import Agent
from .follow import Following
from .hub import Hub
from .interrupts import Interrupts

_GIVEN = ("optimizer", "val", "loss", "scheduler")
_LATE_HOOKS = "_post_accumulate_grad_hooks"
_NOBODY = " (no process was left); wanted one that can write them; train with --checkpoint"


def train_in_processes(
    things: dict[str, Any], sink: Sink | None, control: RunControl | None
) -> Run:
    """Train `things`, the other arguments of `engine.train.train` by name, and return the Run.

    Raises:
        As `engine.train.train` does; an error of the person's code has its traceback of the worker.
        HybridMagicError: also for a worker that was killed, ended by itself, or hangs.
    """
    __tracebackhide__ = True
    processes = _checked(things)
    run, error = None, None
    with _folder() as folder:
        parcel.pack(folder, things)
        _give_memory_back()
        with Interrupts() as interrupts:
            hub, agent = Hub(folder, processes), Agent(folder, processes)
            _begin(folder, hub)
            following = Following(hub, agent, folder, processes, sink, control, interrupts)
            try:
                following.train()
                written = following.hand_over()
            finally:
                interrupts.held = True
                following.end()
            if written:
                run = results.put_back(folder, things)
            error = _error(following, agent, processes, run)
            if run is not None and isinstance(error, Exception):
                run.outcome, run.error = "failed", f"{type(error).__name__}: {error}"
            interrupted = interrupts.hits > 0
    if interrupted:
        raise KeyboardInterrupt
    if error is not None:
        raise error
    assert run is not None
    return run


def _checked(things: dict[str, Any]) -> int:
    """Return how many processes are asked for.

    Raises:
        HybridMagicError: what can be known before any process is started.
    """
    options = things["options"]
    for name, plain in (("device", str), ("checkpoint", os.fspath)):
        if options.get(name) is not None:
            options[name] = plain(options[name])
    config = TrainConfig.from_options(options)
    names, loader = things["names"] or {}, things["loader"]
    flag = f"--processes {config.processes}"
    _check_model(things["model"], names.get("model", "model"), flag)
    if hasattr(loader, "__next__"):
        raise HybridMagicError(
            f"{names.get('loader', 'the loader')} can be read only once, and {flag} reads it in "
            "every process; wanted something that can be read again; make it a list or a DataLoader"
        )
    given = {name: things[name] for name in _GIVEN}
    generators = generators_of(loader)
    random = all_states(generators)
    task = describe(things["model"], loader, things["step"], config, names=names, **given)
    task.feed.close()
    put_all_back(random, generators)  # a batch may have been read to look at it
    kind, gpus = task.device.type, torch.cuda.device_count()
    if kind not in ("cpu", "cuda"):
        raise HybridMagicError(
            f"{flag} on {kind}, which is one device; wanted several GPUs, or the CPU; leave "
            "--processes out, or give --device cpu"
        )
    if kind == "cuda" and config.processes > gpus:
        raise ConfigError(
            f"{flag} is above {gpus}, the GPUs of this machine; wanted a GPU for each; use "
            f"at most {gpus}, or --device cpu"
        )
    if config.device is not None and torch.device(config.device).index is not None:
        raise ConfigError(
            f"--device {config.device} is one device, and {flag} takes one for each process; "
            f"wanted {kind}; leave its number out"
        )
    return config.processes


def _check_model(model: Any, name: str, flag: str) -> None:
    """Refuse a model whose gradients something else than the run sees to.

    Raises:
        HybridMagicError: found, wanted, do.
    """
    if isinstance(model, nn.DataParallel):
        raise HybridMagicError(
            f"{name} is a DataParallel, which spreads each batch over all GPUs itself, and {flag} "
            f"has a process for each; wanted the plain model; use {name}.module, whose weights "
            "are the same ones, also in the step"
        )
    weights = model.named_parameters() if isinstance(model, nn.Module) else ()
    hooked = [weight for weight, held in weights if getattr(held, _LATE_HOOKS, None)]
    if hooked:
        raise HybridMagicError(
            f"{hooked[0]} of {name} has a hook that runs once its gradient is accumulated, and "
            f"under {flag} that is one process's share of it; wanted a hook that sees the "
            "gradient of all; use optimizer.register_step_pre_hook, or train without --processes"
        )


def _give_memory_back() -> None:
    """Give the notebook's unused GPU memory back: the workers need it."""
    if not torch.cuda.is_initialized():
        return
    gc.collect()
    for number in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(number) > 0:
            with torch.cuda.device(number):
                torch.cuda.empty_cache()


def _begin(folder: str, hub: Hub) -> None:
    """Write what a worker needs before it can read the parcel."""
    begin = {
        **hub.where(),
        "path": [place for place in sys.path if isinstance(place, str)],
        "threads": torch.get_num_threads(),
        "sources": parcel.sources(),
    }
    with open(os.path.join(folder, "begin.json"), "w", encoding="utf-8") as file:
        json.dump(begin, file)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Make a folder that only this person can open, and remove it with all that is in it."""
    folder = tempfile.mkdtemp(prefix="hybrid-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _error(following: Following, agent: Agent, size: int, run: Run | None) -> BaseException | None:
    """Return what the person is told, None where all is well."""
    endings = following.endings.values()
    kept = "the model is as it was"
    if run is not None:
        kept = f"the model holds the {run.steps} steps before it, hm.last_run their records"
    if following.own_error is not None:
        return following.own_error
    fault = following.fault
    if fault is not None:
        if agent.error is not None and fault.ending is None and not fault.started:
            return _not_started(agent.error)
        code, printed = agent.exit_codes.get(fault.rank), agent.printed(fault.rank)
        return faults.error_of(fault, size, code, printed, kept)
    if any(ending.kind == "interrupted" for ending in endings):
        return KeyboardInterrupt()
    lost = next((ending for ending in endings if ending.kind == "lost"), None)
    if lost is not None:
        return lost.error()
    if run is None:
        return HybridMagicError(
            "the run ended whole, and its weights could not be brought back"
            + (following.trouble or _NOBODY)
        )
    return None


def _not_started(error: BaseException) -> HybridMagicError:
    return HybridMagicError(
        f"torchrun's agent could not start the processes ({type(error).__name__}: {error}); "
        "wanted a machine that lets a process listen on 127.0.0.1; train without --processes"
    )
