"""`%%hybrid_train` above a training loop: what the notebook holds, shows and keeps afterwards."""

import pytest

SETUP = """
import os, random, signal, threading
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import hybrid_magic as hm

torch.manual_seed(0)
images, labels = torch.randn(96, 4), torch.randint(0, 3, (96,))
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
train_loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)

def press_ctrl_c():
    press = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
    press.start()
    press.join()

def press_stop():
    for row in get_ipython()._hybrid_loops.cell._open[1]._run._control.mail, :
        row.append(("stop", None))

def ours():
    return [name for name in get_ipython().user_ns if "hybrid" in name]
"""
LOOP = """
seen = []
for epoch in range(3):
    for x, y in train_loader:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        seen.append(len(x))
    after = epoch
done = True
"""
EPOCH = """
def train_one_epoch(net, loader, opt):
    total = 0.0
    for x, y in loader:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        total += loss.item()
    return total / len(loader)
"""


@pytest.fixture
def notebook(empty_notebook):
    ran = empty_notebook.run(SETUP)
    assert ran.error is None, ran.out
    return empty_notebook


def test_a_loop_leaves_its_names_its_run_and_nothing_of_ours(notebook):
    ran = notebook.run("%%hybrid_train -o run" + LOOP + "'the last expression'")
    assert ran.error is None, ran.out
    assert "'the last expression'" in ran.out
    assert "outcome      finished" in ran.out
    assert notebook.value("[run.outcome, run is hm.last_run, done, after]") == [
        "finished", True, True, 2,
    ]  # fmt: skip
    assert notebook.value("sum(seen) == run.samples_seen == 3 * 96")
    assert notebook.value("len(seen) == run.steps == len(run.history)")
    assert notebook.value("ours()") == []
    assert notebook.value("all(p.grad is not None for p in net.parameters())")  # as it was written


def test_a_batch_of_ones_own_choice_reads_the_loader_at_that_size_and_len_tells_the_truth(notebook):
    cell = """%%hybrid_train --batch 24 -o run
lengths, sizes = [len(train_loader)], []
schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda batch: 1 / (1 + batch))
for epoch in range(2):
    for i, (x, y) in enumerate(train_loader):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        schedule.step()
        sizes.append(len(x))
        lengths.append(len(train_loader))
"""
    ran = notebook.run(cell)
    assert ran.error is None, ran.out
    assert notebook.value("sizes") == [24] * 8
    assert notebook.value("lengths") == [12] + [4] * 8
    # by the same sample the curve stands where the loader's own batches would have brought it
    assert notebook.value("schedule.last_epoch") == 2 * 12


def test_a_grown_batch_uses_every_sample_once(notebook):
    cell = """%%hybrid_train --efficiency 0 --policy stability --max-batch 32 -o run
epochs = []
for epoch in range(30):
    rows = []
    for x, y in train_loader:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        rows += [tuple(row.tolist()) for row in x]
    epochs.append(sorted(rows))
"""
    ran = notebook.run(cell)
    assert ran.error is None, ran.out
    assert notebook.value("max(r.global_batch_size for r in run.history) > 8")
    assert notebook.value("all(e == sorted(map(tuple, images.tolist())) for e in epochs)")


@pytest.mark.parametrize("options", ["", "--batch fixed"])
def test_a_function_stays_taken_over_when_an_ordinary_cell_calls_it(notebook, options):
    ran = notebook.run(f"%%hybrid_train {options}{EPOCH}")
    assert ran.error is None, ran.out
    assert ran.out == ""  # what a cell prints is its own
    told = (
        "taken over, to train whenever it is called\nform: loop\nline 4: loop over loader, sliced"
    )
    assert ran.err.startswith(told)
    assert notebook.value("hm.last_run") is None
    for turn in (1, 2):
        ran = notebook.run("mean = train_one_epoch(net, train_loader, opt)\nrun = hm.last_run")
        assert ran.error is None, ran.out
        assert "outcome      finished" in ran.out, turn
        assert notebook.value("[run.samples_seen, hm.last_run is run, 0 < mean < 2]") == [
            96, True, True,
        ]  # fmt: skip
    assert notebook.value("get_ipython()._hybrid_loops.cell") is None
    assert notebook.value("ours()") == []


def test_a_function_of_an_earlier_cell_is_its_own_again_after_the_run(notebook):
    notebook.run(EPOCH + "code = train_one_epoch.__code__")
    ran = notebook.run("%%hybrid_train -o run\nfor _ in range(2):\n    "
                       "mean = train_one_epoch(net, train_loader, opt)")  # fmt: skip
    assert ran.error is None, ran.out
    assert notebook.value("run.samples_seen") == 2 * 96
    assert notebook.value("train_one_epoch.__code__ is code")
    notebook.run("before = hm.last_run\ntrain_one_epoch(net, train_loader, opt)")
    assert notebook.value("hm.last_run is before")


