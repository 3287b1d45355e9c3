"""P6: a scheduler sees the learning-rate curve over samples that the plain loop gives it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import mlp, vectors
from simulated import SimulatedProbe
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Sampler, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine import train as training
from hybrid_magic.engine.control import RunControl
from hybrid_magic.engine.data import SplitFeed
from hybrid_magic.engine.sampled import SampledFeed
from hybrid_magic.engine.schedule import ScheduleClock

PER_EPOCH = 10  # batches of 8


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def feed(base: int, batches: int, samples: int | None = None) -> SampledFeed:
    """The feed of a loader with so many batches of `base`."""
    data = TensorDataset(torch.zeros(samples or base * batches))
    return SampledFeed(DataLoader(data, batch_size=base), None, False)


def transformers_like(opt: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.get_linear_schedule_with_warmup(opt, 5, 40)


def chained(opt: Any) -> Any:
    warm = lr_scheduler.LinearLR(opt, 0.1, total_iters=8)
    return lr_scheduler.SequentialLR(opt, [warm, lr_scheduler.CosineAnnealingLR(opt, 32)], [8])


CASES: list[Any] = [
    (lambda opt: lr_scheduler.OneCycleLR(opt, 1.0, total_steps=40), "batch"),
    (lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 1.0, 4), "batch"),
    (lambda opt: lr_scheduler.CosineAnnealingLR(opt, 40), "batch"),
    (lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4), "epoch"),
    (transformers_like, "batch"),
    (chained, "batch"),
    (lambda opt: lr_scheduler.MultiStepLR(opt, [2, 3]), "epoch"),
    (lambda opt: lr_scheduler.MultiStepLR(opt, [20, 30]), "batch"),
    (lambda opt: lr_scheduler.StepLR(opt, 1), "epoch"),
    (lambda opt: lr_scheduler.ExponentialLR(opt, 0.9), "epoch"),
    (lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.95**epoch), "epoch"),
    (lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0), "epoch"),
]


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: lr_scheduler.StepLR(opt, 30),
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 200),
        lambda opt: lr_scheduler.MultiStepLR(opt, [60, 120]),
        lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 10),
        lambda opt: lr_scheduler.LinearLR(opt, total_iters=30),
        lambda opt: lr_scheduler.PolynomialLR(opt, 100),
    ],
)
def test_a_curve_over_epochs_stays_one_when_few_of_them_are_trained(make: Any) -> None:
    assert ScheduleClock(make(optimizer()), feed(32, 400), 3).per == "epoch"


@pytest.mark.parametrize(("make", "per"), CASES)
def test_the_clock_of_each_scheduler_is_read_off_it(make: Any, per: str) -> None:
    clock = ScheduleClock(make(optimizer()), feed(8, PER_EPOCH), 4)
    assert clock.per == per
    assert clock.note


@pytest.mark.parametrize(("make", "per"), CASES)
@pytest.mark.parametrize("sizes", [[8], [3], [12], [16, 5, 8, 24]], ids=str)
def test_steps_of_any_size_see_the_plain_curve_over_samples(
    make: Any, per: str, sizes: list[int]
) -> None:
    def plain() -> list[tuple[int, float]]:
        opt = optimizer()
        scheduler: Any = make(opt)
        curve = []
        for epoch in range(4):
            for batch in range(PER_EPOCH):
                curve.append((epoch * 80 + batch * 8, opt.param_groups[0]["lr"]))
                opt.step()
                if per == "batch":
                    scheduler.step()
            if per == "epoch":
                judges = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([1.0] if judges else []))
        return curve

    expected = dict(plain())
    opt = optimizer()
    clock = ScheduleClock(make(opt), feed(8, PER_EPOCH), 4)
    number = 0
    for epoch in range(4):
        seen = 0
        while seen < 80:
            # what the plain loop would have had for the batch that this sample is in
            assert opt.param_groups[0]["lr"] == pytest.approx(
                expected[epoch * 80 + seen // 8 * 8], rel=1e-9
            )
            opt.step()
            seen = min(80, seen + sizes[number % len(sizes)])
            number += 1
            clock.advance(seen)
        clock.end_epoch(seen, 1.0)


def test_the_last_short_batch_of_an_epoch_counts_as_one() -> None:
    opt = optimizer()
    scheduler = lr_scheduler.OneCycleLR(opt, 1.0, total_steps=9)
    clock = ScheduleClock(scheduler, feed(8, 3, 20), 3)
    for _ in range(3):
        opt.step()
        clock.advance(16)
        clock.advance(20)
        clock.end_epoch(20, None)
    assert scheduler.last_epoch == 9


def test_a_plateau_is_judged_by_the_validation_loss() -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=1e-9)  # nothing is learned
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5, eps=0)
    data = DataLoader(TensorDataset(*vectors(32)), batch_size=8)
    hm.train(model, data, optimizer=opt, scheduler=scheduler, val=data, epochs=6, batch="fixed")
    assert opt.param_groups[0]["lr"] == pytest.approx(0.25e-9)


def test_the_learning_rate_of_a_grown_batch_never_reaches_the_scheduler() -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(opt, 40)
    data = DataLoader(TensorDataset(*vectors(80)), batch_size=8)
    run = hm.train(
        model,
        data,
        optimizer=opt,
        scheduler=scheduler,
        epochs=4,
        batch=16,
        lr_scale="linear",
        precision="fp32",
    )
    assert run.history[0].lr == pytest.approx(0.2)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert scheduler.last_epoch == 40


# -- through hm.train, against the loop that a person writes --


def transformers_cosine(opt: Any) -> Any:
    return pytest.importorskip("transformers").get_cosine_schedule_with_warmup(opt, 4, 30)


def warm_up_then_cosine(opt: Any) -> Any:
    warm = lr_scheduler.LinearLR(opt, 0.1, total_iters=6)
    return lr_scheduler.SequentialLR(opt, [warm, lr_scheduler.CosineAnnealingLR(opt, 24)], [6])


def two_at_once(opt: Any) -> Any:
    parts = [lr_scheduler.LinearLR(opt, 0.1, total_iters=25), lr_scheduler.ExponentialLR(opt, 0.97)]
    return lr_scheduler.ChainedScheduler(parts, opt)


MADE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one cycle": (lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=30), "batch"),
    "cyclic": (lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 4), "batch"),
    "cosine over batches": (lambda opt: lr_scheduler.CosineAnnealingLR(opt, 30), "batch"),
    "cosine over epochs": (lambda opt: lr_scheduler.CosineAnnealingLR(opt, 3), "epoch"),
    "restarts over batches": (
        lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 10),
        "batch",
    ),
    "restarts over epochs": (lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 1), "epoch"),
    "steps of batches": (lambda opt: lr_scheduler.StepLR(opt, 11, 0.5), "batch"),
    "steps of epochs": (lambda opt: lr_scheduler.StepLR(opt, 1, 0.5), "epoch"),
    "milestones": (lambda opt: lr_scheduler.MultiStepLR(opt, [7, 23], 0.5), "batch"),
    "exponential": (lambda opt: lr_scheduler.ExponentialLR(opt, 0.8), "epoch"),
    "function of epochs": (
        lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.7**epoch),
        "epoch",
    ),
    "function of steps": (
        lambda opt: lr_scheduler.LambdaLR(opt, lambda step: min(1.0, (step + 1) / 20)),
        "batch",
    ),
    "transformers linear": (lambda opt: transformers_like(opt), "batch"),
    "transformers cosine": (transformers_cosine, "batch"),
    "warm-up, then cosine": (warm_up_then_cosine, "batch"),
    "chained": (two_at_once, "batch"),
}


class Unsized(Sampler[int]):
    """A sampler that cannot say how many samples it has."""

    def __iter__(self) -> Any:
        return iter(range(77))


class Growing(RunControl):
    """Asks for growth and shrinking as a run goes on."""

    def __init__(self) -> None:
        super().__init__(self._ask)
        self._asked = iter([None, "grow", None, "grow", None, None, "shrink", "grow"])

    def _ask(self) -> None:
        if (action := next(self._asked, None)) is not None:
            self.ask(action)


def loader_of(sizes: list[int]) -> list[Any]:
    x, y = vectors(sum(sizes))
    ends = itertools.accumulate(sizes)
    return [(x[end - n : end], y[end - n : end]) for n, end in zip(sizes, ends, strict=True)]


def loads(n: int, **more: Any) -> Any:
    return lambda: DataLoader(TensorDataset(*vectors(n)), batch_size=8, **more)


# how the loader yields ten batches an epoch -> their sizes
SHORT = [8] * 9 + [5]
WAYS: dict[str, tuple[Any, list[int], dict[str, Any]]] = {
    "as it is": (loads(80), [8] * 10, {"batch": "fixed"}),
    "cut": (loads(80), [8] * 10, {"batch": "fixed", "micro": 3}),
    "four at once": (loads(80), [8] * 10, {"batch": 32}),
    "one and a half": (loads(77), SHORT, {"batch": 12}),
    "half": (loads(77), SHORT, {"batch": 4}),
    "drop_last": (loads(85, drop_last=True), [8] * 10, {"batch": 24}),
    "growing": (loads(77), SHORT, {}),
    "workers": (loads(77, num_workers=1), SHORT, {"batch": 12}),
    "unsized": (loads(77, sampler=Unsized()), SHORT, {"batch": 12}),
    "list": (lambda: loader_of(SHORT), SHORT, {"batch": 12}),
    "ragged": (
        lambda: loader_of([8, 20, 3, 3, 3, 8, 11, 8, 1, 6]),
        [8, 20, 3, 3, 3, 8, 11, 8, 1, 6],
        {},
    ),
}


def own_loop(make: Any, per: str, sizes: list[int], epochs: int) -> tuple[list[float], float]:
    """Return the learning rate that each sample was trained with, and the one at the end."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    scheduler, curve = make(opt), []
    for _ in range(epochs):
        for size in sizes:
            curve += [opt.param_groups[0]["lr"]] * size
            opt.step()
            if per == "batch":
                scheduler.step()
        if per == "epoch":
            scheduler.step()
    return curve, opt.param_groups[0]["lr"]


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # torch's own chains
@pytest.mark.parametrize("way", WAYS)
def test_the_learning_rate_over_samples_is_that_of_the_own_loop(way: str) -> None:
    loader, sizes, options = WAYS[way]
    for name, (make, per) in MADE.items():
        if way == "workers" and name != "one cycle":
            continue
        expected, last = own_loop(make, per, sizes, 3)
        model = mlp()
        opt = torch.optim.SGD(model.parameters(), lr=0.05)
        scheduler = make(opt)
        if way == "unsized":
            scheduler.interval = per
        control = Growing() if way in ("growing", "ragged") else None
        run = hm.train(
            model, loader(), optimizer=opt, scheduler=scheduler, epochs=3, lr_scale="none",
            precision="fp32", control=control, **options,
        )  # fmt: skip
        assert run.samples_seen == len(expected)
        if control is not None:
            assert len({r.global_batch_size for r in run.history}) > 2
        for record in run.history:
            first = record.samples_seen - record.global_batch_size
            assert record.lr == expected[first], (way, name, record.step)
        assert opt.param_groups[0]["lr"] == last, (way, name)


