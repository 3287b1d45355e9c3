"""`%hybrid_export`: what it writes, what it refuses, and that the script trains the same."""

import pathlib

import pytest

from hybrid_magic import HybridMagicError
from hybrid_magic.notebook import exporting

RUN = '''
import contextlib, io, runpy, sys
import torch as _torch

def run_script(file, *options):
    """Return what a script that was exported prints, and the weights that it ends with."""
    import hybrid_magic.run
    before, sys.argv = sys.argv, [file, "--weights", "weights.pt", *options]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said, open("log", "w") as log:
            with contextlib.redirect_stderr(log):
                runpy.run_path(file, run_name="__main__")
    finally:
        sys.argv = before
    return said.getvalue(), _torch.load("weights.pt")

def same_weights(model, file, *options):
    _, found = run_script(file, *options)
    return all(_torch.equal(a, found[n]) for n, a in model.state_dict().items())
'''

FORGET = """
for _past in (get_ipython().history_manager.input_hist_raw,
              get_ipython().history_manager.input_hist_parsed):
    _past[:] = [""]
get_ipython()._hybrid_memory.runs.clear()
get_ipython()._hybrid_memory.failed.clear()
"""

DATA = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
images, labels = torch.randn(48, 4), torch.randint(0, 3, (48,))
train_loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
"""
MODEL = """
# two layers will do
net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 3))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # no momentum
print(net)
"""
OPTIONS = "--precision fp32 --batch fixed --micro 8 --plain"
STEP = f"""%%hybrid_train --epochs 2 {OPTIONS} --log acc
# the step
x, y = batch
out = net(x)
loss = F.cross_entropy(out, y)
acc = (out.argmax(1) == y).float().mean()
"""


@pytest.fixture
def notebook(empty_notebook, tmp_path):
    empty_notebook.run(f"import os; os.chdir({str(tmp_path)!r})\n{RUN}")
    empty_notebook.run(FORGET)
    return empty_notebook


def run(notebook, *cells):
    for cell in cells:
        ran = notebook.run(cell)
        assert ran.error is None, f"{ran.message}\n{ran.out}"
    return ran


def refusal(notebook, *cells, file="train.py"):
    """Return the one line with which an export after `cells` is refused; nothing is written."""
    for cell in cells:
        run(notebook, cell)
    ran = notebook.run(f"%hybrid_export {file}")
    assert ran.error == "UsageError"
    assert "\n" not in ran.message
    assert "Traceback" not in ran.out + ran.err
    assert not notebook.value("os.path.exists('train.py')")
    return ran.message


def text(notebook, file="train.py"):
    return pathlib.Path(notebook.value("os.getcwd()"), file).read_text(encoding="utf-8")


def body(notebook):
    """Return a script's lines below its docstring that are not of every script."""
    return text(notebook).split('"""\n', 1)[1]


# -- the file


def test_without_a_run_there_is_nothing_to_write(notebook):
    assert "no run to write" in refusal(notebook, DATA, MODEL)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("", "has no file; wanted the name of a Python file"),
        ("train.txt", "has train.txt; wanted the name of a Python file"),
        (".py", "has .py; wanted"),
        ("nowhere/train.py", "there is no folder nowhere"),
        ("folder.py", "folder.py cannot be written (Is a directory)"),
    ],
)
def test_a_file_that_cannot_be_written_is_said_so(notebook, file, words):
    setup = "os.makedirs('folder.py')"
    assert words in refusal(notebook, setup, DATA, MODEL, STEP, file=file)


def test_somebody_elses_file_is_left_alone(notebook):
    run(notebook, DATA, MODEL, STEP, "_ = open('mine.py', 'w').write('x = 1')")
    ran = notebook.run("%hybrid_export mine.py")
    assert ran.error == "UsageError"
    assert "is there already and is not of %hybrid_export" in ran.message
    assert text(notebook, "mine.py") == "x = 1"


