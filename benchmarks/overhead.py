"""What does watching cost while a model trains: telemetry, and the timing of stages?

    OMP_NUM_THREADS=1 python -m benchmarks.overhead [--seconds 8] [--rounds 4]

The same training with telemetry, with the stages of every step timed as a profile times them, and
with neither, in one process, in rounds of six short blocks there and back, so that a machine that
drifts does so for all. A step computes for some milliseconds on one thread and waits for nothing,
so that whatever the thread takes is seen. Beside the ratios stands what is known exactly: the
processor time of the telemetry's own thread, from its start to its end, what it opens included. On
a GPU that NVML shows, the run trains there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine import watch
from hybrid_magic.engine.lens import Lens
from hybrid_magic.telemetry.sampling import Telemetry

from . import measure

HERE = pathlib.Path(__file__).parent
GOALS = {"telemetry": 0.005, "stage timing": 0.01}  # of a run
OFF = "neither"
ORDER = (*GOALS, OFF, OFF, *reversed(GOALS))  # a round
EXACT = {"precision": "fp32", "batch": "fixed", "micro": 64, "lr_scale": "none", "seed": 0}
OPEN = "not shown: the interval holds the goal"
Row = dict[str, Any]


def turn(how: str, steps: int, threads_s: list[float]) -> Row:
    """Train once and return what it took; `threads_s` takes what the telemetry's thread does."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(512, 704), nn.ReLU(), nn.Linear(704, 704), nn.ReLU(), nn.Linear(704, 10)
    )
    data = TensorDataset(torch.randn(6400, 512), torch.randint(0, 10, (6400,)))
    loader = DataLoader(data, batch_size=64, shuffle=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    threads_s.clear()
    watch.watching = how == "telemetry"
    timing = Lens(lambda _: "time", lambda _: None) if how == "stage timing" else None
    runs: list[hm.Run] = []
    with timing or contextlib.nullcontext():
        taken = measure.timed(
            lambda: runs.append(hm.train(model, loader, optimizer=optimizer, steps=steps, **EXACT))
        )
    run = runs[0]
    return {
        "how": how,
        "cpu_s": taken.cpu_s,
        "wall_s": taken.wall_s,
        "train_s": run.seconds,
        "thread_s": sum(threads_s),
        "readings": run.telemetry.seen,
        "energy_j": run.energy_j,
        "device": device,
        "weights": [parameter.detach().cpu() for parameter in model.parameters()],
    }


def take(seconds: float, rounds: int) -> list[Row]:
    """Return what each block took, `rounds` rounds of them, after a warm-up that tells the pace."""
    threads_s: list[float] = []
    found, watching = Telemetry._watch, watch.watching

    def clocked(telemetry: Telemetry) -> None:
        found(telemetry)
        threads_s.append(time.thread_time())  # of a thread that did nothing else

    Telemetry._watch = clocked  # type: ignore[method-assign]
    try:
        turn("telemetry", 20, threads_s)
        steps = round(100 * seconds / turn("telemetry", 100, threads_s)["train_s"])
        return [turn(how, steps, threads_s) for _ in range(rounds) for how in ORDER]
    finally:
        Telemetry._watch, watch.watching = found, watching  # type: ignore[method-assign]


def rows_of(taken: Sequence[Row]) -> list[Row]:
    """Return the lines of the result; ratios are formed within a round."""
    rounds = [taken[at : at + len(ORDER)] for at in range(0, len(taken), len(ORDER))]

    def ratio(name: str, how: str) -> measure.Interval:
        pairs = [
            [statistics.fmean(one[name] for one in turns if one["how"] == side)
             for side in (how, OFF)]
            for turns in rounds
        ]  # fmt: skip
        return measure.bootstrap([watched / alone for watched, alone in pairs])

    def over(of: Callable[[Row], float], how: str = "telemetry") -> measure.Interval:
        return measure.bootstrap([of(one) for one in taken if one["how"] == how])

    first = taken[0]["weights"]
    same = all(
        torch.equal(one, other)
        for found in taken
        for one, other in zip(first, found["weights"], strict=True)
    )
    return [
        _row("telemetry: its thread's own CPU time, share of a run",
             over(lambda one: one["thread_s"] / one["train_s"]), GOALS["telemetry"]),
        *(
            _row(f"{how}: {said}, ratio", ratio(name, how), 1 + goal)
            for how, goal in GOALS.items()
            for said, name in (("CPU time of all threads", "cpu_s"), ("time", "wall_s"))
        ),
        _row("the same weights, bit by bit", same, True),
        _row("telemetry: readings per second",
             over(lambda one: one["readings"] / one["train_s"])),
        _row("s of a run with neither", over(lambda one: one["train_s"], OFF)),
    ]  # fmt: skip


def _row(name: str, found: Any, goal: Any = None) -> Row:
    """Return a line; a goal is met when the whole interval is within it, missed when none of it."""
    met = None if goal is None else found is True
    if isinstance(found, measure.Interval) and goal is not None:
        met = True if found.high <= goal else False if found.low > goal else OPEN
    return {"measure": name, "found": found, "goal": goal, "met": met}


def page_of(rows: Sequence[Row], facts: Row) -> str:
    """Return the Markdown page of the rows."""

    def said(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "**no**"
        if isinstance(value, measure.Interval):
            return f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}], n {value.n}"
        if isinstance(value, str):
            return value
        return "" if value is None else f"<= {value:g}"

    shown = [{name: said(value) for name, value in row.items()} for row in rows]
    return "\n".join([INTRODUCTION, measure.table(shown), measure.header(facts)])


INTRODUCTION = """# What watching costs

The same training with telemetry, with the stages of every step timed as a profile times them, and
with neither, in one process, in rounds of six short blocks there and back. A step computes on one
thread and waits for nothing. Ratios are formed within a round (n rounds); medians with 95 %
bootstrap intervals. The thread's own time is counted by its own clock, from its start to its end;
where two blocks of the same work differ by some per cent, as on a shared machine, it is the number
to look at.
"""


def facts_of(command: str, rounds: int) -> Row:
    facts = measure.environment(command, f"0, {rounds} rounds")
    root = pathlib.Path(hm.__file__).parent
    facts["telemetry"] = measure.digest(root.glob("telemetry/*.py"))
    for name in ("psutil", "nvidia-ml-py"):
        facts[name] = importlib.metadata.version(name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: NVML is not in it"
    return facts | {"gpu": gpu}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8, help="length of a block (default 8)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of six blocks (default 4)")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "overhead.json")
    asked = parser.parse_args(argv)

    command = f"python -m benchmarks.overhead --seconds {asked.seconds:g} --rounds {asked.rounds}"
    facts, began = facts_of(command, asked.rounds), time.perf_counter()
    taken = take(asked.seconds, asked.rounds)
    facts["load after"] = measure.system_load()
    facts["taken"] = f"{(time.perf_counter() - began) / 60:.0f} min"
    rows = rows_of(taken)
    turns = [{name: value for name, value in one.items() if name != "weights"} for one in taken]
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    saved = {"environment": facts, "rows": rows, "turns": turns}
    asked.json.write_text(json.dumps(saved, default=measure.plain, indent=1) + "\n")
    page = page_of(rows, facts)
    asked.json.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
