"""The benchmark of the panel: what it runs, and how it judges what it took. Without a browser."""

from benchmarks import panel


def turn(side, seconds, drawing_s, weights="same"):
    return {
        "side": side,
        "cell_s": seconds + 1,
        "cpu_s": seconds / 2,
        "seconds": seconds,
        "steps": 100,
        "drawing_s": drawing_s,
        "asked": 2,
        "weights": weights,
    }


def test_the_sides_take_turns_at_going_first():
    cells = [cell for cell in panel.cells_of(12_000, 2) if "%%hybrid_train" in cell]
    assert ["--plain" in cell for cell in cells[2:]] == [True, False, False, True]
    assert all("--steps 12000" in cell for cell in cells[2:])


def test_ratios_are_formed_within_a_turn_and_judged_against_their_goals():
    taken = [turn("plain", 60, None), turn("panel", 60.3, 0.3)]
    taken += [turn("panel", 80.4, 0.4), turn("plain", 80, None)]
    rows = {row["measure"]: row for row in panel.rows_of(taken)}
    ratio = rows["time of training, ratio"]
    assert abs(ratio["panel"].value - 1.005) < 1e-9
    assert ratio["met"] is True
    assert rows["the same weights, bit by bit"]["met"] is True
    taken[0]["weights"] = "others"
    rows = {row["measure"]: row for row in panel.rows_of(taken)}
    assert rows["the same weights, bit by bit"]["met"] is False
    assert "**no**" in panel.page_of([*rows.values()], {"command": "x"})