def test_an_exported_file_is_replaced_until_it_is_edited(notebook):
    run(notebook, DATA, MODEL, STEP, "%hybrid_export train.py")
    run(notebook, STEP.replace("--epochs 2", "--epochs 3"), "%hybrid_export train.py")
    assert '"epochs": 3' in text(notebook)
    run(notebook, "_ = open('train.py', 'r+').write('r#'); edited = open('train.py').read()")
    ran = notebook.run("%hybrid_export train.py")
    assert "was changed since it was exported" in ran.message
    assert text(notebook) == notebook.value("edited")


# -- the text

GOLDEN = '''
import argparse
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm

OPTIONS = {
    "epochs": 2,
    "precision": "fp32",
    "batch": "fixed",
    "micro": 8,
}


def step(net, batch):
    """Return the loss of one batch, and what is recorded beside it."""
    # the step
    x, y = batch
    out = net(x)
    loss = F.cross_entropy(out, y)
    acc = (out.argmax(1) == y).float().mean()
    return loss, {"acc": acc}


def read_arguments():
    parser = argparse.ArgumentParser(description="Train what a notebook trained.")
    parser.add_argument(
        "--checkpoint", metavar="DIR", default=None, help="write checkpoints to DIR"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in DIR"
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        default=os.path.splitext(os.path.abspath(__file__))[0] + ".jsonl",
        help="write what the run did to FILE",
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="write the trained weights, a state_dict, to FILE"
    )
    return parser.parse_args()


def main():
    arguments = read_arguments()

    torch.manual_seed(0)
    images, labels = torch.randn(48, 4), torch.randint(0, 3, (48,))
    train_loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)

    # two layers will do
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)  # no momentum

    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    try:
        hm.train(
            net,
            train_loader,
            step,
            optimizer=optimizer,
            checkpoint=arguments.checkpoint,
            resume=arguments.resume,
            **OPTIONS,
        )
    finally:
        if first and hm.last_run is not None:
            hm.last_run.save(arguments.record)
            print(hm.last_run.table())
    if first and arguments.weights:
        torch.save(net.state_dict(), arguments.weights)


if __name__ == "__main__":
    main()
'''


def test_the_script_reads_as_a_person_would_write_it(notebook):
    run(notebook, DATA, MODEL, "plot = net(images).sum()\nprint(plot)", STEP)
    told = run(notebook, "%hybrid_export train.py").out
    found, mark, _ = body(notebook).partition("\n# %hybrid_export")
    assert mark
    assert found.strip() == GOLDEN.strip()
    assert told.splitlines()[0] == "wrote train.py: cell [4] of a notebook, from cells [1], [2]"
    assert "torchrun --standalone --nproc-per-node 2 train.py" in told


def test_its_first_lines_say_where_it_is_from_and_how_it_is_started(notebook):
    run(notebook, "os.environ['JPY_SESSION_NAME'] = 'deep/in/My lesson.ipynb'", DATA, MODEL, STEP)
    run(notebook, "%hybrid_export train.py", "del os.environ['JPY_SESSION_NAME']")
    said = text(notebook).split('"""')[1]
    assert said.startswith("Train what cell [4] of My lesson.ipynb trained.")
    for line in (
        "    python train.py",
        "    torchrun --standalone --nproc-per-node 2 train.py",
        "    #SBATCH --nodes=2",
        "--max-restarts 3",
        "--rdzv-id $SLURM_JOB_ID",
        "--rdzv-endpoint $head:29500",
        "        train.py --checkpoint checkpoints --resume",
    ):
        assert line in said


# -- it trains the same

