"""A training run that never happens: plausible records, and a loop that obeys a RunControl.

Needs no torch, so that the notebook's tests run on any kernel, old or new.
"""

import contextlib
import math
import random
import signal
import threading
import time

from hybrid_magic.engine.control import RunControl
from hybrid_magic.records import (
    BatchChangeRecord,
    NoteRecord,
    Record,
    StartRecord,
    StepRecord,
    ValidationRecord,
)
from hybrid_magic.run import Run

GIB = 1 << 30


def start_record(**changed):
    values = dict(
        model="ResNet",
        device="cuda:0 (Tesla T4)",
        precision="fp16",
        optimizer="SGD",
        base_batch_size=64,
        samples_per_epoch=5000,
        epochs=3,
        steps=None,
        minutes=None,
        memory_budget_bytes=int(13.2 * GIB),
        device_bytes=int(14.7 * GIB),
        parameters=11_220_132,
    )
    return StartRecord(**values | changed)


def step_record(step, **changed):
    values = dict(
        step=step,
        samples_seen=64 * step,
        loss=0.3 + 2.2 * math.exp(-step / 60),
        grad_norm=1.5,
        lr=0.1,
        global_batch_size=64,
        microbatch_size=64,
        accumulation_steps=1,
        skipped=False,
        retries=0,
        data_s=0.001,
        forward_s=0.004,
        backward_s=0.008,
        optimizer_s=0.001,
        step_s=0.015,
        allocated_peak_bytes=5 * GIB,
        reserved_peak_bytes=6 * GIB,
        noise_scale=None,
    )
    return StepRecord(**values | changed)


@contextlib.contextmanager
def interrupt_at_the_end():
    """Hold an interrupt back until a step is whole and told, as the engine does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hit = []
    before = signal.signal(signal.SIGINT, lambda *_: hit.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if hit:
        raise KeyboardInterrupt


class FakeTraining:
    """A loop like the engine's, without the engine: asks its control each step, tells its sink.

    `step_s` seconds are slept in each step. What was asked is in `changes` of the Run.
    """

    def __init__(
        self, sink=None, control=None, *, epochs=3, per_epoch=5000, step_s=0.0, seed=0, start=None
    ):
        self.control = control or RunControl()
        self.run = Run(config={}, environment={})
        self.sinks = [self.run.add] + ([sink] if sink else [])
        self.epochs, self.per_epoch, self.step_s = epochs, per_epoch, step_s
        self.random = random.Random(seed)
        self.start = start or start_record(epochs=epochs, samples_per_epoch=per_epoch)
        self.size, self.micro, self.step, self.seen = 64, 64, 0, 0
        self.paused = self.stopped = False

    def tell(self, record: Record):
        for sink in self.sinks:
            sink(record)

    def change(self, what, before, after, reason):
        self.tell(BatchChangeRecord(self.step, before, after, what, reason))

    def obey(self):
        if self.control.poll:
            self.control.poll()
        while self.control.mail:
            name, value = self.control.mail.popleft()
            if name in ("pause", "resume"):
                self.paused = name == "pause"
            self.stopped |= name == "stop"
            self.change(
                "control", None, value, f"you asked for {name}" + (f" {value:g}" if value else "")
            )
            if name in ("grow", "shrink"):
                self.resize(
                    self.size * 2 if name == "grow" else max(1, self.size // 2), "asked for"
                )

    def resize(self, size, why):
        if size == self.size:
            return
        word = "grew" if size > self.size else "shrank"
        reason = f"{word} {self.size} -> {size}: {why}, +31 % goodput, peak 5.1 GiB of 14.7 GiB"
        self.change("global", self.size, size, reason)
        self.size = size
        if size > 128 and self.micro == 64:
            self.change(
                "micro", 64, 128, "micro-batch 64 -> 128: 9 % faster, predicted peak 7.9 GiB"
            )
            self.micro = 128

    def one_step(self):
        with interrupt_at_the_end():
            self.whole_step()

    def whole_step(self):
        self.step += 1
        self.seen += self.size
        done = self.seen / (self.epochs * self.per_epoch)
        loss = (0.35 + 2.0 * math.exp(-4 * done)) * (1 + 0.12 * self.random.gauss(0, 1))
        pieces = -(-self.size // self.micro)
        peak = int((1.1 + 0.04 * min(self.micro, self.size)) * GIB)
        time_s = 0.004 + 0.00012 * self.size
        self.tell(
            step_record(
                self.step,
                samples_seen=self.seen,
                loss=loss,
                global_batch_size=self.size,
                microbatch_size=min(self.micro, self.size),
                accumulation_steps=pieces,
                skipped=self.step == 7,
                data_s=0.05 * time_s,
                forward_s=0.3 * time_s,
                backward_s=0.55 * time_s,
                optimizer_s=0.06 * time_s,
                step_s=time_s * (1 + 0.1 * self.random.random()),
                allocated_peak_bytes=peak,
                reserved_peak_bytes=int(1.2 * peak),
                noise_scale=512.0,
            )
        )
        if self.step in (40, 90, 130):
            self.resize(int(self.size * 1.5), "noise scale 512 samples")
        if self.step == 60:
            self.resize(self.size // 2, "gradient norm 9.1, 6.0 times its median")

    def __call__(self):
        run, began = self.run, time.perf_counter()
        try:
            self.tell(self.start)
            self.tell(
                NoteRecord(
                    "the loss was inferred: cross-entropy, because the targets are class numbers"
                )
            )
            for epoch in range(1, self.epochs + 1):
                while self.seen < epoch * self.per_epoch and not self.stopped:
                    self.obey()
                    if self.paused:
                        time.sleep(0.01)
                    elif not self.stopped:
                        self.one_step()
                        time.sleep(self.step_s)
                if self.stopped:
                    break
                loss = 0.4 + 1.5 * math.exp(-epoch)
                metrics = {"epoch": epoch, "loss": loss, "accuracy": 1 - loss / 2.5}
                self.tell(ValidationRecord(self.step, metrics))
            run.outcome = "stopped" if self.stopped else "finished"
        except KeyboardInterrupt:
            run.outcome = "interrupted"
            raise
        finally:
            run.steps, run.samples_seen, run.seconds = (
                self.step,
                self.seen,
                time.perf_counter() - began,
            )
            peaks = [record.allocated_peak_bytes for record in run.history]
            run.peak_allocated_bytes = max(peaks, default=None)
            run.peak_reserved_bytes = int(1.2 * max(peaks)) if peaks else None
            run.final_loss = run.history[-1].loss if peaks else None
            run.skipped_steps = sum(record.skipped for record in run.history)
        return run


def finished_run(**options):
    """Return the Run of a whole fake training, whose seconds are made up."""
    training = FakeTraining(**options)
    run = training()
    run.seconds, run.validation_seconds = 12.3, 1.1
    return run


def train_under_view(*, plain=False, stamps=None, **options):
    """Train in a cell as the magic does: the view is closed whatever happens. Returns the Run.

    `stamps` is a list that takes the time of day of every step.
    """
    from hybrid_magic import run as runs
    from hybrid_magic.notebook.live import open_view

    view = open_view(plain=plain)
    training = FakeTraining(view, view.control, **options)
    runs.last_run = training.run
    if stamps is not None:
        training.sinks.append(
            lambda record: stamps.append(time.time()) if type(record) is StepRecord else None
        )
    try:
        return training()
    finally:
        view.close(training.run)
