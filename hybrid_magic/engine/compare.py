"""The runs of an ablation, one after the other, made comparable.

The same weights, the same order of samples, fresh peaks, warm kernels, and an order of the variants
that rotates from seed to seed. Knows neither how a run is made nor how it is shown.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from .. import ablation as ablations
from ..ablation import Ablation
from ..config import AblateConfig, TrainConfig
from ..errors import HybridMagicError, OutOfMemoryError
from ..policy.variants import Variant, variant_of
from ..records import Record, Sink, StartRecord, StepRecord, TrialRecord, TrialStartRecord
from ..run import Run
from .control import RunControl, hand_on
from .device import CpuProbe, DeviceProbe
from .prepare import tf32_places
from .rewind import PutBack, undone
from .setup import environment

WARM_STEPS = 3
_OWN = ("variants", "seeds", "restore", "seed")  # options of an ablation, not of its runs


class Subject(Protocol):
    """What is trained several ways."""

    def train(
        self, options: dict[str, Any], sink: Sink, control: RunControl
    ) -> tuple[Run, float, dict[str, float]]:
        """Train once; return the Run, its training seconds and what was judged at its end."""
        ...

    def beginning(self) -> PutBack:
        """Return what puts everything back to how it is now."""
        ...

    def reseed(self, seed: int) -> None:
        """Have the next run draw its samples in the order of `seed`."""
        ...


def compare(
    subject: Subject,
    config: AblateConfig,
    probe: DeviceProbe,
    sink: Sink | None = None,
    control: RunControl | None = None,
) -> Ablation:
    """Return the Ablation of a subject: each variant warmed up, then run with every seed."""
    made = Ablation(config=config.as_json(), environment=environment(probe), names=config.variants)
    made.notes.append(
        "every run starts from the same weights: seeds differ in the order of the samples and in "
        "random numbers"
    )
    if isinstance(probe, CpuProbe):
        made.notes.append(
            "no memory is given: a process on a CPU keeps what its earlier runs took, and no run's "
            "own peak is to be had"
        )
    course = _Course(subject, config, probe, made, sink or (lambda _: None), control)
    put_back = end = subject.beginning()
    ended = "failed"
    gc.collect()
    gc.freeze()  # what is there by now is not looked through again between the runs
    try:
        for trial in course.trials(put_back):
            ablations.last_ablation = made
            if trial.hybrid and not config.restore:
                end = subject.beginning()
        ended = "stopped" if course.stopped else "finished"
    except KeyboardInterrupt:
        ended = "interrupted"
        raise
    finally:
        made.outcome = ended
        gc.unfreeze()
        undone(end)
        probe.release()
    return made


class _Course:
    """The runs of an ablation, one after the other."""

    def __init__(
        self,
        subject: Subject,
        config: AblateConfig,
        probe: DeviceProbe,
        made: Ablation,
        sink: Sink,
        control: RunControl | None,
    ) -> None:
        self._subject, self._config, self._probe, self._made = subject, config, probe, made
        self._sink, self._control = sink, control
        self._variants = [variant_of(name, config) for name in config.variants]
        self._total = len(config.variants) * len(config.seeds)
        self._options = {
            name: value for name, value in _as_given(config).items() if name not in _OWN
        }
        for variant in self._variants:  # a contradiction is told before anything is run
            TrainConfig.from_options(self._options | variant.options)
        self._precision: str | None = None  # what auto was found to be, once for all runs
        self.knows_peaks = not isinstance(probe, CpuProbe)
        self.stopped = False

    def trials(self, put_back: PutBack) -> Iterator[Variant]:
        """Run everything; yield each variant that was run, as its run has left the model."""
        for variant in self._variants:
            if not self.stopped:
                put_back()
                self._warm(variant)
        number = 0
        for at, seed in enumerate(self._config.seeds):
            turn = (at + self._config.seeds[0]) % len(self._variants)  # also over joined ablations
            for variant in (*self._variants[turn:], *self._variants[:turn]):
                if self.stopped:
                    return
                number += 1
                put_back()
                trial = self._run(variant, seed, number)
                if trial is None:
                    return
                self._made.trials.append(trial)
                self._sink(trial)
                yield variant

    def _warm(self, variant: Variant) -> None:
        """Take a few steps, so that kernels are chosen and loaded outside the clock."""
        self._sink(TrialStartRecord(None, self._total, variant.name, self._config.seeds[0]))
        watch = _Watch(self, variant, WARM_STEPS)
        try:
            self._train(variant, self._config.seeds[0], watch)
            if variant.tf32 is None and watch.precision in ("fp32", "bf16"):
                self._precision = self._precision or watch.precision  # fp16 may have to be left
        except OutOfMemoryError:
            pass
        except HybridMagicError:
            raise
        except Exception:  # noqa: BLE001 - it may come of stopping early; the run itself shows it
            pass

    def _run(self, variant: Variant, seed: int, number: int) -> TrialRecord | None:
        """Return one run's record, None where it was stopped by hand."""
        self._sink(TrialStartRecord(number, self._total, variant.name, seed))
        watch = _Watch(self, variant)
        try:
            run, seconds, judged = self._train(variant, seed, watch)
        except OutOfMemoryError as error:
            return TrialRecord(variant.name, seed, "oom", error=str(error))
        if watch.ran_out:
            return TrialRecord(
                variant.name, seed, "oom", precision=watch.precision,
                error="the loader's batch does not fit whole, and this variant does not cut it",
            )  # fmt: skip
        if self.stopped:
            return None
        return TrialRecord(
            variant=variant.name,
            seed=seed,
            outcome="finished",
            seconds=seconds,
            peak_allocated_bytes=watch.allocated or None,
            peak_reserved_bytes=watch.reserved or None,
            accuracy=accuracy_of(judged, self._config.log),
            loss=judged.get("loss", run.final_loss),
            steps=run.steps,
            samples_seen=run.samples_seen,
            precision=watch.precision,
        )

    def _train(
        self, variant: Variant, seed: int, watch: _Watch
    ) -> tuple[Run, float, dict[str, float]]:
        self._subject.reseed(seed)
        self._probe.release()
        self._probe.reset_peak()
        options = self._options | variant.options | {"seed": seed}
        if options["precision"] == "auto" and self._precision is not None:
            options["precision"] = self._precision
        with _arithmetic(variant.tf32):
            return self._subject.train(options, watch, watch.control)

    def pass_on(self, record: Record) -> None:
        self._sink(record)

    def poll(self, inner: RunControl) -> None:
        """Hand what the person asks on to the run."""
        self.stopped |= hand_on(self._control, inner)


