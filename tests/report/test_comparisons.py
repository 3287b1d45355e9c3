"""How an ablation is shown."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from PIL import Image

from hybrid_magic.ablation import Ablation
from hybrid_magic.records import TrialRecord
from hybrid_magic.report import bars, comparisons, verdicts
from hybrid_magic.report import quantities as q

MIB = 2**20
TIMES, MINUS = q.TIMES, comparisons.MINUS


def trials(name: str, seconds: float, mib: float, *accuracies: float | None) -> list[TrialRecord]:
    return [
        TrialRecord(
            name, seed, "finished", seconds + 0.01 * seed, int(mib * MIB), None, accuracy, 1.0, 10,
            80, "fp32",
        )
        for seed, accuracy in enumerate(accuracies)
    ]  # fmt: skip


FIVE = (0.700, 0.702, 0.698, 0.701, 0.699)
NEAR = (0.702, 0.701, 0.699, 0.701, 0.697)
FAR = (0.680, 0.683, 0.677, 0.681, 0.679)
BASE = trials("fp32", 100.0, 1000, *FIVE)
LADDER = Ablation(
    trials=[
        *BASE,
        *trials("mp", 60.0, 700, *NEAR),
        *(TrialRecord("ga", seed, "oom", error="it does not fit") for seed in range(5)),
        *trials("hybrid", 40.0, 600, *FAR),
    ],
    environment={"device": "cpu <one>", "torch": "2.13"},
)  # fmt: skip


def test_a_verdict_has_its_interval_and_its_seeds() -> None:
    said = "\n".join(LADDER.verdicts)
    assert re.search(
        r"mp: 40 % less training time than fp32 \(95 % interval 40\.\d\.\.40\.\d %", said
    )
    assert "the same memory" not in said
    assert "30 % less memory (95 % interval 30.0..30.0 %, 5 seeds)" in said
    within = (
        r"mp: accuracy within 0\.5 points of fp32: yes, 95 % interval -0\.\d\d\.\.\+0\.\d\d points"
    )
    assert re.search(within + ", 5 seeds", said)
    assert "ga: ran out of memory" in said
    assert re.search(r"hybrid: accuracy within 0\.5 points of fp32: no, .* 5 seeds", said)


@pytest.mark.parametrize(
    ("deltas", "said"),
    [
        ((0.001,), "1 seed cannot tell"),
        ((0.001, 0.002), "2 seeds cannot tell (+0.15 points)"),
        ((0.001, 0.002, -0.001), "yes, 95 % interval -0.31..+0.45 points, 3 seeds"),
        ((0.02, -0.03, 0.01, 0.0, 0.0), "undecided, "),
        ((0.02, 0.03, 0.01, 0.02, 0.02), "better, "),
    ],
)
def test_too_few_seeds_are_said_to_be_too_few(deltas: tuple[float, ...], said: str) -> None:
    base = FIVE[: len(deltas)]
    hybrid = trials("hybrid", 90, 900, *(a + d for a, d in zip(base, deltas, strict=True)))
    found = Ablation(trials=[*trials("fp32", 100, 1000, *base), *hybrid])
    *_, verdict, advice = [*found.verdicts, *[""] * (len(deltas) >= 5)]
    assert said in verdict
    assert advice.startswith(f"{len(deltas)} seed") == (len(deltas) < 5)


def test_undecided_says_how_many_seeds_would_tell() -> None:
    hybrid = trials("hybrid", 90, 900, 0.69, 0.705, 0.70, 0.70, 0.71)
    found = Ablation(trials=[*trials("fp32", 100, 1000, *[0.70] * 5), *hybrid])
    assert re.search(r"undecided, .*; about \d+ seeds would tell", found.verdicts[-1])
    of_three = Ablation(trials=[trial for trial in found.trials if trial.seed < 3])
    assert "would tell" not in "".join(of_three.verdicts)  # three say little of the spread


def test_the_same_thing_twice_shows_no_difference() -> None:
    again = [
        TrialRecord(**{**{f: getattr(t, f) for f in t.__dataclass_fields__}, "variant": "b"})
        for t in BASE
    ]
    said = Ablation(trials=[*BASE, *again]).verdicts
    assert said[0] == "b: the same training time as fp32 within 1.0 %, the same memory within 1.0 %"
    assert said[1].endswith("yes, the same with every one of 5 seeds")


def test_accuracy_in_percent_is_taken_as_it_is() -> None:
    base = trials("fp32", 100, 1000, *(100 * a for a in FIVE))
    found = Ablation(trials=[*base, *trials("hybrid", 90, 900, *(100 * a - 2 for a in FIVE))])
    assert comparisons.cells(found)[0][4].startswith("70.00")
    assert "no, 95 % interval -2.00..-2.00 points" in found.verdicts[-1]
    assert verdicts.points_per_unit(LADDER) == 100


def test_the_table_has_the_papers_columns_with_their_spread() -> None:
    head, fp32, mp, ga, hybrid = comparisons.text(LADDER).splitlines()[2:7]
    assert head.split()[:3] == ["variant", "precision", "training"]
    assert "70.00 ± 0.16 %" in fp32
    assert f"1.67 {TIMES}" in mp
    assert f"{MINUS}40.0 %" in mp
    assert f"{MINUS}30.0 %" in mp
    assert "out of memory" in ga
    assert f"2.50 {TIMES}" in hybrid
    assert f"{MINUS}2.00 [{MINUS}2." in hybrid
    assert comparisons.text(LADDER).startswith("Ablation: 5 seeds, on cpu <one>, torch 2.13")


def test_names_are_escaped_in_html_and_in_latex() -> None:
    evil = Ablation(
        trials=[TrialRecord("<b>&_%", 0, "finished", 1.0)], environment={"device": "<script>"}
    )
    html = comparisons.html(evil) + comparisons.mimebundle(evil)["text/html"]
    assert "<b>&" not in html
    assert "<script>" not in html
    assert r"<b>\&\_\% &" in comparisons.latex(evil)


def test_latex_is_a_tabular_of_as_many_columns_as_it_says() -> None:
    lines = comparisons.latex(LADDER).splitlines()
    columns = re.fullmatch(r"\\begin\{tabular\}\{(\w+)\}", lines[1])
    assert columns is not None
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 5
    assert {line.count("&") + 1 for line in rows} == {len(columns[1])}
    assert not re.search(r"(?<!\\)%", "".join(lines[1:]))


def test_csv_has_a_line_a_trial_in_plain_numbers() -> None:
    head, *lines = comparisons.csv(LADDER).splitlines()
    assert len(lines) == len(LADDER.trials)
    assert head.startswith("variant,seed,outcome,seconds")
    assert lines[0] == "fp32,0,finished,100.0,1048576000,,0.7,1.0,10,80,fp32,"


@pytest.mark.parametrize(
    "found",
    [
        LADDER,
        Ablation(),
        Ablation(names=("fp32", "mp")),
        Ablation(trials=trials("fp32", 1, 1, None)),
    ],
)
def test_the_page_is_small_and_stands_without_a_kernel(found: Any) -> None:
    bundle = found._repr_mimebundle_()
    assert len(bundle["text/html"]) < 300_000
    assert "alt=" in bundle["text/html"]
    drawn = Image.open(io.BytesIO(bars.png(found.figure())))
    assert drawn.width > 1000
    assert found.table()


def test_ended_early_is_said() -> None:
    stopped = Ablation(trials=BASE, names=("fp32", "mp"), outcome="interrupted")
    assert "interrupted before its end" in stopped.table()
    assert "not run" in stopped.table()
