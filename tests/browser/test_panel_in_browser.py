"""The panel in a real front end: what is asked there is in the run's records, and soon.

The training is real where the kernel's environment has torch: a small network whose steps take
some 12 ms, and whose weights are compared with a replay of the run. Elsewhere it is a made-up one.
"""

import json
import time

import pytest

pytestmark = pytest.mark.browser

STEP_S = 0.012
WITHIN_S = 1.0  # from the hand to the record

REAL = {
    "ready": """
import time, torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
import hybrid_magic as hm

def start_over():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(640, 16), torch.randint(0, 4, (640,)))
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))
    shuffle = torch.Generator().manual_seed(1)
    loader = DataLoader(data, batch_size=16, shuffle=True, generator=shuffle)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), loader

def taught(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)

def whole(run):
    \"\"\"Whether the weights are those after run.steps steps, not one operation less or more.\"\"\"
    again, its_optimizer, its_loader = start_over()
    same = {"replay": run, "steps": run.steps, "seed": 3}
    hm.train(again, its_loader, taught, optimizer=its_optimizer, **same)
    return all(map(torch.equal, model.parameters(), again.parameters()))

model, optimizer, loader = start_over()
stamps = []
optimizer.register_step_post_hook(lambda *_: stamps.append(time.time()))
%load_ext hybrid_magic
""",
    "train": f"""
%%hybrid_train --epochs EPOCHS --seed 3
time.sleep({STEP_S})
loss = taught(model, batch)
""",
}
MADE_UP = {
    "ready": """
from fake_training import train_under_view
import hybrid_magic as hm

stamps = []

def whole(run):
    return run.steps == len(stamps) == run.history[-1].step
""",
    "train": f"""
_ = train_under_view(step_s={STEP_S}, per_epoch=2560, epochs=EPOCHS, stamps=stamps)
""",
}
SAY = """
import json
run = globals().get("run", hm.last_run)  # a replay is a run too
by_hand = [made for made in run.changes if made.what == "control"]
asked = [[made.step, made.reason, stamps[made.step - 1]] for made in by_hand]
print("RESULT", json.dumps([run.outcome, run.steps, asked, len(stamps), whole(run)]))
"""


@pytest.fixture
def cells(has_torch):
    """Return a function: cells(epochs) -> the notebook of one training and what it left."""
    work = REAL if has_torch else MADE_UP

    def made(epochs):
        return [work["ready"], work["train"].replace("EPOCHS", str(epochs)), SAY]

    return made


def result(notebook, at=2):
    """Return the outcome, steps, what was asked (step, reason, time) and whether all is whole."""
    return json.loads(notebook.printed(at, "RESULT"))


def wait_for_result(notebook, at=1):
    """Wait until cell `at` shows its run's result, and no control any more."""
    cell = notebook.cell(at)
    cell.get_by_text("Hybrid run").wait_for(timeout=20_000)
    cell.locator("img[src^='data:image/png']").wait_for(timeout=20_000)
    cell.locator(".widget-slider").first.wait_for(state="detached", timeout=5000)


def test_two_sliders_pause_resume_and_stop_act_at_once_and_the_cell_behind_runs_after(
    open_notebook, cells
):
    notebook = open_notebook(cells(4000))
    notebook.run_all()
    notebook.wait_for_training()
    notebook.page.wait_for_timeout(1000)
    hands = {}

    def by_hand(name, act, *arguments):
        act(*arguments)
        hands[name] = time.time()
        notebook.page.wait_for_timeout(700)

    by_hand("memory", notebook.drag, "Memory mark", 0.4)
    by_hand("lr_multiplier", notebook.type_value, "Learning rate", "0.5")
    notebook.screenshot("running")

    by_hand("pause", notebook.button("Pause").click)
    notebook.page.get_by_text("Paused", exact=True).wait_for(timeout=5000)
    held = notebook.step()
    notebook.page.wait_for_timeout(1000)
    assert notebook.step() == held
    notebook.screenshot("paused")
    by_hand("resume", notebook.button("Resume").click)
    notebook.wait_for_step_after(held)
    by_hand("stop", notebook.button("Stop").click)

    outcome, steps, asked, taken, whole = result(notebook)
    assert outcome == "stopped"
    assert [next(name for name in hands if name in reason) for _, reason, _ in asked] == [*hands]
    for name, (step, reason, stamp) in zip(hands, asked, strict=True):
        assert stamp - hands[name] < WITHIN_S, (step, reason)
    at = {name: step for name, (step, *_) in zip(hands, asked, strict=True)}
    assert at["pause"] == at["resume"] == held
    assert at["stop"] == steps == taken
    assert whole
    wait_for_result(notebook)
    notebook.screenshot("after")


def test_the_toolbars_interrupt_ends_the_run_at_a_whole_step_and_no_queued_cell_runs(
    open_notebook, cells
):
    ready, train, say = cells(4000)
    notebook = open_notebook([ready, train, "print('QUEUED', 'cell')", say])
    notebook.run_all()
    notebook.wait_for_training()
    notebook.page.wait_for_timeout(1000)
    notebook.interrupt()
    wait_for_result(notebook)
    notebook.screenshot("interrupted")
    notebook.cell(1).get_by_text("KeyboardInterrupt").first.wait_for(timeout=10_000)
    notebook.page.wait_for_timeout(500)
    assert "QUEUED cell" not in notebook.cell(2).inner_text()

    notebook.run(3)
    outcome, steps, asked, taken, whole = result(notebook, 3)
    assert (outcome, asked, taken) == ("interrupted", [], steps)
    assert whole


def test_a_tab_closed_and_opened_again_in_the_middle_of_a_run_has_live_controls(
    open_notebook, cells
):
    notebook = open_notebook(cells(4000))
    notebook.run_all()
    notebook.wait_for_training()
    notebook.open_again()
    notebook.wait_for_training()
    before = notebook.step()
    notebook.type_value("Growth factor", "2")
    moved = time.time()
    notebook.wait_for_step_after(before)
    notebook.screenshot("opened-again")
    notebook.button("Stop").click()
    notebook.page.locator(".widget-slider").first.wait_for(state="detached", timeout=10_000)
    notebook.run(2)
    outcome, _, asked, _, whole = result(notebook)
    assert outcome == "stopped"
    assert "growth_factor" in asked[0][1]
    assert asked[0][2] - moved < WITHIN_S
    assert whole


def test_two_runs_one_after_the_other_each_have_a_panel_and_the_first_result_stays(
    open_notebook, cells
):
    ready, train, _ = cells(4000)
    short = cells(3)[1]
    again = "stamps.clear()" if "torch" not in ready else "model, optimizer, loader = start_over()"
    notebook = open_notebook([ready, short, "print('BETWEEN', 'runs')", again, train, "print(1)"])
    notebook.run_all()
    notebook.cell(4).locator("[data-hybrid-magic=status]").wait_for(timeout=60_000)
    notebook.wait_for_training()
    notebook.drag("Growth factor", 0.7)
    notebook.page.wait_for_timeout(700)
    notebook.button("Stop").last.click()
    wait_for_result(notebook, 4)
    notebook.screenshot("two-runs")
    assert "BETWEEN runs" in notebook.cell(2).inner_text()
    for at, outcome in ((1, "finished"), (4, "stopped from the panel, at a whole step")):
        wait_for_result(notebook, at)
        assert notebook.cell(at).get_by_text(outcome, exact=True).count() == 1
