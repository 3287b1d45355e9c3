"""A run whose loop is the person's: as their own loop, however each batch is cut."""

from __future__ import annotations

import contextlib
import copy
import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faults import Odd, Striking, everything, generators, seed, unequal
from plain import Transformer, cnn, differences, images, mlp, sentences, vectors
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hybrid_magic as hm
from hybrid_magic import run as runs
from hybrid_magic.config import TrainConfig
from hybrid_magic.engine import adopted
from hybrid_magic.engine import precision as precisions
from hybrid_magic.engine import session as sessions
from hybrid_magic.engine.control import RunControl
from hybrid_magic.engine.session import Session
from hybrid_magic.policy import state as policy

SGD = lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
ADAMW = lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3)


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    """Every session gives the interrupt back."""
    yield
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert found is signal.default_int_handler


def loader_of(data: Any, batch: int = 12, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data), batch_size=batch, **options)


def config(micro: Any = "auto", **options: Any) -> TrainConfig:
    return TrainConfig(**{"precision": "fp32", "batch": "fixed", "micro": micro, **options})


def work_of(model: Any, criterion: Any = F.cross_entropy) -> Callable[[dict[str, Any]], Any]:
    """The slice of the usual loop."""

    def work(values: dict[str, Any]) -> Any:
        out = model(values["x"])
        loss = criterion(out, values["y"])
        return loss, {"out": out, "loss": loss}

    return work


class Pair:
    """A model, its optimizer and its loader twice: for the plain loop and for a session."""

    def __init__(
        self,
        make: Any = mlp,
        make_optimizer: Any = SGD,
        data: Any = None,
        *,
        dtype: torch.dtype = torch.float32,
        batch: int = 12,
    ) -> None:
        self.data = data if data is not None else vectors(50)
        self.data = tuple(d.to(dtype) if d.is_floating_point() else d for d in self.data)
        self.batch = batch
        self.plain = make().to(dtype)
        self.model = copy.deepcopy(self.plain)
        self.plain_optimizer = make_optimizer(self.plain)
        self.optimizer = make_optimizer(self.model)

    def loader(self) -> DataLoader[Any]:
        return loader_of(self.data, self.batch, shuffle=True)

    def plainly(self, body: Any, epochs: int = 2) -> list[float]:
        """The plain loop: `body(model, optimizer, i, x, y)` returns the loss."""
        seed(4)
        told, loader = [], self.loader()
        for _ in range(epochs):
            for i, (x, y) in enumerate(loader):
                told.append(float(body(self.plain, self.plain_optimizer, i, x, y)))
        return told

    def session(self, loader: Any = None, micro: Any = "auto", **options: Any) -> Session:
        kept = {name: options.pop(name) for name in list(options) if name in _SESSION}
        return Session(self.model, self.optimizer, config(micro, **options), loader=loader, **kept)

    def hybridly(self, body: Any, epochs: int = 2, **options: Any) -> tuple[list[float], runs.Run]:
        """The same loop on a session: `body(session, optimizer, i, x, y)` returns the loss."""
        seed(4)
        told, loader = [], self.loader()
        session = self.session(loader, epochs=epochs, **options)
        for _ in range(epochs):
            session.begin_pass()
            for i, (x, y) in enumerate(session.batches(loader)):
                told.append(float(body(session, self.optimizer, i, x, y)))
            session.end_pass()
        return told, session.close()

    def apart(self) -> float:
        """The largest difference between the two models."""
        theirs = self.plain.state_dict()
        return max(
            float((value.double() - theirs[name].double()).abs().max())
            for name, value in self.model.state_dict().items()
        )


_SESSION = ("epochs", "sink", "control", "scaler", "own_precision", "before", "names", "found")


def usual(model: Any, optimizer: Any, i: int, x: Any, y: Any) -> Any:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def usual_sliced(pair: Pair, criterion: Any = F.cross_entropy) -> Any:
    def body(session: Session, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        kept = session.accumulate(work_of(pair.model, criterion), {"x": x, "y": y})
        assert len(kept["out"]) == len(x)
        session.apply()
        return kept["loss"]

    return body


# -- equality with the plain loop --


@pytest.mark.parametrize("make_optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: mlp(dropout=0.2), vectors(50)),
        (lambda: cnn(), images(50)),
        (lambda: Odd(mlp(dropout=0.1)), vectors(50)),
        (lambda: Transformer(), sentences(50)),
    ],
    ids=["mlp", "cnn", "odd", "transformer"],
)
def test_in_one_piece_the_weights_and_losses_are_bit_equal(
    make: Any, data: Any, make_optimizer: Any
) -> None:
    pair = Pair(make, make_optimizer, data)
    plain = pair.plainly(usual)
    told, run = pair.hybridly(usual_sliced(pair), micro=12)
    assert told == plain
    assert differences(pair.model, pair.plain) == []
    assert (run.outcome, run.steps, run.samples_seen) == ("finished", 10, 100)
    assert [sum(sizes) for sizes, _ in run.sizes] == [12, 12, 12, 12, 2] * 2


