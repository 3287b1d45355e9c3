"""What do the panel under a cell, its plots and its controls cost while a cell trains?

    OMP_NUM_THREADS=1 python -m benchmarks.panel [--seconds 60] [--rounds 5]

A real kernel trains the same MLP with the panel and with `--plain`, by turns, in a notebook that is
open in headless JupyterLab: the panel is drawn by a browser, and a value is typed into it every ten
seconds. A step is a real one that then waits, as for a device, some 5 ms in all. Beside the clock
stands what the view itself counted (`run.drawing_seconds`). Needs Chromium; the browser runs on the
same machine, beside the kernel.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import hybrid_magic
from tests.browser.front_end import QUIET, Notebook, served

from . import measure

HERE = pathlib.Path(__file__).parent
WAIT_S, STEP_S = 0.004, 0.005
SIDES = ("panel", "plain")
TYPED_EVERY_S = 10.0
PACKAGES = ("jupyterlab", "ipykernel", "ipywidgets", "IPython")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
Row = dict[str, Any]

READY = """
import hashlib, json, time, torch
from torch.nn import functional as F
from benchmarks.loops import WORKS
%load_ext hybrid_magic

def weights():
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()

def note(side):
    now = time.perf_counter(), time.process_time()
    taken.append(dict(
        side=side, cell_s=now[0] - began[0], cpu_s=now[1] - began[1], seconds=run.seconds,
        steps=run.steps, drawing_s=run.drawing_seconds, asked=len(run.changes), weights=weights(),
    ))

taken = []
"""
FRESH = (
    "model, loader, optimizer = WORKS[2].fresh()\nbegan = time.perf_counter(), time.process_time()"
)
TRAIN = """
%%hybrid_train model loader --optimizer optimizer --steps {steps} --seed 0 {exact} {plain} -o run
time.sleep({wait})
x, y = batch
loss = F.cross_entropy(model(x), y)
"""
EXACT = "--precision fp32 --batch fixed --micro 32 --lr-scale none"
END = """
with open("taken.json", "w") as file:
    json.dump(taken, file)
