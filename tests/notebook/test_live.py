"""The view: panel where a front end answers, text where none does, a result that stays."""

import base64
import itertools
import time
import timeit
import tracemalloc
from html import escape

import pytest
from fake_training import FakeTraining, finished_run, start_record, step_record
from kernel_client import parent, printed

from hybrid_magic.notebook import live
from hybrid_magic.notebook.scene import Scene
from hybrid_magic.records import NoteRecord, TelemetryRecord

WIDGET = "application/vnd.jupyter.widget-view+json"
IMPORT = "from fake_training import train_under_view"


def test_in_a_plain_python_there_is_a_line_of_text_and_then_the_table(capsys):
    view = live.open_view(plain=False)
    training = FakeTraining(view, view.control, epochs=1, per_epoch=640, step_s=0.002)
    view.close(training())
    out, err = capsys.readouterr()
    assert "hybrid train: 100%" in err
    assert "640/640" in err
    assert "outcome      finished" in out


def test_a_view_that_saw_no_start_shows_nothing(capsys):
    view = live.open_view(plain=False)
    view(NoteRecord("too early"))
    view.close(None)
    assert capsys.readouterr() == ("", "")


def test_closing_twice_shows_the_result_once(capsys):
    view = live.open_view(plain=True)
    run = FakeTraining(view, view.control, epochs=1, per_epoch=64)()
    view.close(run)
    view.close(run)
    assert capsys.readouterr().out.count("outcome") == 1


def test_what_the_whole_device_holds_reaches_the_plots_with_the_steps_that_follow():
    scene = Scene(start_record(), 0.0)
    scene.take(TelemetryRecord(0, 0.1, gpu_used_bytes=7))
    scene.take_steps([step_record(1), step_record(2)])
    assert [bucket.device_used_bytes for bucket in scene.trace.buckets] == [None, 7]


def test_a_step_costs_next_to_nothing_while_nothing_is_due():
    view = live.open_view(plain=True)
    view(start_record())
    view.control.poll()
    view._due = float("inf")
    record = step_record(1)
    steps = 2000

    def step():
        view(record)
        view.control.poll()

    each_s = min(timeit.repeat(step, number=steps, repeat=1)) / steps
    view._pending.clear()
    each_s = min(each_s, *(timeit.repeat(step, number=steps, repeat=1)), 1.0)
    assert each_s < 5e-6  # measured: about half a microsecond; the machine may be busy
    view.close(None)


def test_memory_stays_bounded_however_long_the_run(capsys):
    view = live.open_view(plain=True)
    view(start_record())
    record = step_record(1)

    def many(steps):
        for _ in range(steps):
            view(record)
            view.control.poll()

    many(20_000)
    tracemalloc.start()
    many(5_000)
    before = tracemalloc.get_traced_memory()[0]
    many(20_000)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    view.close(None)
    assert grown < 100_000  # one list of 4096 references; 20,000 kept references are 160 kB
    assert len(view._pending) <= live._MOST_PENDING