@pytest.mark.parametrize("way", ["four at once", "growing"])
def test_the_factor_of_a_larger_batch_comes_on_top_and_never_compounds(way: str) -> None:
    loader, sizes, options = WAYS[way]
    make, per = MADE["one cycle"]
    expected, last = own_loop(make, per, sizes, 3)
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    run = hm.train(
        model, loader(), optimizer=opt, scheduler=make(opt), epochs=3, precision="fp32",
        lr_scale="linear", warmup=0, control=Growing() if way == "growing" else None, **options,
    )  # fmt: skip
    assert any(record.global_batch_size > 8 for record in run.history)
    for record, (_, factor) in zip(run.history, run.sizes, strict=True):
        first = record.samples_seen - record.global_batch_size
        assert record.lr == expected[first] * factor
        if record.global_batch_size >= 8 and record.samples_seen % 77:
            assert factor == record.global_batch_size / 8
    assert opt.param_groups[0]["lr"] == last


def test_the_ramp_after_a_growth_by_hand_ends_also_where_every_size_was_pinned() -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    run = hm.train(
        model, loads(800)(), optimizer=opt, precision="fp32", batch="fixed", micro=8,
        lr_scale="linear", control=Growing(),
    )  # fmt: skip
    assert run.history[-3].global_batch_size == 12
    assert run.history[-3].lr == pytest.approx(0.05 * 12 / 8)


