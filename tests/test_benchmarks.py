"""The benchmark programs run, on tiny sizes, and what they measure with measures what it says."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from benchmarks import accuracy, data, measure, models, trials

ROOT = pathlib.Path(__file__).parent.parent


def run(program: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", program, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.thorough
def test_the_loop_benchmark_writes_every_field_and_finds_the_same_weights(tmp_path):
    saved = tmp_path / "loop.json"
    printed = run(
        "benchmarks.loop", "--steps", "100", "--blocks", "1", "--work", "1", "--json", str(saved)
    )
    found = json.loads(saved.read_text())
    assert {"machine", "threads", "python", "torch", "hybrid_magic", "seed", "command"} <= set(
        found["environment"]
    )
    rows = {row["measure"]: row for row in found["rows"]}
    assert rows["same weights, bit by bit"]["met"] is True
    assert set(rows["CPU time, ratio"]["ours"]) == {"value", "low", "high", "n"}
    assert rows["Python calls per step"]["by_hand"] > 100
    assert rows["host reads per step"]["by_hand"] == 0
    assert any(name.startswith("as it comes") for name in rows)
    assert any(name.startswith("last tenth") for name in rows)
    assert saved.with_suffix(".md").read_text().strip() == printed.strip()
    assert str(tmp_path) not in printed


@pytest.mark.thorough
def test_the_cell_benchmark_finds_the_same_weights_and_numbers(tmp_path):
    saved = tmp_path / "own_loop.json"
    shape = ("--steps", "100", "--blocks", "1", "--work", "1")
    run("benchmarks.own_loop", *shape, "--json", str(saved))
    uncut, cut = json.loads(saved.read_text())["rows"]
    assert [uncut["cell"], cut["cell"]] == ["uncut", "in four micro-batches"]
    assert uncut["weights_differ_by"] == 0.0
    assert uncut["same_numbers"] is True
    assert 0 < cut["weights_differ_by"] < 1e-5
    assert "| MLP, ready batches | uncut | 1 |" in saved.with_suffix(".md").read_text()


@pytest.fixture
def tiny(monkeypatch):
    """The CNN of the accuracy benchmark on 96 made-up images, one epoch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 3, 32, 32, generator=generator)
    y = torch.randint(0, 20, (96,), generator=generator)
    split = functools.cache(lambda: data.Split(x, y, x, y))
    lr = {"sgd": 0.02, "adamw": 1e-3}
    works = {"cnn": trials.Work("cnn", split, lambda: models.batchnorm_cnn(width=2), 1, lr)}
    monkeypatch.setattr(accuracy, "WORKS", works)
    return works["cnn"]


def test_the_accuracy_benchmark_trains_every_variant_and_reports_it(tiny, tmp_path, capsys):
    accuracy.main(["--seeds", "2", "--results", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "accuracy.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(trials.OPTIMIZERS) * len(trials.VARIANTS)
    for row in rows:
        assert 0 <= row["accuracy"] <= 100
        assert row["optimizer_steps"] > 0
        assert row["cpu_s"] > 0
    page = (tmp_path / "accuracy.md").read_text()
    assert page.count("| hybrid |") == len(trials.OPTIMIZERS)
    assert str(tmp_path) not in page
    capsys.readouterr()


def test_the_fixed_variant_is_the_plain_loop(tiny):
    plain = trials.train(tiny, "adamw", "plain", 0, 2)
    fixed = trials.train(tiny, "adamw", "fixed", 0, 2)
    for name in ("accuracy", "test_loss", "optimizer_steps"):
        assert fixed[name] == plain[name]


def test_an_interrupted_accuracy_benchmark_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    log = tmp_path / "accuracy.jsonl"
    arguments = ["--seeds", "1", "--results", str(tmp_path)]
    accuracy.main([*arguments, "--variant", "plain"])
    log.write_text(log.read_text() + '{"work": "cnn", "opt')  # killed while it wrote
    trained = []

    def train(_work, optimizer, variant, _seed, _epochs):
        trained.append((optimizer, variant))
        return {"accuracy": 1.0, "optimizer_steps": 1, "cpu_s": 1.0, "wall_s": 1.0}

    monkeypatch.setattr(accuracy, "train", train)
    accuracy.main(arguments)
    assert sorted(trained) == [(o, v) for o in ("adamw", "sgd") for v in ("fixed", "hybrid")]
    accuracy.main(arguments)
    assert len(trained) == 4


def row(variant, seed, reached, cpu=1.0):
    key = {"work": "cnn", "optimizer": "sgd", "variant": variant, "seed": seed}
    return key | {"accuracy": reached, "optimizer_steps": 10, "cpu_s": cpu, "wall_s": cpu}


@pytest.mark.parametrize(("loss", "within"), [(0.5, True), (2.0, False)])
def test_the_verdict_is_the_plain_loop_s_own_seed_spread(loss, within):
    plain = [row("plain", seed, 40 + seed) for seed in range(3)]  # standard deviation 1
    hybrid = [row("hybrid", seed, 40 + seed - loss, cpu=0.5) for seed in range(3)]
    lines = {line["variant"]: line for line in accuracy.summarise(plain + hybrid)}
    assert lines["hybrid"]["within_spread"] is within
    assert lines["hybrid"]["difference"].value == pytest.approx(-loss)
    assert lines["hybrid"]["cpu_to_plain"].value == 0.5
    assert lines["hybrid"]["cpu_to_fixed"] is None


def test_calls_are_counted_exactly_on_every_thread():
    import threading

    def work(n):
        def leaf():
            pass

        def several():
            for _ in range(n):
                leaf()

        several()
        thread = threading.Thread(target=several)
        thread.start()
        thread.join()

    few, more = (measure.count_calls(lambda n=n: work(n)) for n in (10, 20))
    assert more - few == 20


def test_every_read_of_a_value_is_counted_and_the_tensor_left_as_it_was():
    tensor = torch.ones(())
    own = dict(torch.Tensor.__dict__)

    def work():
        _ = float(tensor), int(tensor), bool(tensor)
        _ = tensor.item(), tensor.tolist(), tensor.cpu()
        (tensor + tensor).sum()  # reads nothing

    assert measure.count_host_reads(work) == 6
    assert dict(torch.Tensor.__dict__) == own


def test_blocks_take_turns_in_a_rotating_order():
    order = []
    prepare = {name: lambda name=name: lambda: order.append(name) for name in "ab"}
    timings = measure.paired_blocks(prepare, 3, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(found) for found in timings.values()] == [3, 3]


def test_an_interval_holds_its_value_and_repeats():
    values = [1.0, 1.1, 0.9, 1.3, 1.0]
    found = measure.bootstrap(values)
    assert found == measure.bootstrap(values)
    assert found.low <= found.value == 1.0 <= found.high
    assert found.n == 5


def test_a_digest_changes_with_any_file(tmp_path):
    one, two = tmp_path / "a.py", tmp_path / "b.py"
    one.write_text("x")
    two.write_text("y")
    before = measure.digest([one, two])
    assert before == measure.digest([two, one])
    two.write_text("z")
    assert measure.digest([one, two]) != before


def test_the_superclasses_are_the_data_set_s():
    assert torch.tensor(data.SUPERCLASS).bincount().tolist() == [5] * 20
    assert data.words("It's <br />GREAT &amp; long!") == ["it's", "great", "long", "!"]
