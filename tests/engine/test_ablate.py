"""`hm.ablate`: every variant from the same beginning, and nothing of the person's lost."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import by_hand, cnn, differences, images, mlp, vectors
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic import ablation as ablations
from hybrid_magic.engine import rehearse, rewind
from hybrid_magic.engine.control import RunControl
from hybrid_magic.records import Record, StepRecord, TrialRecord, TrialStartRecord


def loader(n: int = 96, batch: int = 16, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*vectors(n)), batch_size=batch, shuffle=True, **options)


def state(model: Any, optimizer: Any) -> Any:
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Seen:
    """The batches that a step was given, a list a run."""

    def __init__(self) -> None:
        self.runs: list[list[torch.Tensor]] = []

    def sink(self, record: Record) -> None:
        if isinstance(record, TrialStartRecord):
            self.runs.append([])

    def step(self, model: Any, batch: Any) -> torch.Tensor:
        x, y = batch
        if model.training:
            self.runs[-1].append(x.detach().clone())
        return F.cross_entropy(model(x), y)


def test_every_variant_of_a_seed_sees_the_same_samples_in_the_same_order() -> None:
    seen = Seen()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    model = mlp()
    hm.ablate(
        model, loader(generator=generator), seen.step, variants=["fp32", "ga"], seeds=[0, 1],
        precision="fp32", epochs=2, sink=seen.sink,
    )  # fmt: skip
    warmed, first, cut, other_cut, other = seen.runs[1], *seen.runs[2:6]
    assert len(seen.runs) == 6  # two of them warm up
    assert sum(map(len, warmed)) < sum(map(len, first))
    assert torch.equal(torch.cat(first), torch.cat(cut))
    assert torch.equal(torch.cat(other), torch.cat(other_cut))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    assert len(cut) == 4 * len(first)
    assert torch.equal(generator.get_state(), before)


def test_the_fp32_variant_ends_where_the_plain_loop_does() -> None:
    model, kept = cnn(), DataLoader(TensorDataset(*images(64)), batch_size=16)
    other = copy.deepcopy(model)
    ends: list[Any] = []

    def sink(record: Record) -> None:
        if isinstance(record, TrialRecord):
            ends.append(copy.deepcopy(model))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    hm.ablate(model, kept, optimizer=optimizer, variants=["fp32"], epochs=2, sink=sink)
    torch.manual_seed(0)
    by_hand(other, kept, torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9), epochs=2)
    assert differences(ends[0], other) == []


def test_a_variant_against_itself_shows_the_same_accuracy_and_loss() -> None:
    model = mlp(dropout=0.1)
    variants = ["fp32", "ga", "fp32+ga"]  # the last two are the same thing
    found = hm.ablate(model, loader(), val=loader(40), variants=variants, seeds=3, epochs=2)
    one, other = (
        [(t.seed, t.accuracy, t.loss, t.steps) for t in found.trials if t.variant == name]
        for name in variants[1:]
    )
    assert sorted(one) == sorted(other)
    assert len(one) == 3


def test_the_order_of_the_variants_rotates_over_the_seeds() -> None:
    found = hm.ablate(mlp(), loader(), variants=["fp32", "mp", "ga"], seeds=[4, 5, 9])
    assert [(t.seed, t.variant) for t in found.trials] == [
        (4, "mp"), (4, "ga"), (4, "fp32"),
        (5, "ga"), (5, "fp32"), (5, "mp"),
        (9, "fp32"), (9, "mp"), (9, "ga"),
    ]  # fmt: skip
    assert [row.name for row in found.variants] == ["fp32", "mp", "ga"]


def test_the_model_ends_as_the_last_hybrid_run_left_it() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    after: list[Any] = []

    def sink(record: Record) -> None:
        if isinstance(record, TrialRecord) and record.variant == "hybrid":
            after.append(state(model, optimizer))

    hm.ablate(model, loader(), optimizer=optimizer, variants=["hybrid", "fp32"], seeds=2, sink=sink)
    assert len(after) == 2
    assert same(after[1], state(model, optimizer))
    assert not same(after[0], state(model, optimizer))


@pytest.mark.parametrize("options", [{"restore": True}, {"variants": ["fp32", "mp"]}])
def test_else_it_ends_untouched_scheduler_modes_and_random_state_too(options: Any) -> None:
    model = cnn()
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(images(4)[0]).sum().backward()
    optimizer.step()  # it has state that must come back
    optimizer.zero_grad()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    data = DataLoader(TensorDataset(*images(48)), batch_size=16, shuffle=True)
    before, rate, drawn = state(model, optimizer), scheduler.state_dict(), torch.get_rng_state()
    rate = copy.deepcopy(rate)
    hm.ablate(model, data, optimizer=optimizer, scheduler=scheduler, epochs=2, **options)
    assert same(before, state(model, optimizer))
    assert scheduler.state_dict() == rate
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


class Limited(torch.nn.Module):
    """A model that runs out of memory above so many samples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.inner = most, mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.inner(x)


