"""Every snippet of the README runs, in order, as a person would paste it.

Python and magic snippets run as the cells of one IPython shell, after the few lines that a reader
already has: a model and loaders. Shell snippets may only name make targets and pip that exist.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
CELLS = [text for language, text in SNIPPETS if language == "python"]
COMMANDS = [text for language, text in SNIPPETS if language in ("sh", "bash")]

# What the README's reader has in their notebook.
ALREADY_THERE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(256, 8)
y = (x.sum(1) > 0).long()
train_loader = DataLoader(TensorDataset(x[:192], y[:192]), batch_size=16, shuffle=True)
test_loader = DataLoader(TensorDataset(x[192:], y[192:]), batch_size=64)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
"""

PROGRAM = """
import sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for number, cell in enumerate({cells!r}):
    result = shell.run_cell(cell, store_history=True)
    if not result.success:
        sys.exit(f"snippet {{number}} failed: {{result.error_in_exec or result.error_before_exec}}")
run = shell.user_ns["run"]
print("outcome", run.outcome, "steps", run.steps, "samples", run.samples_seen)
"""


def test_the_python_snippets_run_as_cells_of_one_notebook(tmp_path):
    assert len(CELLS) >= 3
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(cells=[ALREADY_THERE, *CELLS])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "outcome finished" in done.stdout
    assert "UsageError" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_the_shell_snippets_name_what_exists(command):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    for line in filter(None, (line.partition("#")[0].strip() for line in command.splitlines())):
        program, *words = line.lstrip("%!").split()
        if program == "make":
            assert set(words) <= targets, line
        else:
            assert (program, words[0]) in {("pip", "install"), ("git", "clone")}, line


def test_every_snippet_says_its_language():
    assert README.count("```") == 2 * len(SNIPPETS)
    assert {language for language, _ in SNIPPETS} <= {"python", "sh", "text"}


def test_files_and_pictures_that_it_names_are_there():
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README)
    for name in (first or second for first, second in links):
        if "://" not in name:
            assert (ROOT / name).exists(), name
    assert (ROOT / "notebooks/01_quickstart.png").stat().st_size < 150_000


def test_options_that_it_names_exist():
    import dataclasses

    from hybrid_magic.config import AblateConfig, ProfileConfig, flag_of

    fields = (*dataclasses.fields(AblateConfig), *dataclasses.fields(ProfileConfig))
    known = {flag_of(item) for item in fields}
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", README))
    theirs = {"--no-deps", "--smoke", "--explain"}  # of pip, of a benchmark, of the magic alone
    theirs |= {"--nproc-per-node", "--nnodes", "--max-restarts"}  # of torchrun
    assert named - known == theirs


def test_the_version_has_its_entry_in_the_changelog():
    import hybrid_magic

    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {hybrid_magic.__version__}" in changes
