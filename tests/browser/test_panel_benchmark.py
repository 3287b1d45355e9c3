"""The benchmark of the panel: what it runs, and how it judges what it took. Without a browser."""

import json
import subprocess
import sys

import pytest

from benchmarks import panel


def turn(side, cpu_s, drawing_s=None, others_s=0.0, weights="same"):
    return {
        "side": side,
        "cell_s": cpu_s + 2,
        "cell_cpu_s": cpu_s + (0.75 if side == "panel" else 0.25),
        "train_s": cpu_s,
        "train_cpu_s": cpu_s,
        "main_cpu_s": cpu_s - others_s,
        "steps": 100,
        "drawing_s": drawing_s,
        "opened_s": 0.02,
        "asked": 2,
        "weights": weights,
    }


def a_round(**last):
    """Plain slows down from 10 s to 12 s; the panel costs a hundredth of that."""
    return [
        turn("panel", 10.1, 0.06, 0.03),
        turn("plain", 10.0, None, 0.01),
        turn("plain", 12.0, None, 0.01),
        turn("panel", 12.12, 0.06, 0.03, **last),
    ]


def test_a_round_is_panel_plain_plain_panel_after_a_short_turn_of_each():
    cells = [cell for cell in panel.cells_of(12_000, 2) if "%%hybrid_train" in cell]
    plain = ["--plain" in cell for cell in cells]
    assert plain == [False, True, *[False, True, True, False] * 2]
    assert ["--steps 12000" in cell for cell in cells] == [False] * 2 + [True] * 8


def test_ratios_are_formed_within_a_round_and_judged_against_their_goals():
    rows = {row["measure"]: row for row in panel.rows_of(a_round() + a_round())}
    ratio = rows["CPU time of training, ratio"]
    assert ratio["panel"].value == pytest.approx(1.01)
    assert ratio["panel"].n == 2
    once = next(row for name, row in rows.items() if "once a run" in name)
    assert once["panel"].value == pytest.approx(0.5)
    meanwhile = next(row for name, row in rows.items() if name.startswith("while it trains"))
    assert meanwhile["panel"].value == pytest.approx((0.06 - 0.02 + 0.02) / 11.11)
    together = rows["the two together, as a share of a run of 60 s"]
    assert together["panel"].value == pytest.approx(0.06 / 11.11 + 0.5 / 60)
    assert together["met"] is False
    assert rows["the same weights, bit by bit"]["met"] is True


def test_a_goal_that_lies_in_the_interval_is_neither_met_nor_missed():
    quiet, loud = a_round(), a_round()
    for block in loud:
        block["train_s"] *= 1.1 if block["side"] == "panel" else 1.0
    rows = {row["measure"]: row for row in panel.rows_of(quiet + loud)}
    assert rows["time of training, ratio"]["met"] == panel.OPEN
    rows = {row["measure"]: row for row in panel.rows_of(loud + loud)}
    assert rows["time of training, ratio"]["met"] is False


def test_other_weights_are_seen_and_said():
    rows = panel.rows_of(a_round(weights="others"))
    found = {row["measure"]: row for row in rows}
    assert found["the same weights, bit by bit"]["met"] is False
    assert "**no**" in panel.page_of({"client": rows}, {"command": "x"})


@pytest.mark.thorough
def test_the_light_client_sees_the_panel_and_the_program_writes_its_page(tmp_path):
    pytest.importorskip("ipykernel")
    saved = tmp_path / "panel.json"
    command = [sys.executable, "-m", "benchmarks.panel", "--front-ends", "client"]
    command += ["--seconds", "1", "--rounds", "1", "--json", str(saved)]
    subprocess.run(command, check=True, capture_output=True, timeout=170)
    turns = json.loads(saved.read_text())["turns"]["client"]
    assert [turn["side"] for turn in turns] == [*panel.ORDER]
    assert all(turn["drawing_s"] > 0 for turn in turns)
    assert len({turn["weights"] for turn in turns}) == 1
    assert saved.with_suffix(".md").read_text().startswith("# What the panel costs")
