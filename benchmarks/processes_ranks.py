"""What each process of `benchmarks.processes` does: every way to train has its turn in every round.

    python -m torch.distributed.run --standalone --nproc-per-node 2 \\
        -m benchmarks.processes_ranks FOLDER PLAN

The first process writes what was measured to FOLDER/found.json. It alone takes the turns of one
process, while the others wait at a barrier. Knows no page.
"""

from __future__ import annotations

import contextlib
import gc
import json
import pathlib
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hybrid_magic.engine import ranks
from hybrid_magic.engine.ranks import Ranks
from hybrid_magic.engine.summing import Sum

from . import processes_ways as ways
from .processes_ways import Clock, Work, train

EQUAL = 8  # steps of the runs in float64 whose weights are compared
# whose collectives are measured too, in turns of their own
HEARD = (ways.OURS, ways.LISTED, ways.AS_IT_COMES)
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured; `share` of each work's steps, at least three."""

    rounds: int = 7
    share: float = 1.0
    works: tuple[int, ...] = (0, 1, 2)
    seed: int = 1

    def steps(self, work: Work) -> int:
        return ways.WARM + max(3, round(self.share * work.steps))


# -- what a process tells the others --

KINDS = {  # the function of the engine that calls: what it tells
    "_join": "head: loss, logged values",
    "gradients": "gradients",
    "noise": "noise scale",
    "worst": "facts for the policy",
    "_alike": "random states",
}
TOLD = ("most", "of_all", "of_first", "add_up", "done", "take_first")


@contextlib.contextmanager
def overheard(clock: Clock) -> Iterator[list[tuple[int, str, bool, float]]]:
    """Yield a list of what is told by and by: the step's number, its kind, whether it is a
    collective of its own, and seconds without those that were told within."""
    told: list[tuple[int, str, bool, float]] = []
    within: list[float] = []

    def heard(method: Any, kind: str | None, counts: bool) -> Any:
        def telling(self: Any, *args: Any, **keywords: Any) -> Any:
            begun = time.perf_counter()
            within.append(0.0)
            try:
                return method(self, *args, **keywords)
            finally:
                took = time.perf_counter() - begun
                own = took - within.pop()
                if within:
                    within[-1] += took
                told.append((len(clock.ends), kind or _asking(), counts, own))

        return telling

    of = {(Ranks, name): (None, name != "done") for name in TOLD}
    of |= {(Ranks, "meet"): ("meeting", True), (Sum, "gradients"): ("buckets: copies", True)}
    found = {place: getattr(*place) for place in of}
    try:
        for place, (kind, counts) in of.items():
            setattr(*place, heard(found[place], kind, counts))
        yield told
    finally:
        for place, method in found.items():
            setattr(*place, method)


def _asking() -> str:
    """Return what the function tells that has called a heard method."""
    frame = sys._getframe(2)
    while frame.f_code.co_name.startswith("<") and frame.f_back is not None:
        frame = frame.f_back
    return KINDS.get(frame.f_code.co_name, frame.f_code.co_name.strip("_").replace("_", " "))


def by_kind(told: Sequence[Sequence[Any]], steps: int) -> dict[str, dict[str, float]]:
    """Return calls and microseconds a step of each kind, from what every process has overheard.

    `mean_us` is the processes' mean, with the wait for the others in it; `last_us` counts of each
    call the process that took least, which is the one that came last.
    Raises:
        ValueError: the processes have not told the same in the same order.
    """
    if len({tuple((step, kind) for step, kind, *_ in each) for each in told}) > 1:
        raise ValueError("the processes told different things; wanted the same in the same order")
    found: dict[str, dict[str, float]] = {}
    for calls in zip(*told, strict=True):
        step, kind, counts, _ = calls[0]
        if not ways.WARM <= step < ways.WARM + steps:
            continue
        took = [1e6 * own / steps for *_, own in calls]
        line = found.setdefault(kind, {"calls": 0.0, "mean_us": 0.0, "last_us": 0.0})
        line["calls"] += counts / steps
        line["mean_us"] += sum(took) / len(took)
        line["last_us"] += min(took)
    return found


# -- turns --


def turn(way: str, work: Work, plan: Plan, *, listen: bool) -> Row:
    """Return what a step took, seconds on the clock of the slowest process and CPU seconds of all;
    or, where we `listen`, what they told each other."""
    gc.collect()
    dist.barrier()
    clock, own, told = Clock(plan.steps(work)), None, []
    if way not in ways.BY_ONE or dist.get_rank() == 0:
        with overheard(clock) if listen else contextlib.nullcontext([]) as told:
            train(way, work, plan.steps(work), plan.seed, clock, False)
        own = clock.step()
    every = [each for each in _of_all((own, told)) if each[0] is not None]
    if listen:
        return by_kind([each[1] for each in every], len(clock.ends) - ways.WARM)
    return {"wall_s": max(each[0][0] for each in every), "cpu_s": sum(each[0][1] for each in every)}


def compared(work: Work, plan: Plan) -> dict[str, Row]:
    """Return of each way, in float64: its weights' largest difference from those of the loop by
    hand in one process, over the largest weight; and whether all its processes have the same."""
    found: dict[str, Row] = {}
    reference = torch.empty(0)
    for way in (ways.ALONE, *(way for way in ways.TIMED if way != ways.ALONE)):
        dist.barrier()
        mine = torch.empty(0)
        if way not in ways.BY_ONE or dist.get_rank() == 0:
            model = train(way, work, EQUAL, plan.seed, Clock(EQUAL), True)
            mine = nn.utils.parameters_to_vector(model.parameters()).detach()
        if way == ways.ALONE:
            reference = mine
            continue
        digests = _of_all(zlib.crc32(mine.numpy().tobytes()) if len(mine) else None)
        if dist.get_rank() == 0:
            apart = float((mine - reference).abs().max() / reference.abs().max())
            found[way] = {"differs_by": apart, "alike": len({*digests} - {None}) == 1}
    return found


def _of_all(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def measured(work: Work, plan: Plan) -> Row:
    """Return all rounds of one work: each has every way once, in an order that rotates."""
    turns = [(way, False) for way in ways.TIMED] + [(way, True) for way in HEARD]
    rounds: list[Row] = []
    for number in range(plan.rounds + 1):  # the first is a warm-up
        one: Row = {"timed": {}, "heard": {}}
        for way, listen in turns:
            one["heard" if listen else "timed"][way] = turn(way, work, plan, listen=listen)
        rounds += [one] if number else []
        turns.append(turns.pop(0))
    held = sum(p.numel() * p.element_size() for p in work.model().parameters())
    found = {"work": work.name, "batch": work.batch, "steps": plan.steps(work) - ways.WARM}
    return found | {"gradient_bytes": held, "rounds": rounds, "equal": compared(work, plan)}


def main(folder: str, plan_fields: str) -> None:
    torch.set_num_threads(1)
    plan = Plan(**json.loads(plan_fields))
    group = ranks.join()
    if group is None:
        raise SystemExit("one process; wanted several; run python -m benchmarks.processes")
    found = [measured(ways.WORKS[number], plan) for number in plan.works]
    if group.first:
        saved = {"processes": group.size, "plan": asdict(plan), "works": found}
        pathlib.Path(folder, "found.json").write_text(json.dumps(saved))
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