def test_a_variant_that_runs_out_of_memory_is_a_row_and_the_others_go_on() -> None:
    found = hm.ablate(
        Limited(8), loader(), variants=["fp32", "ga", "hybrid"], seeds=2, precision="auto"
    )
    assert [row.outcome for row in found.variants] == ["oom", "finished", "finished"]
    assert {t.outcome for t in found.trials if t.variant == "fp32"} == {"oom"}
    assert found.variants[1].seconds is not None
    assert found.variants[1].speedup is None  # there is nothing to compare it with
    assert "fp32: ran out of memory" in found.verdicts[0]
    assert "out of memory" in found.table()
    assert found.outcome == "finished"


def test_a_loader_batch_that_cannot_be_cut_any_smaller_is_out_of_memory_too() -> None:
    found = hm.ablate(Limited(0), loader(), variants=["fp32", "hybrid"])
    assert [row.outcome for row in found.variants] == ["oom", "oom"]


def test_what_auto_precision_comes_to_is_measured_once_for_all_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = iter(["bf16", "fp32", "bf16", "fp32"])
    real = rehearse.choose_precision
    asked: list[str] = []

    def choose(ready: Any, precision: str, first: Any, **options: Any) -> Any:
        asked.append(precision)
        return real(ready, next(chosen) if precision == "auto" else precision, first, **options)

    monkeypatch.setattr(rehearse, "choose_precision", choose)
    found = hm.ablate(mlp(), loader(), variants=["fp32", "mp", "hybrid"], seeds=2)
    assert asked.count("auto") == 1
    assert {t.precision for t in found.trials if t.variant != "fp32"} == {"bf16"}


def test_a_stop_keeps_what_is_done_and_undoes_the_open_run() -> None:
    model, control = mlp(), RunControl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = state(model, optimizer)

    def sink(record: Record) -> None:
        if isinstance(record, TrialStartRecord) and record.number == 2:
            control.ask("stop")

    found = hm.ablate(
        model, loader(), optimizer=optimizer, variants=["fp32", "ga"], control=control, sink=sink
    )
    assert [t.variant for t in found.trials] == ["fp32"]
    assert found.outcome == "stopped"
    assert [row.outcome for row in found.variants] == ["finished", "none"]
    assert same(before, state(model, optimizer))
    assert hm.last_ablation is found


def test_an_interrupt_keeps_what_is_done_and_goes_through() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    begun: list[int | None] = []

    def sink(record: Record) -> None:
        if isinstance(record, TrialStartRecord):
            begun.append(record.number)
        if isinstance(record, StepRecord) and begun[-1] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hm.ablate(model, loader(), variants=["fp32", "ga"], sink=sink)
    assert hm.last_ablation is not None
    assert hm.last_ablation.outcome == "interrupted"
    assert [t.variant for t in hm.last_ablation.trials] == ["fp32"]
    assert same(before, model.state_dict())


