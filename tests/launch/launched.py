"""What a person's cells define: run as `__main__`, so that a worker can have it from nowhere else.

Each cell is kept where tracebacks look for its lines, as IPython does it.
"""

from __future__ import annotations

import itertools
import linecache
import pathlib
import time
from typing import Any

import psutil

SETUP = """
import os, signal, sys, time
import torch
from torch import nn
import torch.nn.functional as F

class Data(torch.utils.data.Dataset):
    def __init__(self, n=64):
        made = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 4, generator=made)
        self.y = (self.x.sum(1) > 0).long()
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return self.x[i], self.y[i]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.outer = nn.Linear(8, 2)
    def forward(self, x):
        return self.outer(F.dropout(self.norm(self.inner(x)), 0.1, self.training))

class Odd(Exception):
    def __init__(self, code):
        super().__init__(f"odd {code}")
        self.code = code
    def __reduce__(self):
        return Odd, (self.code,)

torch.manual_seed(0)
model = Net()
loader = torch.utils.data.DataLoader(
    Data(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(2)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
RANK = os.environ.get("RANK")
"""
STEP = """
def step(_, batch):
    x, y = batch
    rank, last = os.environ["RANK"], not model.norm.num_batches_tracked < 3
    {body}
    return F.cross_entropy(model(x), y)
"""
_numbers = itertools.count()


def cell(text: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run a cell in `namespace`; tracebacks show its lines."""
    name = f"<cell {next(_numbers)}>"
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    exec(compile(text, name, "exec"), namespace)
    return namespace


def notebook(body: str = "pass", setup: str = SETUP) -> dict[str, Any]:
    """Return the names of a notebook whose step does `body` before its forward pass."""
    return cell(STEP.format(body=body), cell(setup, {"__name__": "__main__"}))


def trained_with(held: dict[str, Any], **options: Any) -> Any:
    """Train what a notebook holds in two processes, in FP32 at a fixed batch."""
    import hybrid_magic as hm

    given = {"processes": 2, "precision": "fp32", "batch": "fixed", "optimizer": held["optimizer"]}
    return hm.train(held["model"], held["loader"], held["step"], **{**given, **options})


def processes_of(folder: pathlib.Path) -> list[int]:
    """Return the workers whose folder lies in `folder`, and what they have forked."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if f"{folder}/hybrid-" in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.info["pid"])
    return found


def gone(folder: pathlib.Path, within_s: float = 3.0) -> bool:
    """Return whether no process of `folder` is left, soon."""
    ends = time.monotonic() + within_s
    while processes_of(folder):
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True