@pytest.mark.parametrize("make_optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("micro", [4, 5, 1])
def test_in_pieces_the_gradient_is_that_of_the_whole_batch(make_optimizer: Any, micro: int) -> None:
    pair = Pair(mlp, make_optimizer, dtype=torch.float64)
    plain = pair.plainly(usual)
    told, run = pair.hybridly(usual_sliced(pair), micro=micro)
    assert told == pytest.approx(plain, abs=1e-12)
    assert pair.apart() < 1e-12  # float64: rounding alone
    assert max(max(sizes) for sizes, _ in run.sizes) == micro


def test_a_micro_batch_left_to_memory_gives_the_same() -> None:
    pair = Pair(mlp, SGD, dtype=torch.float64)
    plain = pair.plainly(usual)
    told, run = pair.hybridly(usual_sliced(pair))
    assert told == pytest.approx(plain, abs=1e-12)
    assert pair.apart() < 1e-12
    assert len(next(iter(run.sizes))[0]) > 1  # the first step measures


def test_token_weighted_losses_are_normalised_over_the_whole_batch() -> None:
    x, y = sentences(48)
    y = torch.where(torch.rand(48, 7) < 0.6, torch.full((48, 7), -100), x % 5)
    criterion = lambda out, y: F.cross_entropy(out.reshape(-1, 5), y.reshape(-1).long())
    pair = Pair(lambda: Transformer(tokens=True, dropout=0.0), SGD, (x, y), dtype=torch.float64)

    def body(model: Any, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    plain = pair.plainly(body)
    told, _ = pair.hybridly(usual_sliced(pair, criterion), micro=5)
    assert told == pytest.approx(plain, abs=1e-12)
    assert pair.apart() < 1e-12


def test_a_loss_that_no_criterion_tells_of_is_tried_out() -> None:
    pair = Pair(mlp, SGD, dtype=torch.float64)
    criterion = lambda out, y: (out.logsumexp(1) - out.gather(1, y[:, None])[:, 0]).sum()
    body = lambda model, optimizer, i, x, y: _stepped(optimizer, criterion(model(x), y))
    plain = pair.plainly(body)
    told, run = pair.hybridly(usual_sliced(pair, criterion), micro=4)
    assert told == pytest.approx(plain, rel=1e-12)
    assert pair.apart() < 1e-12
    assert "a sum over samples" in run.notes[-1]


def _stepped(optimizer: Any, loss: Any) -> Any:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


# -- gradients are the person's --


@pytest.mark.parametrize(("micro", "tolerance"), [(12, 0.0), (4, 1e-12)])
def test_without_zero_grad_gradients_go_on_adding_up(micro: int, tolerance: float) -> None:
    pair = Pair(mlp, SGD, dtype=torch.float64)

    def body(model: Any, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    def sliced(session: Session, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        loss = session.accumulate(work_of(pair.model), {"x": x, "y": y})["loss"]
        session.apply()
        return loss

    plain = pair.plainly(body)
    told, _ = pair.hybridly(sliced, micro=micro)
    assert told == pytest.approx(plain, abs=tolerance)
    assert pair.apart() <= tolerance
    assert all(param.grad is not None for param in pair.model.parameters())


@pytest.mark.parametrize(("micro", "tolerance"), [(12, 0.0), (4, 1e-12)])
@pytest.mark.parametrize("window", [2, 3])
def test_hand_made_accumulation_stays_what_it_is(micro: int, tolerance: float, window: int) -> None:
    pair = Pair(lambda: mlp(dropout=0.2 if micro == 12 else 0.0), ADAMW, dtype=torch.float64)

    def body(model: Any, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y) / window
        loss.backward()
        if (i + 1) % window == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def sliced(session: Session, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        criterion = lambda out, y: F.cross_entropy(out, y) / window
        loss = session.accumulate(work_of(pair.model, criterion), {"x": x, "y": y})["loss"]
        if (i + 1) % window == 0:
            session.apply()
            optimizer.zero_grad()
        return loss

    plain = pair.plainly(body)  # 5 batches an epoch: the next epoch begins with some left over
    told, run = pair.hybridly(sliced, micro=micro)
    assert told == pytest.approx(plain, abs=tolerance)
    assert pair.apart() <= tolerance
    for mine, theirs in zip(pair.model.parameters(), pair.plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-12)
    assert run.steps == 2 * (5 // window)
    record = run.history[0]
    assert record.global_batch_size == 12 * window
    assert record.loss == pytest.approx(sum(plain[:window]), abs=1e-6)


def test_weights_that_are_not_stepped_keep_their_gradients_too() -> None:
    pair = Pair(mlp, lambda model: torch.optim.SGD(model[5].parameters(), lr=0.1))

    def body(model: Any, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return loss

    def sliced(session: Session, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = session.accumulate(work_of(pair.model), {"x": x, "y": y})["loss"]
        nn.utils.clip_grad_norm_(pair.model.parameters(), 0.1)
        session.apply()
        return loss

    assert pair.hybridly(sliced, micro=12)[0] == pair.plainly(body)
    assert differences(pair.model, pair.plain) == []


def test_tensors_of_no_module_are_trained() -> None:
    def make() -> tuple[torch.Tensor, torch.optim.Optimizer]:
        weight = torch.full((12, 5), 0.1, requires_grad=True)
        return weight, torch.optim.SGD([weight], lr=0.1)

    (mine, my), (theirs, their) = make(), make()
    x, y = vectors(12)
    session = Session(nn.Module(), my, config(4))
    for _ in range(3):
        _stepped(their, F.cross_entropy(x @ theirs, y))
        my.zero_grad()
        session.accumulate(lambda v: (F.cross_entropy(v["x"] @ mine, v["y"]), {}), {"x": x, "y": y})
        session.apply()
    assert torch.allclose(mine, theirs, atol=1e-6)
    assert session.close().start.parameters == 60


# -- loss scaling --


class Brittle(nn.Module):
    """A model whose gradient overflows in the batches where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.bad = mlp(), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inner(x)
        return out * float("inf") if self.bad else out


@pytest.mark.parametrize("bad", [0, 1])
def test_an_overflow_in_any_batch_of_a_window_skips_the_step_and_lowers_the_scale(bad: int) -> None:
    model = Brittle()
    optimizer = SGD(model)
    session = Session(model, optimizer, config(4, precision="fp16"))
    x, y = vectors(12)
    before = copy.deepcopy(model.state_dict())
    for i in range(2):
        model.bad = i == bad
        session.accumulate(work_of(model), {"x": x, "y": y})
    step: Any = session._run.step
    scale = step.precision.scaler.get_scale()
    session.apply()
    assert step.precision.scaler.get_scale() == scale / 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.zero_grad()
    model.bad = False
    session.accumulate(work_of(model), {"x": x, "y": y})
    session.apply()
    run = session.close()
    assert (run.steps, run.skipped_steps) == (2, 1)
    assert not torch.equal(next(model.parameters()), next(iter(before.values())))


def test_accumulated_batches_in_fp16_are_those_of_a_scaled_loop() -> None:
    pair = Pair(mlp, SGD)
    scaler = torch.amp.GradScaler("cpu")

    def body(model: Any, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if i % 2:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return loss

    def sliced(session: Session, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        loss = session.accumulate(work_of(pair.model), {"x": x, "y": y})["loss"]
        if i % 2:
            session.apply()
            optimizer.zero_grad()
        return loss

    plain = pair.plainly(body)
    told, run = pair.hybridly(sliced, micro=12, precision="fp16")
    assert told == pytest.approx(plain, abs=1e-3)  # fp16
    assert pair.apart() < 1e-4
    assert run.skipped_steps == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_of_their_own_scales_and_is_updated(enabled: bool) -> None:
    pair = Pair(mlp, SGD)
    theirs, mine = (torch.amp.GradScaler("cpu", enabled=enabled, growth_interval=3) for _ in "ab")

    def forward(model: Any, x: Any, y: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), y)

    def body(model: Any, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = forward(model, x, y)
        theirs.scale(loss).backward()
        theirs.step(optimizer)
        theirs.update()
        return loss

    def sliced(session: Session, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        work = lambda v: ((loss := forward(pair.model, v["x"], v["y"])), {"loss": loss})
        kept = session.accumulate(work, {"x": x, "y": y})
        session.apply()
        return kept["loss"]

    plain = pair.plainly(body)
    told, run = pair.hybridly(sliced, micro=12, precision="auto", own_precision=True, scaler=mine)
    assert told == plain
    assert differences(pair.model, pair.plain) == []
    assert mine.state_dict() == theirs.state_dict()
    assert run.start is not None
    assert run.start.precision == "own"
    assert not run.changes


# -- passes over the loader --


class Numbered(Dataset[Any]):
    """Samples that know their number; `seen` are those that were trained on."""

    def __init__(self, n: int) -> None:
        self.x, self.y = vectors(n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        return self.x[index], self.y[index], index


def grown(session: Session, batch: int) -> None:
    """Have the policy use this global batch."""
    state = session._run.state.sizing.learned  # type: ignore[union-attr]
    policy.rebatch(state, batch, 0, "control", "by the test")


@pytest.mark.parametrize("workers", [0, 2])
def test_while_the_batch_grows_every_sample_is_used_once_in_the_loaders_order(workers: int) -> None:
    model = mlp()
    loader = DataLoader(Numbered(100), batch_size=8, shuffle=True, num_workers=workers)
    seed(2)
    order = [int(number) for _, _, numbers in loader for number in numbers]
    seed(2)
    session = Session(model, SGD(model), config(batch="adaptive", max_batch=64), loader=loader)
    seen, lengths = [], []
    assert session.length(loader) == 13
    session.begin_pass()
    for i, (x, y, numbers) in enumerate(session.batches(loader)):
        seen += numbers.tolist()
        session.accumulate(work_of(model), {"x": x, "y": y})
        session.apply()
        if i in (2, 4):
            grown(session, [16, 24][i // 4])
        lengths.append(session.length(loader))
    session.end_pass()
    run = session.close()
    assert seen == order
    sizes = [sum(sizes) for sizes, _ in run.sizes]
    assert sum(sizes) == 100
    assert max(sizes) >= 16
    assert session.length(loader) == len(sizes) == lengths[-1]
    assert lengths == sorted(lengths, reverse=True)
    assert len(loader) == 13


def test_a_scheduler_is_stepped_as_often_as_by_the_same_sample_of_the_plain_loop() -> None:
    model = mlp()
    optimizer = SGD(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = loader_of(vectors(100), 8)
    session = Session(model, optimizer, config(batch="adaptive", lr_scale="none"), loader=loader)
    samples = 0
    for _ in range(2):
        session.begin_pass()
        for i, (x, y) in enumerate(session.batches(loader)):
            session.accumulate(work_of(model), {"x": x, "y": y})
            session.apply()
            session.advance(scheduler)
            samples += len(x)
            whole, rest = divmod(samples, 100)
            assert scheduler.last_epoch == 13 * whole + rest // 8
            if i in (1, 5):
                grown(session, [12, 20][i // 4])
        session.end_pass()
    session.close()
    assert scheduler.last_epoch == 26


def test_a_scheduler_of_hand_made_accumulation_is_stepped_once_a_step() -> None:
    model = mlp()
    optimizer = SGD(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    loader = loader_of(vectors(96), 8)
    session = Session(model, optimizer, config(batch="adaptive"), loader=loader)
    session.begin_pass()
    for i, (x, y) in enumerate(session.batches(loader)):
        session.accumulate(work_of(model), {"x": x, "y": y})
        if i % 4 == 3:
            session.apply()
            session.advance(scheduler)
            optimizer.zero_grad()
    session.end_pass()
    session.close()
    assert scheduler.last_epoch == 3


def test_a_loader_of_another_kind_is_read_as_it_comes() -> None:
    model = mlp()
    batches = [vectors(n, seed=n) for n in (5, 9, 9, 2)]
    session = Session(model, SGD(model), config(3, batch="adaptive"), loader=batches)
    assert session.length(batches) == 4
    session.begin_pass()
    for x, y in session.batches(batches):
        kept = session.accumulate(work_of(model), {"x": x, "y": y})
        assert len(kept["out"]) == len(x)
        session.apply()
    session.end_pass()
    run = session.close()
    assert [sum(sizes) for sizes, _ in run.sizes] == [5, 9, 9, 2]
    assert max(max(sizes) for sizes, _ in run.sizes) == 3
    assert run.start is not None
    assert run.start.base_batch_size == 5
    assert not run.start.steered


def test_no_training_time_passes_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    x, y = vectors(8)
    session = Session(model, SGD(model), config(8))
    for _ in range(3):
        session.begin_pass()
        session.accumulate(work_of(model), {"x": x, "y": y})
        session.apply()
        session.end_pass()
        began = sessions.time.perf_counter()
        while sessions.time.perf_counter() - began < 0.2:
            pass
    run = session.close()
    assert run.seconds < 0.2  # not even the one after the last


# -- what can and cannot be cut --


def test_lists_of_samples_are_cut_and_what_is_no_samples_goes_whole() -> None:
    model = mlp()
    x, y = vectors(6)
    table, seen = torch.arange(5.0), []

    def work(values: dict[str, Any]) -> Any:
        if model.training:  # and not tried out on copies
            seen.append((len(values["images"]), len(values["names"]), values["table"] is table))
        loss = F.cross_entropy(model(torch.stack(values["images"])), values["y"])
        return loss, {"names": values["names"], "table": values["table"]}

    session = Session(model, SGD(model), config(3))
    values = {"images": tuple(x), "names": [f"{n}" for n in range(6)], "table": table, "y": y}
    kept = session.accumulate(work, values)
    session.apply()
    assert seen[-2:] == [(3, 3, True)] * 2
    assert kept["names"] == values["names"]
    assert kept["table"] is table
    session.close()


def test_a_loader_of_image_tuples_is_not_cut_between_channels() -> None:
    images = [tuple(torch.ones(3, 4, 4) for _ in range(5)) for _ in range(2)]
    model = nn.Linear(48, 1)
    session = Session(model, SGD(model), config(2), loader=images)
    session.begin_pass()
    for batch in session.batches([(each, [{"boxes": torch.ones(2, 4)}] * 5) for each in images]):
        shot, targets = batch
        work = lambda v: (model(torch.stack(v["shot"]).flatten(1)).mean(), {"t": v["targets"]})
        kept = session.accumulate(work, {"shot": shot, "targets": targets})
        assert len(kept["t"]) == 5
        session.apply()
    run = session.close()
    assert [sum(sizes) for sizes, _ in run.sizes] == [5, 5]


def test_code_that_wants_the_whole_batch_gets_it_and_says_so() -> None:
    pair = Pair(lambda: mlp(dropout=0.3), SGD, vectors(48))
    body = lambda model, optimizer, i, x, y: _stepped(
        optimizer, F.cross_entropy(model(x.view(12, 12)), y)
    )

    def sliced(session: Session, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        criterion = lambda out, y: F.cross_entropy(out, y.view(12))
        loss = session.accumulate(work_of(pair.model, criterion), {"x": x, "y": y})["loss"]
        session.apply()
        return loss

    plain = pair.plainly(body)
    told, run = pair.hybridly(sliced, micro=4)
    assert told == plain
    assert differences(pair.model, pair.plain) == []
    assert {len(sizes) for sizes, _ in run.sizes} == {1}
    (note,) = [note for note in run.notes if "not cut" in note]
    assert "RuntimeError: shape '[12]' is invalid" in note


def test_a_value_that_cannot_be_merged_leaves_the_batch_whole() -> None:
    pair = Pair(lambda: mlp(dropout=0.3), SGD)

    def sliced(session: Session, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        optimizer.zero_grad()

        def work(values: dict[str, Any]) -> Any:
            loss = F.cross_entropy(pair.model(values["x"]), values["y"])
            return loss, {"loss": loss, "words": f"loss {float(loss)}"}

        kept = session.accumulate(work, {"x": x, "y": y})
        session.apply()
        assert kept["words"] == f"loss {float(kept['loss'])}"
        return kept["loss"]

    plain = pair.plainly(usual)
    told, run = pair.hybridly(sliced, micro=4)
    assert told == plain
    assert differences(pair.model, pair.plain) == []
    (note,) = [note for note in run.notes if "not cut" in note]
    assert "words: it is a str that differs" in note


def test_a_batch_that_trains_nothing_is_merged_and_leaves_no_step_open() -> None:
    pair = Pair(lambda: cnn(dropout=0.0), SGD, images(48))

    def body(model: Any, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        model.train(i % 2 == 0)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if i % 2 == 0:
            loss.backward()
            optimizer.step()
        return loss

    def sliced(session: Session, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        pair.model.train(i % 2 == 0)
        optimizer.zero_grad()

        def work(values: dict[str, Any]) -> Any:
            loss = F.cross_entropy(pair.model(values["x"]), values["y"])
            return loss if i % 2 == 0 else None, {"loss": loss}

        kept = session.accumulate(work, {"x": x, "y": y})
        if i % 2 == 0:
            session.apply()
        else:
            assert session._run.step.transaction.number is None  # type: ignore[union-attr]
        return kept["loss"]

    assert pair.hybridly(sliced, micro=12)[0] == pair.plainly(body)
    assert differences(pair.model, pair.plain) == []


def test_micro_batches_must_agree_on_whether_to_train() -> None:
    model = mlp()
    x, y = vectors(12)
    session = Session(model, SGD(model), config(4))

    def work(values: dict[str, Any]) -> Any:
        loss = F.cross_entropy(model(values["x"]), values["y"])
        return loss if float(values["x"][0, 0]) == float(x[0, 0]) else None, {}

    with pytest.raises(hm.HybridMagicError, match="2 of 3 micro-batches") as caught:
        session.accumulate(work, {"x": x, "y": y})
    session.close(caught.value)
    assert all(param.grad is None for param in model.parameters())


def test_apply_without_a_batch_is_the_optimizers_own_step() -> None:
    model, other = mlp(), mlp()
    optimizer, theirs = SGD(model), SGD(other)
    session = Session(model, optimizer, config())
    for each, stepping in ((model, session.apply), (other, theirs.step)):
        F.cross_entropy(each(vectors(4)[0]), vectors(4)[1]).backward()
        stepping()
    assert differences(model, other) == []


# -- running out of memory --


@pytest.mark.parametrize(
    ("make", "data", "make_optimizer", "precision"),
    [
        (lambda: Odd(mlp(dropout=0.1)), vectors(12), ADAMW, "fp32"),
        (cnn, images(12), SGD, "fp32"),
        (lambda: mlp(dropout=0.1), vectors(12), SGD, "fp16"),
    ],
    ids=["odd adamw", "cnn sgd", "mlp fp16"],
)
def test_a_fault_at_every_operation_of_a_batch_leaves_no_trace(
    make: Any, data: Any, make_optimizer: Any, precision: str
) -> None:
    """Gradients of an earlier batch are there, too, and have to stay what they were."""
    x, y = data

    def steps(session: Session, model: Any, optimizer: Any, chosen: int | None) -> Any:
        striking = Striking(chosen)
        for number in range(4):
            with _within(striking) if number == 2 else contextlib.nullcontext():
                session.accumulate(work_of(model), {"x": x, "y": y})
            if number != 1:  # the third batch finds gradients
                session.apply()
                optimizer.zero_grad()
        return striking

    def made() -> Any:
        seed(1)
        model = make()
        optimizer = make_optimizer(model)
        session = Session(model, optimizer, config(3, precision=precision))
        return model, optimizer, session

    model, optimizer, session = made()
    operations = steps(session, model, optimizer, None).count
    session.close()
    assert operations > 60
    gc.freeze()  # each retry collects
    for chosen in range(0, operations, 7):
        model, optimizer, session = made()
        steps(session, model, optimizer, chosen)
        run = session.close()
        assert run.retries == 1
        sizes = [sizes for sizes, _ in run.sizes]
        after, generator = everything(model, optimizer), generators()
        model, optimizer, session = made()
        with _with_sizes(sizes):
            steps(session, model, optimizer, None)
        session.close()
        assert unequal(after, everything(model, optimizer)) == [], chosen
        assert unequal(generator, generators()) == [], chosen
    gc.unfreeze()


@contextlib.contextmanager
def _within(striking: Striking) -> Iterator[None]:
    """Have it strike in the forward and backward passes: cutting a batch takes no memory."""
    real = sessions.accumulate

    def struck(*args: Any, **options: Any) -> Any:
        with striking:
            return real(*args, **options)

    sessions.accumulate = struck
    try:
        yield
    finally:
        sessions.accumulate = real


@contextlib.contextmanager
def _with_sizes(steps: list[tuple[int, ...]]) -> Iterator[None]:
    """Have batches of 12 cut into what they were in these steps, some of several batches."""
    batches: list[list[int]] = [[]]
    for size in (size for sizes in steps for size in sizes):
        if sum(batches[-1]) == 12:
            batches.append([])
        batches[-1].append(size)
    real = adopted.sizes_of
    adopted.sizes_of = lambda passes, sizing, countable, n: (batches.pop(0), False)
    try:
        yield
    finally:
        adopted.sizes_of = real


def test_a_fault_in_the_optimizers_step_is_taken_back_and_the_same_gradients_tried_again() -> None:
    def steps(chosen: int | None) -> tuple[Any, int, Any]:
        seed(1)
        model = mlp()
        optimizer = ADAMW(model)
        session = Session(model, optimizer, config(4))
        x, y = vectors(12)
        for number in range(3):
            optimizer.zero_grad()
            session.accumulate(work_of(model), {"x": x, "y": y})
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # the person's: it has to survive
            striking = Striking(chosen if number == 1 else None)
            with striking if number == 1 else contextlib.nullcontext():
                session.apply()
        return everything(model, optimizer), striking.count, session.close()

    wanted, _, _ = steps(None)
    struck = 0
    for chosen in range(60):
        got, _, run = steps(chosen)
        struck += run.retries
        assert unequal(got, wanted) == [], chosen
    assert struck >= 20


def test_a_step_that_never_finds_room_ends_the_run_at_the_step_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    optimizer = ADAMW(model)
    session = Session(model, optimizer, config(4))
    x, y = vectors(12)
    session.accumulate(work_of(model), {"x": x, "y": y})
    session.apply()
    optimizer.zero_grad()
    before = everything(model, optimizer)
    session.accumulate(work_of(model), {"x": x, "y": y})

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sessions, "apply", full)
    with pytest.raises(hm.HybridMagicError, match="out of memory on cpu.* in the optimizer's step"):
        session.apply()
    session.close()
    assert unequal(everything(model, optimizer), before) == []


def test_the_persons_learning_rates_are_scaled_for_the_step_alone() -> None:
    model = mlp()
    optimizer = SGD(model)
    session = Session(model, optimizer, config(4))
    x, y = vectors(12)
    session.begin_pass()
    session.accumulate(work_of(model), {"x": x, "y": y})
    control = session._run.state.sizing  # type: ignore[union-attr]
    control.by_hand("lr_multiplier", 0.5, 0)
    session.apply()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert session.close().history[0].lr == pytest.approx(0.025)


# -- ends --


def trained(session: Session, model: Any, steps: int = 100, between: Any = None) -> Iterator[int]:
    x, y = vectors(12)
    for number in session.batches(range(steps)):
        session.accumulate(work_of(model), {"x": x, "y": y})
        if between is not None:
            between(number)
        session.apply()
        yield number


def test_stop_ends_the_loop_at_a_whole_step_and_a_pause_is_no_training_time() -> None:
    model = mlp()
    control = RunControl()
    polls: list[int] = []

    def poll() -> None:
        polls.append(1)
        if len(polls) == 3:
            control.ask("pause")
        if len(polls) == 6:
            control.ask("resume")
        if len(polls) == 9:
            control.ask("stop")

    control.poll = poll
    session = Session(model, SGD(model), config(4), control=control)
    done = list(trained(session, model))
    assert session.over
    run = session.close()
    assert run.outcome == "stopped"
    assert len(done) == run.steps == 6
    assert [change.after for change in run.changes if change.what == "control"] == [
        "paused", "running", "stopped",
    ]  # fmt: skip
    assert list(trained(session, model)) == []  # no further step may begin


def test_steps_end_the_loop() -> None:
    model = mlp()
    session = Session(model, SGD(model), config(4, steps=3))
    assert list(trained(session, model)) == [0, 1, 2]
    assert (session.over, session.steps, session.close().outcome) == (True, 3, "finished")


def test_an_interrupt_waits_for_the_step_to_be_whole() -> None:
    model = mlp()
    session = Session(model, SGD(model), config(4))
    steps: list[int] = []
    interrupt = lambda n: n == 2 and signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        steps.extend(trained(session, model, between=interrupt))
    assert (steps, session.steps) == ([0, 1], 3)
    run = session.close(caught.value)
    assert (run.outcome, run.steps, len(run.sizes)) == ("interrupted", 3, 3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert hm.last_run is run


def test_between_steps_an_interrupt_is_immediate_and_the_loop_may_go_on() -> None:
    model = mlp()
    session = Session(model, SGD(model), config(4))
    for number in trained(session, model, 4):
        if number == 1:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert session.steps == 4  # the person caught it
    assert session.close().outcome == "finished"


@pytest.mark.parametrize("held", [True, False])
def test_an_interrupt_that_they_catch_round_their_loop_comes_once(held: bool) -> None:
    model = mlp()
    session = Session(model, SGD(model), config(4))
    interrupt = lambda n: n == 1 and signal.raise_signal(signal.SIGINT)
    session.begin_pass()
    with contextlib.suppress(KeyboardInterrupt):  # their own except clause
        for number in trained(session, model, between=interrupt if held else None):
            if not held:
                interrupt(number)
    session.end_pass()
    assert session.steps == 2
    list(trained(session, model, 2))
    assert session.close().steps == 4


def test_a_second_interrupt_takes_the_step_back() -> None:
    model = mlp()
    optimizer = SGD(model)
    session = Session(model, optimizer, config(4))
    list(trained(session, model, 2))
    optimizer.zero_grad()
    before = everything(model, optimizer)
    x, y = vectors(12)

    def work(values: dict[str, Any]) -> Any:
        loss = F.cross_entropy(model(values["x"]), values["y"])
        signal.raise_signal(signal.SIGINT)
        return loss, {}

    with pytest.raises(KeyboardInterrupt) as caught:
        session.accumulate(work, {"x": x, "y": y})
    session.close(caught.value)
    assert unequal(everything(model, optimizer), before) == []


def test_an_error_of_their_code_is_theirs_and_leaves_no_trace_and_no_tensor() -> None:
    model = mlp()
    optimizer = SGD(model)
    session = Session(model, optimizer, config(4))
    list(trained(session, model, 2))
    optimizer.zero_grad()
    before, generator = everything(model, optimizer), generators()
    x, y = vectors(12)
    alive: Any = []

    def work(values: dict[str, Any]) -> Any:
        out = model(values["x"])
        alive.append(weakref.ref(out))
        if len(alive) == 2:
            raise ValueError("a mistake of theirs")
        return F.cross_entropy(out, values["y"]), {}

    with pytest.raises(ValueError, match="a mistake of theirs") as caught:
        session.accumulate(work, {"x": x, "y": y})
    assert unequal(everything(model, optimizer), before) == []
    assert unequal(generators(), generator) == []
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    session.accumulate(work, {"x": x, "y": y})  # they caught it, and go on
    session.apply()
    assert session.steps == 3
    run = session.close(caught.value)
    assert run.error == "ValueError: a mistake of theirs"


def test_a_gradient_that_is_no_number_never_reaches_the_weights() -> None:
    model = cnn(dropout=0.0)
    session = Session(model, SGD(model), config(6))
    x, y = images(12)
    session.accumulate(work_of(model), {"x": x, "y": y})
    session.apply()
    before = copy.deepcopy(model.state_dict())
    session.accumulate(work_of(model), {"x": x * float("nan"), "y": y})
    session.apply()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert session.close().skipped_steps == 1


def test_closing_after_an_error_clears_gradients_and_closing_twice_does_nothing() -> None:
    model = mlp()
    optimizer = ADAMW(model)
    session = Session(model, optimizer, config(4))
    list(trained(session, model, 2))
    before = everything(model, optimizer) | {"gradients": []}
    x, y = vectors(12)
    session.accumulate(work_of(model), {"x": x, "y": y})
    run = session.close(RuntimeError("theirs"))
    assert (run.outcome, run.error, run.steps) == ("failed", "RuntimeError: theirs", 2)
    assert unequal(everything(model, optimizer), before) == []
    assert session.close() is run
    assert run.outcome == "failed"


def test_closing_in_the_midst_of_hand_made_accumulation_leaves_what_the_plain_loop_leaves() -> None:
    pair = Pair(lambda: cnn(dropout=0.2), ADAMW, images(36))
    seed(2)
    for x, y in loader_of(pair.data):
        F.cross_entropy(pair.plain(x), y).backward()
    after = generators()
    seed(2)
    session = pair.session(micro=12)
    for x, y in session.batches(loader_of(pair.data)):
        session.accumulate(work_of(pair.model), {"x": x, "y": y})
    run = session.close()
    assert (run.outcome, run.steps) == ("finished", 0)
    assert differences(pair.model, pair.plain) == []
    assert unequal(generators(), after) == []
    for mine, theirs in zip(pair.model.parameters(), pair.plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert not pair.optimizer.state


def test_a_session_without_a_step_changes_nothing() -> None:
    model = mlp()
    optimizer = ADAMW(model)
    last = hm.last_run
    session = Session(model, optimizer, config(), loader=loader_of(vectors(12)))
    session.begin_pass()
    session.end_pass()
    assert session.close().outcome == "finished"
    assert not optimizer.state
    assert hm.last_run is last


# -- what is refused --


@pytest.mark.parametrize(
    ("make", "make_optimizer", "words"),
    [
        (mlp, lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS, which asks for the loss many"),
        (mlp, lambda m: torch.optim.SGD(m.half().parameters(), 0.1), "parameters of torch.float16"),
        (mlp, lambda m: torch.optim.SGD(m.requires_grad_(False).parameters(), 0.1), "only frozen"),
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            lambda m: torch.optim.SGD(m.parameters(), 0.1),
            "lazy parameters",
        ),
        (
            lambda: nn.Linear(2, 2, device="meta"),
            lambda m: torch.optim.SGD(m.parameters(), 0.1),
            "on the meta device",
        ),
        (lambda: lambda x: x, lambda m: SGD(mlp()), "the model is a function; wanted a torch.nn"),
        (mlp, lambda m: m, "the optimizer is a Sequential; wanted a torch.optim.Optimizer"),
    ],
)
def test_mistakes_are_told_before_anything_is_changed(
    make: Any, make_optimizer: Any, words: str
) -> None:
    model = make()
    optimizer = make_optimizer(model)
    with pytest.raises(hm.HybridMagicError, match=words):
        Session(model, optimizer, config())


# -- from one session to the next --


def test_the_next_session_goes_on_with_what_was_learned() -> None:
    model = mlp()
    optimizer = SGD(model)
    loader = loader_of(vectors(96), 8)
    asked = config(batch="adaptive", precision="fp16")

    def one(before: Any, growing: bool) -> tuple[list[int], Any, Any]:
        session = Session(model, optimizer, asked, loader=loader, before=before)
        session.begin_pass()
        for i, (x, y) in enumerate(session.batches(loader)):
            optimizer.zero_grad()
            session.accumulate(work_of(model), {"x": x, "y": y})
            session.apply()
            if growing and i == 2:
                grown(session, 24)
        session.end_pass()
        scaler = session._run.step.precision.scaler  # type: ignore[union-attr]
        memory = session.memory()
        return [sum(sizes) for sizes, _ in session.close().sizes], memory, scaler

    sizes, memory, scaler = one(None, growing=True)
    assert max(sizes) == 24
    sizes, again, same = one(memory, growing=False)
    assert sizes == [24] * 4
    assert same is scaler
    held = [each for each in _held(again) if isinstance(each, torch.Tensor)]
    assert sum(tensor.numel() for tensor in held) <= 2  # the scale, and when it last grew


def _held(value: Any) -> Iterator[Any]:
    import dataclasses

    yield value
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from _held(getattr(value, item.name))
    elif isinstance(value, torch.amp.GradScaler):
        yield from vars(value).values()


def test_a_loss_is_tried_out_once_for_all_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = SGD(model)
    x, y = vectors(12)
    evaluated = []
    model.register_forward_hook(lambda m, _, __: evaluated.append(not m.training))
    memory = None
    for _ in range(3):
        session = Session(model, optimizer, config(4), before=memory)
        criterion = lambda out, y: F.cross_entropy(out, y) * 1.0
        session.accumulate(work_of(model, criterion), {"x": x, "y": y})
        session.apply()
        memory = session.memory()
        session.close()
    # whole and in two parts, once; and in each session whether three pieces make up the batch
    assert sum(evaluated) == 3 + 3 * (3 + 3)


# -- verbatim --


@pytest.mark.parametrize(("micro", "tolerance"), [(12, 0.0), (5, 1e-12)])
def test_a_body_that_runs_once_a_piece_gives_the_plain_loops_weights(
    micro: int, tolerance: float
) -> None:
    pair = Pair(mlp, ADAMW, dtype=torch.float64)

    def body(model: Any, optimizer: Any, i: int, x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return loss

    pair.plainly(body)
    seed(4)
    loader = pair.loader()
    session = pair.session(loader, micro)
    shape = []
    for _ in range(2):
        session.begin_pass()
        for batch in session.batches(loader):
            for x, y in session.pieces(batch):
                shape.append((session.first, session.last, len(x)))
                if session.first:
                    pair.optimizer.zero_grad()
                with session.forwarding():
                    loss = F.cross_entropy(pair.model(x), y)
                session.backward(loss)
                if session.last:
                    nn.utils.clip_grad_norm_(pair.model.parameters(), 0.5)
                    session.apply()
        session.end_pass()
    run = session.close()
    assert pair.apart() <= tolerance
    assert run.steps == 10
    pieces = [[(True, True, 12)], [(True, False, 5), (False, False, 5), (False, True, 2)]]
    assert shape[: len(pieces[micro == 5])] == pieces[micro == 5]
    assert (session.first, session.last) == (True, True)


def test_verbatim_without_a_loader_has_its_batch_left_alone() -> None:
    pair = Pair(mlp, SGD)
    x, y = pair.data
    for _ in range(4):
        _stepped(pair.plain_optimizer, F.cross_entropy(pair.plain(x), y))
    session = pair.session()
    session.begin_pass()
    for _ in range(4):
        with session.forwarding():
            loss = F.cross_entropy(pair.model(x), y)
        pair.optimizer.zero_grad()
        session.backward(loss)
        session.apply()
    session.end_pass()
    run = session.close()
    assert differences(pair.model, pair.plain) == []
    assert [sizes for sizes, _ in run.sizes] == [(1,)] * 4
    assert run.final_loss == pytest.approx(float(loss.detach()))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_verbatim_two_losses_of_a_piece_are_added(precision: str) -> None:
    pair = Pair(mlp, SGD)
    x, y = vectors(12)
    out = pair.plain(x)
    F.cross_entropy(out, y).backward(retain_graph=True)
    out.square().mean().backward()
    pair.plain_optimizer.step()
    session = pair.session(micro=5, precision=precision)
    for a, b in session.pieces((x, y)):
        for loss in (F.cross_entropy, lambda out, _: out.square().mean()):
            with session.forwarding():
                each = loss(pair.model(a), b)
            session.backward(each)
        if session.last:
            session.apply()
    run = session.close()
    assert pair.apart() < (1e-6 if precision == "fp32" else 1e-3)
    assert [sizes for sizes, _ in run.sizes] == [(5, 5, 2)]


def test_verbatim_running_out_of_memory_is_remembered_and_let_through() -> None:
    model = mlp()
    optimizer = SGD(model)
    session = Session(model, optimizer, config())
    before = everything(model, optimizer)

    def step() -> None:
        for a, b in session.pieces(vectors(48)):
            with session.forwarding():
                loss = F.cross_entropy(model(a), b)
                if len(a) > 8:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
            session.backward(loss)

    with pytest.raises(torch.OutOfMemoryError):
        step()
    assert unequal(everything(model, optimizer), before) == []
    assert all(len(a) <= 8 for a, _ in session.pieces(vectors(48)))
    session.close()


def test_an_unmergeable_batch_that_trains_nothing_leaves_no_trace_of_the_first_try() -> None:
    model, other = cnn(), cnn()
    x, y = images(12)
    session = Session(model, SGD(model), config(4))
    seed(1)
    session.accumulate(lambda v: (None, {"words": str(model(v["x"]).sum())}), {"x": x, "y": y})
    session.close()
    after = generators()
    seed(1)
    other(x)
    assert differences(model, other) == []
    assert unequal(generators(), after) == []


def test_a_loss_that_autocast_refuses_is_computed_in_fp32_and_the_run_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precisions, "native", lambda device: ("bf16", "by the test"))
    pair = Pair(lambda: nn.Sequential(mlp(1, dropout=0.2), nn.Sigmoid(), nn.Flatten(0)))
    criterion = lambda out, y: F.binary_cross_entropy(out, (y > 2).float())
    body = lambda model, optimizer, i, x, y: _stepped(optimizer, criterion(model(x), y))

    def refusing(out: Any, y: Any) -> Any:  # as CUDA's autocast does
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("binary_cross_entropy and BCELoss are unsafe to autocast.")
        return criterion(out, y)

    plain = pair.plainly(body)
    told, run = pair.hybridly(usual_sliced(pair, refusing), micro=12, precision="auto")
    assert told == plain
    assert differences(pair.model, pair.plain) == []
    assert run.start is not None
    assert run.start.precision == "bf16"
    assert run.changes[-1].reason == (
        "this loop does not compute in bf16 (binary_cross_entropy and BCELoss are unsafe to "
        "autocast.); going on in fp32"
    )


# -- details of it --


def test_in_fp16_clipping_by_all_weights_sees_none_that_is_scaled() -> None:
    def one(make_optimizer: Any, precision: str) -> nn.Module:
        model = mlp()
        optimizer = make_optimizer(model)
        session = Session(model, optimizer, config(4, precision=precision))
        x, y = vectors(12)
        session.accumulate(work_of(model), {"x": x, "y": y})
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        session.apply()
        session.close()
        return model

    head = lambda model: torch.optim.SGD(model[5].parameters(), lr=0.5)
    full, half = one(head, "fp32"), one(head, "fp16")
    for name, value in full.state_dict().items():
        assert torch.allclose(value, half.state_dict()[name], atol=1e-4), name  # fp16's rounding


def test_a_batch_of_a_window_that_fails_leaves_the_window_as_it_was() -> None:
    model = mlp()
    optimizer = SGD(model)
    session = Session(model, optimizer, config(4, precision="fp16"))
    x, y = vectors(12)
    session.accumulate(work_of(model), {"x": x, "y": y})
    grads = [param.grad for param in model.parameters()]
    with pytest.raises(IndexError):  # a class that there is not
        session.accumulate(work_of(model), {"x": x, "y": y + 10})
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    session.apply()
    assert session.close().samples_seen == 12


def test_gradients_that_were_there_before_the_first_step_are_kept() -> None:
    pair = Pair(mlp, ADAMW)
    x, y = vectors(12)
    for model in (pair.plain, pair.model):
        F.cross_entropy(model(x), y).backward()
    F.cross_entropy(pair.plain(x), y).backward()
    pair.plain_optimizer.step()
    session = pair.session(micro=12)
    session.accumulate(work_of(pair.model), {"x": x, "y": y})
    session.apply()
    session.close()
    assert differences(pair.model, pair.plain) == []


def test_weights_that_an_optimizer_is_given_later_are_stepped_and_taken_back() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[5].parameters(), lr=0.1)
    session = Session(model, optimizer, config(4))
    x, y = vectors(12)
    session.accumulate(work_of(model), {"x": x, "y": y})
    session.apply()
    optimizer.add_param_group({"params": model[0].parameters()})
    optimizer.zero_grad()
    session.accumulate(work_of(model), {"x": x, "y": y})
    session.apply()
    assert sum(param.grad is not None for param in session._run.step.params) == 4  # type: ignore[union-attr]
    assert session.close().steps == 2


def test_a_value_that_was_whole_once_is_never_cut() -> None:
    model = mlp()
    session = Session(model, SGD(model), config(2))
    seen = []

    def work(values: dict[str, Any]) -> Any:
        seen.append(len(values["table"]))
        return F.cross_entropy(model(values["x"]), values["y"]), {}

    for n in (6, 4):
        x, y = vectors(n)
        session.accumulate(work, {"x": x, "table": torch.arange(4.0), "y": y})
        session.apply()
    session.close()
    assert set(seen) == {4}


def test_the_number_of_samples_is_that_of_the_batch_as_it_was_loaded() -> None:
    batch = (torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2)), ("a",) * 4
    model = nn.Linear(6, 1)
    session = Session(model, SGD(model), config(2))
    seen = []

    def work(values: dict[str, Any]) -> Any:
        seen.append(len(values["shots"]))
        return model(torch.stack(values["shots"]).flatten(1)).mean(), {}

    for shots, _ in session.batches([batch]):
        session.accumulate(work, {"shots": list(shots)})
        session.apply()
    assert set(seen) >= {2}
    assert [sum(sizes) for sizes, _ in session.close().sizes] == [4]


def test_a_loss_of_one_element_is_a_loss() -> None:
    model = mlp()
    x, y = vectors(12)
    session = Session(model, SGD(model), config(4))
    criterion = lambda out, y: F.cross_entropy(out, y).view(1)
    session.accumulate(work_of(model, criterion), {"x": x, "y": y})
    session.apply()
    assert session.close().steps == 1


def test_the_optimizers_own_step_knows_nothing_of_a_step_of_ours_that_was_skipped() -> None:
    model = mlp()
    optimizer: Any = SGD(model)
    session = Session(model, optimizer, config(4))
    optimizer.found_inf = torch.ones(())
    F.cross_entropy(model(vectors(4)[0]), vectors(4)[1]).backward()
    session.apply()
    assert not hasattr(optimizer, "found_inf")


def test_the_policy_knows_that_a_scaler_of_their_own_finds_its_place() -> None:
    model = mlp()
    scaler = torch.amp.GradScaler("cpu")
    session = Session(model, SGD(model), config(), own_precision=True, scaler=scaler)
    session.accumulate(work_of(model), dict(zip("xy", vectors(12), strict=True)))
    assert session._run.state.sizing.settings.loss_scaling  # type: ignore[union-attr]
    session.close()


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.float32])
def test_targets_that_are_made_whole_numbers_on_their_way_are_found(kind: torch.dtype) -> None:
    x, y = vectors(12)
    y = torch.where(torch.arange(12) % 3 == 0, 9, y)
    criterion = lambda out, y: F.cross_entropy(out, y.long().view(-1), ignore_index=9)
    pair = Pair(mlp, SGD, (x, y), dtype=torch.float64)
    batch = {"x": pair.data[0], "y": y.to(kind).view(12, 1), "other": y.clone().view(3, 4)}
    _stepped(pair.plain_optimizer, criterion(pair.plain(batch["x"]), batch["y"]))
    session = pair.session(micro=5)
    session.accumulate(work_of(pair.model, criterion), batch)
    session.apply()
    assert session._run.step.reduction.path == ("y",)  # type: ignore[union-attr]
    session.close()
    assert pair.apart() < 1e-12
