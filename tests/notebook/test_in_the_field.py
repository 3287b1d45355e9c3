"""What has gone wrong under cells in other projects: floods, threads, figures, names, leftovers."""

import gc
import sys
import threading
import time

import pytest
from fake_training import finished_run, start_record, step_record
from kernel_client import parent
from test_live import IMPORT, opened, report_view

from hybrid_magic.notebook import live

UPDATES_PER_S = 5  # that a front end is sent at most, of any one thing


# -- callbacks on another thread


def test_callbacks_hammered_from_threads_are_all_recorded_and_leave_the_weights_bit_equal():
    torch = pytest.importorskip("torch")
    pytest.importorskip("ipywidgets")
    import hybrid_magic as hm
    from hybrid_magic.engine.control import RunControl
    from hybrid_magic.notebook.panel import Panel
    from hybrid_magic.notebook.scene import Scene

    def train(control):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Dropout(), torch.nn.Linear(16, 2)
        )
        data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 2, (64,)))
        loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
        options = {"precision": "fp32", "batch": "fixed", "micro": 8, "epochs": 60, "seed": 1}
        return hm.train(model, loader, control=control, **options), [*model.parameters()]

    control = RunControl()
    panel = Panel(control, Scene(start_record(), now=0.0), None)
    sliders = {
        name: next(one for one in panel._settings if one.description == name)
        for name in ("Growth factor", "Stable below")
    }
    asked = dict.fromkeys(sliders, 0)
    over = threading.Event()

    def hammer(name, values):
        while not over.is_set():
            for value in values:
                sliders[name].value = value
                asked[name] += 1
                time.sleep(0)

    threads = [
        threading.Thread(target=hammer, args=("Growth factor", (2.0, 3.0))),
        threading.Thread(target=hammer, args=("Stable below", (0.1, 0.5))),
    ]
    for thread in threads:
        thread.start()
    try:
        hammered, weights = train(control)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    _, alone = train(None)
    left = len(control.mail)  # asked after the last step
    assert min(asked.values()) > 20
    assert len(hammered.changes) == sum(asked.values()) - left
    assert all(map(torch.equal, weights, alone))


# -- floods


class Eager:
    """A panel and a pump in one: counts what it draws, and asks for something at every chance."""

    views, due, why = 1, 0.0, None

    def __init__(self, control, clock):
        self._control, self._clock, self.drawn = control, clock, []

    def draw(self, now):
        self.drawn.append(now)

    def __call__(self):
        self.due = self._clock[0] + 0.1
        self._control.ask("grow")

    def close(self):
        pass