@pytest.mark.parametrize("steps", [1, 9, 10, 14, 20])
@pytest.mark.parametrize("name", ["one cycle", "exponential", "transformers linear"])
def test_a_run_that_ends_by_steps_leaves_the_scheduler_where_the_own_loop_does(
    name: str, steps: int
) -> None:
    make, per = MADE[name]
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = make(opt)
    hm.train(model, loads(77)(), optimizer=opt, scheduler=scheduler, steps=steps, batch="fixed")
    # a loop that leaves both loops once it took its steps
    assert scheduler.last_epoch == (steps if per == "batch" else (steps - 1) // 10)


def test_minutes_end_a_run_with_the_scheduler_at_its_samples() -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10**6)
    run = hm.train(model, loads(800)(), optimizer=opt, scheduler=scheduler, minutes=0.003, batch=12)
    full, rest = divmod(run.samples_seen, 800)
    assert scheduler.last_epoch == full * 100 + rest // 8


def test_a_step_that_starts_over_advances_the_scheduler_once() -> None:
    model, rooms = mlp(), iter([8, 8, 4, 4, 4, 4, 4, 2])
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10)

    def step(model: Any, batch: Any) -> Any:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if len(batch[0]) > next(rooms, 8):
            raise torch.OutOfMemoryError("no room")
        return loss

    run = hm.train(
        model, loads(80)(), step, optimizer=opt, scheduler=scheduler, precision="fp32",
        batch="fixed", micro=8,
    )  # fmt: skip
    assert sum(record.retries for record in run.history) == 2
    assert scheduler.last_epoch == 10
    ten = lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10)
    assert [record.lr for record in run.history] == own_loop(ten, "batch", [1] * 10, 1)[0]