print("TAKEN", len(taken))
"""


def cells_of(steps: int, rounds: int) -> list[str]:
    """Return the notebook: a short turn of each side to warm up, then `rounds` turns of both."""
    cells = [READY]
    for number in range(-1, rounds):
        for side in SIDES if number % 2 else SIDES[::-1]:
            plain = "--plain" if side == "plain" else ""
            length = steps if number >= 0 else min(steps, 400)
            cells += [FRESH, TRAIN.format(steps=length, exact=EXACT, plain=plain, wait=WAIT_S)]
            cells.append(f"note({side!r})" if number >= 0 else "taken.clear()")
    return [*cells, END]


def take(steps: int, rounds: int) -> list[Row]:
    """Run the notebook in a browser, and return what each of its turns took."""
    from playwright.sync_api import sync_playwright

    programs = pathlib.Path(sys.executable).parent
    cells = cells_of(steps, rounds)
    with (
        tempfile.TemporaryDirectory() as folder,
        served("lab", pathlib.Path(folder), programs, sys.executable) as server,
        sync_playwright() as player,
    ):
        browser = player.chromium.launch(executable_path=_chromium(), args=list(QUIET))
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        notebook = Notebook(page, server, server.write(cells))
        notebook.open()
        notebook.run_all()
        _watch(notebook, until=lambda: _found(server.folder) is not None)
        browser.close()
        found = _found(server.folder)
    assert found is not None
    return found


def _watch(notebook: Notebook, until: Callable[[], bool]) -> None:
    """Type a value into the panel now and then, as a person does who watches, to the end."""
    typed = 0
    while not until():
        errors = notebook.page.locator(".jp-RenderedText[data-mime-type*=error]")
        if errors.count():
            raise SystemExit(errors.first.inner_text())
        if notebook.page.locator(".widget-slider").count():
            typed += 1
            notebook.type_value("Growth factor", f"{1.5 + typed % 2}")
        notebook.page.wait_for_timeout(1000 * TYPED_EVERY_S)


def _found(folder: pathlib.Path) -> list[Row] | None:
    try:
        return json.loads((folder / "taken.json").read_text())
    except (OSError, ValueError):
        return None


def _chromium() -> str:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit(f"no browser is installed; wanted one of {', '.join(BROWSERS)}")
    return path


def rows_of(taken: Sequence[Row]) -> list[Row]:
    """Return the lines of the result; ratios are formed within a turn of both sides."""
    panel, plain = ([turn for turn in taken if turn["side"] == side] for side in SIDES)

    def paired(formed: Callable[[Row, Row], float]) -> measure.Interval:
        pairs = zip(panel, plain, strict=True)
        return measure.bootstrap([formed(ours, theirs) for ours, theirs in pairs])

    shown = measure.bootstrap([turn["drawing_s"] / turn["seconds"] for turn in panel])
    equal = len({turn["weights"] for turn in taken}) == 1
    return [
        _row("time of training, ratio", paired(lambda a, b: a["seconds"] / b["seconds"]), 1.01),
        _row("share of it by the view's own clock", shown, 0.01),
        _row("the same weights, bit by bit", equal, True),
        _row("time of the whole cell, ratio", paired(lambda a, b: a["cell_s"] / b["cell_s"])),
        _row(
            "CPU time of the kernel, ms more per second",
            paired(lambda a, b: 1e3 * (a["cpu_s"] / a["cell_s"] - b["cpu_s"] / b["cell_s"])),
        ),
        _row("s of training, plain", measure.bootstrap([turn["seconds"] for turn in plain])),
        _row(
            "ms per step, plain",
            measure.bootstrap([1e3 * turn["seconds"] / turn["steps"] for turn in plain]),
        ),
        _row("values typed in a run", measure.bootstrap([turn["asked"] for turn in panel])),
    ]


def _row(name: str, found: Any, goal: Any = None) -> Row:
    value = found.value if isinstance(found, measure.Interval) else found
    met = None if goal is None else value is True if goal is True else value <= goal
    return {"measure": name, "panel": found, "goal": goal, "met": met}


def page_of(rows: Sequence[Row], facts: Row) -> str:
    """Return the Markdown page of the rows."""

    def said(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "**no**"
        if isinstance(value, measure.Interval):
            return f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]"
        return "" if value is None else f"<= {value:g}"

    shown = [{name: said(value) if name != "measure" else value for name, value in row.items()}
             for row in rows]  # fmt: skip
    return f"{INTRODUCTION}\n{measure.table(shown)}\n{measure.header(facts)}"


INTRODUCTION = """# What the panel costs

The same training with the panel and with `--plain`, by turns, in one kernel; headless JupyterLab
shows the notebook on the same machine, and a value is typed into the panel every ten seconds.
Medians over turns with 95 % bootstrap intervals; ratios are formed within a turn. *Time of
training* is `run.seconds`; the whole cell also opens the panel and leaves table and figure behind,
once a run.
"""


def facts_of(seconds: float, rounds: int) -> Row:
    command = f"python -m benchmarks.panel --seconds {seconds:g} --rounds {rounds}"
    facts = measure.environment(command, f"0, {rounds} turns of each side")
    root = pathlib.Path(hybrid_magic.__file__).parent
    facts["panel"] = measure.digest([*root.glob("notebook/*.py"), *root.glob("report/*.py")])
    facts |= {name.lower(): importlib.metadata.version(name) for name in PACKAGES}
    told = subprocess.check_output([_chromium(), "--version", "--no-sandbox"], text=True)
    facts["browser"] = " ".join(told.split()[:2])
    return facts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="length of a run (default 60)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "panel.json")
    arguments = parser.parse_args(argv)

    facts = facts_of(arguments.seconds, arguments.rounds)
    began = time.perf_counter()
    taken = take(round(arguments.seconds / STEP_S), arguments.rounds)
    facts["taken"] = f"{(time.perf_counter() - began) / 60:.0f} min"
    rows = rows_of(taken)
    text = page_of(rows, facts)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    saved = {"environment": facts, "rows": rows, "turns": taken}
    arguments.json.write_text(json.dumps(saved, default=measure.plain, indent=1) + "\n")
    arguments.json.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
