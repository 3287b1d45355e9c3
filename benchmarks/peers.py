"""What does a training loop cost in others' hands, in ours, and written by hand in PyTorch?

    OMP_NUM_THREADS=1 python -m benchmarks.peers [--quick] [--peer NAME]

The same model, samples, order, optimizer and seed through every loop of `peer_loops`, by turns in
one process on one thread; the weights must come out as the hand-written loop leaves them. A peer
that is not installed or fails is named with its reason. Knows nothing of what is inside a loop.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import truediv
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from . import measure
from .loops import BASE, MLP_STEPS, SEED, WORKS, Work
from .peer_loops import PEERS, Fit, Loop, Parts, by_hand, installed, ours, ours_shown, said

HERE = pathlib.Path(__file__).parent
BY_HAND, OURS, SHOWN = "by hand", "hybrid_magic", "hybrid_magic, live view"
OWN: dict[str, Loop] = {BY_HAND: by_hand, OURS: ours, SHOWN: ours_shown}
EPOCHS = 2  # of a turn
COUNTED = 100, 300  # batches of the two runs whose counts are subtracted
LOGGERS = ("lightning.pytorch", "lightning.fabric", "transformers", "accelerate")
Row = dict[str, Any]
start_of = "{}: one step".format  # a turn's second run


def fresh(work: Work, batches: int, *, epochs: int = 1, generator: bool = False) -> Parts:
    """Return what is trained, the same every time; `generator`: the loader has one of its own."""
    torch.manual_seed(SEED)
    model, samples = work.model(), BASE * batches
    data = TensorDataset(work.inputs(samples), torch.randint(0, 2, (samples,)))
    order = torch.Generator().manual_seed(SEED) if generator else None
    loader = DataLoader(data, batch_size=BASE, shuffle=True, generator=order)
    fed = list(loader) if work.ready else loader
    return Parts(model, fed, work.optimizer(model.parameters()), work.accumulate, epochs)


def ready(loop: Loop, parts: Parts) -> Fit:
    """Return what trains; what building it drew or changed in the process is undone."""
    fit = loop(parts)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    return fit


def apart(model: nn.Module, other: nn.Module) -> float:
    """Return the largest difference between two models' parameters; 0.0 is equal bit by bit."""
    one, two = (nn.utils.parameters_to_vector(each.parameters()) for each in (model, other))
    return 0.0 if torch.equal(one, two) else float((one - two).detach().abs().max())


