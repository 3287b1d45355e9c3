"""The panel's controls: each puts one request into the mailbox, and nothing else."""

import re
import threading

import pytest
from fake_training import start_record, step_record

from hybrid_magic.engine.control import ACTIONS, SETTINGS, RunControl
from hybrid_magic.notebook.scene import Scene
from hybrid_magic.records import BatchChangeRecord, NoteRecord

ipywidgets = pytest.importorskip("ipywidgets")
HOSTILE = "<img src=x onerror=alert(1)>"


def make(why_deaf=None, **start):
    from hybrid_magic.notebook.panel import Panel

    control, scene = RunControl(), Scene(start_record(**start), now=0.0)
    return Panel(control, scene, why_deaf), control, scene


def widgets_in(panel):
    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    return list(walk(panel._box))


def find(panel, name):
    return next(one for one in widgets_in(panel) if getattr(one, "description", "") == name)


def html_of(panel):
    return "".join(one.value for one in widgets_in(panel) if type(one) is ipywidgets.HTML)


@pytest.mark.parametrize(
    ("label", "value", "asked"),
    [
        ("Accumulation", 4, ("accum", 4)),
        ("Largest batch", 128, ("max_batch", 128)),
        ("Memory mark", 0.5, ("memory", 0.5)),
        ("Learning rate \N{MULTIPLICATION SIGN}", 2.0, ("lr_multiplier", 2.0)),
        ("Growth factor", 2.0, ("growth_factor", 2.0)),
        ("Stable below", 0.2, ("stability_threshold", 0.2)),
    ],
)
def test_each_setting_is_asked_for_by_its_name(label, value, asked):
    panel, control, _ = make()
    find(panel, label).value = value
    assert list(control.mail) == [asked]


def test_there_is_a_control_for_every_setting_and_action():
    panel, control, _ = make()
    for one in widgets_in(panel):
        if isinstance(one, ipywidgets.Button):
            one.click()
        elif hasattr(one, "options"):
            one.value = one.options[-1][1]
        elif hasattr(one, "step"):
            one.value = one.value + one.step
    find(panel, "Pause").click()  # pressed a second time: resume
    assert {name for name, _ in control.mail} == {*SETTINGS, *ACTIONS}


def test_every_value_that_a_control_offers_is_one_that_may_be_asked_for():
    panel, control, _ = make()
    for one in widgets_in(panel):
        if hasattr(one, "options"):
            for _, value in one.options:
                one.value = value
        elif hasattr(one, "step"):
            exponent = getattr(one, "base", None)
            for end in (one.min, one.max):
                one.value = exponent**end if exponent else end
    assert len(control.mail) > 20


def test_auto_gives_the_choice_back():
    panel, control, _ = make()
    accumulation = find(panel, "Accumulation")
    accumulation.value = 4
    accumulation.value = accumulation.options[0][1]
    assert list(control.mail) == [("accum", 4), ("accum", None)]


def test_callbacks_may_come_on_another_thread():
    panel, control, _ = make()
    slider = find(panel, "Memory mark")
    thread = threading.Thread(target=lambda: setattr(slider, "value", 0.3))
    thread.start()
    thread.join()
    assert list(control.mail) == [("memory", 0.3)]


def test_pause_becomes_resume_and_back():
    panel, control, _ = make()
    button = find(panel, "Pause")
    button.click()
    panel.draw(1.0)
    assert button.description == "Resume"
    assert "Paused" in html_of(panel)
    button.click()
    panel.draw(2.0)
    assert button.description == "Pause"
    assert [name for name, _ in control.mail] == ["pause", "resume"]


def test_after_stop_nothing_can_be_asked_any_more():
    panel, _, _ = make()
    find(panel, "Stop").click()
    panel.draw(1.0)
    assert all(one.disabled for one in widgets_in(panel) if hasattr(one, "disabled"))
    assert "Stopping at the end of this step" in html_of(panel)


def test_controls_that_cannot_act_are_disabled_and_say_why():
    panel, _, _ = make(why_deaf="live controls are off: <no kernel>")
    assert all(one.disabled for one in widgets_in(panel) if hasattr(one, "disabled"))
    assert "live controls are off: &lt;no kernel&gt;" in html_of(panel)


def tip_of(widget):
    return getattr(widget, "tooltip", None) or widget.description_tooltip


def test_a_control_without_an_effect_in_this_run_is_disabled_and_its_tooltip_says_why():
    panel, _, _ = make(device_bytes=None, memory_budget_bytes=None, steered=False)
    disabled = {
        one.description: tip_of(one) for one in widgets_in(panel) if getattr(one, "disabled", False)
    }
    assert {*disabled} == {"Memory mark", "Stable below"}
    assert "does not tell how much memory" in disabled["Memory mark"]
    assert "The batch is kept" in disabled["Stable below"]


def test_every_control_has_a_tooltip_and_a_name():
    panel, _, _ = make()
    for one in widgets_in(panel):
        if hasattr(one, "disabled"):
            assert one.description
            assert tip_of(one)


def test_what_comes_from_outside_is_escaped():
    panel, _, scene = make()
    scene.take_steps([step_record(1)])
    scene.take(BatchChangeRecord(1, 64, 96, "global", HOSTILE))
    scene.take(NoteRecord(HOSTILE))
    panel.draw(1.0)
    assert "<img" not in html_of(panel)
    assert "&lt;img" in html_of(panel)


def test_the_panel_says_where_the_run_is():
    panel, _, scene = make(samples_per_epoch=640, epochs=2)
    for now in (1.0, 2.0, 3.0):
        scene.take_steps([step_record(int(5 * now))])
        scene.look(now)
    panel.draw(3.0)
    said = html_of(panel)
    words = re.sub("<[^>]*>", "", said)
    assert "epoch 2 of 2, step 15, 320 samples/s, 3 s so far, about 1 s to go" in words
    assert 'aria-valuenow="75"' in said


def test_a_pause_counts_neither_as_training_time_nor_against_the_pace():
    _, _, scene = make(samples_per_epoch=None, epochs=None, minutes=1.0)
    scene.take_steps([step_record(1)])
    scene.look(1.0)
    scene.paused = True
    scene.look(20.0)
    scene.paused = False
    scene.look(31.0)
    assert scene.elapsed_s(31.0) == 12.0
    assert scene.fraction(31.0) == pytest.approx(0.2)  # 12 s of 60


def test_close_leaves_no_widget_alive():
    if ipywidgets.__version__ < "8":
        registry = ipywidgets.Widget.widgets
    else:
        registry = ipywidgets.widgets.widget._instances
    before = set(registry)
    panel, _, _ = make()
    assert set(registry) > before
    panel.close()
    assert set(registry) == before


def test_looks_are_shared_as_each_is_opened_and_closed_with_a_message_of_its_own():
    panel, _, _ = make()
    shown = widgets_in(panel)
    looks = {
        id(look) for one in shown for look in (one.layout, getattr(one, "style", None)) if look
    }
    assert len(looks) <= 11 < len(shown)
