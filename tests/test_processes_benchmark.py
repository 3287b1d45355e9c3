"""The benchmark of several processes: its accounts by hand, and a tiny run of all of it."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from benchmarks import processes, processes_ranks
from benchmarks import processes_ways as ways
from hybrid_magic.engine.ranks import Ranks
from hybrid_magic.engine.summing import Sum

ROOT = pathlib.Path(__file__).parent.parent
WARM = ways.WARM


@pytest.fixture
def spent(monkeypatch):
    """A clock for the listening that goes on only where it is told to."""
    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    monkeypatch.setattr(processes_ranks, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return spend


def test_each_collective_is_heard_once_under_what_it_is_for(monkeypatch, spent):
    def gradients(self):
        spent(2.0)  # copies
        return [self.ranks.done(work) for work in [self.ranks.add_up() for _ in range(2)]]

    for name, seconds in {"add_up": 0.5, "done": 1.0, "meet": 4.0, "most": 8.0}.items():
        monkeypatch.setattr(Ranks, name, lambda *_, s=seconds: spent(s))
    monkeypatch.setattr(Sum, "gradients", gradients)
    own = dict(vars(Ranks)), dict(vars(Sum))
    ranks, summing = object.__new__(Ranks), object.__new__(Sum)
    summing.ranks = ranks

    def worst():
        ranks.most()

    def somewhere_else():
        ranks.done(ranks.add_up())

    clock = ways.Clock(3)
    with processes_ranks.overheard(clock) as told:
        ranks.meet()
        summing.gradients()
        clock()
        worst()
        somewhere_else()
    assert told == [
        (0, "meeting", True, 4.0),
        *[(0, "gradients", True, 0.5)] * 2,
        *[(0, "gradients", False, 1.0)] * 2,
        (0, "buckets: copies", True, 2.0),
        (1, "facts for the policy", True, 8.0),
        (1, "somewhere else", True, 0.5),
        (1, "somewhere else", False, 1.0),
    ]
    assert (dict(vars(Ranks)), dict(vars(Sum))) == own


def test_what_is_told_counts_from_the_first_timed_step_to_the_last():
    def heard(*seconds):
        return [(WARM - 1 + at, "meeting", True, took) for at, took in enumerate(seconds)]

    found = processes_ranks.by_kind([heard(9, 1, 4, 9), heard(9, 3, 2, 9)], steps=2)
    assert found == {"meeting": {"calls": 1.0, "mean_us": 2.5e6, "last_us": 1.5e6}}


def test_processes_that_tell_different_things_are_no_measurement():
    one, other = [(WARM, "meeting", True, 1.0)], [(WARM, "gradients", True, 1.0)]
    with pytest.raises(ValueError, match="the processes told different things; wanted the same"):
        processes_ranks.by_kind([one, other], steps=1)


@pytest.mark.parametrize(("planned", "cpu"), [(WARM + 3, 2), (99, None)])
def test_the_first_steps_are_outside_the_clock(monkeypatch, planned, cpu):
    ticks, used = iter([0, 0, 0, 0, 100, 110, 120, 140]), iter([1, 7])
    fake = types.SimpleNamespace(perf_counter=lambda: next(ticks), process_time=lambda: next(used))
    monkeypatch.setattr(ways, "time", fake)
    clock = ways.Clock(planned)
    for _ in range(WARM + 3):
        clock()
    assert clock.step() == (pytest.approx(40 / 3), cpu)


def made_up(times, kinds=None):
    """Return what the processes would have found in one round for each of `times`."""
    rounds = [
        {"timed": each, "heard": {way: kinds or {} for way in processes_ranks.HEARD}}
        for each in times
    ]
    equal = {ways.OURS: {"differs_by": 2e-16, "alike": True}}
    equal[ways.DDP] = {"differs_by": 0.0, "alike": False}
    size = {"batch": 64, "steps": 10, "gradient_bytes": 2**21}
    return {"work": "made up", **size, "rounds": rounds, "equal": equal}


def test_ratios_are_formed_within_a_round_and_say_which_way_they_go():
    step = dict.fromkeys(ways.TIMED, 1.0)
    step |= {ways.OURS: 3.0, ways.DDP: 2.0, ways.ONE: 4.0, ways.OURS_ALONE: 4.5, ways.ALONE: 3.0}
    times = [
        {way: {"wall_s": n * s, "cpu_s": 2 * n * s} for way, s in step.items()}
        for n in (1, 10, 1000)  # a machine that slows down
    ]
    kinds = {"meeting": {"calls": 1.0, "mean_us": 300.0, "last_us": 200.0}}
    found = processes.summarised(made_up(times, kinds))
    for name, value in {
        "hybrid_over_ddp": 1.5, "hybrid_over_ddp_cpu": 1.5, "list_over_ddp": 0.5, "overlap": 0.5,
        "hybrid_speedup": 1.5, "ddp_speedup": 1.5,
    }.items():  # fmt: skip
        assert (found[name].low, found[name].value, found[name].high) == (value,) * 3
    assert found["over_ddp_us"].value == pytest.approx(1e7)
    assert found["alone_us"].value == pytest.approx(1.5e7)
    assert [row["way"] for row in found["told"]] == list(processes_ranks.HEARD)
    plan = {"rounds": 3}
    text = processes.page(
        {"works": [found], "plan": plan, "processes": 2, "environment": {"command": "it"}}
    )
    assert "| made up | 64 | 2e+04 | 1.500 [1.500, 1.500] |" in text
    assert "| hybrid | meeting | 1.00 | 300 [300, 300] | 200 [200, 200] |" in text
    assert "| made up | hybrid | 2.0e-16 | yes |" in text
    assert "| made up | DDP | equal | **no** |" in text


@pytest.mark.parametrize("n", ["1", "3"])
def test_a_number_of_processes_that_shares_unevenly_is_refused(n, capsys):
    with pytest.raises(SystemExit):
        processes.main(["--processes", n])
    assert f"{n} processes; wanted 2 or more that share steps" in capsys.readouterr().err


def test_a_process_that_fails_ends_the_program_with_its_code(monkeypatch, tmp_path):
    ended = types.SimpleNamespace(returncode=3)
    monkeypatch.setattr(processes.subprocess, "run", lambda *_, **__: ended)
    saved = tmp_path / "processes.json"
    with pytest.raises(SystemExit) as told:
        processes.main(["--quick", "--json", str(saved)])
    assert told.value.code == 3
    assert not saved.exists()


def test_the_processes_program_run_by_itself_says_how_to_run_it():
    with pytest.raises(SystemExit, match="one process; wanted several; run python -m benchmarks"):
        processes_ranks.main("nowhere", "{}")


@pytest.mark.thorough
def test_two_processes_train_every_way_to_the_same_weights(tmp_path):
    saved = tmp_path / "processes.json"
    shape = ["--quick", "--rounds", "1", "--work", "0"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.processes", *shape, "--json", str(saved)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(saved.read_text())
    (work,) = found["works"]
    assert {"machine", "torch", "seed", "command", "load after"} <= set(found["environment"])
    assert set(work["step_ms"]) == set(ways.TIMED)
    assert set(work["equal"]) == set(ways.TIMED) - {ways.ALONE}
    assert all(each["alike"] for each in work["equal"].values())
    # sums of few float64 values in another order
    assert max(each["differs_by"] for each in work["equal"].values()) < 1e-12
    calls = {(row["way"], row["kind"]): row["calls"] for row in work["told"]}
    every_step = {("hybrid", kind) for kind in ("meeting", "gradients", "buckets: copies")}
    every_step.add((ways.LISTED, "random states"))
    every_step.add((ways.AS_IT_COMES, "facts for the policy"))
    assert all(calls[key] == pytest.approx(1.0) for key in every_step), calls
    assert saved.with_suffix(".md").read_text().strip() == ended.stdout.strip()
    assert str(tmp_path) not in ended.stdout
