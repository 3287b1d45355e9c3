"""P6: a scheduler sees the learning-rate curve over samples that the plain loop gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import mlp, vectors
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine.schedule import ScheduleClock

PER_EPOCH = 10  # batches of 8


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


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
    assert ScheduleClock(make(optimizer()), 32, 400, 3).per == "epoch"


@pytest.mark.parametrize(("make", "per"), CASES)
def test_the_clock_of_each_scheduler_is_read_off_it(make: Any, per: str) -> None:
    clock = ScheduleClock(make(optimizer()), 8, PER_EPOCH, 4)
    assert clock.per == per
    assert clock.why


@pytest.mark.parametrize(("make", "per"), CASES)
@pytest.mark.parametrize("sizes", [[8], [3], [12], [16, 5, 8, 24]], ids=str)
def test_steps_of_any_size_see_the_plain_curve_over_samples(
    make: Any, per: str, sizes: list[int]
) -> None:
    def plain() -> list[tuple[int, float]]:
        opt = optimizer()
        scheduler, curve = make(opt), []
        for epoch in range(4):
            for batch in range(PER_EPOCH):
                curve.append((epoch * 80 + batch * 8, opt.param_groups[0]["lr"]))
                opt.step()
                if per == "batch":
                    scheduler.step()
            if per == "epoch":
                scheduler.step(
                    *([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
                )
        return curve

    expected = dict(plain())
    opt = optimizer()
    clock = ScheduleClock(make(opt), 8, PER_EPOCH, 4)
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
    clock = ScheduleClock(scheduler, 8, 3, 3)
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
