"""The finder benchmark on tiny sizes: what it counts is what happened, whoever searched."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import hybrid_magic as hm
from benchmarks import finder, finders
from hybrid_magic.engine.device import is_out_of_memory

SMALL = {"loader_batch": 32, "batch": 1024, "memory": 1.0}


@pytest.fixture(scope="module")
def data():
    return finder.made_up(4096)


def test_a_pass_above_the_limit_runs_out_of_memory_in_the_words_of_pytorch():
    device = finders.Device(10)
    model = finders.Limited(device)
    model(torch.zeros(10, 4))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model(torch.zeros(11, 4))
    assert is_out_of_memory(caught.value)
    assert (device.passes, device.failed) == ([10, 11], [11])
    assert device.peak_bytes == device.total_bytes  # the limit is all there is
    assert device.now_s == pytest.approx(2 * finders.UNFILLED.seconds(10))


@pytest.mark.parametrize("tells", [True, False])
def test_our_account_agrees_with_the_ledger(data, tells):
    device = finders.Device(77)
    found = finders.ours(device, data, 12, tells=tells, **SMALL)
    run = hm.last_run
    assert run is not None
    assert run.steps == 12
    assert found.samples_lost == sum(device.passes) - run.samples_seen
    assert found.errors == len(device.failed) == sum(record.retries for record in run.history)
    assert found.size == run.history[-1].microbatch_size <= 77
    assert found.ran == "a step"
    assert found.batch == 1024
    assert (found.predicted is None) is not tells
    assert {record.microbatch_size for record in list(run.history)[found.steps + 2 :]} == {
        found.size
    }


def test_without_readings_only_an_error_tells_the_limit_and_its_passes_are_counted(data):
    found = finders.ours(finders.Device(77), data, 12, tells=False, **SMALL)
    assert found.errors >= 1
    assert found.passes_lost >= found.errors
    assert found.samples_lost > 77 * found.errors
    assert found.search_s > 0


def test_a_device_that_gets_full_is_not_filled(data):
    slow = finders.Clock(1e-3, 1e-4)  # 10 samples take as long as the overhead
    one = finders.ours(finders.Device(1000, slow), data, 24, **SMALL)
    line = finder.row("ours", one, slow)
    assert line["of_limit"] < 0.7
    assert line["of_speed"] > 0.95
    assert one.errors == 0


def test_a_row_names_the_cut_that_memory_allows():
    found = finders.searched(finders.Device(777), 700, "a trial", 1)
    assert finder.row("x", found, finders.UNFILLED)["fewest_cuts"] is None
    ours = dataclasses.replace(found, batch=7000)
    line = finder.row("ours", ours, finders.UNFILLED)
    assert (line["cuts"], line["fewest_cuts"]) == (10, 10)
    assert line["of_limit"] == line["of_speed"] == 700 / 777


@pytest.mark.parametrize(("size", "errors", "met"), [(950, 0, True), (940, 0, False)])
def test_a_goal_is_met_or_not(monkeypatch, size, errors, met):
    monkeypatch.setattr(finder, "GOALS", {1000: 0.95})
    device = finders.Device(1000, failed=[2000] * errors)
    line = finder.row("ours", finders.searched(device, size, "a step", 0), finders.UNFILLED)
    first, *rest = finder.goals([line])
    assert first["met"] is met
    assert all(other["met"] for other in rest)
    device.failed.append(2000)
    line = finder.row("ours", finders.searched(device, size, "a step", 0), finders.UNFILLED)
    assert not finder.goals([line])[1]["met"]


def test_the_program_writes_every_field_and_names_the_peers_that_are_missing(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(finder, "GOALS", {777: 0.93})
    monkeypatch.setattr(finder, "SAMPLES", 4096)
    monkeypatch.setattr(finder, "OURS", {"ours": (finders.UNFILLED, 8, SMALL | {"batch": 4096})})
    monkeypatch.setattr(finder, "version", lambda _: None)
    saved = tmp_path / "finder.json"
    finder.main(["--quick", "--json", str(saved)])
    printed = capsys.readouterr().out
    found = json.loads(saved.read_text())
    assert {"machine", "torch", "seed", "command", "accelerate"} <= set(found["environment"])
    assert [line["finder"] for line in found["rows"]] == ["ours"]
    assert set(found["rows"][0]) >= {"errors", "samples_lost", "restarts", "ran", "of_limit"}
    assert found["goals"][0]["goal"] == "N=777: at least 0.93 of N"
    assert "Not installed, so not run: accelerate, lightning." in printed
    assert saved.with_suffix(".md").read_text().strip() == printed.strip()
    assert str(tmp_path) not in printed


def test_the_drawn_limits_repeat_and_are_left_out_when_quick():
    assert finder.limits(quick=True) == list(finder.GOALS)
    drawn = finder.limits(quick=False)
    assert drawn == finder.limits(quick=False)
    assert len(drawn) == len(finder.GOALS) + finder.DRAWN
    assert all(finder.LEAST <= limit <= finder.MOST for limit in drawn)


def test_accelerate_shrinks_by_a_tenth_and_begins_again(data):
    pytest.importorskip("accelerate")
    found = finders.accelerate(finders.Device(777), data, 1024)
    assert (found.size, found.errors, found.restarts, found.ran) == (745, 3, 3, "a step")
    assert found.samples_lost == 1024 + 921 + 828


def test_lightning_undoes_its_trials_and_may_settle_on_a_size_that_never_ran(data):
    pytest.importorskip("lightning")
    power = finders.lightning(finders.Device(777), data, "power")
    assert (power.size, power.errors, power.restarts, power.ran) == (512, 1, 1, "a trial")
    halved = finders.lightning(finders.Device(777), data, "binsearch")
    assert (halved.size, halved.errors, halved.ran) == (738, 7, "nothing")
