"""How well the batch is steered, in thousands of made-up worlds: `python -m benchmarks.simulator`.

Both policies run through worlds of every kind. Asked of each run: out-of-memory errors, throughput
against the best micro-batch that fits, goodput against one who knows the world, how often sizes
change and whether they return. No device is touched; see `worlds` for what is simulated.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import measure
from benchmarks.oracle import best_share, oracle_goodput
from benchmarks.worlds import World, simulate
from hybrid_magic.policy.facts import Settings
from hybrid_magic.report import palette

HERE = pathlib.Path(__file__).parent
STEPS = 1200
SETTLE = 30  # steps after which the micro-batch is to be found
POLICIES = ("goodput", "stability")
KINDS = (
    *("steady", "launch-bound", "plateau", "growing noise", "falling noise", "long samples"),
    *("evaluation", "fragmented", "neighbour", "no readings"),
)
COLOURS, MARKS = (palette.BLUE, palette.ORANGE), {"goodput": "o", "stability": "D"}
FAST, GOOD = 0.95, 0.9  # goals: of the best micro-batch's throughput, of an oracle's goodput


def _steady(rng: random.Random) -> tuple[World, Settings]:
    """A steady world: from launch-bound to saturated at one sample, small memories and large."""
    while True:
        sample_s = 10 ** rng.uniform(-5, -2.5)
        base = rng.choice([8, 16, 32, 50, 64, 100, 128, 256])
        sample_bytes, fixed = int(10 ** rng.uniform(5.5, 8)), int(10 ** rng.uniform(8, 9.7))
        noise = 10 ** rng.uniform(1.5, 3.5)
        world = World(
            sample_s=sample_s,
            overhead_s=sample_s * 10 ** rng.uniform(-1, 2),
            optimizer_s=sample_s * 10 ** rng.uniform(-1, 2),
            sample_bytes=sample_bytes,
            fixed_bytes=fixed,
            optimizer_bytes=int(fixed * rng.choice([0, 0.5, 2])),
            rough=rng.choice([0, 0.02, 0.05]),
            noise=noise,
            noise_end=noise,
            jitter=rng.choice([0.01, 0.03, 0.1]),
            prefetch=rng.choice([0, 1, 2, 4]),
            late=rng.choice([0, 1, 8]),
        )
        capacity = int(world.bytes(0) + sample_bytes * base * 10 ** rng.uniform(-0.5, 1.5))
        world = dataclasses.replace(world, capacity_bytes=capacity)
        budget = int(0.9 * capacity)
        if world.most(budget) >= 8:
            norms = rng.random() < 0.25
            return world, Settings(
                base=base,
                max_batch=16 * base,
                budget_bytes=budget,
                batch_statistics=norms,
                family=rng.choice(["sgd", "adam"]),
            )


def _changes(kind: str, world: World, rng: random.Random, base: int) -> dict[str, Any]:
    """Return the fields in which a world of `kind` differs from a steady one."""
    room = 1 - world.bytes(4) / world.capacity_bytes  # share that may go: a few samples still fit
    early, late = rng.uniform(0.15, 0.6), rng.uniform(0.1, 0.3)
    jump = rng.choice([None, early])
    if kind == "launch-bound":
        return {"overhead_s": world.sample_s * 10 ** rng.uniform(2, 3.5)}
    if kind == "plateau":
        return {
            "overhead_s": world.sample_s * 10 ** rng.uniform(-1, 0.5),
            "cache": int(base * 2 ** rng.uniform(-2, 3)),
            "spill_s": world.sample_s * rng.uniform(0.1, 0.5),
        }
    if kind == "fragmented":
        return {"fragments": rng.uniform(0.3, 1) * min(0.3, room)}
    if kind == "neighbour":
        held = min(rng.uniform(0.15, 0.7), room)
        back = ((early + late, 0.0),) if rng.random() < 0.5 else ()
        return {"neighbour": ((early, held), *back)}
    if kind == "long samples":
        return {"uneven": rng.uniform(0.1, 0.4), "longest": rng.uniform(1.1, 2.5)}
    if kind == "evaluation":
        peak = int(world.capacity_bytes * rng.uniform(0.3, 1.0))
        return {"evaluate_every": rng.randrange(100, 400), "evaluate_bytes": peak}
    if kind == "growing noise":
        return {"noise_end": world.noise * 10 ** rng.uniform(0.5, 1.5), "jump": jump}
    if kind == "falling noise":
        noise = 10 ** rng.uniform(3, 4)
        return {"noise": noise, "noise_end": noise / 10 ** rng.uniform(0.5, 1.5), "jump": jump}
    return {"reads_memory": False} if kind == "no readings" else {}


def worlds(kind: str, count: int, seed: int = 1) -> Iterator[tuple[World, Settings]]:
    """Yield `count` worlds of a kind and what is asked of the run in them."""
    rng = random.Random(f"{kind} {seed}")
    for _ in range(count):
        world, asked = _steady(rng)
        world = dataclasses.replace(world, **_changes(kind, world, rng, asked.base))
        if not world.reads_memory:
            asked = dataclasses.replace(asked, budget_bytes=None)
        yield world, asked


@dataclass(frozen=True)
class Result:
    """What one run came to."""

    ooms: int
    ended: bool  # by a failure at the smallest size
    throughput: float  # of the best micro-batches', in the 60 steps after the first `SETTLE`
    goodput: float  # of an oracle's under the same rules of growth
    unbound: float  # of an oracle's without them
    changes: float  # per 1,000 steps
    returns: int  # of a size to the one before it


def run(world: World, asked: Settings, steps: int, seed: int) -> Result:
    trace = simulate(world, asked, steps, seed=seed)
    return Result(
        trace.ooms,
        trace.ended,
        best_share(world, asked, trace, SETTLE, 3 * SETTLE),
        trace.goodput / oracle_goodput(world, asked, steps),
        trace.goodput / oracle_goodput(world, asked, steps, bound=False),
        1000 * len(trace.changes) / steps,
        trace.returns,
    )


Found = dict[tuple[str, str], list[Result]]  # by kind and policy


def run_all(count: int, steps: int, seed: int, kinds: Iterable[str] = KINDS) -> Found:
    """Run `count` worlds of each kind under both policies."""
    return {
        (kind, policy): [
            run(world, dataclasses.replace(asked, policy=policy), steps, number)
            for number, (world, asked) in enumerate(worlds(kind, count, seed))
        ]
        for kind in kinds
        for policy in POLICIES
    }


def quantile(values: Iterable[float], share: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def rows(found: Found) -> Iterator[dict[str, str]]:
    """Yield the lines of the table."""
    for (kind, policy), results in found.items():
        ooms = [one.ooms for one in results]
        fast = [one.throughput for one in results]
        good = [one.goodput for one in results]
        free = statistics.median(one.unbound for one in results)
        yield {
            "worlds": kind,
            "policy": policy,
            "out of memory: median, most": f"{statistics.median(ooms):g}, {max(ooms)}",
            "runs with any": _percent(_share(ooms, lambda n: n > 0)),
            "ended": str(sum(one.ended for one in results)),
            "throughput: median, 5 %": _pair(fast),
            "runs >= 95 %": _percent(_share(fast, lambda x: x >= FAST)),
            "goodput: median, 5 %": _pair(good),
            "runs >= 90 %": _percent(_share(good, lambda x: x >= GOOD)),
            "unbound": _percent(free),
            "changes / 1,000 steps": f"{statistics.mean(one.changes for one in results):.1f}",
            "returns: most": str(max(one.returns for one in results)),
            "runs with two": _percent(_share([one.returns for one in results], lambda n: n > 1)),
        }


def _share(values: Sequence[float], wanted: Callable[[float], bool]) -> float:
    return sum(map(wanted, values)) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _pair(values: Sequence[float]) -> str:
    return f"{_percent(statistics.median(values))}, {_percent(quantile(values, 0.05))}"


def figure(found: Found) -> Figure:
    """Return the three answers by kind of world: dots at the medians, lines from 5 to 95 %."""
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    with mpl.rc_context(palette.STYLE):
        sheet = Figure(figsize=(11, 0.42 * len(kinds) + 2.1), dpi=140, layout="constrained")
        axes = sheet.subplots(1, 3, sharey=True)
        panels: list[tuple[str, str, Callable[[Result], float], float | None]] = [
            ("Goodput", "% of an oracle's", lambda one: 100 * one.goodput, 100 * GOOD),
            (
                "Throughput after 30 steps",
                "% of the best micro-batch's",
                lambda one: 100 * one.throughput,
                100 * FAST,
            ),
            ("Out of memory", "errors per run", lambda one: one.ooms, None),
        ]
        for ax, (title, label, value, goal) in zip(axes, panels, strict=True):
            for policy, colour, shift in zip(POLICIES, COLOURS, (-0.17, 0.17), strict=True):
                for place, kind in enumerate(kinds):
                    values = [value(one) for one in found[kind, policy]]
                    low, middle, high = (quantile(values, at) for at in (0.05, 0.5, 0.95))
                    ax.hlines(place + shift, low, high, color=colour, lw=3, alpha=0.45)
                    ax.plot(middle, place + shift, MARKS[policy], color=colour, ms=7)
                    if goal is None and max(values) > high:
                        ax.plot(max(values), place + shift, "|", color=colour, ms=7)
            if goal is not None:
                ax.axvline(goal, color=palette.INK, lw=1, ls=(0, (4, 3)), zorder=1.5)
                ax.set_xlim(45, 110)
            ax.set(title=title, xlabel=label)
            ax.grid(axis="y", visible=False)
            ax.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(kinds)), kinds)
        axes[0].set_ylim(len(kinds) - 0.5, -0.5)
        axes[2].xaxis.get_major_locator().set_params(integer=True)
        handles = [
            Line2D([], [], color=colour, marker=MARKS[policy], lw=3, ms=7, label=f"{policy} policy")
            for policy, colour in zip(POLICIES, COLOURS, strict=True)
        ]
        goal_line = Line2D([], [], color=palette.INK, lw=1, ls=(0, (4, 3)), label="goal")
        worst = Line2D([], [], color=palette.INK, marker="|", ls="", ms=8, label="worst run")
        sheet.legend(handles=[*handles, goal_line, worst], loc="outside lower center", ncols=4)
        sheet.draw_without_rendering()
    return sheet


INTRODUCTION = """# The steering in made-up worlds

