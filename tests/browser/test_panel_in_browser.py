"""The panel in real front ends: a control that is moved is in the run's records.

The training is a fake one, so that any kernel with ipywidgets will do.
"""

import json
import re

import pytest

pytestmark = pytest.mark.browser

TRAIN = """
from fake_training import train_under_view
run = train_under_view(step_s=0.01, epochs=400)
"""
AFTER = """
import json
asked = [(change.step, change.reason) for change in run.changes if change.what == "control"]
print("RESULT", json.dumps([run.outcome, run.steps, asked]))
"""


def wait_for_training(notebook):
    notebook.page.wait_for_function(
        "() => /Training.*step/s.test("
        "document.querySelector('[data-hybrid-magic=status]')?.innerText || '')",
        timeout=60_000,
    )


@pytest.mark.parametrize("kind", ["lab", "notebook7", "classic"])
def test_two_sliders_pause_resume_and_stop_act_while_the_cell_runs(open_notebook, kind):
    notebook = open_notebook(kind, [TRAIN, AFTER])
    notebook.run_all()
    wait_for_training(notebook)
    notebook.drag("Memory mark", 0.4)
    notebook.type_value("Learning rate", "0.5")
    notebook.page.wait_for_timeout(1500)
    notebook.screenshot(f"{kind}-running")

    notebook.button("Pause").click()
    notebook.page.get_by_text("Paused", exact=True).wait_for(timeout=5000)
    notebook.page.wait_for_timeout(500)
    held = notebook.step()
    notebook.page.wait_for_timeout(1500)
    assert notebook.step() == held
    notebook.button("Resume").click()
    wait_for_training(notebook)
    notebook.page.wait_for_timeout(1000)
    assert notebook.step() > held

    notebook.button("Stop").click()
    outcome, steps, asked = json.loads(notebook.printed("RESULT"))
    assert outcome == "stopped"
    reasons = [reason for _, reason in asked]
    memory = float(re.fullmatch(r"you asked for memory (.*)", reasons[0])[1])
    assert 0.3 < memory < 0.6
    assert reasons[1:] == [
        "you asked for lr_multiplier 0.5",
        "you asked for pause",
        "you asked for resume",
        "you asked for stop",
    ]
    assert steps >= held
    notebook.page.locator(".widget-slider").first.wait_for(state="detached", timeout=5000)
    notebook.page.get_by_text("Hybrid run").first.wait_for(timeout=5000)
    notebook.page.locator("img[src^='data:image/png']").first.wait_for(timeout=5000)
    notebook.screenshot(f"{kind}-after")


def test_a_page_opened_again_in_the_middle_of_a_run_has_live_controls(open_notebook):
    notebook = open_notebook("lab", [TRAIN, AFTER])
    notebook.run_all()
    wait_for_training(notebook)
    notebook.page.keyboard.press("Control+S")
    notebook.page.wait_for_timeout(1500)
    notebook.page.on("dialog", lambda dialog: dialog.accept())
    notebook.open()
    wait_for_training(notebook)
    notebook.button("Stop").click()
    notebook.page.locator(".widget-slider").first.wait_for(state="detached", timeout=10_000)