def test_stop_ends_the_loops_and_the_cell_goes_on(notebook):
    cell = LOOP.replace("seen.append(len(x))", "seen.append(len(x))\n        "
                        "press_stop() if len(seen) == 4 else None")  # fmt: skip
    ran = notebook.run("%%hybrid_train --batch fixed -o run" + cell)
    assert ran.error is None, ran.out
    assert notebook.value("[run.outcome, run.steps, len(seen), after, done]") == [
        "stopped", 5, 5, 0, True,
    ]  # fmt: skip


@pytest.mark.parametrize("flag", ["--steps 7", "--minutes 1e-9"])
def test_an_end_that_was_asked_for_ends_the_loops(notebook, flag):
    ran = notebook.run(f"%%hybrid_train --batch fixed {flag} -o run" + LOOP)
    assert ran.error is None, ran.out
    steps = 7 if "steps" in flag else 1
    assert notebook.value("[run.outcome, run.steps, len(seen), done]") == [
        "finished", steps, steps, True,
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["loss = F", "seen.append"])
def test_an_interrupt_ends_at_a_whole_step_without_a_traceback_of_ours(notebook, where):
    cell = LOOP.replace(where, f"if len(seen) == 4: press_ctrl_c()\n        {where}")
    ran = notebook.run("%%hybrid_train --batch fixed -o run" + cell)
    assert ran.error == "KeyboardInterrupt"
    assert "hybrid_magic/" not in ran.out + ran.err
    assert notebook.value("run.outcome") == "interrupted"
    assert notebook.value("run.steps") in (4, 5)
    assert notebook.value("all(p.grad is None for p in net.parameters())")
    assert notebook.value("signal.getsignal(signal.SIGINT) is signal.default_int_handler")


def test_an_interrupt_that_the_cell_itself_awaits_is_its_own_business(notebook):
    body = LOOP.replace("\n", "\n    ")
    body = body.replace("(len(x))", "(len(x)); press_ctrl_c() if len(seen) == 4 else None")
    cell = f"try:{body}\nexcept KeyboardInterrupt:\n    print('stopped early')\n"
    ran = notebook.run("%%hybrid_train --batch fixed -o run\n" + cell)
    assert ran.error is None, ran.out
    assert "stopped early" in ran.out
    assert notebook.value("run.steps") == 4


def test_an_error_of_the_loop_shows_its_own_line_and_leaves_a_whole_step(notebook):
    cell = LOOP.replace("net(x)", "net(x if len(seen) < 4 else x[:, :3])")
    ran = notebook.run("%%hybrid_train --batch fixed --micro 4 -o run" + cell)
    assert ran.error == "RuntimeError"
    assert "loss = F.cross_entropy(net(x if len(seen) < 4 else x[:, :3]), y)" in ran.out
    assert "hybrid_magic/" not in ran.out
    assert notebook.value("[run.outcome, run.steps]") == ["failed", 4]
    assert notebook.value("all(p.grad is None for p in net.parameters())")
    assert notebook.value("ours()") == []


def test_explain_says_what_would_be_done_and_does_nothing(notebook):
    ran = notebook.run("%%hybrid_train --explain --batch fixed" + LOOP)
    assert ran.error is None, ran.out
    assert "line 4: loop over train_loader, sliced" in ran.out
    assert "per micro-batch: lines 6-7" in ran.out
    assert "per step: lines 5, 8-9" in ran.out
    assert notebook.value("'seen' in globals()") is False
    told = notebook.value(f"str(hm.explain({LOOP.strip()!r}, globals()))")
    assert "line 3: loop over train_loader, sliced" in told
    assert notebook.value("str(hm.explain('x, y = batch\\nF.mse_loss(net(x), y)'))").startswith(
        "form: step"
    )


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--epochs 3", "--epochs is for a step"),
        ("--val train_loader", "--val is for a step"),
        ("--device cpu", "--device is for a step"),
        ("--processes 2", "--processes 2 is for a step"),
        ("other train_loader", "other is not in this cell's training loop"),
    ],
)
def test_what_a_loop_says_itself_is_not_said_twice(notebook, options, found):
    ran = notebook.run(f"%%hybrid_train {options}" + LOOP)
    assert ran.error == "UsageError"
    assert found in ran.message
    assert "\n" not in ran.message
    assert notebook.value("'seen' in globals()") is False


def test_the_loader_and_model_may_be_named_as_for_a_step(notebook):
    ran = notebook.run("%%hybrid_train net train_loader -o run" + LOOP)
    assert ran.error is None, ran.out


def test_an_optimizer_that_is_none_is_told_at_its_line(notebook):
    ran = notebook.run("%%hybrid_train\nopt = 3" + LOOP)
    assert ran.error == "UsageError"
    assert ran.message == "line 5: opt is a int; wanted a torch.optim.Optimizer"


