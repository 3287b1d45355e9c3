"""The table of a run: true, readable, escaped."""

import pytest
from fake_training import FakeTraining, finished_run, start_record

from hybrid_magic.records import BatchChangeRecord
from hybrid_magic.report import quantities as q
from hybrid_magic.report import tables
from hybrid_magic.run import Run

HOSTILE = "<script>alert('x')</script>&\""


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ((96, 48, 2), "96 = 48 x 2"),
        ((100, 32, 4), "100 in 4 pieces of up to 32"),
        ((96, 24, 2, 2), "96 = 24 x 2 on each of 2"),
        ((16, 2, 5, 2), "16 in 5 pieces of up to 2 on each of 2"),
        ((5, 3, 1, 2), "5, up to 3 on each of 2"),
    ],
)
def test_a_batch_is_told_with_what_each_process_holds_at_once(cut, said):
    assert q.batch(*cut) == said.replace("x", "\N{MULTIPLICATION SIGN}")


def test_the_table_says_what_a_student_asks():
    said = tables.text(finished_run())
    for words in (
        "finished",
        "ResNet (11.2 M parameters) on cuda:0 (Tesla T4) in fp16 with SGD",
        "188 steps, 15,064 samples",
        "12.3 s training + 1.1 s validation, 1,225 samples/s",
        "of a budget of 13.2 GiB",
        "64 = 64 \N{MULTIPLICATION SIGN} 1 at the start, 108 in 2 pieces of up to 64 at the end",
        "4 decisions",
        "1 of the steps: loss or gradient not finite",
        "noise scale 512 samples",
        "the loss was inferred: cross-entropy",
    ):
        assert words in " ".join(said.split()), words
    assert max(map(len, said.splitlines())) <= 100


def test_each_validation_is_a_row_with_every_metric_seen():
    run = finished_run()
    run.metrics[1] = {"epoch": 2, "loss": 0.5, "f1": 0.25}
    columns, rows = tables.validations(run)
    assert columns == ["epoch", "loss", "accuracy", "f1"]
    assert rows[1] == ["2", "0.500", "", "0.250"]


def test_many_decisions_end_in_the_last_few_and_their_number():
    run = finished_run()
    run.changes = [BatchChangeRecord(n, n, n + 1, "global", f"reason {n}") for n in range(40)]
    said = tables.text(run)
    assert "the last 5 of 40 decisions" in said
    assert "reason 39" in said
    assert "reason 34" not in said


def test_a_run_without_a_step_or_a_start_has_a_table_too():
    run = Run(config={}, environment={}, error="ValueError: no")
    assert "failed: ValueError: no" in tables.text(run)
    assert "no reading on this device" in tables.text(run)
    assert "<table" in tables.html(run)


def test_every_name_is_escaped_in_html():
    run = FakeTraining(start=start_record(model=HOSTILE, device=HOSTILE, optimizer=HOSTILE))()
    run.error = HOSTILE
    run.notes.append(HOSTILE)
    run.changes.append(BatchChangeRecord(1, HOSTILE, HOSTILE, HOSTILE, HOSTILE))
    run.metrics.append({HOSTILE: 1.0})
    page = tables.html(run)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_html_brings_no_colour_of_its_own():
    page = tables.html(finished_run())
    assert "background" not in page
    assert page.count("color:") == page.count("color: inherit")


def test_a_number_stays_on_a_line_with_its_unit():
    said = q.unbroken("20 samples/s, 8 GiB of 12.5 GiB, 3 % in 4 min 05 s, 2 maps")
    assert said.replace("\N{NO-BREAK SPACE}", "_") == (
        "20_samples/s, 8_GiB of 12.5_GiB, 3_% in 4_min 05_s, 2 maps"
    )


def test_what_was_shown_live_is_told_as_a_share_of_the_training():
    run = finished_run()
    run.drawing_seconds = 0.0615
    facts = dict(tables.facts(run))
    assert facts["time"].endswith("; 0.5 % of it (62 ms) for what was shown live")


def test_quantities_read_as_a_person_says_them():
    said = {
        q.count(12345): "12,345",
        q.count(None): "unknown",
        q.value(0.41234): "0.412",
        q.value(12.345): "12.3",
        q.value(1234.5): "1234",
        q.value(1.2e-5): "1.20e-05",
        q.value(0.0): "0.000",
        q.value(float("nan")): "not finite",
        q.size(5.13 * 2**30): "5.1 GiB",
        q.size(312 * 2**20): "312 MiB",
        q.size(12): "12 B",
        q.duration(0.0123): "12 ms",
        q.duration(59.97): "1 min 00 s",
        q.duration(125): "2 min 05 s",
        q.duration(3780): "1 h 03 min",
        q.rate(12.34): "12.3 samples/s",
        q.share(0.083): "8.3 %",
        q.share(0.614): "61 %",
        q.change(None, 4): "auto \N{RIGHTWARDS ARROW} 4",
        q.change(0.9, 0.5): "0.9 \N{RIGHTWARDS ARROW} 0.5",
    }
    for found, wanted in said.items():
        assert found == wanted
