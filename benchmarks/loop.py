"""What does the whole training loop cost against the same loop written by hand in PyTorch?

    OMP_NUM_THREADS=1 python -m benchmarks.loop [--quick]

An MLP with steps of a few hundred microseconds, without and with accumulation over four batches,
and a small Transformer; ready batches (nothing but the loop is left to see) and a shuffled
DataLoader over a TensorDataset, as any notebook has it. Our side keeps its default records and
draws nothing. CPU time of all threads, by turns. Knows nothing of what is inside `hm.train`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybrid_magic.records import Record, StepRecord

from . import measure
from .loops import BATCHES, MLP_STEPS, SEED, WORKS, Loop, Work, by_hand, ours

HERE = pathlib.Path(__file__).parent
Row = dict[str, Any]
AS_IT_COMES = {"precision": "auto", "batch": "adaptive", "micro": "auto", "lr_scale": "auto"}


def row(work: Work, name: str, ours: Any, by_hand: Any = None, goal: Any = None) -> Row:
    """Return one line of the result; a number meets its goal when it is not above it."""
    found = ours.value if isinstance(ours, measure.Interval) else ours
    met = None if goal is None else found is True if goal is True else found <= goal
    names = ("work", "measure", "ours", "by_hand", "goal", "met")
    return dict(zip(names, (work.name, name, ours, by_hand, goal, met), strict=True))


def measure_work(work: Work, steps: int, blocks: int) -> list[Row]:
    """Return the lines of one work; counts only where the work has a goal for them."""
    found = row(work, "same weights, bit by bit", same_weights(work, work.epochs(steps)), goal=True)
    rows = [*time_loops(work, steps, blocks, work.ratio_goal), found]
    if work.counted:
        calls, reads = measure.count_calls, measure.count_host_reads
        raw = per_step(work, by_hand, reads)
        rows += [
            row(work, "CPU ms of a run of one step", 1e3 * once_s(work, blocks)),
            row(
                work,
                "Python calls per step",
                per_step(work, ours, calls),
                per_step(work, by_hand, calls),
                work.calls_goal,
            ),
            row(work, "host reads per step", per_step(work, ours, reads), raw, raw + 1),
        ]
    return rows


def time_loops(
    work: Work, steps: int, blocks: int, goal: float | None = None, name: str = "", **options: Any
) -> list[Row]:
    """Return the paired ratios of both loops, in CPU time and on the clock."""
    epochs = work.epochs(steps)

    def prepare(loop: Loop, **more: Any) -> Callable[[], Callable[[], Any]]:
        def fresh() -> Callable[[], Any]:
            parts = work.fresh()
            return lambda: loop(*parts, work.accumulate, epochs, **more)

        return fresh

    timings = measure.paired_blocks(
        {"by hand": prepare(by_hand), "ours": prepare(ours, **options)}, blocks
    )
    taken = epochs * BATCHES / work.accumulate
    by_hand_us, our_us = (
        1e6 * statistics.median(timing.cpu_s for timing in timings[side]) / taken
        for side in ("by hand", "ours")
    )
    cpu = measure.ratio(timings["ours"], timings["by hand"])
    wall = measure.ratio(timings["ours"], timings["by hand"], "wall_s")
    return [
        row(work, f"{name}CPU time, ratio", cpu, goal=goal),
        row(work, f"{name}clock, ratio", wall),
        row(work, f"{name}CPU us per step", our_us, by_hand_us),
    ]


def same_weights(work: Work, epochs: int) -> bool:
    """Return whether both loops end in the same weights, bit by bit."""
    ends = []
    for loop in (by_hand, ours):
        model, loader, optimizer = work.fresh()
        torch.manual_seed(SEED)
        loop(model, loader, optimizer, work.accumulate, epochs)
        ends.append(list(model.parameters()))
    return all(map(torch.equal, *ends))


def per_step(work: Work, loop: Loop, count: Callable[[Callable[[], Any]], int]) -> float:
    """Return the count of one optimizer step, exactly: runs of one and of two epochs."""

    def total(epochs: int) -> int:
        parts = work.fresh()
        return count(lambda: loop(*parts, work.accumulate, epochs))

    return (total(2) - total(1)) * work.accumulate / BATCHES


def once_s(work: Work, blocks: int) -> float:
    """Return the CPU seconds of a run of one step: what a run of ours costs once, and a step."""

    def fresh() -> Callable[[], Any]:
        parts = work.fresh()
        return lambda: ours(*parts, work.accumulate, epochs=None, steps=1)

    timings = measure.paired_blocks({"one": fresh}, blocks)["one"]
    return statistics.median(timing.cpu_s for timing in timings)


def growth(work: Work, steps: int) -> Row:
    """Return the CPU time of steps in the last tenth of one long run against the first tenth."""
    stamps: list[float] = []

    def sink(record: Record) -> None:
        if isinstance(record, StepRecord):
            stamps.append(time.process_time())

    ours(*work.fresh(), work.accumulate, work.epochs(steps), sink=sink)
    stamps = stamps[len(stamps) // 50 :]  # the first steps find their memory
    spans = [late - early for early, late in zip(stamps, stamps[10:], strict=False)][::10]
    tenth = len(spans) // 10
    pairs = zip(spans[-tenth:], spans[:tenth], strict=True)
    ratio = measure.bootstrap([late / early for late, early in pairs])
    return row(work, f"last tenth / first tenth of {steps} steps", ratio, goal=1.05)


def page(rows: Sequence[Row], facts: Row) -> str:
    """Return the Markdown page of the rows."""
    shown = [
        {
            "work": line["work"],
            "measure": line["measure"],
            "ours": _text(line["ours"]),
            "by hand": _text(line["by_hand"]),
            "goal": _goal(line["goal"]),
            "met": _text(line["met"]),
        }
        for line in rows
    ]
    return f"{INTRODUCTION}\n{measure.table(shown)}\n{measure.header(facts)}"


def _goal(goal: Any) -> str:
    return "" if goal is None else "yes" if goal is True else f"<= {goal:g}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


INTRODUCTION = """# The whole loop against one written by hand

Ratios are medians over blocks of our run to the hand-written loop of the same turn, with 95 %
bootstrap intervals; CPU time is that of all threads, and a block holds the start of our run too.
Both sides train in FP32 at the same batch. *As it comes*: precision and batch left to hm.train, the
same samples. Counts are exact: runs of one and of two epochs, by difference, all threads.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, 3 blocks")
    parser.add_argument("--blocks", type=int, help="turns per work (default 15)")
    parser.add_argument("--steps", type=int, help="batches in a block of the MLP; others in scale")
    parser.add_argument("--work", type=int, action="append", help="0, 1, ...: only these works")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "loop.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    blocks = arguments.blocks or (3 if arguments.quick else 15)
    scale = (arguments.steps or MLP_STEPS / (10 if arguments.quick else 1)) / MLP_STEPS

    facts = measure.environment("python -m benchmarks.loop", f"{SEED}, {blocks} blocks")
    rows: list[Row] = []
    works = [WORKS[number] for number in arguments.work or range(len(WORKS))]
    for work in works:
        rows += measure_work(work, int(work.steps * scale), blocks)
    first, steps = works[0], int(works[0].steps * scale)
    rows += time_loops(first, steps, blocks, None, "as it comes: ", **AS_IT_COMES)
    rows.append(growth(first, 10 * steps))

    text = page(rows, facts)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    saved = {"environment": facts, "rows": rows}
    arguments.json.write_text(json.dumps(saved, default=measure.plain, indent=1) + "\n")
    arguments.json.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