{worlds} worlds of each kind, {steps} steps in each, under both policies. *Out of memory*: failed
micro-batches of a run; *ended* counts the runs in which not even the smallest ran. *Throughput*:
the time that steps {settle} to {until} would take in the best micro-batches that surely fit, over
the time that they took, measuring included, luck excluded. *Goodput*: samples times their
efficiency by the second, failures included, against one who knows the world and grows by the same
rules (not before 24 probes, one in four steps; 40 steps between changes, by half at most;
efficiency at least 0.9). *Unbound*: the median against one who has the best batch from the first
step. *Returns*: a size went A, B, A: once is a trial taken back, twice is an oscillation. *5 %*:
one run in twenty is worse.

"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, default=200, help="of each kind (default 200)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"in each (default {STEPS})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    arguments = parser.parse_args(argv)
    count, steps = arguments.worlds, arguments.steps
    command = f"python -m benchmarks.simulator --worlds {count} --steps {steps}"
    seed = f"{arguments.seed}, n={count}"
    facts = measure.environment(f"{command} --seed {arguments.seed}", seed)
    found = run_all(count, steps, arguments.seed)
    words = INTRODUCTION.format(worlds=count, steps=steps, settle=SETTLE, until=3 * SETTLE)
    picture = "![Goodput, throughput and failures by kind of world](simulator.png)\n"
    text = f"{words}{measure.table(list(rows(found)))}\n{picture}\n{measure.header(facts)}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "simulator.md").write_text(text)
    figure(found).savefig(arguments.out / "simulator.png")
    print(text)


if __name__ == "__main__":
    main()
