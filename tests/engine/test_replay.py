"""P9: a run can be repeated from its record: every size, every learning rate, every bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import cnn, differences, images, mlp, vectors
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine import precision as precisions
from hybrid_magic.engine.control import RunControl
from hybrid_magic.engine.sizing import Sizing
from hybrid_magic.policy.facts import Settings
from hybrid_magic.run import Run
from hybrid_magic.sizes import StepSizes


class Script(RunControl):
    """Asks at the steps given: `Script({3: [("grow", None)], 5: [("accum", 3)]})`."""

    def __init__(self, asked: dict[int, list[tuple[str, Any]]]) -> None:
        super().__init__(self._ask)
        self._asked, self._step = asked, 0

    def _ask(self) -> None:
        self._step += 1
        self.mail.extend(self._asked.get(self._step, []))


class OutOfMemory:
    """A step that runs out of memory as a device with room for `room` samples does."""

    def __init__(self, room: int = 10**9, **rooms: int) -> None:
        self.rooms, self.calls, self.room = rooms, 0, room

    def __call__(self, model: Any, batch: Any) -> Any:
        x, y = batch
        self.calls += 1
        loss = F.cross_entropy(model(x), y)
        room = self.rooms.get(f"call{self.calls}", self.room)
        if model.training and len(x) > room:
            raise torch.OutOfMemoryError(f"no room for {len(x)} samples")
        return loss


def state_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [
        {name: value.clone() if torch.is_tensor(value) else value for name, value in held.items()}
        for held in optimizer.state.values()
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def steps_of(run: Run) -> list[tuple[Any, ...]]:
    return [
        (r.step, r.samples_seen, r.loss, r.lr, r.global_batch_size, r.microbatch_size,
         r.accumulation_steps, r.skipped)
        for r in run.history
    ]  # fmt: skip


class Trial:
    """One job, run as often as wanted from the same beginning."""

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        loader: Callable[[], Any],
        make_optimizer: Callable[[Any], torch.optim.Optimizer],
        step: Callable[[], Any] = lambda: None,
        **options: Any,
    ) -> None:
        self.make = make_model, loader, make_optimizer, step
        self.options = {"precision": "fp32", "seed": 5, **options}

    def run(self, **more: Any) -> tuple[Run, nn.Module, list[Any]]:
        make_model, loader, make_optimizer, step = self.make
        model = make_model()
        optimizer = make_optimizer(model.parameters())
        run = hm.train(model, loader(), step(), optimizer=optimizer, **(self.options | more))
        return run, model, state_of(optimizer)

    def again(self, recorded: Any, replay: Run, **more: Any) -> Run:
        """Replay and compare all of it with what was recorded."""
        run, model, state = recorded
        options = {"batch": "adaptive", "accum": "auto", "micro": "auto"} | more
        found, fresh, fresh_state = self.run(replay=replay, **options)
        assert list(found.sizes) == list(run.sizes)
        assert repr(steps_of(found)) == repr(steps_of(run))  # a NaN is like another
        assert differences(model, fresh) == []
        assert same(state, fresh_state)
        assert [r.retries for r in found.history] == [0] * len(found.history)
        return found


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3)


def shuffled(data: Any, n: int, **more: Any) -> Callable[[], Any]:
    return lambda: DataLoader(TensorDataset(*data(n)), batch_size=8, shuffle=True, **more)


CONTROLS = {
    2: [("grow", None)],
    4: [("grow", None)],
    6: [("accum", 3)],
    8: [("lr_multiplier", 0.5)],
    9: [("accum", None)],
    11: [("shrink", None)],
    13: [("lr_multiplier", None), ("max_batch", 9)],
}


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize(
    ("model", "data"), [(lambda: mlp(dropout=0.1), vectors), (cnn, images)], ids=["mlp", "cnn"]
)
def test_what_was_asked_by_hand_is_repeated(
    model: Any, data: Any, make_optimizer: Any, tmp_path: Any
) -> None:
    trial = Trial(model, shuffled(data, 149), make_optimizer, epochs=2)
    recorded = trial.run(control=Script(CONTROLS))
    run = recorded[0]
    assert len({r.global_batch_size for r in run.history}) > 3
    assert len({r.accumulation_steps for r in run.history}) > 1
    assert len({r.lr for r in run.history}) > 3
    again = trial.again(recorded, run)
    trial.again(recorded, again)  # a replay of a replay
    run.save(tmp_path / "run.jsonl")
    trial.again(recorded, hm.load_run(tmp_path / "run.jsonl"))


@pytest.mark.parametrize(
    ("model", "data"), [(lambda: mlp(dropout=0.1), vectors), (cnn, images)], ids=["mlp", "cnn"]
)
def test_sizes_that_ran_out_of_memory_are_not_tried_again(model: Any, data: Any) -> None:
    trial = Trial(model, shuffled(data, 90), adamw, lambda: OutOfMemory(room=5), batch="fixed")
    recorded = trial.run()
    assert sum(r.retries for r in recorded[0].history) > 0
    trial.again(recorded, recorded[0])


def test_a_step_that_failed_once_is_repeated_as_it_was_taken() -> None:
    trial = Trial(lambda: mlp(dropout=0.1), shuffled(vectors, 90), sgd, batch="fixed", micro=8)
    faulty = OutOfMemory(call3=4, call9=2)
    model = mlp(dropout=0.1)
    optimizer = sgd(model.parameters())
    loader = shuffled(vectors, 90)()
    run = hm.train(model, loader, faulty, optimizer=optimizer, **trial.options)
    assert [r.retries for r in run.history].count(1) == 2
    trial.again((run, model, state_of(optimizer)), run)


def test_a_batch_that_grew_by_itself_is_repeated(tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 12, generator=generator)
    y = torch.randint(0, 5, (4000,), generator=generator)  # nothing but noise: it wants to grow
    trial = Trial(
        mlp,
        lambda: DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
        lambda p: torch.optim.SGD(p, lr=0.01),
        max_batch=32,
        policy="stability",
        efficiency=0.0,
    )
    recorded = trial.run()
    assert recorded[0].changes
    assert max(r.global_batch_size for r in recorded[0].history) > 4
    assert len({r.accumulation_steps for r in recorded[0].history}) > 1  # cut to measure the noise
    recorded[0].save(tmp_path / "run.jsonl")
    trial.again(recorded, hm.load_run(tmp_path / "run.jsonl"))


def test_skipped_steps_are_skipped_again() -> None:
    def loader() -> Any:
        x, y = vectors(101)
        x[17] = x[60] = math.nan
        return DataLoader(TensorDataset(x, y), batch_size=8)

    trial = Trial(mlp, loader, adamw, epochs=2)
    recorded = trial.run(control=Script({1: [("grow", None)], 5: [("grow", None)]}))
    assert recorded[0].skipped_steps == 4
    again = trial.again(recorded, recorded[0])
    assert again.skipped_steps == 4


def batches_of(sizes: list[int]) -> list[Any]:
    x, y = vectors(sum(sizes))
    ends = list(itertools.accumulate(sizes))
    return [(x[end - n : end], y[end - n : end]) for n, end in zip(sizes, ends, strict=True)]


class Unsized(Sampler[int]):
    """A sampler that cannot say how many samples it has."""

    def __iter__(self) -> Any:
        return iter(torch.randperm(77).tolist())


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(lambda: batches_of([8] * 9 + [5]), id="list"),
        pytest.param(lambda: batches_of([8, 3, 8, 11, 8, 1, 7, 8, 2]), id="ragged"),
        pytest.param(lambda: batches_of([8] * 8 + [5, 3]), id="whole-in-two"),
        pytest.param(shuffled(vectors, 77, num_workers=2), id="workers"),
        pytest.param(shuffled(vectors, 77, drop_last=True), id="drop_last"),
        pytest.param(
            lambda: DataLoader(TensorDataset(*vectors(77)), batch_size=8, sampler=Unsized()),
            id="unsized",
        ),
        pytest.param(
            lambda: DataLoader(
                TensorDataset(*vectors(77)), batch_size=8, sampler=Unsized(), num_workers=1
            ),
            id="unsized-workers",
        ),
    ],
)
def test_every_kind_of_loader_is_repeated(loader: Any) -> None:
    trial = Trial(mlp, loader, adamw, epochs=3)
    asked: dict[int, Any] = {
        2: [("grow", None)],
        7: [("grow", None)],
        12: [("accum", 2)],
        16: [("shrink", None)],
    }
    recorded = trial.run(control=Script(asked))
    assert len({r.global_batch_size for r in recorded[0].history}) > 2
    assert len({r.accumulation_steps for r in recorded[0].history}) > 1
    trial.again(recorded, recorded[0])


def test_a_longer_replay_says_so_and_goes_on_as_asked() -> None:
    short = Trial(mlp, shuffled(vectors, 64), sgd, steps=5)
    run, _, _ = short.run(control=Script({2: [("grow", None)]}))
    longer = Trial(mlp, shuffled(vectors, 64), sgd, steps=9)
    again, _, _ = longer.run(replay=run)
    assert list(again.sizes)[:5] == list(run.sizes)
    assert [n for n in again.notes if "replayed" in n] == [
        "replayed all 5 steps; the next are as asked"
    ]
    assert again.steps == 9
    same_length, _, _ = short.run(replay=run)
    assert not [n for n in same_length.notes if "replayed" in n]


def test_after_the_recorded_steps_the_batch_is_steered_again() -> None:
    steady = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # makes this policy grow
    trial = Trial(mlp, shuffled(vectors, 1600), steady, policy="stability", efficiency=0.0, steps=3)
    run, _, _ = trial.run()
    again, _, _ = trial.run(replay=run, steps=None)
    grown = [change.step for change in again.changes if change.reason.startswith("grew 8 -> ")]
    assert len(grown) == 1
    assert grown[0] > 3


def test_a_shorter_replay_is_the_beginning_of_the_run() -> None:
    trial = Trial(mlp, shuffled(vectors, 64), sgd, epochs=3)
    run, _, _ = trial.run(control=Script({2: [("grow", None)]}))
    again, _, _ = trial.run(replay=run, epochs=None, steps=4)
    assert list(again.sizes) == list(run.sizes)[:4]
    assert steps_of(again) == steps_of(run)[:4]


@pytest.mark.parametrize(
    ("kind", "n"),
    [*itertools.product(["tensors", "list"], [1, 7, 37, 64, 73, 200]), ("workers", 73)],
)
def test_other_data_is_used_once_each_and_in_order(kind: str, n: int) -> None:
    trial = Trial(mlp, shuffled(vectors, 64), sgd)
    run, _, _ = trial.run(control=Script({1: [("grow", None)], 3: [("accum", 3)]}))
    seen: list[int] = []

    def step(model: Any, batch: Any) -> Any:
        x, index = batch
        if not torch.is_grad_enabled():
            return F.cross_entropy(model(x), index % 5)
        seen.extend(index.tolist())
        return F.cross_entropy(model(x), index % 5)

    x, _ = vectors(n)
    data: Any = TensorDataset(x, torch.arange(n))
    if kind == "list":
        loader: Any = [(x[i : i + 8], torch.arange(n)[i : i + 8]) for i in range(0, n, 8)]
    else:
        loader = DataLoader(data, batch_size=8, num_workers=2 if kind == "workers" else 0)
    model = mlp()
    again = hm.train(model, loader, step, optimizer=sgd(model.parameters()), replay=run)
    assert seen == list(range(n))
    assert again.samples_seen == n


@given(
    recorded=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=6),
    samples=st.integers(1, 60),
    pairs=st.booleans(),
)
@settings(max_examples=200)
def test_a_recorded_step_is_fitted_to_what_is_left(
    recorded: list[list[int]], samples: int, pairs: bool
) -> None:
    sizes = StepSizes()
    for cut in recorded:
        sizes.append(cut, 1.0)
    limits = Settings(base=4, max_batch=64, batch="fixed", micro=4, batch_statistics=pairs)
    sizing = Sizing(limits, lambda record: None, sizes)
    left = samples
    for cut in recorded:
        planned = sizing.plan(left).sizes
        assert sum(planned) <= left
        assert all(size > 0 for size in planned)
        if sum(cut) < left - 1 or sum(cut) == left:
            assert planned == tuple(cut)
        if pairs and left > 1:
            assert left - sum(planned) != 1 or left <= 3
            assert planned[-1] > 1 or planned == tuple(cut)
        left -= sum(planned)
        if left == 0:
            break


def test_batch_statistics_never_see_a_single_sample_of_other_data() -> None:
    trial = Trial(cnn, shuffled(images, 64), sgd)
    run, _, _ = trial.run(control=Script({1: [("grow", None)]}))
    for n in (61, 65, 69):  # 65 would be 64 and a single one
        model = cnn()
        loader = DataLoader(TensorDataset(*images(n)), batch_size=8)
        again = hm.train(model, loader, optimizer=sgd(model.parameters()), replay=run)
        assert again.samples_seen == n
        assert min(min(cut) for cut, _ in again.sizes) > 1


def test_precision_is_taken_over_unless_another_is_asked_for() -> None:
    trial = Trial(mlp, shuffled(vectors, 40), sgd, precision="bf16")
    recorded = trial.run()
    again = trial.again(recorded, recorded[0], precision="auto")
    assert again.start is not None
    assert again.start.precision == "bf16"
    other, _, _ = trial.run(replay=recorded[0], precision="fp32")
    assert other.start is not None
    assert other.start.precision == "fp32"


def test_a_precision_that_was_given_up_is_given_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "native", lambda device: ("fp16", "a test"))

    def step(model: Any, batch: Any) -> Any:
        x, y = batch
        output = model(x)
        overflow = math.inf if output.dtype == torch.float16 else 0.0
        return F.cross_entropy(output.float(), y) + overflow * output.float().square().mean()

    trial = Trial(mlp, shuffled(vectors, 160), adamw, lambda: step, precision="auto")
    recorded = trial.run()
    assert any(change.before == "fp16" for change in recorded[0].changes)
    assert 0 < recorded[0].skipped_steps < recorded[0].steps
    again = trial.again(recorded, recorded[0])
    trial.again(recorded, again)


def test_what_is_asked_by_hand_of_a_replay_is_passed_over_once_said() -> None:
    trial = Trial(mlp, shuffled(vectors, 64), sgd)
    recorded = trial.run(control=Script({2: [("grow", None)]}))
    asked: Any = {1: [("grow", None)], 2: [("lr_multiplier", 3.0)], 3: [("shrink", None)]}
    again = trial.again(recorded, recorded[0], control=Script(asked))
    assert [n for n in again.notes if "passed over" in n] == [
        "grow is passed over: a replay repeats recorded sizes"
    ]
    assert not [change for change in again.changes if change.what in ("control", "global")]


def test_a_replay_where_less_fits_shrinks_and_goes_on() -> None:
    trial = Trial(mlp, shuffled(vectors, 64), sgd, lambda: OutOfMemory(room=3))
    big, _, _ = Trial(mlp, shuffled(vectors, 64), sgd, batch="fixed", micro=8).run()
    again, _, _ = trial.run(replay=big)
    assert again.samples_seen == 64
    assert {r.global_batch_size for r in again.history} == {8}
    assert max(r.microbatch_size for r in again.history) <= 3
    assert sum(r.retries for r in again.history[2:]) == 0


@pytest.mark.parametrize(
    ("replay", "option", "words"),
    [
        ("run.jsonl", {}, "replay is a str that is no Run; wanted a Run that trained"),
        (Run({}, {}), {}, "replay is a Run without a step"),
        (None, {"micro": 4}, "--micro 4 was given and a run to replay"),
        (None, {"accum": 2}, "--accum 2 was given and a run to replay"),
        (None, {"batch": "fixed"}, "--batch fixed was given and a run to replay"),
        (None, {"batch": 64}, "--batch 64 was given and a run to replay"),
    ],
    ids=str,
)
def test_a_replay_that_cannot_be_is_told_before_anything_changes(
    replay: Any, option: dict[str, Any], words: str
) -> None:
    trial = Trial(mlp, shuffled(vectors, 24), sgd)
    model = mlp().eval()
    optimizer = sgd(model.parameters())
    recorded = trial.run()[0] if replay is None else replay
    before, last = {k: v.clone() for k, v in model.state_dict().items()}, hm.last_run
    torch.manual_seed(3)
    random = torch.get_rng_state()
    loader = shuffled(vectors, 24)()
    with pytest.raises((hm.HybridMagicError, ValueError), match=words) as raised:
        hm.train(model, loader, optimizer=optimizer, replay=recorded, seed=1, **option)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), random)
    assert hm.last_run is last
