"""Going on from a checkpoint: whether it is this run's, what has changed since, whether it is over.

What cannot be gone on with exactly is refused, before anything of the person's is changed. Writes
nothing and trains nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch

from .. import run as runs
from ..config import TrainConfig, flag_of
from ..errors import HybridMagicError
from ..policy.steering import StepPlan
from ..records import NoteRecord, Sink
from ..run import Run
from . import checkpoint, nested
from .checkpoint_copy import size_bytes
from .checkpoint_store import NoStore, Store
from .data import Feed, StepData
from .drawing import Drawing
from .ranks import Ranks
from .sampled import SampledFeed
from .task import Task

OVER = "the run was over already; raise --epochs, --steps or --minutes to go on"
CONTENT = 2  # of the tree that is written; another one's is refused, but for 1
_NO_OPTION = {"checkpoint", "resume", "o", "plain"}
_NAMES = {"val", "optimizer", "loss", "scheduler", "log"}  # names of things, which are the cell's
_OF_THE_START = {"seed": "random numbers", "lr": "learning rate"}


def find(
    store: Store | NoStore,
    group: Ranks | None,
    config: TrainConfig,
    check: Callable[[Any], None],
) -> tuple[Any, list[str]]:
    """Return the checkpoint to go on from, None to begin anew, and what the person is to know.

    Args:
        group: the processes that train together, of which the first one reads.
        check: raises where a checkpoint cannot be gone on with.
    Raises:
        HybridMagicError: as `check`; or there are checkpoints, and they are not to be gone on from.
    """
    place = f"checkpoint={config.checkpoint!r}"

    def accept(tree: Any) -> None:
        if not isinstance(tree, dict) or tree.get("content") not in (1, CONTENT):
            raise HybridMagicError(
                f"{place} holds checkpoints that another version of hybrid_magic wrote; wanted "
                "those of this one; use that version, or another folder"
            )
        _bring_up(tree)
        if not config.resume:
            raise HybridMagicError(
                f"{place} holds the checkpoints of a run at step {tree['state']['step']}, which "
                "would be written over; wanted an empty folder; add --resume to go on from them, "
                "or give another folder"
            )
        try:
            check(tree)
        except HybridMagicError as error:
            raise HybridMagicError(f"{place}: {error}") from None

    found = store.newest(accept)
    tree = None if found is None else found.tree
    if group is not None:
        tree = _of_first(group, tree)
    if found is None:
        if not config.resume:
            return tree, []
        return tree, [f"nothing to go on from in {config.checkpoint}: the run begins"]
    return tree, [*found.notes, f"went on from the checkpoint of step {found.step}"]


def _of_first(group: Ranks, tree: Any) -> Any:
    """Return the tree that the first of several processes has read."""
    held = io.BytesIO()
    if tree is not None:
        torch.save(tree, held)
    told = group.of_first(held.getvalue())
    return torch.load(io.BytesIO(told), weights_only=True) if told and not group.first else tree


def _bring_up(tree: dict[str, Any]) -> None:
    """Make a tree of the content before this one into one of today's."""
    if tree["content"] == CONTENT:
        return
    tree["content"] = CONTENT
    tree["model"]["extra"] = {}
    tree["schedulers"] = [[None, state] for state in tree.get("schedulers", ())]


def needed_bytes(task: Task, optimizer: Any, start: dict[str, Any]) -> int:
    """Return about how large a checkpoint of this run will be.

    Raises:
        HybridMagicError: something that no checkpoint can hold.
    """
    scheduler = task.scheduler
    if scheduler is not None and not hasattr(scheduler, "load_state_dict"):
        raise HybridMagicError(
            f"the scheduler, a {type(scheduler).__name__}, has no state_dict(); wanted "
            "one that a checkpoint can hold; give it state_dict() and load_state_dict()"
        )
    tree = checkpoint.begun(task.model, optimizer) | {"start": start}
    tree["schedule"] = None if scheduler is None else scheduler.state_dict()
    needed = size_bytes(tree)
    if not optimizer.state_dict()["state"]:  # two moments, as most have
        needed += 2 * size_bytes(tree["model"]["parameters"])
    return needed


def check(tree: dict[str, Any], kind: str, task: Task, optimizer: Any, drawing: Drawing) -> None:
    """Raise HybridMagicError where the checkpoint is not one of this run."""
    do = "give another folder, or what that run was given"
    if tree["kind"] != kind:
        raise HybridMagicError(
            f"its run was a {tree['kind']}, and this is a {kind}; wanted the same form; {do}"
        )
    other = checkpoint.other_kind(tree, task.model, optimizer)
    if other is not None:
        raise HybridMagicError(f"it is of another model: {other}; wanted that run's; {do}")
    schedules = tree["schedule"] and tree["schedule"]["kind"]
    mine = None if task.scheduler is None else type(task.scheduler).__name__
    if schedules != mine:
        raise HybridMagicError(
            f"its scheduler is {schedules or 'none'}, and here {mine or 'none'}; wanted the same; "
            f"{do}"
        )
    now = data_of(task, drawing)
    before = now | tree["data"]  # of the content before this one some are not known
    for name, what in _DATA.items():
        at_an_end = tree["state"]["in_epoch"] == 0
        if before[name] != now[name] and not (name == "workers" and at_an_end):
            raise HybridMagicError(
                f"its {what.format(before[name])}, and here {now[name]}; wanted the same, to find "
                f"the place in the data; {do}"
            )