def test_a_model_that_is_spread_over_devices_is_told_before_anything_runs(notebook):
    made = """
class DistributedDataParallel(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

net = DistributedDataParallel(net)
"""
    notebook.run(made)
    ran = notebook.run("%%hybrid_train" + LOOP)
    assert ran.error == "UsageError"
    assert "net is a DistributedDataParallel; wanted the plain model" in ran.message
    assert notebook.value("seen") == []


def test_blank_lines_at_the_head_of_a_cell_count(notebook):
    ran = notebook.run("%%hybrid_train\n\n\n" + LOOP.replace("opt.step()", "opt.step(closure)"))
    assert ran.error == "UsageError"
    assert ran.message.startswith("line 11: opt.step(closure) asks its closure ")


def test_two_trainings_of_a_cell_are_two_runs(notebook):
    cell = """%%hybrid_train --batch fixed
runs = []
for rate in (0.1, 0.01):
    net = nn.Linear(4, 3)
    opt = torch.optim.SGD(net.parameters(), lr=rate)
    for x, y in train_loader:
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    runs.append(hm.last_run)
"""
    ran = notebook.run(cell)
    assert ran.error is None, ran.out
    assert notebook.value("[run.steps for run in runs]") == [12, 12]
    assert notebook.value("runs[0] is not runs[1]")
    assert notebook.value("[run.history[0].lr for run in runs]") == [0.1, 0.01]


@pytest.mark.parametrize("micro", ["8", "3"])
def test_the_rest_of_a_step_sees_full_precision(notebook, micro):
    cell = """
kinds = set()
for x, y in train_loader:
    opt.zero_grad()
    out = net(x)
    inside = out.dtype
    loss = F.cross_entropy(out, y) + 0 * float(inside == torch.bfloat16)
    loss.backward()
    opt.step()
    kinds |= {str(inside), str(out.dtype), str(loss.dtype), out.detach().numpy().dtype.name}
"""
    ran = notebook.run(f"%%hybrid_train --precision bf16 --batch fixed --micro {micro}" + cell)
    assert ran.error is None, ran.out
    assert notebook.value("sorted(kinds)") == ["float32", "torch.bfloat16", "torch.float32"]


def test_a_hidden_state_that_the_model_keeps_is_not_left_there_by_measuring(notebook):
    cell = """
class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 3)
    def forward(self, x):
        out, self.state = self.lstm(x[..., None], self.state)
        return self.head(out[:, -1])

net = Keeping()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x, y in train_loader:
    net.state = (torch.zeros(1, len(x), 4), torch.zeros(1, len(x), 4))
    opt.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    opt.step()
"""
    ran = notebook.run("%%hybrid_train" + cell)
    assert ran.error is None, ran.out


@pytest.mark.parametrize(
    ("around", "options"),
    [
        ("for epoch in range(3):", ""),
        ("for epoch in range(3):", "--batch fixed"),
        ("for epoch in tqdm(range(3)):", ""),
        ("for epoch in range(3):\n  for phase in ['train']:", ""),
        ("for lr in (0.1,):\n  for epoch in range(3):", "--batch fixed"),
    ],
)
def test_the_epochs_to_come_are_those_of_the_range_around(notebook, around, options):
    cell = f"""%%hybrid_train {options} -o run
from tqdm import tqdm
{around}
    for x, y in train_loader:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
"""
    ran = notebook.run(cell)
    assert ran.error is None, ran.out
    assert notebook.value("[run.start.epochs, run.start.samples_per_epoch]") == [3, 96]
    assert notebook.value("run.start.base_batch_size") == 8


def test_a_step_function_is_one_pass_however_often_it_is_called(notebook):
    cell = """%%hybrid_train --micro 3 -o run
def train_step(x, y):
    opt.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    opt.step()
    return loss.item()

losses = [train_step(x, y) for epoch in range(2) for x, y in train_loader]
"""
    ran = notebook.run(cell)
    assert ran.error is None, ran.out
    assert notebook.value("[run.steps, run.samples_seen, len(losses)]") == [24, 192, 24]
    assert notebook.value("max(map(max, (sizes for sizes, _ in run.sizes)))") == 3


def test_the_rest_of_a_verbatim_step_sees_full_precision_too(notebook):
    cell = """
kinds = set()
for turn in range(3):
    opt.zero_grad()
    out = net(images)
    inside = str(out.dtype)
    loss = F.cross_entropy(out, labels)
    loss.backward()
    opt.step()
    kinds |= {inside, out.detach().numpy().dtype.name}
"""
    ran = notebook.run("%%hybrid_train --precision bf16" + cell)
    assert ran.error is None, ran.out
    assert notebook.value("sorted(kinds)") == ["float32", "torch.bfloat16"]
