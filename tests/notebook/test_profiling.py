"""`%%hybrid_profile` over the three forms of a cell: what is shown, and that nothing is left."""

import pytest

SETUP = """
import os, signal
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import hybrid_magic as hm
from hybrid_magic.engine import roofline
roofline.flops_per_s = lambda *_: 1e11  # measuring takes a second
roofline.bytes_per_s = lambda _: 1e10

torch.manual_seed(0)
images, labels = torch.randn(96, 4), torch.randint(0, 3, (96,))
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
train_loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
history = ["kept"]

def weights():
    return torch.cat([p.detach().flatten() for p in net.parameters()])

before = weights(), torch.get_rng_state()

def as_before():
    return (
        torch.equal(before[0], weights()) and torch.equal(before[1], torch.get_rng_state())
        and not opt.state and all(p.grad is None for p in net.parameters())
    )
"""
STEP = """
x, y = batch
loss = F.cross_entropy(net(x), y)
"""
LOOP = """
for epoch in range(3):
    total = 0.0
    for x, y in train_loader:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        total += loss.item()
    history.append(total)
    print("epoch", epoch)
"""


@pytest.fixture
def notebook(empty_notebook):
    ran = empty_notebook.run(SETUP)
    assert ran.error is None, ran.out
    return empty_notebook


@pytest.mark.parametrize("cell", [STEP, "", LOOP], ids=["step", "bare", "loop"])
def test_a_cell_is_looked_at_and_everything_put_back(notebook, cell):
    ran = notebook.run("%%hybrid_profile --steps 3 --precision fp32 -o found" + (cell or "\n"))
    assert ran.error is None, ran.out
    for words in ("a step", "forward", "backward", "optimizer", "Linear", "micro-batch"):
        assert words in ran.out
    assert "epoch" not in ran.out
    assert notebook.value("as_before()")
    assert notebook.value("history") == ["kept"]
    assert notebook.value("found is hm.last_profile")
    assert notebook.value("(found.batch, found.micro, found.steps)") == [8, 8, 3]
    assert notebook.value("[m.path for m in found.modules]") == ["", "0", "1", "2"]
    assert notebook.value("'loss' in globals() or 'total' in globals()") is False


def test_a_cell_that_builds_its_model_leaves_no_name(notebook):
    ran = notebook.run(
        "%%hybrid_profile --steps 2\nmade = nn.Linear(4, 3)\n"
        "sgd = torch.optim.SGD(made.parameters(), lr=0.1)\n"
        + LOOP.replace("net(", "made(").replace("opt.", "sgd.")
    )
    assert ran.error is None, ran.out
    assert "Linear" in ran.out
    assert notebook.value("'made' in globals()") is False
    assert notebook.value("as_before()")


def test_an_interrupt_puts_everything_back_and_says_so(notebook):
    ran = notebook.run(
        "%%hybrid_profile\nx, y = batch\nif len(hits := globals().setdefault('hits', [])) == 5:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\nhits.append(1)\n"
        "loss = F.cross_entropy(net(x), y)\n"
    )
    assert ran.error == "KeyboardInterrupt"
    assert "everything was put back as it was" in ran.out
    assert notebook.value("as_before()")


def test_an_error_in_the_cell_keeps_its_traceback_and_everything_is_put_back(notebook):
    ran = notebook.run("%%hybrid_profile\nx, y = batch\nloss = F.cross_entropy(net(x), nothing)\n")
    assert ran.error == "NameError"
    assert "nothing" in ran.out
    assert notebook.value("as_before()")


def test_a_mistake_is_one_line(notebook):
    ran = notebook.run("%hybrid_profile --trace trace.txt")
    assert ran.error == "UsageError"
    assert "--trace trace.txt ends in neither .json nor .json.gz" in ran.err
    assert "Traceback" not in ran.out + ran.err


def test_explain_and_the_help_say_what_it_does(notebook):
    assert "step" in notebook.run("%%hybrid_profile --explain" + STEP).out
    told = notebook.run("%hybrid_profile?").out
    assert "--trace FILE" in told
    assert "--snapshot FILE" in told
