"""What do several processes cost and bring: `hm.train` under torchrun against DDP by hand?

    OMP_NUM_THREADS=1 python -m benchmarks.processes [--processes 2] [--quick] [--work 0]

Starts `processes_ranks` under torchrun on this machine, and says in ratios what it has measured:
against DistributedDataParallel, what overlap brings, what is told between the processes, how much
faster than one process. Writes results/processes.json and .md. Knows nothing of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from . import measure, processes_ranks
from . import processes_ways as ways
from .measure import Interval
from .processes_ranks import EQUAL, HEARD, Plan

HERE = pathlib.Path(__file__).resolve().parent
Row = dict[str, Any]
QUICK = Plan(rounds=2, share=0.05)

INTRODUCTION = """# Several processes

*Hybrid* is `hm.train(precision="fp32", batch="fixed")` on a DataLoader, each process with its share
of every step in one micro-batch. *DDP* is a loop by hand around DistributedDataParallel, on the
same shares, made before the clock starts. Both on one thread a process, over gloo. In each round
every way has one turn, in an order that rotates; the first {warm} steps of a turn are outside the
clock. Ratios are of a step's mean seconds within a round: medians of {n} rounds with their 95 %
bootstrap intervals. The clock is the slowest process's; CPU time is that of all.
"""
AGAINST = """## Against DistributedDataParallel

*Met and summed after, by hand* is the hybrid's order of things and no more: a meeting once the
backward is over, then all gradients as one sum. *Alone* is what a step of the hybrid takes more
than one by hand in one process, on the whole batch: it has nothing to do with the others.
"""
OVERLAP = """## What overlap brings

DDP with its own buckets (1 MiB, then 25 MiB) and with buckets of an eighth of the gradients, over
DDP with one bucket, which leaves after the backward's end. Below 1, overlap brings something.
"""
SPEEDUP = """## {n} processes over one

How many times as fast on the same global batch; every process has one thread.
"""
TOLD = """## What they tell each other

Calls and microseconds a step, measured in turns of their own. The mean over the processes has in it
the wait for the others, also for a core; *last* counts of each call the process that took least: it
came last. *Buckets: copies* is the host's work around the sums. *As it comes* is adaptive.
"""
WEIGHTS = """## Weights

After {steps} steps in float64: the largest difference from the weights of one process by hand, over
the largest weight.
"""


def of_rounds(work: Row, way: str, field: str = "wall_s") -> list[float]:
    """Return what a step of `way` took in each round."""
    return [one["timed"][way][field] for one in work["rounds"]]


def ratio(work: Row, way: str, other: str, field: str = "wall_s") -> Interval:
    """Return the median of the rounds' ratios of `way` to `other`."""
    pairs = zip(of_rounds(work, way, field), of_rounds(work, other, field), strict=True)
    return measure.bootstrap([one / two for one, two in pairs])


def more_us(work: Row, way: str, other: str) -> Interval:
    """Return how many microseconds a step of `way` takes more than one of `other`."""
    pairs = zip(of_rounds(work, way), of_rounds(work, other), strict=True)
    return measure.bootstrap([1e6 * (one - two) for one, two in pairs])


def told(work: Row) -> list[Row]:
    """Return a row for each kind of collective of each way that was listened to."""
    rows: list[Row] = []
    for way in HEARD:
        heard = [one["heard"][way] for one in work["rounds"]]
        for kind in dict.fromkeys(kind for each in heard for kind in each):
            none = {"calls": 0.0, "mean_us": 0.0, "last_us": 0.0}
            found = [each.get(kind, none) for each in heard]
            row: Row = {"way": way, "kind": kind}
            row["calls"] = statistics.mean(each["calls"] for each in found)
            for field in ("mean_us", "last_us"):
                row[field] = measure.bootstrap([each[field] for each in found])
            rows.append(row)
    return rows


def summarised(work: Row) -> Row:
    """Return all that is said of one work."""
    return {
        "work": work["work"],
        "batch": work["batch"],
        "steps": work["steps"],
        "gradient_mib": work["gradient_bytes"] / 2**20,
        "step_ms": {
            way: measure.bootstrap([1e3 * seconds for seconds in of_rounds(work, way)])
            for way in ways.TIMED
        },
        "hybrid_over_ddp": ratio(work, ways.OURS, ways.DDP),
        "hybrid_over_ddp_cpu": ratio(work, ways.OURS, ways.DDP, "cpu_s"),
        "list_over_ddp": ratio(work, ways.LISTED, ways.DDP),
        "by_hand_over_ddp": ratio(work, ways.DESIGN, ways.DDP),
        "over_ddp_us": more_us(work, ways.OURS, ways.DDP),
        "alone_us": more_us(work, ways.OURS_ALONE, ways.ALONE),
        "overlap": ratio(work, ways.DDP, ways.ONE),
        "overlap_small": ratio(work, ways.SMALL, ways.ONE),
        "hybrid_speedup": ratio(work, ways.OURS_ALONE, ways.OURS),
        "ddp_speedup": ratio(work, ways.ALONE, ways.DDP),
        "told": told(work),
        "equal": work["equal"],
    }