def try_all(
    work: Work, contestants: Mapping[str, Loop], batches: int
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Warm up; return what each trained (its loader has a generator), and why others failed."""
    models: dict[str, nn.Module] = {}
    failed: dict[str, str] = {}
    for name, loop in contestants.items():
        parts = fresh(work, batches, epochs=EPOCHS, generator=True)
        try:
            ready(loop, parts)()
            models[name] = parts.model
        except Exception as error:
            if name in OWN:
                raise
            failed[f"{name}, {work.name}"] = f"failed ({said(error)})"
    return models, failed


def measure_work(
    work: Work, contestants: Mapping[str, Loop], blocks: int, batches: int
) -> tuple[list[Row], dict[str, str]]:
    """Return a row for each loop that trains, and of each peer that failed the reason."""
    steps = max(1, batches // EPOCHS // work.accumulate)  # in an epoch
    epoch = steps * work.accumulate  # batches
    tried, failed = try_all(work, contestants, max(1, steps // 4) * work.accumulate)
    loops = {name: contestants[name] for name in tried}
    ends: dict[str, nn.Module] = {}

    def whole(name: str) -> Fit:
        parts = fresh(work, epoch, epochs=EPOCHS)
        ends[name] = parts.model
        return ready(loops[name], parts)

    def start(name: str) -> Fit:
        return ready(loops[name], fresh(work, work.accumulate))

    turns = {name: partial(whole, name) for name in loops}
    starts = {start_of(name): partial(start, name) for name in loops}
    timings = measure.paired_blocks(turns | starts, blocks, warmup=0)
    rows = [
        {"work": work.name, "loop": name}
        | times(timings, name, steps * EPOCHS)
        | counts(work, loop)
        | {
            "differs_by": apart(ends[name], ends[BY_HAND]),
            "with_generator_differs_by": apart(tried[name], tried[BY_HAND]),
        }
        for name, loop in loops.items()
    ]
    return rows, failed


def times(timings: Mapping[str, list[measure.Timing]], name: str, steps: int) -> Row:
    """Return what a run of `steps` takes, and what a step takes without the start of the run."""

    def later(which: str) -> list[float]:
        pairs = zip(timings[which], timings[start_of(which)], strict=True)
        return [run.cpu_s - start.cpu_s for run, start in pairs]

    def paired(form: Callable[[float, float], float], other: str) -> measure.Interval:
        return measure.bootstrap(list(map(form, later(name), later(other))))

    more = steps - 1
    return {
        "cpu_ratio": measure.ratio(timings[name], timings[BY_HAND]),
        "wall_ratio": measure.ratio(timings[name], timings[BY_HAND], "wall_s"),
        "cpu_us_per_step": 1e6 * statistics.median(later(name)) / more,
        "over_by_hand_us": paired(lambda one, other: 1e6 * (one - other) / more, BY_HAND),
        "shown_to_ours": paired(truediv, OURS) if name == SHOWN else None,
        "one_step_ms": 1e3 * statistics.median(run.cpu_s for run in timings[start_of(name)]),
    }


def counts(work: Work, loop: Loop) -> Row:
    """Return Python calls and host reads per step: two runs of different length, by difference."""
    found: Row = {"calls_per_step": None, "host_reads_per_step": None}
    if work.counted:
        counters = (measure.count_calls, measure.count_host_reads)
        for name, count in zip(found, counters, strict=True):
            few, more = (count(ready(loop, fresh(work, batches))) for batches in COUNTED)
            found[name] = (more - few) * work.accumulate / (COUNTED[1] - COUNTED[0])
    return found


def goals_of(rows: Sequence[Row], works: Sequence[Work]) -> list[Row]:
    """Return what our loops are held to, beside the best of the others."""
    lines: list[Row] = []
    for work in works:
        found = {row["loop"]: row for row in rows if row["work"] == work.name}
        others = [row for name, row in found.items() if name not in OWN]
        goals = [
            (OURS, "cpu_ratio", work.ratio_goal),
            (OURS, "calls_per_step", work.calls_goal),
            (OURS, "differs_by", 0.0),
            (SHOWN, "differs_by", 0.0),
            (SHOWN, "shown_to_ours", 1.01),
        ]
        for name, measured, goal in goals:
            reached = found[name][measured]
            if goal is None or reached is None:
                continue
            line = {"work": work.name, "loop": name, "measure": measured, "found": reached}
            line |= {"goal": goal, "met": within(reached, goal), "best_other": None}
            if others and measured in ("cpu_ratio", "calls_per_step"):
                best = min(others, key=lambda row, at=measured: getattr(row[at], "value", row[at]))
                line["best_other"] = {"loop": best["loop"], "found": best[measured]}
            lines.append(line)
    return lines


def within(found: Any, goal: float) -> bool | None:
    """Return whether all of an interval, or a number, is within `goal`; None: a part of it is."""
    if not isinstance(found, measure.Interval):
        return found <= goal
    return True if found.high <= goal else False if found.low > goal else None


TITLES = {
    "cpu_ratio": "CPU time, ratio",
    "wall_ratio": "clock, ratio",
    "over_by_hand_us": "CPU us a step over by hand",
    "cpu_us_per_step": "CPU us a step",
    "one_step_ms": "CPU ms of a run of one step",
    "calls_per_step": "Python calls a step",
    "host_reads_per_step": "host reads a step",
    "differs_by": "weights",
    "with_generator_differs_by": "weights, generator=...",
    "shown_to_ours": "CPU time of a step, with the view to without",
}
MET = {True: "yes", False: "**no**", None: "not shown: the interval holds the goal"}


def page_of(
    rows: Sequence[Row], goals: Sequence[Row], left_out: Mapping[str, str], facts: Row
) -> str:
    """Return the Markdown page."""
    held = []
    for line in goals:
        name, goal, best = line["measure"], line["goal"], line["best_other"]
        held.append(
            {"work": line["work"], "loop": line["loop"], "measure": TITLES[name]}
            | {"found": shown(name, line["found"])}
            | {"goal": "equal" if goal == 0 else f"<= {goal:g}", "met": MET[line["met"]]}
            | {"best other": f"{best['loop']} {shown(name, best['found'])}" if best else ""}
        )
    parts = [INTRODUCTION, "## Goals\n", measure.table(held)]
    for work in dict.fromkeys(row["work"] for row in rows):
        columns = [name for name in TITLES if name != "shown_to_ours"]
        lines = [
            {"loop": row["loop"]} | {TITLES[name]: shown(name, row[name]) for name in columns}
            for row in rows
            if row["work"] == work
        ]
        parts += [f"## {work}\n", measure.table(lines)]
    parts += [f"Left out: {name}: {reason}.\n" for name, reason in left_out.items()]
    return "\n".join([*parts, measure.header(facts)])


def shown(measured: str, value: Any) -> str:
    if value is None:
        return ""
    if measured.endswith("differs_by"):
        return "equal" if value == 0 else f"**differ by {value:.1e}**"
    if isinstance(value, measure.Interval):
        digits = 0 if measured.endswith("_us") else 3
        return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return f"{value:.4g}"


INTRODUCTION = """# The same training through every loop

Ratios are medians over blocks of a loop's run to the hand-written run of the same turn, with 95 %
bootstrap intervals; CPU time is that of all threads. Building a loop is outside the clock, the
start of its run is inside; from the microseconds *a step*, a run of one step is taken off. Counts
are exact, by difference of two runs; only the live view, here as text, draws by the clock.
*Weights*: after the last turn, two epochs of a shuffled DataLoader (or ready batches), against
those of the hand-written loop. *Weights, generator=...*: the same where the loader was given a
generator; who leaves its sampler before the end draws less, and sees another second epoch.
"""


def main(argv: Sequence[str] | None = None) -> None:
    asked = arguments(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what peers say about each other's versions
    blocks = asked.blocks or (3 if asked.quick else 7)
    scale = (asked.steps or (100 if asked.quick else 1000)) / MLP_STEPS
    works = [WORKS[number] for number in asked.work or range(len(WORKS))]
    facts = measure.environment(asked.command, f"{SEED}, {blocks} blocks")
    peers = {name: PEERS[name] for name in asked.peer or PEERS}
    there, left_out, facts["peers"] = installed(peers)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    gc.collect()
    gc.freeze()  # nobody's garbage collections walk through what the others have imported

    began = time.perf_counter()
    rows: list[Row] = []
    for work in works:
        found, failed = measure_work(work, OWN | there, blocks, round(work.steps * scale))
        rows, left_out = rows + found, left_out | failed
    gc.unfreeze()
    facts["taken"] = f"{(time.perf_counter() - began) / 60:.1f} min"
    facts["load after"] = measure.system_load()
    goals = goals_of(rows, works)
    text = page_of(rows, goals, left_out, facts)
    saved = {"environment": facts, "goals": goals, "left_out": left_out, "rows": rows}
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(saved, default=measure.plain, indent=1) + "\n")
    asked.json.with_suffix(".md").write_text(text)
    print(text)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, 3 blocks")
    parser.add_argument("--peer", choices=PEERS, action="append", help="only these peers")
    parser.add_argument("--work", type=int, action="append", help="0, 1, ...: only these works")
    parser.add_argument("--blocks", type=int, help="turns per work (default 7)")
    parser.add_argument("--steps", type=int, help="batches in a block of the MLP; others in scale")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "peers.json")
    asked = parser.parse_args(argv)
    given = {"quick": asked.quick or None, "blocks": asked.blocks, "steps": asked.steps}
    words = [f"--{name} {value}".removesuffix(" True") for name, value in given.items() if value]
    words += [f"--work {number}" for number in asked.work or ()]
    words += [f"--peer '{name}'" for name in asked.peer or ()]
    asked.command = " ".join(["python -m benchmarks.peers", *words])
    return asked


if __name__ == "__main__":
    main()