WAYS = {
    "step": (DATA, MODEL, STEP),
    "the loss as the last expression": (
        DATA,
        MODEL,
        f"%%hybrid_train {OPTIONS}\nx, y = batch\nF.cross_entropy(\n    net(x), y\n)  # the loss",
    ),
    "bare, with a criterion, a scheduler and validation": (
        DATA,
        MODEL,
        "criterion = nn.CrossEntropyLoss(label_smoothing=0.1)",
        "scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)\nscheduler.interval = 'epoch'",
        "test_loader = DataLoader(train_loader.dataset, 16)",
        f"%hybrid_train net train_loader --epochs 3 --val test_loader {OPTIONS}",
    ),
    "bare, with a fresh optimizer": (
        DATA,
        "net = nn.Linear(4, 3)",
        f"%%hybrid_train --lr 0.01 --clip 0.5 --seed 3 {OPTIONS}",
    ),
    "a line in the middle of a cell, the second of two": (
        DATA,
        MODEL + f"%hybrid_train {OPTIONS}\n",
        "torch.manual_seed(5)\n" + MODEL.strip()
        + f"\n%hybrid_train {OPTIONS}\ntorch.manual_seed(6)\n"
        + MODEL + f"\n%hybrid_train --epochs 2 {OPTIONS}\nlate = 1",
    ),
    "a loop": (
        DATA,
        MODEL,
        f"""%%hybrid_train {OPTIONS}
EPOCHS = 2
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
for epoch in range(EPOCHS):
    running = 0.0
    for i, (x, y) in enumerate(train_loader):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)  # smooth
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        running += loss.item()
    scheduler.step()
    print(running)
""",
    ),
    "functions that read globals, names of ours, a star": (
        DATA + "from torch.nn.init import *\nimport os as hm",
        "def scaled(x):\n    return x * factor\n\n\ndef main(n):\n    return nn.Linear(n, 3)",
        "factor = 2.0\nstep = main\nnet = step(4)\nxavier_uniform_(net.weight)\narguments = 0.1",
        "optimizer = torch.optim.SGD(net.parameters(), lr=arguments)",
        f"%%hybrid_train {OPTIONS}\nx, y = batch\nloss = F.cross_entropy(net(scaled(x)), y)",
    ),
    "a step that reads what is made beside it": (
        DATA,
        MODEL,
        "weights = torch.rand(3)\ncriterion = nn.CrossEntropyLoss(weight=weights)",
        f"%%hybrid_train {OPTIONS}\nx, y = batch\nloss = criterion(net(x), y)",
    ),
    "cells that were run again, and one that failed half-way": (
        DATA,
        MODEL,
        DATA,
        "!net = wrong\ntorch.manual_seed(1)\n" + MODEL,
        f"%%hybrid_train {OPTIONS}\nx, y = batch\nloss = F.cross_entropy(net(x), y)",
    ),
    "a cell that is timed": (
        DATA,
        "%%time\n" + MODEL.strip(),
        "%time optimizer = torch.optim.SGD(net.parameters(), lr=0.2)",
        f"%%hybrid_train {OPTIONS}\nx, y = batch\nloss = F.cross_entropy(net(x), y)",
    ),
}  # fmt: skip