def test_ten_thousand_steps_a_second_draw_at_most_five_times_a_second(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(live.time, "perf_counter", lambda: clock[0])
    view = live.open_view(plain=True)
    view(start_record())
    view._text = None
    view._panel = view._pump = eager = Eager(view.control, clock)
    view._pump_due = 0.0
    record = step_record(1)
    for _ in range(30_000):
        clock[0] += 1e-4
        view(record)
        view.control.poll()
        view.control.mail.clear()
    view.close(None)
    assert 3 <= len(eager.drawn) <= 3.0 * UPDATES_PER_S


def test_a_front_end_is_sent_at_most_five_updates_a_second_of_anything(front_end):
    front_end.run(IMPORT)
    cell = front_end.send("run = train_under_view(epochs=100_000)")
    began = time.monotonic()
    model, seen, names = opened(front_end)
    report_view(front_end, model)
    for value in range(1, 31):  # a person who asks for more than can be drawn
        front_end.move(names["Growth factor"], 1.0 + value / 20)
        time.sleep(0.1)
    front_end.comm(names["Stop"], {"method": "custom", "content": {"event": "click"}})
    seen += front_end.until_idle(cell)
    taken = time.monotonic() - began
    sent = {}
    for message in seen:
        if message["msg_type"] == "comm_msg" and message["content"]["data"]["method"] == "update":
            key = message["content"]["comm_id"], *message["content"]["data"]["state"]
            sent[key] = sent.get(key, 0) + 1
        if message["msg_type"] == "stream":
            sent["stream"] = sent.get("stream", 0) + 1
    steps = int(front_end.text("print(run.steps)"))
    assert steps > 2000  # far more steps than updates
    live_updates = max(count for key, count in sent.items() if key[0] not in names.values())
    assert 3 <= live_updates <= UPDATES_PER_S * taken + 1


# -- what is shown lands where it belongs, and with widgets that every front end has


def test_all_that_a_run_shows_lands_in_its_own_cell_whoever_is_moving_sliders(front_end):
    front_end.run(IMPORT)
    cell = front_end.send("run = train_under_view(step_s=0.01, epochs=400)")
    model, seen, names = opened(front_end)
    report_view(front_end, model)
    moved = [front_end.move(names["Growth factor"], value) for value in (2.0, 3.0)]
    behind = front_end.send("print('behind')")
    time.sleep(1.5)
    moved.append(front_end.move(names["Memory mark"], 0.5))
    stop = {"method": "custom", "content": {"event": "click"}}
    moved.append(front_end.comm(names["Stop"], stop))
    seen += front_end.until_idle(behind)
    shown = {
        (message["msg_type"], parent(message))
        for message in seen
        if message["msg_type"] in ("stream", "display_data", "update_display_data", "error")
    }
    assert shown == {("display_data", cell), ("update_display_data", cell), ("stream", behind)}
    assert {parent(message) for message in seen} >= {*moved}  # they were answered meanwhile
    ids = [
        message["content"]["transient"]["display_id"]
        for message in seen
        if message["msg_type"] == "update_display_data"
    ]
    assert len(set(ids)) == 1  # one place: the panel's, where the table stands in the end


def test_the_panel_is_made_of_core_widgets_alone():
    widgets = pytest.importorskip("ipywidgets")
    from hybrid_magic.engine.control import RunControl
    from hybrid_magic.notebook.panel import Panel, _tree
    from hybrid_magic.notebook.scene import Scene

    panel = Panel(RunControl(), Scene(start_record(), now=0.0), None)
    modules = {one._model_module for one in _tree(panel._box) if isinstance(one, widgets.Widget)}
    assert modules == {"@jupyter-widgets/base", "@jupyter-widgets/controls"}


# -- figures


def test_no_figure_is_left_when_the_view_has_closed(capsys):
    pytest.importorskip("IPython")
    from matplotlib.figure import Figure

    for _ in range(3):
        view = live.View(kernel=object(), plain=False)  # no kernel to pump: text, then the result
        view(start_record())
        view.close(finished_run())
    gc.collect()
    assert "Four plots of a training run" in capsys.readouterr().out
    assert [kind for kind in map(type, gc.get_objects()) if issubclass(kind, Figure)] == []
    assert "matplotlib.pyplot" not in sys.modules


# -- what a run leaves behind

HELD = """
import gc, weakref, torch, hybrid_magic as hm
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

net = nn.Linear(4, 2)
data = TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
train_loader = DataLoader(data, batch_size=8)
seen, entries = [], len(Out)

def tensors_of(thing):
    found, todo, known = 0, [thing], set()
    while todo:
        one = todo.pop()
        if id(one) in known or isinstance(one, type) or callable(one):
            continue
        known.add(id(one))
        found += isinstance(one, torch.Tensor)
        todo += gc.get_referents(one)
    return found
"""
TRAIN = """%%hybrid_train --epochs 2 --log acc -o run
x, y = batch
out = net(x)
acc = (out.argmax(1) == y).float().mean()
seen.extend([weakref.ref(batch[0]), weakref.ref(out), weakref.ref(acc)])
loss = F.cross_entropy(out, y)
"""


def test_a_run_leaves_no_tensor_in_the_notebook_nor_in_its_result(empty_notebook):
    pytest.importorskip("torch")
    for cell in (HELD, TRAIN):
        ran = empty_notebook.run(cell)
        assert ran.error is None, ran.out
    assert empty_notebook.value("len(seen) >= 24")
    assert empty_notebook.value("[ref() is None for ref in seen].count(False)") == 0
    assert empty_notebook.value("len(Out) - entries") == 0
    assert empty_notebook.value("tensors_of(run)") == 0
    ran = empty_notebook.run("run")
    assert ran.error is None
    assert empty_notebook.value("tensors_of(Out)") == 0


# -- names


@pytest.mark.parametrize("wrap", ["DataParallel", "compile"])
def test_a_wrapped_model_is_the_one_model_and_keeps_its_optimizer(wrap):
    torch = pytest.importorskip("torch")
    from hybrid_magic.notebook.arguments import read
    from hybrid_magic.notebook.capture import capture

    net = torch.nn.Linear(4, 2)
    data = torch.utils.data.TensorDataset(torch.zeros(8, 4), torch.zeros(8).long())
    wrapped = torch.nn.DataParallel(net) if wrap == "DataParallel" else torch.compile(net)
    namespace = {
        "net": net,
        "fast": wrapped,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
        "loader": torch.utils.data.DataLoader(data, batch_size=4),
    }
    taken = capture(read(""), namespace, bare=True)
    assert taken.model is wrapped
    assert taken.optimizer is namespace["optimizer"]
