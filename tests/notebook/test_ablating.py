"""`%%hybrid_ablate` over the three forms of a cell: what is shown, what is left behind."""

import pytest

SETUP = """
import os, signal, threading
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
test_loader = DataLoader(TensorDataset(images, labels), batch_size=32)
history = ["kept"]

def weights():
    return torch.cat([p.detach().flatten() for p in net.parameters()])

before = weights()
"""
STEP = """
x, y = batch
out = net(x)
loss = F.cross_entropy(out, y)
acc = (out.argmax(1) == y).float().mean()
"""
LOOP = """
for epoch in range(3):
    hits = 0
    for x, y in train_loader:
        opt.zero_grad()
        out = net(x)
        loss = F.cross_entropy(out, y)
        loss.backward()
        opt.step()
        hits += (out.argmax(1) == y).sum().item()
    acc = hits / 96
    history.append(acc)
    print("epoch", epoch)
"""


@pytest.fixture
def notebook(empty_notebook):
    ran = empty_notebook.run(SETUP)
    assert ran.error is None, ran.out
    return empty_notebook


def test_a_step_is_trained_several_ways_and_compared(notebook):
    line = (
        "%%hybrid_ablate --epochs 2 --val test_loader --log acc --seeds 2 "
        "--variants fp32,ga,hybrid -o found"
    )
    ran = notebook.run(line + STEP)
    assert ran.error is None, ran.out
    assert "1 of 6  fp32, seed 0: " in ran.out
    assert "6 of 6  " in ran.out
    assert "Ablation: 2 seeds" in ran.out
    assert "accuracy within 0.5 points of fp32: 2 seeds cannot tell" in ran.out
    assert notebook.value("[row.name for row in found.variants]") == ["fp32", "ga", "hybrid"]
    assert notebook.value("found is hm.last_ablation")
    assert notebook.value("all(0 < t.accuracy <= 1 for t in found.trials)")
    assert not notebook.value("torch.equal(before, weights())")


def test_an_empty_cell_and_the_line_magic_infer_the_step(notebook):
    ran = notebook.run(
        "%hybrid_ablate net train_loader --val test_loader --variants fp32,ga --restore -o found"
    )
    assert ran.error is None, ran.out
    assert notebook.value("torch.equal(before, weights())")
    assert notebook.value("len(found.trials)") == 2
    assert notebook.value("found.trials[0].accuracy == found.trials[1].accuracy")


def test_a_loop_runs_whole_from_the_same_notebook_each_time(notebook):
    ran = notebook.run("%%hybrid_ablate --variants fp32,ga,hybrid --seeds 2 -o found" + LOOP)
    assert ran.error is None, ran.out
    assert notebook.value("[t.outcome for t in found.trials]") == ["finished"] * 6
    same = "[[t.accuracy, t.steps] for t in found.trials if t.seed == {} and t.variant != 'hybrid']"
    for seed in (0, 1):
        one, other = notebook.value(same.format(seed))
        assert one == pytest.approx(other)
        assert one[1] == 36
    assert notebook.value("history[0] == 'kept' and len(history) == 4")  # as one run leaves it
    assert notebook.value("history[-1] == acc == found.trials[4].accuracy")
    assert notebook.value("found.trials[4].variant") == "hybrid"
    assert ran.out.count("epoch 0") == 1  # what the last hybrid run printed
    assert not notebook.value("torch.equal(before, weights())")
    assert notebook.value("[n for n in get_ipython().user_ns if 'hybrid' in n]") == []


def test_a_loop_with_restore_leaves_the_notebook_as_it_was(notebook):
    ran = notebook.run("%%hybrid_ablate --variants fp32,hybrid --restore -o found" + LOOP)
    assert ran.error is None, ran.out
    assert notebook.value("torch.equal(before, weights())")
    assert notebook.value("history") == ["kept"]
    assert notebook.value("'acc' in globals()") is False
    assert "epoch 0" not in ran.out
    assert notebook.value("len(found.trials)") == 2


