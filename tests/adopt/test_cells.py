"""Training cells as people write them: plain and under the one line, the same comes out."""

from __future__ import annotations

import pytest
from cell import RUNS, Refused
from cells import CELLS

TRAINED = [pytest.param(cell, id=cell.name) for cell in CELLS if isinstance(cell.expect, str)]
CUT = [param for param in TRAINED if not param.values[0].whole]
REFUSED = [pytest.param(cell, id=cell.name) for cell in CELLS if isinstance(cell.expect, Refused)]


def test_every_cell_has_a_name_of_its_own():
    assert len({cell.name for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize("cell", TRAINED)
def test_in_whole_batches_every_bit_and_letter_is_the_plain_cells(twins, cell):
    assert twins.differences(cell.setup, cell.source, cell.after) == []


@pytest.mark.parametrize("cell", CUT)
def test_in_thirds_of_batches_it_is_the_plain_cells_to_rounding(twins, cell):
    only = "weights" if cell.piecewise else "everything"
    assert twins.differences(cell.setup, cell.source, cell.after, pieces=True, only=only) == []


@pytest.mark.parametrize("cell", TRAINED)
def test_the_plan_says_how_each_loop_runs(twins, cell):
    plan = twins.explained(cell.setup, cell.source)
    assert plan["refusal"] is None
    assert plan["form"] == "loop"
    assert plan["loops"]
    if cell.expect != RUNS:
        assert {mode for _, mode, _ in plan["loops"]} == {cell.expect}, plan["loops"]


@pytest.mark.parametrize("cell", REFUSED)
def test_a_refusal_names_its_line_and_reason_and_has_changed_nothing(twins, cell):
    lines = cell.lines_at(cell.expect.at)
    line, text = twins.explained(cell.setup, cell.source)["refusal"]
    assert line in lines, text
    for word in cell.expect.words:
        assert word in text
    ran = twins.outcome(cell.setup, cell.source)
    assert ran["error"] == "UsageError"
    assert f"line {line}" in ran["message"]
    assert "\n" not in ran["message"]
    assert ran["text"] == ""
    assert ran["changed"] == []


# -- the comparison itself

ONE = """
for x, y in train_loader:
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    print(f"{loss.item():.4f}")
"""


@pytest.mark.parametrize(
    ("instead", "found"),
    [
        (ONE, None),
        (ONE.replace("optimizer.zero_grad()", "pass"), "[model][fc1.weight]"),
        (ONE.replace("model(x), y", "model(x), y) + 0 * torch.rand(1)[0].mul(1"), "random numbers"),
        (ONE.replace("print", "(lambda text: None)"), "text line 1"),
        (ONE.replace("loss.item():", "loss.item() * 1.01:"), "text line 1"),
        (ONE + "_leaked = 1\n", "[_leaked]"),
        (ONE + "optimizer.param_groups[0]['lr'] *= 1.01\n", "[optimizer][param_groups]"),
        (ONE + "model.fc1.weight.grad = None\n", "[model][fc1.weight.grad]"),
        (ONE + "model.eval()\n", "[model][training]"),
        (ONE + "del loss\n", "[loss]"),
    ],
)
@pytest.mark.parametrize("pieces", [False, True])
def test_the_comparison_sees(twins, instead, found, pieces):
    from setups import MLP

    told = twins.other(MLP, ONE, instead, pieces=pieces)
    assert told == [] if found is None else any(found in line for line in told)
