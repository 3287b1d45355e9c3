"""Exported scripts as people start them: with python, under torchrun, for all cells of the corpus.

The corpus is that of `tests/adopt`: loops as people write them.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
from test_export import DATA, FORGET, MODEL, RUN, STEP, body, run, text

from hybrid_magic import load_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "notebooks" / "01_quickstart.ipynb"
sys.path.insert(0, str(ROOT / "tests" / "adopt"))

from cells import CELLS  # noqa: E402 - found by the line above

SAME = "--precision fp32 --batch fixed --micro 16"
AGENT = (
    *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
    *("--rdzv-id", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint"),
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def notebook(empty_notebook, tmp_path):
    empty_notebook.run(f"import os; os.chdir({str(tmp_path)!r})\n{RUN}")
    empty_notebook.run(FORGET)
    return empty_notebook


def start(folder, *words):
    """Run Python with `words` in `folder`; return what it prints."""
    return end(begin(folder, *words))


def begin(folder, *words):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    heard = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=env, **heard)


def end(program):
    try:
        out, err = program.communicate(timeout=120)
    finally:
        program.kill()
    assert program.returncode == 0, out + err
    return out


def check_weights(notebook, path):
    """Two processes end with the weights of the notebook's `net`."""
    import torch

    found = torch.load(path)
    wanted = notebook.value("{n: p.tolist() for n, p in net.state_dict().items()}")
    for name, values in wanted.items():
        # two halves of a batch are added up in another order
        torch.testing.assert_close(found[name], torch.tensor(values), rtol=1e-5, atol=1e-6)


