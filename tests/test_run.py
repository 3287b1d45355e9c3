import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hybrid_magic as hm
from hybrid_magic import HybridMagicError, Run, load_run
from hybrid_magic import run as runs
from hybrid_magic.records import (
    BatchChangeRecord,
    NoteRecord,
    StartRecord,
    StepRecord,
    TelemetryRecord,
    ValidationRecord,
)
from hybrid_magic.run import History, Readings

START = StartRecord("Net", "cpu", "fp32", "AdamW", 8, 48, 1, None, None, None, 2**34, 67)
CHANGE = BatchChangeRecord(2, 8, 12, "global", "grew 8 -> 12: noise scale 512 samples")


def step(number: int, loss: float | None = 1.0, *, skipped: bool = False) -> StepRecord:
    return StepRecord(
        step=number,
        samples_seen=8 * number,
        loss=loss,
        grad_norm=0.5,
        lr=1e-3,
        global_batch_size=8,
        microbatch_size=4,
        accumulation_steps=2,
        skipped=skipped,
        retries=0,
        data_s=1e-4,
        forward_s=1e-3,
        backward_s=2e-3,
        optimizer_s=1e-4,
        step_s=4e-3,
        allocated_peak_bytes=2**20,
        reserved_peak_bytes=None,
        noise_scale=None,
    )


def a_run() -> Run:
    run = Run(config={"epochs": 1, "log": ["acc"]}, environment={"torch": "2.13.0"})
    run.add(START)
    for number in range(1, 7):
        run.add(step(number, 1.0 / number))
    run.add(dataclasses.replace(step(7, 0.1), logged={"acc": 0.5}))
    run.add(CHANGE)
    run.add(ValidationRecord(7, {"epoch": 1, "loss": 0.25, "acc": 0.75}))
    run.add(NoteRecord("model: net"))
    run.add(TelemetryRecord(1, 0.05, energy_j=5.0, gpu_used_bytes=2**21))
    run.add(TelemetryRecord(7, 0.5, energy_j=28.0, gpu_used_bytes=2**21, gpu_power_w=50.0))
    run.outcome, run.steps, run.samples_seen, run.seconds = "finished", 7, 56, 0.5
    run.validation_seconds, run.final_loss, run.peak_allocated_bytes = 0.125, 0.1, 2**20
    return run


def saved(folder) -> tuple[str, list[str]]:
    path = folder / "run.jsonl"
    a_run().save(path)
    return path, path.read_text().splitlines()


def test_a_saved_run_comes_back_whole(tmp_path):
    run = a_run()
    run.save(tmp_path / "run.jsonl")
    back = load_run(tmp_path / "run.jsonl")
    assert back.summary() == run.summary()
    for name in ("config", "environment", "start", "changes", "notes", "metrics"):
        assert getattr(back, name) == getattr(run, name)
    assert list(back.history) == list(run.history)
    assert list(back.telemetry) == list(run.telemetry)
    assert back.table() == run.table()