def test_a_second_interrupt_while_things_are_put_back_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    real, strikes = rewind._module, [True]

    def struck(given: Any) -> Any:
        put_back = real(given)

        def interrupted() -> None:
            ending = getattr(hm.last_ablation, "outcome", None) == "interrupted"
            if ending and strikes and strikes.pop():
                raise KeyboardInterrupt
            put_back()

        return interrupted

    def sink(record: Record) -> None:
        done = getattr(hm.last_ablation, "trials", ())
        if isinstance(record, StepRecord) and len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(rewind, "_module", struck)
    monkeypatch.setattr(ablations, "last_ablation", None)
    with pytest.raises(KeyboardInterrupt):
        hm.ablate(model, loader(), variants=["fp32", "ga"], sink=sink)
    assert strikes == []
    assert same(before, model.state_dict())


def test_an_error_in_the_persons_step_goes_through_with_the_model_as_it_was() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())

    def step(model: Any, batch: Any) -> torch.Tensor:
        raise ZeroDivisionError("theirs")

    with pytest.raises(ZeroDivisionError, match="theirs"):
        hm.ablate(model, loader(), step, variants=["fp32"])
    assert same(before, model.state_dict())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variants": ["fast"]}, "variants is"),
        ({"variants": ["mp+fp32"]}, "one of fp32, tf32, mp at most"),
        ({"variants": ["mp"], "precision": "fp32"}, "leaves nothing for the variant mp"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": 2, "seed": 3}, "--seed 3 and --seeds"),
        ({"epoch": 2}, "did you mean epochs"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(options: Any, said: str) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(hm.HybridMagicError, match=said):
        hm.ablate(model, loader(), **options)
    assert same(before, model.state_dict())


def test_what_can_be_read_only_once_is_refused() -> None:
    with pytest.raises(hm.HybridMagicError, match="read only once"):
        hm.ablate(mlp(), iter(list(loader())))


def test_strict_fp32_and_tf32_set_the_switches_for_their_runs_only() -> None:
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn
    found = products.allow_tf32, convolutions.allow_tf32
    during: dict[str, set[Any]] = {}
    now: list[str] = []

    def sink(record: Record) -> None:
        if isinstance(record, TrialStartRecord):
            now[:] = [record.variant]
        elif isinstance(record, StepRecord):
            seen = during.setdefault(now[0], set())
            seen.add((products.allow_tf32, convolutions.allow_tf32))

    hm.ablate(mlp(), loader(), variants=["fp32", "tf32", "mp"], sink=sink)
    assert during == {"fp32": {(False, False)}, "tf32": {(False, True)}, "mp": {found}}
    assert (products.allow_tf32, convolutions.allow_tf32) == found


def test_an_ablation_comes_back_from_its_json_and_says_the_same(tmp_path: Any) -> None:
    found = hm.ablate(mlp(), loader(), val=loader(40), variants=["fp32", "hybrid"], seeds=3)
    found.save(tmp_path / "a.json")
    back = hm.load_ablation(tmp_path / "a.json")
    assert back.table() == found.table()
    assert back.variants == found.variants
    held = json.loads((tmp_path / "a.json").read_text())
    assert held["variants"][1]["seconds"]["n"] == 3
    assert held["environment"]["torch"] == torch.__version__
    for suffix, part in ((".csv", "hybrid,2"), (".tex", r"\toprule"), (".html", "<table")):
        found.save(tmp_path / f"a{suffix}")
        assert part in (tmp_path / f"a{suffix}").read_text()
    with pytest.raises(hm.HybridMagicError, match="wanted one of .json"):
        found.save(tmp_path / "a.xlsx")


def test_ablations_of_other_seeds_are_joined_and_the_same_seed_is_refused() -> None:
    one = hm.ablate(mlp(), loader(), variants=["fp32", "ga"], seeds=[0])
    other = hm.ablate(mlp(), loader(), variants=["ga", "fp32"], seeds=[1])
    both = one + other
    assert both.names == ("fp32", "ga")
    assert both.seeds == [0, 1]
    assert both.variants[1].seconds is not None
    assert both.variants[1].seconds.n == 2
    with pytest.raises(hm.HybridMagicError, match="both ablations hold fp32 with seed 0"):
        _ = one + one