def quickstart():
    """Return the lesson's cells up to the one that trains with the step alone, and two epochs."""
    cells = json.loads(QUICKSTART.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    last = next(n for n, text in enumerate(sources) if text.startswith("%%hybrid_train --epochs"))
    sources = [text.replace("EPOCHS = 10", "EPOCHS = 1") for text in sources[: last + 1]]
    return [*sources[:-1], sources[-1].replace("--epochs 10", f"--epochs 2 {SAME}")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_quickstart_trains_the_same_as_a_script_alone_and_under_torchrun(notebook, tmp_path):
    run(notebook, *quickstart(), "%hybrid_export quick.py")
    there = set(os.listdir(tmp_path))
    table = start(tmp_path, "quick.py")
    assert "finished" in table
    alone = load_run(tmp_path / "quick.jsonl")
    assert alone.final_loss == notebook.value("run.final_loss")
    assert alone.metrics == notebook.value("run.metrics")
    assert alone.samples_seen == notebook.value("run.samples_seen")

    told = start(tmp_path, *TORCHRUN, "quick.py", "--record", "two.jsonl")
    assert told.count("outcome") == 1
    assert set(os.listdir(tmp_path)) - there == {"quick.jsonl", "two.jsonl"}
    two = load_run(tmp_path / "two.jsonl")
    assert two.outcome == "finished"
    assert (two.samples_seen, two.steps) == (alone.samples_seen, alone.steps)
    assert [step.global_batch_size for step in two.history] == [16] * two.steps


# with the reduction given, the step is called for nothing but training
SEEN = f"""%%hybrid_train --epochs 2 {SAME} --reduction mean --plain
numbers, x = batch
with open(f"seen-{{os.environ.get('RANK', 'alone')}}", "a") as file:
    file.write(" ".join(map(str, numbers.tolist())) + "\\n")
loss = net(x).square().mean()
"""


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_two_machines_train_as_one_and_the_first_keeps_the_record(notebook, tmp_path):
    """Each has its agent, its folder and its copy of the script, as on two machines."""
    run(notebook, DATA, MODEL, STEP, "%hybrid_export train.py")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machines = [tmp_path / name for name in ("first", "second")]
    agents = []
    for machine in machines:
        machine.mkdir()
        shutil.copy(tmp_path / "train.py", machine)
        agents.append(begin(machine, *AGENT, f"localhost:{port}", "train.py", "--weights", "it.pt"))
    told = [end(agent) for agent in agents]
    kept = [machine for machine in machines if (machine / "train.jsonl").exists()]
    assert len(kept) == 1
    assert sum("outcome" in each for each in told) == 1
    done = load_run(kept[0] / "train.jsonl")
    assert done.samples_seen == 96
    assert [step.global_batch_size for step in done.history] == [8] * done.steps
    assert done.start is not None
    assert done.start.processes == 2
    assert (kept[0] / "it.pt").exists()


STRUCK = f"""%%hybrid_train --epochs 3 {SAME} --reduction mean --plain
if started == ("1", "0") and glob.glob("kept/*.pt"):
    os.kill(os.getpid(), 9)
(x,) = batch
loss = net(x).square().mean()
"""


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_what_torchrun_starts_again_goes_on_from_the_checkpoint(notebook, tmp_path):
    """The second process is killed in the second epoch; then the first one comes late."""
    run(
        notebook,
        "import glob, os, time\nimport torch\nfrom torch import nn\n"
        "from torch.utils.data import DataLoader, TensorDataset",
        'started = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")',
        "def made():\n"
        '    time.sleep(3 * (started == ("0", "1")))\n'
        "    torch.manual_seed(0)\n"
        "    return nn.Linear(4, 2)",
        "net = made()\noptimizer = torch.optim.SGD(net.parameters(), lr=0.1)",
        "data = TensorDataset(torch.randn(4096, 4))",
        "train_loader = DataLoader(data, batch_size=16, shuffle=True)",
        STRUCK,
        "%hybrid_export train.py",
    )
    words = ("train.py", "--checkpoint", "kept", "--resume", "--weights", "two.pt")
    told = start(tmp_path, *TORCHRUN, "--max-restarts", "1", *words)
    assert "went on from the checkpoint of step" in told
    check_weights(notebook, tmp_path / "two.pt")


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_two_processes_use_every_sample_once_and_end_with_the_weights_of_one(notebook, tmp_path):
    run(
        notebook,
        "import os\nimport torch\nfrom torch import nn\n"
        "from torch.utils.data import DataLoader, TensorDataset",
        "torch.manual_seed(0)\ndata = TensorDataset(torch.arange(48), torch.randn(48, 4))",
        "train_loader = DataLoader(data, batch_size=16, shuffle=True)\nnet = nn.Linear(4, 2)",
        "optimizer = torch.optim.SGD(net.parameters(), lr=0.1)",
        SEEN,
        "%hybrid_export train.py",
    )
    start(tmp_path, *TORCHRUN, "train.py", "--weights", "two.pt", "--checkpoint", "kept")
    ranks = [(tmp_path / f"seen-{rank}").read_text().split() for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted(list(map(str, range(48))) * 2)
    assert [len(seen) for seen in ranks] == [48, 48]
    check_weights(notebook, tmp_path / "two.pt")
    assert "the run was over already" in start(
        tmp_path, *TORCHRUN, "train.py", "--checkpoint", "kept", "--resume"
    )


# -- the corpus

SEEDS = "import random, numpy, torch\ntorch.manual_seed(0); random.seed(0); numpy.random.seed(0)"
OF_ITS_OWN = {"an iterable data set", "one window of a series a step"}  # batches are never joined
LOOPS = [cell for cell in CELLS if isinstance(cell.expect, str)]
TRAINED = [
    pytest.param(cell, id=cell.name, marks=[pytest.mark.thorough] if number % 3 else [])
    for number, cell in enumerate(LOOPS)
]


@pytest.mark.parametrize("cell", TRAINED)
def test_a_loop_is_refused_in_one_line_or_its_script_ends_with_its_weights(notebook, cell):
    """Or the script names what it left out that may have drawn random numbers."""
    size = "" if cell.name in OF_ITS_OWN else "--micro 512"
    run(notebook, SEEDS, cell.setup)
    notebook.run(f"%%hybrid_train --precision fp32 --batch fixed {size} --plain\n{cell.source}")
    ran = notebook.run("%hybrid_export train.py")
    if ran.error is not None:
        assert ran.error == "UsageError"
        assert "wanted" in ran.message
        assert "\n" not in ran.message
        return
    model = text(notebook).rpartition("torch.save(")[2].partition(".")[0]
    same = notebook.value(f"same_weights({model}, 'train.py')")
    assert same or "may have drawn random numbers" in ran.out, body(notebook)
