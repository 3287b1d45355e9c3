"""What do the panel under a cell, its plots and its controls cost while a cell trains?

    OMP_NUM_THREADS=1 python -m benchmarks.panel [--seconds 15] [--rounds 10]

A real kernel trains the same MLP with the panel and with `--plain` in short blocks, panel, plain,
plain, panel, so that a machine that drifts does so for both. A step computes for some 5 ms on one
thread and waits for nothing, so that all that drawing takes is seen. Two front ends watch: a light
one, beside which the kernel has a core to itself, and a browser, which takes what it needs.
Counted is the CPU time of the kernel's process, all its threads, beside the clock and beside what
the view itself counted (`run.drawing_seconds`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import hybrid_magic

from . import measure, watching

HERE = pathlib.Path(__file__).parent
STEP_S, RUN_S = 0.005, 60.0  # of the goal
OPEN = "not shown: the interval holds the goal"
ORDER = ("panel", "plain", "plain", "panel")  # a round
PACKAGES = ("jupyterlab", "ipykernel", "ipywidgets", "IPython")
Row = dict[str, Any]

READY = """
import hashlib, json, os, time, torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
%load_ext hybrid_magic
from hybrid_magic.notebook.live import View
torch.set_num_threads(1)

def fresh():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(512, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )
    data = TensorDataset(torch.randn(6400, 512), torch.randint(0, 10, (6400,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, DataLoader(data, batch_size=64, shuffle=True), optimizer

def clocks():
    return time.perf_counter(), time.process_time(), time.thread_time()

def weights():
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()

opening, opened_s = View._open, [0.0]

def timed_opening(view, start):
    opening(view, start)
    opened_s[:] = [view.cost_s]

View._open = timed_opening

def note(side):
    (cell_s, cell_cpu_s, _), (train_s, train_cpu_s, main_cpu_s) = (
        [later - sooner for sooner, later in zip(*pair)]
        for pair in ((began, clocks()), (spans[0], spans[-1]))
    )
    taken.append(dict(
        side=side, cell_s=cell_s, cell_cpu_s=cell_cpu_s, train_s=train_s, train_cpu_s=train_cpu_s,
        main_cpu_s=main_cpu_s, steps=run.steps, drawing_s=run.drawing_seconds,
        opened_s=opened_s[0], asked=len(run.changes), weights=weights(),
    ))

taken = []
"""
FRESH = "model, loader, optimizer = fresh()\nspans, began = [], clocks()"
TRAIN = """
%%hybrid_train model loader --optimizer optimizer --steps {steps} --seed 0 {exact} {plain} -o run
spans[1:] = [clocks()]
x, y = batch
loss = F.cross_entropy(model(x), y)
"""
EXACT = "--precision fp32 --batch fixed --micro 64 --lr-scale none"
END = """
with open("taken.part", "w") as file:
    json.dump(taken, file)
os.replace("taken.part", "taken.json")
"""


def cells_of(steps: int, rounds: int) -> list[str]:
    """Return the notebook: a short turn of each side to warm up, then `rounds` rounds."""
    cells = [READY.replace("WIDTH", "704")]
    sides = [*ORDER[:2], *ORDER * rounds]
    for number, side in enumerate(sides, start=-2):
        plain = "--plain" if side == "plain" else ""
        length = steps if number >= 0 else min(steps, 400)
        cells += [FRESH, TRAIN.format(steps=length, exact=EXACT, plain=plain)]
        cells.append(f"note({side!r})" if number >= 0 else "taken.clear()")
    return [*cells, END]


def take(front_end: str, steps: int, rounds: int) -> list[Row]:
    """Run the notebook in a front end, and return what each of its turns took."""
    with tempfile.TemporaryDirectory() as name:
        result = pathlib.Path(name, "taken.json")
        watching.FRONT_ENDS[front_end](cells_of(steps, rounds), result.parent, result)
        return json.loads(result.read_text())


def rows_of(taken: Sequence[Row]) -> list[Row]:
    """Return the lines of the result; ratios and differences are formed within a round."""
    rounds = [taken[at : at + len(ORDER)] for at in range(0, len(taken), len(ORDER))]

    def mean(turns: Sequence[Row], side: str, of: Callable[[Row], float]) -> float:
        return statistics.fmean(of(turn) for turn in turns if turn["side"] == side)

    def paired(of: Callable[[Row], float], form: Callable[[float, float], float]) -> Any:
        pairs = [[mean(turns, side, of) for side in ORDER[:2]] for turns in rounds]
        return measure.bootstrap([form(*pair) for pair in pairs])

    def ratio(name: str) -> measure.Interval:
        return paired(lambda turn: turn[name], lambda panel, plain: panel / plain)

    def over(side: str, of: Callable[[Row], float]) -> measure.Interval:
        return measure.bootstrap([of(turn) for turn in taken if turn["side"] == side])

    def others_s(turn: Row) -> float:
        return turn["train_cpu_s"] - turn["main_cpu_s"]

    def around_s(turn: Row) -> float:
        return turn["cell_cpu_s"] - turn["train_cpu_s"]

    def counted(turns: Sequence[Row]) -> float:
        """Return the share of the training that is known to go into what is shown meanwhile."""
        more_s = mean(turns, "panel", others_s) - mean(turns, "plain", others_s)
        drawing_s = mean(turns, "panel", lambda turn: turn["drawing_s"] - turn["opened_s"])
        return (drawing_s + more_s) / mean(turns, "panel", lambda turn: turn["train_s"])

    def once_s(turns: Sequence[Row]) -> float:
        panel_s, plain_s = (mean(turns, side, around_s) for side in ORDER[:2])
        return panel_s - plain_s

    return [
        _row("CPU time of training, ratio", ratio("train_cpu_s"), 1.01),
        _row("time of training, ratio", ratio("train_s"), 1.01),
        _row(
            "share by the view's own clock",
            over("panel", lambda turn: turn["drawing_s"] / turn["train_s"]),
            0.01,
        ),
        _row(
            "while it trains: its own clock from the first step on, and what other threads do more",
            measure.bootstrap([counted(turns) for turns in rounds]),
        ),
        _row(
            "s of CPU time to open the panel and leave table and figure, once a run",
            measure.bootstrap([once_s(turns) for turns in rounds]),
        ),
        _row(
            f"the two together, as a share of a run of {RUN_S:g} s",
            measure.bootstrap([counted(turns) + once_s(turns) / RUN_S for turns in rounds]),
            0.01,
        ),
        _row("the same weights, bit by bit", len({turn["weights"] for turn in taken}) == 1, True),
        _row("s of training, plain", over("plain", lambda turn: turn["train_s"])),
        _row(
            "ms per step, plain",
            over("plain", lambda turn: 1e3 * turn["train_s"] / max(1, turn["steps"] - 1)),
        ),
        _row("values typed in a run", over("panel", lambda turn: turn["asked"])),
    ]


def _row(name: str, found: Any, goal: Any = None) -> Row:
    """Return a line; a goal is met when the whole interval is within it, missed when none of it."""
    met = None if goal is None else found is True
    if isinstance(found, measure.Interval) and goal is not None:
        met = True if found.high <= goal else False if found.low > goal else OPEN
    return {"measure": name, "panel": found, "goal": goal, "met": met}


def page_of(found: dict[str, list[Row]], facts: Row) -> str:
    """Return the Markdown page of what each front end's rows say."""

    def said(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "**no**"
        if isinstance(value, measure.Interval):
            return f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}], n {value.n}"
        if isinstance(value, str):
            return value
        return "" if value is None else f"<= {value:g}"

    parts = [INTRODUCTION]
    for front_end, rows in found.items():
        shown = [{name: said(value) for name, value in row.items()} for row in rows]
        parts += [f"## {TITLES[front_end]}\n", measure.table(shown)]
    return "\n".join([*parts, measure.header(facts)])


TITLES = {
    "client": "Watched by a light client, which leaves the kernel a core to itself",
    "browser": "Watched in headless JupyterLab: server and browser share the machine",
}
INTRODUCTION = """# What the panel costs

The same training with the panel and with `--plain` in one kernel, in rounds of four short blocks:
panel, plain, plain, panel. A step computes on one thread and waits for nothing. Ratios are formed
within a round (n rounds); medians with 95 % bootstrap intervals. *Training* lasts from the first
step to the last, *CPU time* is the kernel's, of all its threads. A value is typed into the panel
every ten seconds.
"""


def facts_of(command: str, rounds: int, front_ends: Sequence[str]) -> Row:
    facts = measure.environment(command, f"0, {rounds} rounds")
    root = pathlib.Path(hybrid_magic.__file__).parent
    facts["panel"] = measure.digest([*root.glob("notebook/*.py"), *root.glob("report/*.py")])
    facts |= {name.lower(): importlib.metadata.version(name) for name in PACKAGES}
    if "browser" in front_ends:
        facts["browser"] = watching.browser_version()
    return facts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=15, help="length of a block (default 15)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of four blocks (default 10)")
    parser.add_argument("--front-ends", nargs="+", choices=TITLES, default=[*TITLES])
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "panel.json")
    asked = parser.parse_args(argv)

    command = f"python -m benchmarks.panel --seconds {asked.seconds:g} --rounds {asked.rounds}"
    if asked.front_ends != [*TITLES]:
        command += " --front-ends " + " ".join(asked.front_ends)
    facts = facts_of(command, asked.rounds, asked.front_ends)
    began = time.perf_counter()
    steps = round(asked.seconds / STEP_S)
    taken: dict[str, list[Row]] = {}
    for name in asked.front_ends:
        taken[name] = take(name, steps, asked.rounds)
        facts[f"load after the {name}"] = measure.system_load()
        facts["taken"] = f"{(time.perf_counter() - began) / 60:.0f} min"
        save(asked.json, taken, facts)  # each time: the next one may fail
    print(asked.json.with_suffix(".md").read_text())


def save(path: pathlib.Path, taken: dict[str, list[Row]], facts: Row) -> None:
    """Write what was taken as JSON to `path`, and as a page beside it."""
    found = {name: rows_of(turns) for name, turns in taken.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {"environment": facts, "rows": found, "turns": taken}
    path.write_text(json.dumps(saved, default=measure.plain, indent=1) + "\n")
    path.with_suffix(".md").write_text(page_of(found, facts))


if __name__ == "__main__":
    main()