class _Watch:
    """The sink of one run: keeps its peaks, ends it after `steps`, or where memory ran out that
    the variant has no means to save."""

    def __init__(self, course: _Course, variant: Variant, steps: int | None = None) -> None:
        self._course, self._recovers, self._steps = course, variant.recovers, steps
        self.control = RunControl(poll=lambda: course.poll(self.control))
        self.allocated = self.reserved = 0
        self.precision: str | None = None
        self.ran_out = False

    def __call__(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            if self._course.knows_peaks:
                self.allocated = max(self.allocated, record.allocated_peak_bytes or 0)
                self.reserved = max(self.reserved, record.reserved_peak_bytes or 0)
            self.ran_out |= record.retries > 0 and not self._recovers
            if self.ran_out or record.step == self._steps:
                self.control.ask("stop")
        elif isinstance(record, StartRecord):
            self.precision = record.precision
        if self._steps is None:
            self._course.pass_on(record)


def accuracy_of(judged: Mapping[str, float], log: Sequence[str] | None) -> float | None:
    """Return the one accuracy: `accuracy`, else `acc`, else the first name logged."""
    return next((judged[n] for n in ("accuracy", "acc", *(log or ())[:1]) if n in judged), None)


def _as_given(config: AblateConfig) -> dict[str, Any]:
    """Return the config's options, those left out that were not given."""
    values = {name: getattr(config, name) for name in AblateConfig.__dataclass_fields__}
    return {name: value for name, value in values.items() if value is not None}


@contextlib.contextmanager
def _arithmetic(tf32: bool | None) -> Iterator[None]:
    """Compute FP32 strictly, or in TF32 where PyTorch ships with it (convolutions); None leaves
    what the person set, as a run of ours does."""
    if tf32 is None:
        yield
        return
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn
    switches = [(products, "allow_tf32", False), (convolutions, "allow_tf32", tf32)]
    try:
        found = [getattr(place, name) for place, name, _ in switches]
    except RuntimeError:  # the person uses torch's newer switches, and it mixes no two
        words = ["ieee", *(["tf32" if tf32 else "ieee"] * 2)]
        places = zip(tf32_places(), words, strict=True)
        switches = [(place, "fp32_precision", word) for place, word in places]
        found = [place.fp32_precision for place in tf32_places()]
    for place, name, value in switches:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name, _), value in zip(switches, found, strict=True):
            setattr(place, name, value)