def test_redraws_keep_to_their_share_and_one_slow_one_does_not_freeze_the_view(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(live.time, "perf_counter", lambda: clock[0])
    view = live.open_view(plain=True)
    view(start_record())
    costs = iter([3.0])
    drawn = []

    def draw():
        drawn.append(clock[0])
        clock[0] += next(costs, 0.004)

    view._text.draw = draw
    while clock[0] < 120.0:
        clock[0] += 0.01
        view.control.poll()
    gaps = [later - sooner for sooner, later in itertools.pairwise(drawn)]
    assert max(gaps) < live.LATEST_S + 3.1
    assert gaps[-1] >= 0.004 / live.DRAW_SHARE - 0.01
    assert 0.004 * (len(drawn) - 1) < 0.01 * 120
    view._text = None
    view.close(None)


def test_a_view_that_fails_says_so_once_and_training_goes_on(capsys, monkeypatch):
    view = live.open_view(plain=True)
    view(start_record())

    def fail():
        raise ZeroDivisionError("in the drawing")

    view._text.draw = fail
    for step in range(1, 1000):
        view(step_record(step))
        view._due = min(view._due, 0.0) if view._text else view._due
        view.control.poll()
    err = capsys.readouterr().err
    assert err.count("the live view stopped (ZeroDivisionError: in the drawing)") == 1
    view.close(finished_run())
    assert "outcome" in capsys.readouterr().out


def outputs(messages, cell):
    """Return the cell's displays as a front end would hold them: updates put in their place."""
    shown = {}
    for message in messages:
        if (
            message["msg_type"] in ("display_data", "update_display_data")
            and parent(message) == cell
        ):
            content = message["content"]
            key = content.get("transient", {}).get("display_id", len(shown))
            shown[key] = content["data"]
    return list(shown.values())


def model_of(messages):
    for message in messages:
        if message["msg_type"] == "display_data" and WIDGET in message["content"]["data"]:
            return message["content"]["data"][WIDGET]["model_id"]
    raise AssertionError("no panel was displayed")


def opened(front_end):
    """Wait for the panel; return its model id, what was seen, and each control's id by name."""
    seen, names = [], {}
    while True:
        message = front_end.client.get_iopub_msg(timeout=30)
        seen.append(message)
        if message["msg_type"] == "comm_open":
            state = message["content"]["data"]["state"]
            if state.get("description"):
                names[state["description"]] = message["content"]["comm_id"]
        if message["msg_type"] == "display_data":
            return model_of(seen), seen, names


def report_view(front_end, model):
    front_end.comm(model, {"method": "update", "state": {"_view_count": 1}, "buffer_paths": []})


def test_with_a_front_end_the_panel_stays_and_what_it_asks_is_in_the_records(front_end):
    front_end.run(IMPORT)
    cell = front_end.send("run = train_under_view(step_s=0.01, epochs=400)")
    model, seen, names = opened(front_end)
    report_view(front_end, model)
    time.sleep(1.0)
    front_end.move(names["Memory mark"], 0.5)
    front_end.move(names["Growth factor"], 2.0)
    time.sleep(2.5)  # longer than the patience with a silent front end
    front_end.comm(names["Stop"], {"method": "custom", "content": {"event": "click"}})
    seen += front_end.until_idle(cell)

    assert printed(seen, cell) == ""
    table, figure = outputs(seen, cell)
    assert WIDGET not in table
    assert "stopped from the panel" in table["text/plain"]
    assert "<table" in table["text/html"]
    assert base64.b64decode(figure["image/png"]).startswith(b"\x89PNG")
    asked = front_end.text(
        "print([change.reason for change in run.changes if change.what == 'control'])"
    )
    for words in (
        "you asked for memory 0.5",
        "you asked for growth_factor 2",
        "you asked for stop",
    ):
        assert words in asked
    opened_models = {m["content"]["comm_id"] for m in seen if m["msg_type"] == "comm_open"}
    closed_models = {m["content"]["comm_id"] for m in seen if m["msg_type"] == "comm_close"}
    assert opened_models == closed_models


def test_without_a_front_end_the_view_becomes_text_by_itself(front_end):
    front_end.run(IMPORT)
    cell = front_end.send("run = train_under_view(step_s=0.02, epochs=3)")
    seen = front_end.until_idle(cell)
    assert "hybrid train: 100%" in printed(seen, cell)
    table, figure = outputs(seen, cell)
    assert "finished" in table["text/plain"]
    assert "Four plots of a training run" in figure["text/plain"]


def said(messages):
    """Return the last text of each widget that a front end was sent."""
    found = {}
    for message in messages:
        if message["msg_type"] in ("comm_open", "comm_msg"):
            found[message["content"]["comm_id"]] = message["content"]["data"]["state"].get(
                "value", found.get(message["content"]["comm_id"])
            )
    return [value for value in found.values() if isinstance(value, str)]


def hear(front_end, seen, found):
    """Add to `seen` what is published, until `found()` is true of it."""
    end = time.monotonic() + 20
    while not found():
        assert time.monotonic() < end, "what was waited for did not come"
        seen.append(front_end.client.get_iopub_msg(timeout=20))


def test_while_a_front_end_says_nothing_the_panel_says_so_and_text_stands_by(front_end):
    front_end.run(IMPORT)
    cell = front_end.send("run = train_under_view(step_s=0.01, epochs=400)")
    model, seen, names = opened(front_end)
    silent = f"<i>{escape(live.SILENT)}</i>"
    hear(front_end, seen, lambda: silent in said(seen) and printed(seen, cell))
    report_view(front_end, model)  # it shows the panel after all
    front_end.move(names["Growth factor"], 2.0)
    time.sleep(1.5)
    front_end.comm(names["Stop"], {"method": "custom", "content": {"event": "click"}})
    seen += front_end.until_idle(cell)
    assert silent not in said(seen)
    assert "hybrid train" in printed(seen, cell)
    assert "stopped from the panel" in outputs(seen, cell)[0]["text/plain"]
    assert "you asked for growth_factor 2" in front_end.text("print(run.changes[-2].reason)")


def test_a_front_end_that_refuses_widgets_gets_text_and_the_result(front_end):
    front_end.run(IMPORT)
    cell = front_end.send("run = train_under_view(step_s=0.01, per_epoch=12_000)")
    _, seen, _ = opened(front_end)
    for message in seen:
        if message["msg_type"] == "comm_open":  # as a front end without a widget manager answers
            content = {"comm_id": message["content"]["comm_id"], "data": {}}
            refusal = front_end.client.session.msg("comm_close", content)
            front_end.client.shell_channel.send(refusal)
    seen += front_end.until_idle(cell)
    assert "hybrid train: 100%" in printed(seen, cell)
    assert "live view stopped" not in printed(seen, cell)
    assert "finished" in outputs(seen, cell)[0]["text/plain"]


def test_controls_that_go_deaf_in_the_middle_of_a_run_are_disabled_and_say_why(monkeypatch, capsys):
    pytest.importorskip("ipywidgets")
    from test_panel import html_of, widgets_in

    class Failing:
        due, why = 0.0, None

        def __call__(self):
            self.due, self.why = float("inf"), "live controls are off: the socket is gone"

    monkeypatch.setattr(live, "Pump", lambda kernel: Failing())
    view = live.View(kernel=object(), plain=False)
    view(start_record())
    panel = view._panel
    assert not all(one.disabled for one in widgets_in(panel) if hasattr(one, "disabled"))
    view.control.poll()
    assert all(one.disabled for one in widgets_in(panel) if hasattr(one, "disabled"))
    assert "live controls are off: the socket is gone" in html_of(panel)
    view.close(finished_run())


def test_plain_means_text_and_nothing_else(front_end):
    front_end.run(IMPORT)
    cell = front_end.send("run = train_under_view(epochs=1, plain=True)")
    seen = front_end.until_idle(cell)
    assert outputs(seen, cell) == []
    assert "outcome      finished" in printed(seen, cell)
    assert not [m for m in seen if m["msg_type"] == "comm_open"]


def test_an_interrupt_ends_the_run_and_its_result_is_shown(front_end):
    front_end.run(IMPORT)
    cell = front_end.send("run = train_under_view(step_s=0.01, epochs=400)")
    model, seen, _ = opened(front_end)
    report_view(front_end, model)
    time.sleep(1.0)
    front_end.manager.interrupt_kernel()
    seen += front_end.until_idle(cell)
    assert [m["content"]["ename"] for m in seen if m["msg_type"] == "error"] == [
        "KeyboardInterrupt"
    ]
    assert "interrupted, at a whole step" in outputs(seen, cell)[0]["text/plain"]
