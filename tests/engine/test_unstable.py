"""P5: what is not finite never reaches the weights, is counted, and the batch answers.

The reference is the plain loop that leaves such steps out: it tests loss and gradients, and steps
the optimizer only where both are finite.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import cnn, images, mlp, vectors
from simulated import SimulatedProbe
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine import precision as precisions
from hybrid_magic.engine import setup as setups
from hybrid_magic.engine import train as training
from hybrid_magic.engine.control import RunControl
from hybrid_magic.run import Run

STEPS, BATCH = 6, 8
BAD: dict[str, list[int]] = {
    "none": [],
    "first": [0],
    "third": [2],
    "last": [5],
    "two in a row": [3, 4],
    "every": list(range(STEPS)),
}
WHERE = ("input", "loss", "gradient")


class Poisoned:
    """A step whose batch is (x, y, what is added to the loss, what to one weight's gradient)."""

    def __init__(self, model: nn.Module) -> None:
        self._into_gradient: Any = 0.0
        first = next(model.parameters())
        first.register_hook(lambda grad: grad + self._into_gradient)

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        x, y, into_loss, into_gradient = batch
        self._into_gradient = into_gradient.sum()
        return F.cross_entropy(model(x).float(), y) + into_loss.sum()


def poisoned(data: Any, where: str, steps: list[int], value: float, sample: int = 5) -> Any:
    """The batches of a run, some of them with one sample that carries `value`."""
    x, y = data(STEPS * BATCH)
    loss, gradient = torch.zeros(len(x)), torch.zeros(len(x))
    for step in steps:
        target = {"input": x, "loss": loss, "gradient": gradient}[where]
        target[step * BATCH + sample].fill_(value)
    return DataLoader(TensorDataset(x, y, loss, gradient), batch_size=BATCH)


def leaving_out(
    model: nn.Module,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    *,
    fp16: bool = False,
    micro: int = BATCH,
) -> tuple[list[int], float | None]:
    """Train as a person would who skips what is not finite; return the skipped steps, the scale."""
    step = Poisoned(model)
    scaler = torch.amp.GradScaler("cpu") if fp16 else None
    cast = torch.autocast("cpu", torch.float16) if fp16 else contextlib.nullcontext()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    skipped: list[int] = []
    model.train()
    for number, batch in enumerate(loader):
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        losses = []
        for start in range(0, BATCH, micro):
            with cast:
                loss = step(model, [part[start : start + micro] for part in batch])
            scaled = loss if scaler is None else scaler.scale(loss)
            scaled.backward(torch.tensor(micro / BATCH) if micro < BATCH else None)
            losses.append(loss.item())
        if scaler is not None:
            scaler.unscale_(optimizer)
        sound = all(map(math.isfinite, losses))
        if sound and all(bool(p.grad.isfinite().all()) for p in params if p.grad is not None):
            optimizer.step()
        else:
            skipped.append(number + 1)
        if not sound:
            for buffer, value in buffers:
                buffer.copy_(value)
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return skipped, None if scaler is None else scaler.get_scale()


def momentum(params: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3, **more)


def adamw(params: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=2e-3, **more)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All tensors that a run leaves behind, by name."""
    found: dict[str, Any] = dict(model.state_dict())
    names = {id(param): name for name, param in model.named_parameters()}
    for param, held in optimizer.state.items():
        for key, value in held.items():
            if value is not None:
                found[f"{names[id(param)]}/{key}"] = torch.as_tensor(value)
    return found


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not bit-equal, or not in both."""
    odd = list(one.keys() ^ other.keys())
    return odd + [key for key in one.keys() & other.keys() if not torch.equal(one[key], other[key])]


def compare(
    make_model: Callable[[], nn.Module],
    data: Any,
    make_optimizer: Any,
    where: str,
    when: str,
    value: float,
    *,
    fp16: bool = False,
    micro: int = BATCH,
    **how: Any,
) -> tuple[Run, list[int]]:
    """Train both ways and compare all that is left behind, and what was counted."""
    found = []
    loader = poisoned(data, where, BAD[when], value)
    model = make_model()
    optimizer = make_optimizer(model.parameters(), **how)
    torch.manual_seed(2)
    skipped, _ = leaving_out(model, loader, optimizer, fp16=fp16, micro=micro)
    found.append(everything(model, optimizer))
    model = make_model()
    optimizer = make_optimizer(model.parameters(), **how)
    torch.manual_seed(2)
    run = hm.train(
        model,
        loader,
        Poisoned(model),
        optimizer=optimizer,
        batch="fixed",
        micro=micro,
        precision="fp16" if fp16 else "fp32",
        reduction="mean",
    )
    found.append(everything(model, optimizer))
    assert different(*found) == [], (where, when, value)
    assert [record.step for record in run.history if record.skipped] == skipped
    assert run.skipped_steps == len(skipped)
    assert all(value.isfinite().all() for value in found[1].values())
    assert all(param.grad is None for param in model.parameters())
    return run, skipped


CASES = [
    ("loss", "none", math.nan),
    ("loss", "two in a row", math.nan),
    *((where, when, math.nan) for where in WHERE for when in ("first", "third", "last", "every")),
    *((where, "third", math.inf) for where in WHERE),
]
FEW = [*itertools.product(WHERE, ("first", "third"))]
KINDS: list[Any] = [
    pytest.param(mlp, vectors, id="mlp"),
    pytest.param(cnn, images, id="batchnorm"),
]


@pytest.mark.parametrize("make_optimizer", [momentum, adamw])
@pytest.mark.parametrize(("make_model", "data"), KINDS)
def test_steps_that_are_not_finite_are_as_if_left_out(
    make_model: Any, data: Any, make_optimizer: Any
) -> None:
    for where, when, value in CASES:
        _, skipped = compare(make_model, data, make_optimizer, where, when, value)
        assert skipped == [number + 1 for number in BAD[when]]


@pytest.mark.parametrize(("make_model", "data"), KINDS)
def test_one_bad_micro_batch_of_several_voids_the_whole_step(make_model: Any, data: Any) -> None:
    for where, when in FEW:
        _, skipped = compare(make_model, data, adamw, where, when, math.nan, micro=4)
        assert skipped == [number + 1 for number in BAD[when]]


@pytest.mark.parametrize(("make_model", "data"), KINDS)
def test_the_same_in_fp16_where_the_loss_scale_is_the_plain_loops(
    make_model: Any, data: Any
) -> None:
    for where, when in FEW:
        _, skipped = compare(make_model, data, adamw, where, when, math.inf, fp16=True)
        assert {number + 1 for number in BAD[when]} <= set(skipped)


@pytest.fixture
def on_a_late_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on a device that is read late, and so decides for itself whether to skip."""
    probe = lambda device: SimulatedProbe(nn.Module(), fixed=1, per_sample=1, total=1000)
    monkeypatch.setattr(training, "probe_for", probe)
    monkeypatch.setattr(setups, "mover_for", lambda device, channels_last=False: None)


@pytest.mark.usefixtures("on_a_late_device")
@pytest.mark.parametrize("make_optimizer", [momentum, adamw])
@pytest.mark.parametrize(("make_model", "data"), KINDS)
def test_a_device_that_decides_by_itself_leaves_out_the_same(
    make_model: Any, data: Any, make_optimizer: Any
) -> None:
    for where, when, value in CASES:
        compare(make_model, data, make_optimizer, where, when, value, fused=True)


@pytest.mark.usefixtures("on_a_late_device")
def test_a_first_momentum_is_never_made_of_a_skipped_step(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty_like  # memory as it may be found
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    compare(mlp, vectors, momentum, "loss", "first", math.nan, fused=True)


class Averaged(nn.Module):
    """Keeps a running mean of what it sees in a buffer that it replaces, as people write it."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 5)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x - self.mean)


@pytest.mark.parametrize("late", [False, True])
def test_a_buffer_that_a_step_replaces_is_kept_clean_too(
    late: bool, request: pytest.FixtureRequest
) -> None:
    if late:
        request.getfixturevalue("on_a_late_device")
    x, y = vectors(48)
    x[20] = math.nan
    model = Averaged()
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    run = hm.train(model, data, optimizer=optimizer, precision="fp32", batch="fixed", micro=8)
    assert run.skipped_steps == 1
    expected = torch.zeros(12)
    for number in (0, 1, 3, 4, 5):
        expected = 0.9 * expected + 0.1 * x[8 * number : 8 * number + 8].mean(0)
    assert torch.allclose(model.mean, expected)


# -- a loss whose reduction is not known yet --


def test_a_first_step_that_is_not_finite_does_not_hide_how_the_loss_is_reduced() -> None:
    x, y = vectors(48)
    bad = x.clone()
    bad[3] = math.nan

    def step(model: Any, batch: Any) -> Any:  # a sum, which no criterion tells
        return (model(batch[0]) - F.one_hot(batch[1], 5)).square().sum(1).sum()

    def trained(x: Any) -> tuple[Run, nn.Module]:
        model = mlp()
        data = DataLoader(TensorDataset(x, y), batch_size=8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        run = hm.train(
            model, data, step, optimizer=optimizer, precision="fp32", batch="fixed", micro=4
        )
        return run, model

    run, _ = trained(bad)
    assert run.skipped_steps == 1
    assert not [note for note in run.notes if "not the mean of its parts" in note]
    assert [note for note in run.notes if "is a sum over samples" in note]
    sound, _ = trained(x)
    assert run.history[-1].loss == pytest.approx(sound.history[-1].loss, rel=0.2)  # of a sample


# -- what is said --


def test_what_was_skipped_is_in_the_table() -> None:
    model = mlp()
    loader = poisoned(vectors, "loss", [1, 4], math.nan)
    run = hm.train(model, loader, Poisoned(model), precision="fp32", batch="fixed")
    assert "2 of the steps" in run.table()
    losses = [record.loss for record in run.history]
    assert [number for number, loss in enumerate(losses) if loss != loss] == [1, 4]
    assert run.final_loss == losses[-1]
    assert run.summary()["skipped_steps"] == 2


def test_a_run_without_one_sound_step_says_so_and_has_no_final_loss() -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = poisoned(vectors, "input", list(range(STEPS)), math.nan)
    run = hm.train(model, loader, Poisoned(model), precision="fp32")
    assert run.outcome == "finished"
    assert run.final_loss is None
    assert f"{STEPS} of the steps" in run.table()
    assert different(before, dict(model.state_dict())) == []


# -- the batch answers --


class Scripted(nn.Module):
    """One weight whose loss and gradient a test dictates, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.norm = 1.0
        self.weight.register_hook(lambda grad: grad * self.norm)


def scripted(losses: Callable[[int], float], norms: Callable[[int], float] = lambda n: 1.0) -> Any:
    """A step of number n whose loss is losses(n) and whose gradient has the norm norms(n)."""
    counter = itertools.count(1)

    def step(model: Any, batch: Any) -> torch.Tensor:
        number = next(counter)
        model.norm = norms(number)
        return (model.weight - model.weight.detach()).sum() + losses(number) + 0.0 * batch.sum()

    return step


class Asking(RunControl):
    """Asks for growth after the first steps."""

    def __init__(self, times: int) -> None:
        super().__init__(self._ask)
        self._left = times

    def _ask(self) -> None:
        if self._left:
            self.ask("grow")
        self._left -= self._left > 0


def steered(step: Any, steps: int, *, grow: int = 2, **options: Any) -> Run:
    model = Scripted()
    # a micro-batch is a call of the step: one a step, so that the script counts steps
    data = DataLoader(TensorDataset(torch.zeros(40_000)), batch_size=8)
    step_of = lambda model, batch: step(model, batch[0])
    options = {"precision": "fp32", "accum": 1, "reduction": "mean", "steps": steps} | options
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return hm.train(model, data, step_of, optimizer=optimizer, control=Asking(grow), **options)


def moves(run: Run, sign: int) -> list[Any]:
    """The policy's changes of the global batch: growth (1) or shrinking (-1)."""
    made: list[Any] = [made for made in run.changes if made.what == "global"]
    return [each for each in made if sign * (each.after - each.before) > 0]


def shrinks(run: Run) -> list[Any]:
    return moves(run, -1)


def test_a_loss_that_is_not_finite_halves_a_grown_batch_and_says_why() -> None:
    run = steered(scripted(lambda n: math.nan if n == 30 else 1.0), 40)
    grown = max(record.global_batch_size for record in run.history)
    assert grown == 16
    (made,) = shrinks(run)
    assert (made.step, made.before, made.after) == (30, grown, max(8, grown // 2))
    assert made.reason == (
        f"shrank {grown} -> {made.after}: the loss is not finite; no growth for 120 steps"
    )
    assert run.history[30].global_batch_size == made.after


def test_a_gradient_that_is_not_finite_does_too() -> None:
    run = steered(scripted(lambda n: 1.0, lambda n: math.inf if n == 30 else 1.0), 40)
    (made,) = shrinks(run)
    assert "the gradient is not finite" in made.reason
    assert run.skipped_steps == 1


def test_steps_that_stay_not_finite_shrink_to_the_loaders_batch_and_no_further() -> None:
    run = steered(scripted(lambda n: math.nan if n >= 30 else 1.0), 60)
    assert [record.global_batch_size for record in run.history][-1] == 8
    assert min(record.global_batch_size for record in run.history) == 8
    assert run.skipped_steps == 31
    assert 1 <= len(shrinks(run)) <= 3


def test_a_gradient_norm_that_explodes_halves_the_batch() -> None:
    run = steered(scripted(lambda n: 1.0, lambda n: 50.0 if n == 30 else 1.0), 40)
    (made,) = shrinks(run)
    assert made.step == 30
    assert "gradient norm 50, 50 times its median 1" in made.reason
    assert run.skipped_steps == 0  # it is finite, and was taken


def test_a_loss_that_oscillates_halves_the_batch() -> None:
    run = steered(scripted(lambda n: 1.0 if n // 8 % 2 else 4.0), 60)
    made = shrinks(run)[0]
    assert "the loss oscillates" in made.reason
    assert "no growth for 120 steps" in made.reason


def test_a_batch_that_shrank_cools_down_before_it_grows_again() -> None:
    run = steered(
        scripted(lambda n: math.nan if n == 60 else 1.0), 300, grow=1, policy="stability",
        efficiency=0.0, max_batch=64,
    )  # fmt: skip
    (made,) = shrinks(run)
    grown = [grown.step for grown in moves(run, 1)]
    assert grown  # steady losses make this policy grow
    assert not [step for step in grown if made.step < step <= made.step + 120]
    assert [step for step in grown if step > made.step]


# -- fp16 that does not fit the model --


def overflowing(model: Any, batch: Any) -> Any:
    output = model(batch[0])
    factor = math.inf if output.dtype == torch.float16 else 1.0
    return F.cross_entropy(output.float() * factor, batch[1])


def collapse(steps: int, **options: Any) -> tuple[Run, nn.Module]:
    model = mlp()
    data = DataLoader(TensorDataset(*vectors(8 * steps)), batch_size=8)
    run = hm.train(model, data, overflowing, batch="fixed", micro=8, reduction="mean", **options)
    return run, model


def test_a_model_that_overflows_at_every_scale_goes_on_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precisions, "native", lambda device: ("fp16", "a test"))
    run, model = collapse(40, precision="auto")
    changes = [made for made in run.changes if made.what == "precision"]
    assert [(made.before, made.after) for made in changes] == [("auto", "fp16"), ("fp16", "fp32")]
    assert "does not train in fp16" in changes[1].reason
    assert "loss scale of 0.5" in changes[1].reason
    assert "going on in fp32" in changes[1].reason
    assert [record.skipped for record in run.history] == [True] * 17 + [False] * 23
    assert changes[1].step == 17
    # from there on it is the plain run in fp32
    plain = mlp()
    rest = DataLoader(TensorDataset(*(part[17 * 8 :] for part in vectors(320))), batch_size=8)
    hm.train(plain, rest, overflowing, batch="fixed", micro=8, reduction="mean", precision="fp32")
    assert different(dict(plain.state_dict()), dict(model.state_dict())) == []


def test_an_fp16_that_was_asked_for_stays_and_is_advised_against_once() -> None:
    run, model = collapse(40, precision="fp16")
    (note,) = [note for note in run.notes if "does not train in fp16" in note]
    assert "--precision bf16 or fp32" in note
    assert run.skipped_steps == 40
    assert not [made for made in run.changes if made.what == "precision"]
    assert different(dict(mlp().state_dict()), dict(model.state_dict())) == []


def test_the_first_overflows_of_fp16_are_no_alarm() -> None:
    """The loss scale is finding its place: a grown batch does not answer."""
    run = steered(
        scripted(lambda n: 1.0, lambda n: math.inf if n in (3, 4, 30) else 1.0), 40,
        precision="fp16",
    )  # fmt: skip
    assert run.skipped_steps == 3
    assert shrinks(run) == []


# -- a scheduler beside skipped steps --


@pytest.mark.filterwarnings("error")
def test_a_scheduler_stays_on_the_clock_of_samples_where_steps_are_skipped() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS)
    loader = poisoned(vectors, "loss", [0, 1, 4], math.nan)
    run = hm.train(
        model, loader, Poisoned(model), optimizer=optimizer, scheduler=scheduler, precision="fp32",
        batch="fixed",
    )  # fmt: skip
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    curve, by_hand = [], lr_scheduler.OneCycleLR(other, 0.1, total_steps=STEPS)
    for _ in range(STEPS):
        curve.append(other.param_groups[0]["lr"])
        other.step()
        by_hand.step()
    assert [record.lr for record in run.history] == curve
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