def test_a_cell_that_makes_its_own_model_and_optimizer_is_compared_too(notebook):
    cell = """%%hybrid_ablate --variants fp32,ga --log score -o found
torch.manual_seed(1)
own = nn.Linear(4, 3)
adam = torch.optim.Adam(own.parameters(), lr=0.05)
def fit(epochs):
    for _ in range(epochs):
        for x, y in train_loader:
            loss = F.cross_entropy(own(x), y)
            adam.zero_grad()
            loss.backward()
            adam.step()
fit(2)
with torch.no_grad():
    score = (own(images).argmax(1) == labels).float().mean()
"""
    ran = notebook.run(cell)
    assert ran.error is None, ran.out
    one, other = notebook.value("[[t.accuracy, t.steps] for t in found.trials]")
    assert one == pytest.approx(other)
    assert one[1] == 24
    assert notebook.value("'own' in globals()") is False


def test_mistakes_are_one_line_and_change_nothing(notebook):
    for line, said in (
        ("%%hybrid_ablate --variants fast" + STEP, "wanted hybrid, or of fp32"),
        ("%%hybrid_ablate --seed 1 --seeds 2" + STEP, "leave one out"),
        ("%%hybrid_ablate --epochs 2" + LOOP, "--epochs is for a step"),
        ("%%hybrid_ablate --variant fp32" + STEP, "did you mean --variants?"),
        ("%hybrid_ablate net train_loader --log acc", "--log is for a step"),
    ):
        ran = notebook.run(line)
        assert said in ran.err, ran
        assert "Traceback" not in ran.out + ran.err
    assert notebook.value("torch.equal(before, weights())")


def test_an_error_in_the_cell_keeps_its_line_and_the_model_is_as_it_was(notebook):
    ran = notebook.run(
        "%%hybrid_ablate --variants fp32\nx, y = batch\nloss = net(x).mean() / 0 * missing"
    )
    assert "missing" in ran.out
    assert "line 3" in ran.out or "----> 3" in ran.out
    assert notebook.value("torch.equal(before, weights())")


def test_an_interrupt_keeps_what_is_done(notebook):
    cell = """%%hybrid_ablate --variants fp32,ga -o found
x, y = batch
if hm.last_ablation is not None and len(hm.last_ablation.trials) == 1 and net.training:
    press = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
    press.start()
    press.join()
loss = F.cross_entropy(net(x), y)
"""
    ran = notebook.run(cell)
    assert "KeyboardInterrupt" in ran.out
    assert "hm.last_ablation holds what was done" in ran.out
    assert notebook.value("[found.outcome, len(found.trials)]") == ["interrupted", 1]
    assert notebook.value("torch.equal(before, weights())")


def test_help_and_completion_know_the_options_of_an_ablation(notebook):
    ran = notebook.run("print(get_ipython().find_cell_magic('hybrid_ablate').__doc__)")
    assert "--variants NAMES" in ran.out
    assert "(default fp32,mp,mp+ga,hybrid)" in ran.out
    assert "--precision" in ran.out
    for line, offered in (("%%hybrid_ablate --see", ["--seed", "--seeds"]),
                          ("%%hybrid_train --see", ["--seed"])):  # fmt: skip
        asked = f"get_ipython().complete(None, {line!r}, {len(line)})[1]"
        assert notebook.value(asked) == offered


def test_explain_says_what_would_be_done_and_runs_nothing(notebook):
    ran = notebook.run("%%hybrid_ablate --explain" + LOOP)
    assert ran.error is None, ran.out
    assert "per step" in ran.out
    assert notebook.value("torch.equal(before, weights())")


def test_a_gpu_is_known_by_its_number(notebook):
    notebook.run("""
from unittest import mock
from hybrid_magic.notebook.ablating import device_here
with mock.patch.multiple(torch.cuda, is_available=lambda: True, current_device=lambda: 1):
    here = str(device_here())
""")
    assert notebook.value("here") == "cuda:1"
