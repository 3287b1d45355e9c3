"""profile(): a few steps of a training, looked at, and everything put back as it was.

The steps are those of `train`, on the person's own data; a Course says how closely to look at each,
`profiled` makes of it what is told. Prints nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .. import profiles
from .. import run as runs
from ..config import ProfileConfig
from ..errors import HybridMagicError, OutOfMemoryError
from ..policy.advice import advise
from ..profiles import Profile
from ..records import NoteRecord, Record, Sink, StepRecord
from . import tracing
from .ablate import Training
from .compare import Subject
from .control import RunControl
from .course import WARM_STEPS, Course
from .device import DeviceProbe, probe_for
from .lens import Lens
from .placement import choose_device
from .profiled import assembled
from .rewind import undone
from .step_state import Compute

_NOT_ITS_OWN = ("trace", "snapshot", "epochs", "steps", "minutes", "val", "checkpoint", "resume")
LOADER_S = 1.0  # for the loader alone


def profile(
    model: torch.nn.Module,
    loader: Any,
    step: Compute | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    val: Any = None,
    loss: Any = None,
    scheduler: Any = None,
    sink: Sink | None = None,
    control: RunControl | None = None,
    names: Mapping[str, str] | None = None,
    found: Sequence[str] = (),
    **options: Any,
) -> Profile:
    """Take a few training steps, look where time and memory go, and put everything back.

    The steps are `train`'s own, at the loader's batch unless `batch` says otherwise. Model,
    optimizer, scheduler, generators and random state end bit-equal to what they were.

    Args:
        model, loader, step, optimizer, loss, scheduler: as for `train`; `val` is passed over, and
            so are the options that say how long a run is.
        sink: called with every Record.
        control: `stop` ends it with what was seen.
        names, found: as for `train`.
        options: the fields of ProfileConfig: steps, trace, snapshot, and those of TrainConfig.
    Raises:
        HybridMagicError: a mistake that can be known before; or memory runs out at the smallest
            possible micro-batch.
        KeyboardInterrupt: everything is put back.
        Whatever the person's own code raises; everything is put back.
    """
    del val
    if hasattr(loader, "__next__"):
        raise HybridMagicError(
            "the loader can be read only once; wanted one that is there again afterwards; make it "
            "a list or a DataLoader"
        )
    said = dict(optimizer=optimizer, val=None, loss=loss, scheduler=scheduler)
    config = ProfileConfig.from_options(
        options | {name: type(value).__name__ for name, value in said.items() if value is not None}
    )
    subject = Training(model, loader, step, said, names, found)
    probe = probe_for(choose_device(config.device, model))
    return examine(subject, config, probe, sink, control)


def examine(
    subject: Subject,
    config: ProfileConfig,
    probe: DeviceProbe,
    sink: Sink | None = None,
    control: RunControl | None = None,
) -> Profile:
    """Return the Profile of a subject, whose things are put back whatever ends it."""
    began = time.perf_counter()
    tracing.check(config.trace, config.snapshot, probe.device)
    options = _options(config)
    course, last_run = Course(config, control), runs.last_run
    records: dict[tuple[int, int], StepRecord] = {}
    notes: list[str] = []

    def take(record: Record) -> None:
        if isinstance(record, StepRecord):
            records[lens.runs, record.step] = record
        elif isinstance(record, NoteRecord) and record.text not in notes:
            notes.append(record.text)
        if sink is not None:
            sink(record)

    put_back = subject.beginning()
    course.lens = lens = Lens(course.choose, course.trace)
    try:
        with lens, contextlib.closing(course):
            before = -1
            while before < len(course.looks) and not (course.over or course.stopped or course.late):
                if before >= 0:
                    put_back()  # a loop that ended before enough was seen: once more
                before = len(course.looks)
                subject.train(options | course.found, take, course.control)
            if (size := course.grow()) is not None:
                put_back()
                kept = list(notes)
                with contextlib.suppress(OutOfMemoryError):
                    grown = {"batch": size, "micro": size, "accum": "auto"}
                    subject.train(options | grown | course.found, take, course.control)
                notes[:] = kept
        if not course.timed:
            raise _nothing_seen(course)
        put_back()
        alone = _loader_speed(lens.task.loader)
        made = assembled(course, lens, records, config, alone)
    finally:
        runs.last_run = last_run
        undone(put_back)
        probe.release()
    made = dataclasses.replace(
        made, advice=advise(made), notes=(*course.notes, *notes),
        seconds=time.perf_counter() - began,
    )  # fmt: skip
    profiles.last_profile = made
    return made


def _nothing_seen(course: Course) -> HybridMagicError:
    steps = len(course.looks)
    if course.stopped:
        return HybridMagicError(
            f"the profile was stopped after {steps} steps, before one was measured; wanted a few "
            "seconds; run it again"
        )
    return HybridMagicError(
        f"the training ended after {steps} steps, and begins with others each time; wanted "
        f"{WARM_STEPS + 1} to be looked at; profile it on more data"
    )


def _options(config: ProfileConfig) -> dict[str, Any]:
    """Return the options of the run that is looked at: one batch of the loader a step, whole,
    unless something else was asked for."""
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    options = {
        name: value
        for name, value in values.items()
        if value is not None and name not in _NOT_ITS_OWN
    }
    if options["batch"] == "adaptive":
        options["batch"] = "fixed"
    if options["accum"] == options["micro"] == "auto":
        options["accum"] = 1
    return options | {"steps": 1_000_000}


def _loader_speed(loader: Any) -> tuple[float | None, int]:
    """Return the samples a second that the loader gives when nothing else is done, and over how
    many batches; the first one, for which workers are started, is outside the clock."""
    from . import nested

    samples = batches = 0
    stream: Iterator[Any] = iter(loader) if loader is not None else iter(())
    try:
        if next(stream, None) is None:
            return None, 0
        began = time.perf_counter()
        for batch in itertools.islice(stream, 200):
            samples, batches = samples + (nested.count(batch) or 1), batches + 1
            taken = time.perf_counter() - began
            if taken > LOADER_S:
                break
    finally:
        del stream
    return (samples / taken, batches) if batches else (None, 0)