OPTIMIZER = "optimizer = torch.optim.SGD(net.parameters(), lr=0.1)"
CHANGED = {
    "by a function, at a global": (
        "def freeze():\n    for p in net[0].parameters():\n        p.requires_grad = False",
        "freeze()",
    ),
    "by the variable of a loop": (
        "for p in net[0].parameters():\n    p.requires_grad = False",
        "for group in optimizer.param_groups:\n    group.update(lr=0.5)",
    ),
    "by what it holds": ("head = nn.Linear(8, 3)\nnet[2] = head\nnn.init.ones_(head.weight)",
                         OPTIMIZER),
    "by a class": ("class Twice(nn.Linear):\n    pass", "torch.manual_seed(1)",
                   "net = nn.Sequential(Twice(4, 3))",
                   "def forward(self, x):\n    return 2 * nn.Linear.forward(self, x)",
                   "Twice.forward = forward", OPTIMIZER),
    "by what has a result": ("handle = net[0].register_forward_hook(lambda m, i, o: 3 * o)",
                            "_ = torch.manual_seed(7)"),
    "by the layers' modes": (
        "torch.manual_seed(1)\nnet = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))", OPTIMIZER,
        "for m in net.modules():\n    if isinstance(m, nn.BatchNorm1d):\n        m.eval()",
    ),
    "by an object of an own class": (
        "class Scaler:\n    def fit(self, x):\n        self.mean = x.mean(0)\n        return self",
        "scaler = Scaler()\nscaler.fit(images)",
        "images -= scaler.mean",
    ),
    "by the kind of numbers": (
        "from torch import set_default_dtype\nset_default_dtype(torch.float64)",
        "images = images.double()\ntorch.manual_seed(1)\nnet = nn.Linear(4, 3)\n" + OPTIMIZER,
        "train_loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)",
        "set_default_dtype(torch.float32)\nnet.float(); net.double()",
    ),
    "with a star, a form feed and names that were a builtin's": (
        "from math import *\n# page\x0c 3\n# and\u2028 this",
        "list = [1]\ndel list\nimages /= pi - pow(list((1, 3))[-1], 2)",
    ),
    "by a generator": (
        "import numpy as np\nrng = np.random.default_rng(0)\nshown = rng.choice(48, 5)",
        "images[rng.permutation(48)[:8]] = 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "cells",
    [pytest.param(CHANGED[name], id=name, marks=[pytest.mark.thorough] if place % 2 else [])
     for place, name in enumerate(CHANGED)],
)  # fmt: skip
def test_what_was_changed_before_it_trains_is_changed_in_the_script(notebook, cells):
    run(notebook, DATA, MODEL, *cells, SECOND, "%hybrid_export train.py")
    assert notebook.value("same_weights(net, 'train.py')"), text(notebook)


@pytest.mark.parametrize("cells", WAYS.values(), ids=WAYS)
def test_a_script_ends_with_the_notebooks_weights(notebook, cells):
    run(notebook, *cells, "%hybrid_export train.py")
    compile(text(notebook), "train.py", "exec")
    assert notebook.value("same_weights(net, 'train.py')"), text(notebook)
    record = pathlib.Path(notebook.value("os.getcwd()"), "train.jsonl")
    assert record.read_text(encoding="utf-8").startswith('{"kind": "run"')


def test_a_cell_that_failed_counts_up_to_where_it_failed(notebook):
    run(notebook, DATA, MODEL)
    assert notebook.run("optimizer.param_groups[0]['lr'] = 0.3\n1 / 0\nnet = None").error
    assert notebook.run("net = )").error
    run(notebook, STEP, "%hybrid_export train.py")
    assert "['lr'] = 0.3" in text(notebook)
    assert "net = None" not in text(notebook)
    assert notebook.value("same_weights(net, 'train.py')")


@pytest.mark.parametrize("magic", ["%%time", "%%capture"])
def test_a_cell_under_a_magic_that_failed_counts_up_to_where_it_failed(notebook, magic):
    run(notebook, DATA, MODEL)
    notebook.run(f"\n{magic}\noptimizer.param_groups[0]['lr'] = 0.3\n1 / 0\nlate = net.x = 1")
    run(notebook, STEP, "%hybrid_export train.py")
    assert "['lr'] = 0.3" in text(notebook)
    assert "late" not in text(notebook)


@pytest.mark.thorough
def test_a_comparison_above_a_training_in_one_cell_is_no_training_of_it(notebook):
    line = "%hybrid_ablate net train_loader --steps 2 --plain"
    cell = f"{line}\noptimizer.param_groups[0]['lr'] = 0.3\n%hybrid_train net {OPTIONS}"
    run(notebook, DATA, MODEL, cell)
    told = run(notebook, "%hybrid_export train.py").out
    assert "Left out: cell [3] trained net before" in told
    assert "['lr'] = 0.3" in text(notebook)


def test_a_run_that_was_interrupted_is_written_too(notebook):
    run(notebook, DATA, MODEL, "seen = []")
    stop = STEP + "seen.append(1)\nif len(seen) == 9:\n    raise KeyboardInterrupt\n"
    assert notebook.run(stop.replace("--log acc", "--log acc -o stopped")).error
    assert notebook.value("stopped.outcome") == "interrupted"
    run(notebook, "%hybrid_export train.py")
    assert "raise KeyboardInterrupt" in text(notebook)


def test_a_run_that_never_began_leaves_the_one_before(notebook):
    run(notebook, DATA, MODEL, STEP)
    assert notebook.run("%hybrid_train net nothing").error == "UsageError"
    run(notebook, "%hybrid_export train.py")
    assert '"epochs": 2' in text(notebook)


def test_it_goes_on_from_its_own_checkpoints(notebook):
    run(notebook, DATA, MODEL, STEP.replace("--log acc", "--checkpoint kept"))
    run(notebook, "%hybrid_export train.py")
    assert 'default="kept"' in text(notebook)
    said = notebook.value("run_script('train.py', '--resume', '--record', 'r.jsonl')[0]")
    assert "12 steps" in said
    assert notebook.value("same_weights(net, 'train.py', '--resume')")


# -- what it says

SECOND = f"%%hybrid_train {OPTIONS}\nx, y = batch\nloss = F.cross_entropy(net(x), y)"
NOTES = {
    "trained before": (
        (DATA, MODEL, STEP, SECOND), "cell [3] trained net before", True,
    ),
    "another folder": (
        (DATA, "import os\nos.chdir('.')", MODEL, SECOND), "Start it in the folder that", True,
    ),
    "not trained before": ((DATA, MODEL, STEP, MODEL, SECOND), "trained net before", False),
    "trained by hand before": (
        (DATA, MODEL, "F.cross_entropy(net(images), labels).backward()\noptimizer.step()", SECOND),
        "cell [3] trained net before", True,
    ),
    "lines of IPython's": ((DATA, MODEL, "!echo 1\n%who", SECOND), "!echo 1", True),
    "no seed": ((DATA.replace("torch.manual_seed(0)", ""), MODEL, SECOND), "No seed is set", True),
    "a seed": ((DATA, MODEL, SECOND), "seed", False),
    "drawn": ((DATA, "x = torch.rand(3)", MODEL, SECOND), "cell [2], line 1. So the first", True),
    "one GPU": (
        (DATA, "home = 'cuda:1' if 0 else 'cpu'", MODEL + "net.to(home)", SECOND),
        "cuda:1 names one GPU", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("cells", "words", "there"), NOTES.values(), ids=NOTES)
def test_what_a_script_cannot_have_is_told_and_stands_in_it(notebook, cells, words, there):
    run(notebook, *cells)
    told = run(notebook, "%hybrid_export train.py").out
    assert (words in told) is there
    assert (words in " ".join(text(notebook).split('"""')[1].split())) is there


def loop(body, head="for epoch in range(2):", above=""):
    lines = "\n".join(f"        {line}" for line in body.strip().splitlines())
    return f"%%hybrid_train {OPTIONS}\n{head}\n{above}    for x, y in train_loader:\n{lines}\n"


PLAIN = """
optimizer.zero_grad()
loss = F.cross_entropy(net(x), y)
loss.backward()
optimizer.step()
"""


def test_what_a_loop_only_tells_is_left_out_and_named(notebook):
    run(notebook, DATA, MODEL, loop(PLAIN + "print(loss.item())", above="    net.train()\n"))
    told = run(notebook, "%hybrid_export train.py").out
    assert "Left out of the loop: net.train(); print(loss.item())" in told
    assert notebook.value("same_weights(net, 'train.py')")


def test_a_bar_around_the_loader_is_taken_off(notebook):
    cell = loop(PLAIN + "bar.set_postfix(loss=1)", above="    bar = tqdm(train_loader)\n")
    run(notebook, DATA, MODEL, "from tqdm import tqdm", cell.replace("in train_loader", "in bar"))
    run(notebook, "%hybrid_export train.py")
    assert "tqdm" not in body(notebook)
    assert notebook.value("same_weights(net, 'train.py')")


REFUSED_LOOPS = {
    "a weight that follows the epochs": (
        loop(PLAIN.replace("loss =", "loss = (1 + epoch) *")), "line 3: the loss reads epoch",
    ),
    "a learning rate set by hand": (
        loop(PLAIN, above="    optimizer.param_groups[0]['lr'] = 0.1\n"), "changes optimizer",
    ),
    "a function that changes the optimizer": (
        loop(PLAIN, above="    slower(optimizer)\n"), "`slower(optimizer)` changes optimizer",
    ),
    "weights changed after the step": (
        loop(PLAIN + "net[0].weight.data.clamp_(-1, 1)"), "changes net while it trains",
    ),
    "a learning rate set by a function that reads the global": (
        loop(PLAIN, above="    adjust(epoch)\n"), "`adjust(epoch)` changes optimizer",
    ),
    "a learning rate set in a comprehension": (
        loop(PLAIN, above="    [g.update(lr=1) for g in optimizer.param_groups]\n"),
        "changes optimizer",
    ),
    "eval mode in the cell": (
        "%%hybrid_train\nnet.eval()\n" + loop(PLAIN).split("\n", 1)[1],
        "line 2: `net.eval()` has net train in eval mode",
    ),
    "eval mode at the top of an epoch": (
        loop(PLAIN, above="    net.eval()\n"), "line 3: `net.eval()` has net train in eval mode",
    ),
    "eval mode from the second epoch on": (
        loop(PLAIN) + "    judge(net)\n", "`judge(net)` has net train in eval mode",
    ),
    "layers in eval mode": (
        loop(PLAIN, above="    net.train()\n    for m in net.children():\n        m.eval()\n"),
        "line 4: `for m in net.children():` changes net",
    ),
    "an end of its own": (
        loop(PLAIN, above="    if epoch > 5:\n        break\n"), "decides how long is trained",
    ),
    "gradients that add up": (loop(PLAIN.replace("optimizer.zero_grad()", "")), "no zero_grad"),
    "clipped by value": (
        loop(PLAIN.replace("optimizer.step", "nn.utils.clip_grad_value_(net.parameters(), 1)\n"
                           "optimizer.step")),
        "is no clipping of the whole norm",
    ),
    "a scheduler that is told a number": (
        loop(PLAIN + "plateau.step(loss)"), "is not the plain step of one scheduler",
    ),
    "epochs until": (loop(PLAIN, head="for epoch in epochs():"), "how often this loop is run"),
    "two loops": (loop(PLAIN) + loop(PLAIN).split("\n", 1)[1], "holds 2 training loops"),
    "a function": (
        "%%hybrid_train\ndef fit():\n" + "    for x, y in train_loader:\n"
        + "\n".join(f"        {line}" for line in PLAIN.strip().splitlines()) + "\nfit()",
        "the training stands in fit()",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("cell", "words"), REFUSED_LOOPS.values(), ids=REFUSED_LOOPS)
def test_a_loop_that_is_more_than_a_step_is_refused_at_its_line(notebook, cell, words):
    more = (
        "plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)\n"
        "def slower(o):\n    o.param_groups[0]['lr'] *= 0.9\ndef epochs():\n    return [0, 1]\n"
        "def adjust(n):\n    for g in optimizer.param_groups:\n        g['lr'] = 0.1 / (n + 1)\n"
        "def judge(m):\n    m.eval()\n    return m(images)"
    )
    told = refusal(notebook, DATA, MODEL, more, cell)
    assert words in told
    assert "%%hybrid_train --epochs N" in told


def test_a_loop_in_the_eval_mode_of_before_is_refused_and_one_that_leaves_it_is_written(notebook):
    told = refusal(notebook, DATA, MODEL, "net.eval()", loop(PLAIN))
    assert "line 3: the loop trains net in eval mode, as it was before" in told
    run(notebook, DATA, MODEL, "net.eval()", loop(PLAIN, above="    net.train()\n"))
    run(notebook, "net.eval()", "%hybrid_export train.py")
    assert notebook.value("same_weights(net, 'train.py')")


def test_what_only_a_notebook_or_a_star_gives_is_imported(notebook):
    cell = "from math import *\ndef shown(n):\n    display(n)\n    return floor(n)"
    run(notebook, DATA, cell, MODEL, "net.n = shown(3.5)", SECOND, "%hybrid_export train.py")
    lines = body(notebook).splitlines()
    assert "from math import floor" in lines
    assert "from IPython.display import display" in lines
    assert notebook.value("same_weights(net, 'train.py')")


# -- what is refused

REFUSED = {
    "a line of IPython's is needed": (
        (DATA, MODEL, "found = !echo 3\nnet.tag = found", SECOND),
        "cell [3], line 1 is needed and holds a line of IPython's own",
    ),
    "a line of IPython's in a function": (
        (DATA, "def size():\n    !true\n    return 4", MODEL, "net.n = size()", SECOND),
        "cell [2], line 1 is needed and holds a line of IPython's own",
    ),
    "a line of IPython's in the step": (
        (DATA, MODEL, SECOND + "\n!true"), "the step of cell [3] is needed and holds a line",
    ),
    "a name that no cell makes": (
        (DATA, MODEL, "shell = get_ipython()",
         "shell.user_ns['width'] = 4", "net.width = width", SECOND),
        "no cell that was run at the top level makes width",
    ),
    "a name that is given by its text": (
        ("globals()['width'] = 4", DATA, MODEL, "net.width = width", SECOND),
        "cell [1], line 1 reaches names by their text (exec, eval, globals, locals)",
    ),
    "a step that reads by text": (
        (DATA, MODEL, SECOND + " * eval('1')"), "the step of cell [3] reaches names by their text",
    ),
    "a class that is found by its text": (
        (DATA, "class Net(nn.Linear):\n    pass", "net = eval('Net')(4, 3)",
         "optimizer = torch.optim.SGD(net.parameters(), lr=0.1)", SECOND),
        "cell [3], line 1 reaches names by their text",
    ),
    "a name that another training made": (
        (DATA, MODEL, "best = net.state_dict()\n(net(images).sum() * 0).backward()",
         "for _ in [1]:\n    kept = best\n    net(images).sum().backward()",
         "optimizer.zero_grad()", "net.load_state_dict(kept)", SECOND),
        "no cell that was run at the top level makes kept",
    ),
    "a magic inside a statement": (
        (DATA, MODEL, f"if True:\n    %hybrid_train {OPTIONS}"),
        "was started from inside another statement of cell [3]",
    ),
    "awaiting": (
        (DATA, MODEL, "import asyncio\nnet.n = await asyncio.sleep(0, 3)", SECOND),
        "cell [3], line 2 awaits",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("cells", "words"), REFUSED.values(), ids=REFUSED)
def test_a_script_that_would_not_stand_by_itself_is_not_written(notebook, cells, words):
    assert words in refusal(notebook, *cells)


def test_help_says_what_is_written(notebook):
    assert "%hybrid_export FILE" in notebook.value(
        "get_ipython().find_line_magic('hybrid_export').__doc__"
    )


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("def f():\n    return lost", "the script would read lost, which it never makes"),
        ("def f():\n    x = 1\n\n\ndef g():\n    return x", "the script would read x"),
        ("return 1", "the script would not compile (line 1: 'return' outside function)"),
    ],
)
def test_the_whole_text_is_looked_at_once_more_before_it_is_written(script, words):
    with pytest.raises(HybridMagicError) as caught:
        exporting._check(script, "train.py")
    assert words in str(caught.value)
    exporting._check("def f():\n    return len(__file__)", "train.py")