_DATA = {
    "kind": "data were read as a {}",
    "base": "loader's batch was {}",
    "samples": "epochs had {} samples",
    "batches": "epochs had {} batches",
    "generators": "loader had {} generators of its own",
    "drawn": "loader drew from {}",
    "workers": "loader had {} worker processes",
}


def data_of(task: Task, drawing: Drawing) -> dict[str, Any]:
    """Return what the place in the data depends on."""
    feed = task.feed
    return {
        "kind": type(feed).__name__.removeprefix("Shared"),  # by several processes or by one
        "base": feed.base,
        "samples": feed.samples,
        "batches": feed.batches,
        "generators": len(drawing.generators),
        "drawn": drawing.kinds(),
        "workers": feed.workers,
    }


def plans_of(tree: dict[str, Any]) -> list[StepPlan]:
    """Return the plans of the open epoch's steps, also of those that were planned ahead."""
    return [StepPlan(tuple(sizes), probe) for sizes, probe, n in tree["plans"] for _ in range(n)]


def read_again(feed: Feed, samples: int, seconds: float) -> list[str]:
    """Return what the person is to know of the samples of an epoch that were gone past."""
    if not feed.workers and isinstance(feed, SampledFeed):
        return []
    who = "the loader's workers, whose random numbers go on with them" if feed.workers else "us"
    return [f"{samples} samples of the open epoch were read again by {who}: {seconds:.1f} s"]


def sample_of(task: Task) -> StepData:
    """Return a batch of the loader, read for what it looks like; nothing is drawn by that."""
    batch, drawing = getattr(task.feed, "sample", None), Drawing(task.loader)
    found = drawing.of_epoch()
    try:
        batch = next(iter(task.loader)) if batch is None else batch
    finally:
        drawing.put_back(found)
    return StepData([batch], [nested.count(batch) or 1], False)


def run_of(tree: dict[str, Any], *, over: bool) -> Run:
    """Return the checkpoint's Run as it was; `over`: as it ended."""
    return checkpoint.run_of(tree, tree["ended"] if over else None)


def moved(found: Run, run: Run, loader: Any) -> list[str]:
    """Return why the run may end in other weights than one that was never interrupted."""
    there, here = (
        [made.environment.get(name, 1) for name in ("device", "torch", "processes")]
        for made in (found, run)
    )
    notes = []
    if there != here:
        began, now = (
            f"on {device} with torch {version}" + f" in {processes} processes" * (processes != 1)
            for device, version, processes in (there, here)
        )
        notes.append(f"the run began {began} and goes on {now}: equal to rounding, not to the bit")
    if getattr(loader, "persistent_workers", False):
        notes.append(
            "the loader's workers live on from epoch to epoch (persistent_workers=True), and so "
            "did their random numbers; these are new, and random augmentation goes on otherwise"
        )
    return notes


def as_begun(found: Run, run: Run) -> Run:
    """Return the Run that was found, to go on as `run` would begin."""
    found.config, found.environment = run.config, run.environment
    found.outcome, found.error = run.outcome, None
    return found


def close_run(tree: dict[str, Any], run: Run, notes: list[str], sink: Sink | None) -> None:
    """Close the books of a run that was over when it was to be gone on with."""
    state = tree["state"]
    run.outcome, run.seconds = "finished", tree["seconds"]
    run.steps, run.samples_seen = state["step"], state["samples"]
    told = [NoteRecord(note) for note in notes if note not in run.notes]
    for record in told:
        run.add(record)
    if sink is not None:
        for record in (*filter(None, [run.start]), *told):
            sink(record)
    runs.last_run = run


def is_over(tree: dict[str, Any], config: TrainConfig) -> bool:
    """Return whether the run has reached an end that `config` asks for."""
    state, passes = tree["state"], config.passes
    return (
        (passes is not None and state["epoch"] >= passes)
        or (config.steps is not None and state["step"] >= config.steps)
        or (config.minutes is not None and tree["seconds"] >= 60 * config.minutes)
    )


def changed_options(tree: dict[str, Any], config: TrainConfig) -> list[str]:
    """Return a sentence for the options that are others now, and one for each that comes too
    late."""
    before, now = tree["config"], config.as_json()
    others = [
        (name, flag_of(item))
        for name, item in type(config).__dataclass_fields__.items()
        if name not in _NO_OPTION | _NAMES and before.get(name) != now[name]
    ]
    taken = [
        f"{flag} {before.get(name)} -> {now[name]}"
        for name, flag in others
        if name not in _OF_THE_START
    ]
    notes = [f"goes on with other options than before: {', '.join(taken)}"] if taken else []
    for name, flag in others:
        if name in _OF_THE_START and now[name] is not None:
            what = _OF_THE_START[name]
            notes.append(f"{flag} {now[name]} is passed over: the run goes on with its own {what}")
    return notes