@pytest.mark.parametrize("outcome", ["stopped", "interrupted", "failed"])
def test_a_run_that_did_not_finish_is_saved_too(tmp_path, outcome):
    run = Run(config={}, environment={}, outcome=outcome, error="ValueError: no")
    run.save(str(tmp_path / "run.jsonl"))
    back = load_run(str(tmp_path / "run.jsonl"))
    assert (back.outcome, back.error, back.start, len(back.history)) == (
        outcome,
        "ValueError: no",
        None,
        0,
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [],
        lambda lines: lines[1:],
        lambda lines: lines[:-1],  # cut between two lines
        lambda lines: [*lines[:-1], lines[-1][:20]],  # cut inside a line
        lambda lines: [*lines, lines[-1]],
        lambda lines: ['{"kind": "run"}', *lines[1:]],
        lambda lines: ["[1, 2]", *lines[1:]],
        lambda lines: [lines[0], "[1, 2]", *lines[2:]],
        lambda lines: [lines[0], '{"kind": "step"}', *lines[2:]],
        lambda lines: [lines[0].replace('"format": 1', '"format": 99'), *lines[1:]],
        lambda lines: ["x,y", "1,2"],
        lambda lines: ["\x00\x01"],
    ],
)
def test_a_damaged_or_foreign_file_is_told_in_one_line(tmp_path, damage):
    path, lines = saved(tmp_path)
    path.write_text("\n".join(damage(lines)))
    with pytest.raises(HybridMagicError, match="damaged, or not a run that this version") as caught:
        load_run(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_told_so(tmp_path):
    (tmp_path / "run.jsonl").write_bytes(bytes(range(256)))
    with pytest.raises(HybridMagicError):
        load_run(tmp_path / "run.jsonl")


def test_a_missing_file_is_pythons_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_run(tmp_path / "nothing.jsonl")


def test_a_kind_of_record_that_a_later_version_adds_is_passed_over(tmp_path):
    path, lines = saved(tmp_path)
    lines[0] = lines[0].replace(f'"records": {len(lines) - 1}', f'"records": {len(lines)}')
    path.write_text("\n".join([*lines, '{"kind": "weather", "rain": true}']))
    assert load_run(path).summary() == a_run().summary()


@pytest.mark.parametrize("broken", ["json", "os.replace"])
def test_a_save_that_fails_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path, lines = saved(tmp_path)
    run = a_run()
    if broken == "json":
        run.notes.append(object())  # type: ignore[arg-type]
    else:
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises((TypeError, OSError)):
        run.save(path)
    assert path.read_text().splitlines() == lines
    assert os.listdir(tmp_path) == ["run.jsonl"]


def test_the_file_is_complete_before_it_has_its_name(tmp_path, monkeypatch):
    moved = {}

    def replace(source, target):
        moved[os.fspath(target)] = json.loads(pathlib.Path(source).read_text().splitlines()[0])[
            "records"
        ]

    monkeypatch.setattr(os, "replace", replace)
    a_run().save(tmp_path / "run.jsonl")
    assert moved == {str(tmp_path / "run.jsonl"): 11}
    assert not (tmp_path / "run.jsonl").exists()


def test_a_saved_run_reads_where_torch_cannot_be_imported(tmp_path):
    path, _ = saved(tmp_path)
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['IPython'] = None\n"
        "import hybrid_magic as hm\n"
        f"run = hm.load_run({str(path)!r})\n"
        "print(run.outcome, len(run.history), run.metrics[0]['acc'], 'AdamW' in run.table())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["finished", "7", "0.75", "True"], done.stderr


def test_samples_per_second_is_unknown_until_time_has_passed():
    run = a_run()
    assert run.samples_per_second == 112.0
    run.seconds = 0.0
    assert run.samples_per_second is None


def test_energy_is_that_of_the_last_reading_and_unknown_where_it_is():
    run = a_run()
    assert (run.energy_j, run.energy_j_per_1000_samples) == (28.0, 500.0)
    run.samples_seen = 0
    assert run.energy_j_per_1000_samples is None
    run.add(TelemetryRecord(7, 0.6))  # the driver has gone: what was drawn to the end is not known
    assert run.energy_j is run.energy_j_per_1000_samples is None
    assert Run(config={}, environment={}).energy_j is None


def test_a_run_that_was_saved_before_there_was_telemetry_is_loaded(tmp_path):
    path, lines = saved(tmp_path)
    older = [line for line in lines if '"kind": "telemetry"' not in line]
    head = json.loads(older[0])
    head["records"] = len(older) - 1
    del head["energy_j"], head["energy_j_per_1000_samples"]
    path.write_text("\n".join([json.dumps(head), *older[1:]]))
    run = load_run(path)
    assert (len(run.telemetry), run.energy_j) == (0, None)
    assert "energy" not in run.table()


def test_the_summary_is_plain_and_does_not_hold_the_run():
    run = a_run()
    json.dumps(run.summary())
    run.summary()["metrics"][0]["acc"] = 0.0
    assert run.metrics[0]["acc"] == 0.75


def test_last_run_is_the_newest_run_and_nothing_before_the_first(monkeypatch):
    monkeypatch.setattr(runs, "last_run", None)
    assert hm.last_run is None
    run = runs.last_run = a_run()
    assert hm.last_run is run


losses = st.floats(0, 100) | st.just(float("nan")) | st.none()


@given(st.lists(st.tuples(losses, st.booleans()), max_size=300), st.integers(5, 40))
def test_a_history_is_bounded_and_ordered_and_keeps_its_ends_and_extremes(steps, limit):
    history = History(limit)
    for number, (loss, skipped) in enumerate(steps, 1):
        history.append(step(number, loss, skipped=skipped))
        assert len(history) <= limit
        assert history[-1].step == number
    kept = list(history)
    numbers = [one.step for one in kept]
    assert numbers == sorted(set(numbers))
    assert history.seen == len(steps)
    assert all(
        (one.loss, one.skipped) == steps[one.step - 1] or one.loss != one.loss for one in kept
    )
    if steps:
        assert numbers[0] == 1
    taken = [loss for loss, skipped in steps if not skipped and loss is not None and loss == loss]
    left = [one.loss for one in kept if not one.skipped]
    if taken:
        assert {min(taken), max(taken)} <= set(left)
    if len(taken) < len(steps):  # what was skipped, or had no loss, has left its mark
        assert any(one.skipped or one.loss is None or one.loss != one.loss for one in kept)


def test_a_spike_and_a_skipped_step_survive_twenty_thousand_steps():
    history = History(64)
    for number in range(1, 20_001):
        loss = 1e6 if number == 77 else 1.0 + (number % 7) / 10
        history.append(step(number, loss, skipped=number == 78))
    kept = {one.step for one in history}
    assert {1, 77, 78, 20_000} <= kept
    assert len(kept) <= 64


def test_a_history_reads_as_a_sequence():
    history = History()
    for number in range(1, 5):
        history.append(step(number))
    assert [one.step for one in history] == [1, 2, 3, 4]
    assert [one.step for one in history[1:3]] == [2, 3]
    assert [one.step for one in reversed(history)] == [4, 3, 2, 1]


@given(st.integers(0, 400), st.integers(3, 40))
def test_readings_are_bounded_and_evenly_apart_and_keep_their_ends(number, limit):
    readings = Readings(limit)
    for at in range(number):
        readings.append(TelemetryRecord(at, float(at)))
        assert len(readings) <= limit
        assert (readings[0].step, readings[-1].step) == (0, at)
    kept = [record.step for record in readings]
    apart = {later - sooner for sooner, later in itertools.pairwise(kept[:-1])}
    assert len(apart) <= 1  # all but the newest
    assert len(kept) >= min(number, limit // 2)