def page(found: Row) -> str:
    """Return the results as Markdown."""
    works, plan = found["works"], found["plan"]
    against, overlap, speedup = [], [], []
    for work in works:
        ms, name = work["step_ms"], work["work"]
        against.append(
            {
                "work": name,
                "global batch": work["batch"],
                "DDP, ms": _three(ms[ways.DDP].value),
            }
            | {"hybrid / DDP, clock": work["hybrid_over_ddp"]}
            | {"hybrid / DDP, CPU": work["hybrid_over_ddp_cpu"]}
            | {
                f"{ways.LISTED} / DDP": work["list_over_ddp"],
                f"{ways.DESIGN} / DDP": work["by_hand_over_ddp"],
            }
            | {"hybrid - DDP, us": _whole(work["over_ddp_us"])}
            | {"alone, us": _whole(work["alone_us"])}
        )
        overlap.append(
            {"work": name, "gradients, MiB": f"{work['gradient_mib']:.1f}"}
            | {
                "one bucket, ms": _three(ms[ways.ONE].value),
                "DDP's buckets / one": work["overlap"],
            }
            | {"small buckets / one": work["overlap_small"]}
        )
        speedup.append(
            {"work": name, "by hand, one process, ms": _three(ms[ways.ALONE].value)}
            | {"hybrid": work["hybrid_speedup"], "DDP": work["ddp_speedup"]}
        )
    parts = [INTRODUCTION.format(warm=ways.WARM, n=plan["rounds"])]
    parts += [AGAINST, measure.table(against), OVERLAP, measure.table(overlap)]
    parts += [SPEEDUP.format(n=found["processes"]), measure.table(speedup), TOLD]
    for work in works:
        parts += [f"### {work['work']}\n", measure.table([_told(row) for row in work["told"]])]
    parts += [WEIGHTS.format(steps=EQUAL)]
    parts += [
        measure.table(
            [_equal(work["work"], *line) for work in works for line in work["equal"].items()]
        )
    ]
    return "\n".join([*parts, measure.header(found["environment"])])


def _told(row: Row) -> Row:
    calls = {"way": row["way"], "what": row["kind"], "calls a step": f"{row['calls']:.2f}"}
    return calls | {"us a step": _whole(row["mean_us"]), "last, us": _whole(row["last_us"])}


def _equal(work: str, way: str, one: Row) -> Row:
    apart = f"{one['differs_by']:.1e}" if one["differs_by"] else "equal"
    return {"work": work, "way": way, "differs by": apart} | {
        "same in all processes": "yes" if one["alike"] else "**no**"
    }


def _three(value: float) -> str:
    return f"{value:.3g}"


def _whole(found: Interval) -> str:
    return f"{found.value:.0f} [{found.low:.0f}, {found.high:.0f}]"


def run(processes: int, plan: Plan) -> Row:
    """Return what the processes have measured.

    Raises:
        SystemExit: one of them has failed, and said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        program = ["-m", processes_ranks.__name__, folder, json.dumps(asdict(plan))]
        ended = subprocess.run(
            [sys.executable, "-m", *torchrun, *program],
            cwd=HERE.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        if ended.returncode:
            raise SystemExit(ended.returncode)
        return json.loads(pathlib.Path(folder, "found.json").read_text())


def main(given: Sequence[str] | None = None) -> None:
    asked = arguments(given)
    torch.set_num_threads(1)
    facts = measure.environment(asked.command, str(asked.plan.seed))
    began = time.perf_counter()
    raw = run(asked.processes, asked.plan)
    crowded = asked.processes > facts["cores"]
    facts["processes"] = f"{asked.processes}{', more than cores' if crowded else ''}"
    facts["taken"] = f"{(time.perf_counter() - began) / 60:.1f} min"
    facts["load after"] = measure.system_load()
    works = [summarised(work) for work in raw["works"]]
    found = {"environment": facts, **raw, "works": works}
    text = page(found)
    found["rounds"] = {work["work"]: work["rounds"] for work in raw["works"]}
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(found, default=measure.plain, indent=1) + "\n")
    asked.json.with_suffix(".md").write_text(text)
    print(text)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=_several, default=2)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps, 2 rounds")
    parser.add_argument("--rounds", type=int, help=f"turns of every way (default {Plan.rounds})")
    numbers = range(len(ways.WORKS))
    parser.add_argument("--work", type=int, action="append", choices=numbers, help="only these")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "processes.json")
    asked = parser.parse_args(given)
    start = QUICK if asked.quick else Plan()
    works = tuple(asked.work or numbers)
    asked.plan = Plan(asked.rounds or start.rounds, start.share, works, start.seed)
    words = [f"--processes {asked.processes}", *(["--quick"] if asked.quick else [])]
    words += [f"--rounds {asked.rounds}"] if asked.rounds else []
    words += [f"--work {number}" for number in asked.work or ()]
    asked.command = " ".join(["python -m benchmarks.processes", *words])
    return asked


def _several(text: str) -> int:
    n, batches = int(text), [work.batch for work in ways.WORKS]
    if n < 2 or any(batch % n for batch in batches):
        most = min(batches)
        raise argparse.ArgumentTypeError(
            f"{n} processes; wanted 2 or more that share steps of {batches} samples evenly; take "
            f"2, 4, ... {most}"
        )
    return n


if __name__ == "__main__":
    main()