# -- a plateau --


def plateau(metrics: list[float] | None, **how: Any) -> tuple[list[float], hm.Run]:
    """Train one epoch for each of `metrics` (validation losses; None: no validation)."""
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    opt.param_groups[0]["lr"] = 1.0
    opt.register_step_pre_hook(lambda *_: model.zero_grad())  # nothing is learned
    scheduler: Any = lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5, eps=0, **how)
    told: list[float] = []
    step_of = scheduler.step
    scheduler.step = lambda metrics, epoch=None: (told.append(metrics), step_of(metrics))[1]
    values, rise = iter(metrics or ()), itertools.count()

    def step(model: Any, batch: Any) -> Any:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if model.training:
            return loss + next(rise)
        value = next(values)
        return loss * 0 + value, {"acc": torch.tensor(2 * value)}

    data = loads(80)()
    run = hm.train(
        model, data, step, optimizer=opt, scheduler=scheduler, precision="fp32", batch="fixed",
        reduction="mean", epochs=3, val=None if metrics is None else loader_of([8]),
    )  # fmt: skip
    return [*told, opt.param_groups[0]["lr"]], run


def test_a_plateau_goes_by_the_validation_loss() -> None:
    assert plateau([3.0, 2.0, 2.5])[0] == [3.0, 2.0, 2.5, 0.5]


def test_a_plateau_of_what_should_rise_goes_by_the_accuracy() -> None:
    assert plateau([0.5, 0.25, 0.75], mode="max")[0] == [1.0, 0.5, 1.5, 0.5]


