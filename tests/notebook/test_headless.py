"""Programs that run a notebook with no one watching: they end, and leave the result in the file."""

import base64
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE_S = 150  # a program that hangs is ended; it takes some ten seconds
MOST_BYTES = 300_000
CELLS = [
    """
import time, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
data = TensorDataset(torch.randn(256, 8), torch.randint(0, 2, (256,)))
train_loader = DataLoader(data, batch_size=16)
model = nn.Linear(8, 2)
%load_ext hybrid_magic
""",
    """
%%hybrid_train --epochs 8 -o run
x, y = batch
time.sleep(0.02)
loss = nn.functional.cross_entropy(model(x), y)
""",
    "print(run.outcome, run.samples_seen, 'samples')",
]
PROGRAMS = {
    "nbconvert": ["--to", "notebook", "--execute", "--output", "out.ipynb", "in.ipynb"],
    "papermill": ["in.ipynb", "out.ipynb", "--kernel", "python3"],
}


@pytest.mark.timeout(PATIENCE_S + 30)
@pytest.mark.parametrize(
    "program", [pytest.param("nbconvert", marks=pytest.mark.thorough), "papermill"]
)
def test_a_program_that_runs_notebooks_ends_and_keeps_table_and_figure(program, tmp_path):
    for needed in (program, "torch", "ipykernel", "ipywidgets"):
        pytest.importorskip(needed)
    nbformat = pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "in.ipynb")
    done = subprocess.run(
        [sys.executable, "-m", program, *PROGRAMS[program]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    assert len(text) < MOST_BYTES
    trained, behind = (cell["outputs"] for cell in json.loads(text)["cells"][-2:])
    assert "".join(behind[0]["text"]) == "finished 2048 samples\n"
    streams = ["".join(output["text"]) for output in trained if "text" in output]
    assert "hybrid train: 100%" in "".join(streams)
    table, figure = (output["data"] for output in trained if "data" in output)
    assert {*table} == {"text/html", "text/plain"}
    assert {*figure} == {"image/png", "text/plain"}
    assert "finished" in "".join(table["text/plain"])
    assert "<table" in "".join(table["text/html"])
    assert base64.b64decode(figure["image/png"]).startswith(b"\x89PNG")
    assert "Four plots of a training run" in "".join(figure["text/plain"])
