"""What does it cost to find the batch that fits, and how large is it?

    OMP_NUM_THREADS=1 python -m benchmarks.finder [--quick] [--json PATH]

`hm.train` against Accelerate's `find_executable_batch_size` and Lightning's `scale_batch_size`, on
a simulated device whose memory holds a forward pass of N samples. All is counted and the clock is
simulated, so two runs give the same numbers on any machine. A peer that is not installed is left
out, and named. Knows nothing of how anyone searches.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import pathlib
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import TensorDataset

from . import finders, measure
from .finders import FILLED, UNFILLED, Clock, Device, Found

HERE = pathlib.Path(__file__).parent
Row = dict[str, Any]
Finder = Callable[[Device, int], Found]  # of a device and a number of steps

GOALS = {3000: 0.95, 777: 0.93, 20000: 0.95}  # of N
DRAWN = 4  # more limits, between these two, each scale as likely as any other
LEAST, MOST = 500, 30_000
SAMPLES = 2**19
ROOMY, STEP, OWN = 2**19, 2**15, 2**13  # samples in a step
STEPS, LONG = 24, 700
PEERS = {
    "Accelerate, from 8,192": ("accelerate", finders.accelerate, {"start": 8192}),
    "Accelerate, from 65,536": ("accelerate", finders.accelerate, {"start": 65536}),
    "Lightning, power": ("lightning", finders.lightning, {"mode": "power"}),
    "Lightning, binsearch": ("lightning", finders.lightning, {"mode": "binsearch"}),
    "Lightning, power, max_val 65,536": (
        "lightning", finders.lightning, {"mode": "power", "max_val": 65536},
    ),
    "Lightning, binsearch, max_val 65,536": (
        "lightning", finders.lightning, {"mode": "binsearch", "max_val": 65536},
    ),
}  # fmt: skip
# ours: the clock, the steps, and what is asked for. The budget is the whole device but for "0.9".
FIXED: Row = {"loader_batch": 256, "memory": 1.0}
OURS: dict[str, tuple[Clock, int, Row]] = {
    "ours": (UNFILLED, STEPS, FIXED | {"batch": ROOMY}),
    "steps of 32,768": (UNFILLED, STEPS, FIXED | {"batch": STEP}),
    "the loader's own 8,192": (UNFILLED, STEPS, FIXED | {"batch": "fixed", "loader_batch": OWN}),
    "adaptive, from 1,024": (UNFILLED, LONG, FIXED | {"loader_batch": 1024}),
    "default budget (0.9)": (UNFILLED, STEPS, FIXED | {"batch": STEP, "memory": 0.9}),
    "a device that gets full": (FILLED, STEPS, FIXED | {"batch": STEP}),
    "no memory readings": (UNFILLED, STEPS, FIXED | {"batch": STEP, "tells": False}),
}

NOTES = """A forward pass of more than N samples raises PyTorch's out-of-memory error; nothing else
does. *Thrown away* are samples of forward passes that no step trained on, failed passes included.
A *restart* is a training that began again, or a model put back from disk. *Cost* is the simulated
time until the size was settled, less what the samples that were trained on meanwhile take at that
size. Ours reads memory as a GPU is read: the host's account of what was allocated, one step late.