@pytest.mark.parametrize("late", [False, True])
def test_without_validation_a_plateau_goes_by_the_epochs_mean_training_loss(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if late:  # as a GPU is: readings come a step later, and the epoch's last one counts too
        probe = SimulatedProbe(torch.nn.Module(), fixed=1, per_sample=1, total=1000)
        monkeypatch.setattr(training, "probe_for", lambda _: probe)
    (*told, _), run = plateau(None)
    losses: list[Any] = [record.loss for record in run.history]
    means = [sum(losses[10 * epoch : 10 * epoch + 10]) / 10 for epoch in range(3)]
    assert told == pytest.approx(means)
    assert told[0] != pytest.approx(losses[9])


def test_a_plateau_of_an_accuracy_without_validation_is_refused() -> None:
    with pytest.raises(hm.HybridMagicError, match=r"mode='max'.*give --val"):
        plateau(None, mode="max")


# -- which clock, and how to say otherwise --


def of(
    make: Any, *, epochs: int | None = None, steps: int | None = None, batches: int = 100
) -> Any:
    return ScheduleClock(make(optimizer()), feed(8, batches), epochs, steps)


def test_a_run_of_steps_tells_what_a_curve_of_as_many_steps_counts() -> None:
    cosine = lambda n: lambda opt: lr_scheduler.CosineAnnealingLR(opt, n)
    assert of(cosine(500), steps=500).per == "batch"
    assert of(cosine(50), steps=50).per == "batch"
    assert of(cosine(500), steps=520).per == "batch"
    assert of(cosine(5), steps=500).per == "epoch"
    assert of(cosine(450), steps=1000, epochs=5).per == "batch"
    unsized = SplitFeed((batch for batch in loader_of([8, 8])), "loader")
    assert ScheduleClock(cosine(50)(optimizer()), unsized, None, 50).per == "batch"


def test_a_list_of_batches_knows_how_many_they_are() -> None:
    listed = SplitFeed(loader_of([8] * 10), "loader")
    assert ScheduleClock(lr_scheduler.CosineAnnealingLR(optimizer(), 40), listed, 4).per == "batch"


@pytest.mark.parametrize(
    ("function", "per"),
    [
        (lambda epoch: 1.0, "epoch"),
        (lambda current_epoch: 1.0, "epoch"),
        (lambda step: 1.0, "batch"),
        (lambda current_step: 1.0, "batch"),
        (lambda iteration: 1.0, "batch"),
        (lambda n: 1.0, "epoch"),
    ],
)
def test_a_function_says_by_its_argument_what_it_counts(function: Any, per: str) -> None:
    clock = of(lambda opt: lr_scheduler.LambdaLR(opt, function), epochs=2)
    assert clock.per == per
    chained = lambda opt: lr_scheduler.ChainedScheduler([lr_scheduler.LambdaLR(opt, function)])
    assert of(chained, epochs=2).per == per


@pytest.mark.parametrize(
    ("interval", "per"), [("batch", "batch"), ("step", "batch"), ("epoch", "epoch")]
)
def test_a_scheduler_may_say_what_it_counts(interval: str, per: str) -> None:
    for make, _ in MADE.values():
        opt = optimizer()
        scheduler = make(opt)
        scheduler.interval = interval
        clock = ScheduleClock(scheduler, feed(8, 10), 3)
        assert clock.per == per
        assert "say so" not in clock.note


def test_a_guess_says_how_to_say_otherwise() -> None:
    cosine = lambda opt: lr_scheduler.CosineAnnealingLR(opt, 3)
    assert of(cosine, epochs=3).note == (
        "scheduler: one step per epoch (CosineAnnealingLR spans 3 steps); "
        "if it counts batches say so: scheduler.interval = 'batch'"
    )
    assert of(lambda opt: lr_scheduler.CosineAnnealingLR(opt, 300), epochs=3).note.endswith(
        "if it counts epochs say so: scheduler.interval = 'epoch'"
    )
    assert "say so" not in of(MADE["one cycle"][0]).note


# -- a schedule that is over --


def test_a_cycle_too_short_for_the_epochs_is_refused_before_anything_changes() -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = lr_scheduler.OneCycleLR(opt, 0.1, total_steps=29)
    before = opt.param_groups[0]["lr"]
    for loader in (loads(77)(), loader_of(SHORT)):
        with pytest.raises(hm.HybridMagicError, match="29 of its 29 steps left.*need 30"):
            hm.train(model, loader, optimizer=opt, scheduler=scheduler, epochs=3)
    assert (scheduler.last_epoch, opt.param_groups[0]["lr"]) == (0, before)


def test_a_cycle_that_ends_before_a_run_of_steps_does_is_held_and_that_is_said_once() -> None:
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = lr_scheduler.OneCycleLR(opt, 0.1, total_steps=12)
    run = hm.train(
        model, loads(77)(), optimizer=opt, scheduler=scheduler, steps=12, batch=16, lr_scale="none"
    )
    assert run.outcome == "finished"
    assert [note for note in run.notes if "are over" in note] == [
        "scheduler: its 12 steps are over; the learning rate stays as it is"
    ]
    assert scheduler.last_epoch == 12
    assert run.history[-1].lr == opt.param_groups[0]["lr"]


def test_no_warning_blames_the_person_where_the_first_step_is_skipped() -> None:
    x, y = vectors(24)
    x[0] = float("nan")
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hm.train(
            model, DataLoader(TensorDataset(x, y), batch_size=8), optimizer=opt, batch="fixed",
            scheduler=lr_scheduler.OneCycleLR(opt, 0.1, total_steps=3),
        )  # fmt: skip