A step of a given number of samples cannot always be cut into micro-batches of N: the second table
says into how many it was cut, and into how few memory allows. A micro-batch takes 10 ms whatever
its size, so that larger is faster; on *a device that gets full* it takes 2 ms + 10 us a sample, and
ours stops by design at the smallest size within 3 % of the fastest.
"""


def limits(*, quick: bool) -> list[int]:
    """Return the limits of the goals and, unless `quick`, some drawn ones (fixed seed)."""
    source = random.Random(finders.SEED)
    low, high = math.log(LEAST), math.log(MOST)
    drawn = [round(math.exp(source.uniform(low, high))) for _ in range(DRAWN)]
    return [*GOALS, *([] if quick else drawn)]


def made_up(count: int) -> TensorDataset:
    """Return samples whose labels say nothing: their gradient is noise, so a batch may grow."""
    generator = torch.Generator().manual_seed(finders.SEED)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, torch.randint(0, 2, (count,), generator=generator))


def version(library: str) -> str | None:
    """Return the version of an installed library, None where it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def row(finder: str, found: Found, clock: Clock) -> Row:
    """Return what was found beside the best there is: N itself, and for a step of a given batch
    the size that cuts it into as few micro-batches as memory allows."""
    size, limit = found.size, found.limit
    best = None if found.batch is None else -(-found.batch // -(-found.batch // limit))
    pace = [n / clock.seconds(n) for n in (size, limit)]
    return {
        "finder": finder,
        **asdict(found),
        "of_limit": size / limit,
        "best_cut": best,
        "cuts": None if found.batch is None else -(-found.batch // size),
        "fewest_cuts": None if found.batch is None else -(-found.batch // limit),
        "of_speed": pace[0] / pace[1],
    }


def measured(quick: bool) -> tuple[list[Row], list[str]]:
    """Return a line for each finder and limit, and the peers that are not installed."""
    data = made_up(SAMPLES)
    rows: list[Row] = []
    missing: dict[str, None] = {}
    gc.collect()
    gc.freeze()  # the peers collect garbage at every trial; torch itself need not be looked through
    for limit in limits(quick=quick):
        for name, (library, find, asked) in PEERS.items():
            if version(library) is None:
                missing[library] = None
                continue
            rows.append(row(name, find(Device(limit), data, **asked), UNFILLED))
        for name, (clock, steps, asked) in OURS.items():
            if limit in GOALS or name == "ours":
                found = finders.ours(Device(limit, clock), data, steps, **asked)
                rows.append(row(name, found, clock))
    gc.unfreeze()
    return rows, list(missing)


def goals(rows: list[Row]) -> list[Row]:
    """Return each goal beside what was reached."""
    found = {line["limit"]: line for line in rows if line["finder"] == "ours"}
    lines: list[Row] = [
        {
            "goal": f"N={limit:,}: at least {goal} of N",
            "ours": round(found[limit]["of_limit"], 3),
            "met": found[limit]["of_limit"] >= goal,
        }
        for limit, goal in GOALS.items()
        if limit in found
    ]
    for name, total in (
        ("out-of-memory errors", sum(line["errors"] for line in found.values())),
        ("samples thrown away", sum(line["samples_lost"] for line in found.values())),
    ):
        lines.append({"goal": f"{name}, all {len(found)} N: 0", "ours": total, "met": total == 0})
    return lines


def page(facts: dict[str, Any], rows: list[Row], missing: list[str]) -> str:
    """Return the results as Markdown."""
    reached = [line | {"met": "yes" if line["met"] else "**no**"} for line in goals(rows)]
    with_peers = [line for line in rows if line["finder"] == "ours" or line["finder"] in PEERS]
    asked = [line for line in rows if line["finder"] in OURS and line["limit"] in GOALS]
    parts = [
        "# Finding the batch that fits\n",
        measure.header(facts),
        NOTES,
        f"Not installed, so not run: {', '.join(missing)}.\n" if missing else "",
        "## Goals\n",
        measure.table(reached),
        f"## Against the peers (ours: steps of {ROOMY:,} samples, the budget is all memory)\n",
        measure.table([_beside(line) for line in sorted(with_peers, key=_place)]),
        "## Ours, as it may be asked for\n",
        measure.table([_asked(line) for line in asked]),
    ]
    return "\n".join(part for part in parts if part)


def _place(line: Row) -> tuple[Any, ...]:
    order = [*GOALS, line["limit"]]
    return order.index(line["limit"]), line["limit"], line["finder"] in PEERS


def _beside(line: Row) -> Row:
    return {
        "N": f"{line['limit']:,}",
        "finder": line["finder"],
        "settled on": f"{line['size']:,}",
        "of N": f"{line['of_limit']:.2f}",
        "out-of-memory errors": line["errors"],
        "samples thrown away": f"{line['samples_lost']:,}",
        "in forward passes": line["passes_lost"],
        "restarts": line["restarts"],
        "that size ran in": line["ran"],
        "simulated s it cost": f"{line['search_s']:.2f}",
    }


def _asked(line: Row) -> Row:
    predicted = line["predicted"]
    return {
        "ours": line["finder"],
        "N": f"{line['limit']:,}",
        "settled on": f"{line['size']:,}",
        "of N": f"{line['of_limit']:.2f}",
        "memory allows, it says": "-" if predicted is None else f"{predicted:,}",
        "samples in a step": f"{line['batch']:,}",
        "micro-batches (fewest possible)": f"{line['cuts']} ({line['fewest_cuts']})",
        "of the speed at N": f"{line['of_speed']:.2f}",
        "errors": line["errors"],
        "samples thrown away": f"{line['samples_lost']:,}",
        "settled after step": line["steps"],
        "simulated s it cost": f"{line['search_s']:.2f}",
    }


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the limits that have a goal")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "finder.json")
    arguments = parser.parse_args(given)
    command = "python -m benchmarks.finder" + " --quick" * arguments.quick
    facts = measure.environment(command, str(finders.SEED))
    libraries = sorted({library for library, _, _ in PEERS.values()})
    facts |= {library: version(library) or "not installed" for library in libraries}
    rows, missing = measured(arguments.quick)
    found = {"environment": facts, "goals": goals(rows), "rows": rows}
    arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = page(facts, rows, missing)
    arguments.json.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
