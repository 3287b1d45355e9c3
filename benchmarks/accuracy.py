"""Does the hybrid run end in as good a model as the plain FP32 loop, at equal epochs?

    HYBRID_MAGIC_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.accuracy

A CNN with BatchNorm on the small CIFAR-100 set (20 superclasses) and a Transformer encoder on the
small IMDB set, with SGD and AdamW, each trained in the three ways of trials.py. Every run is one
line of results/accuracy.jsonl, so an interrupted benchmark goes on where it was; a line counts as
long as the sources that made it are unchanged. Knows nothing of training.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import measure
from .trials import OPTIMIZERS, VARIANTS, WORKS, Row, Work, train

HERE = pathlib.Path(__file__).parent


def jobs(works: Sequence[Work], arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the key of every run, seed by seed; which variant goes first rotates."""
    recipe = measure.digest(HERE / name for name in ("trials.py", "data.py", "models.py"))
    for seed in range(arguments.seeds):
        for work in works:
            for optimizer in OPTIMIZERS:
                for turn in range(len(VARIANTS)):
                    variant = VARIANTS[(seed + turn) % len(VARIANTS)]
                    yield {
                        "work": work.name,
                        "optimizer": optimizer,
                        "variant": variant,
                        "seed": seed,
                        "epochs": arguments.epochs or work.epochs,
                        "recipe": recipe,
                        "package": None if variant == "plain" else measure.package_digest(),
                    }


def identity(row: Row) -> tuple[Any, ...]:
    names = ("work", "optimizer", "variant", "seed", "epochs", "recipe", "package")
    return tuple(row[name] for name in names)


def load(path: pathlib.Path) -> dict[tuple[Any, ...], Row]:
    """Return the runs that were written to `path`; a line cut short by a kill is passed over."""
    done = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        done[identity(row)] = row
    return done


def write(path: pathlib.Path, row: Row) -> None:
    """Append one line in one write, so that two programs may share the file; never to a line that
    was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        whole = file.tell() == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"
        file.write((("" if whole else "\n") + json.dumps(row) + "\n").encode())


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Return a line per work, optimizer and variant, against the plain loop of the same seeds."""
    lines = []
    groups = dict.fromkeys((row["work"], row["optimizer"]) for row in rows)
    for work, optimizer in groups:
        runs = {
            variant: {
                row["seed"]: row
                for row in rows
                if (row["work"], row["optimizer"], row["variant"]) == (work, optimizer, variant)
            }
            for variant in VARIANTS
        }
        for variant, by_seed in runs.items():
            if by_seed:
                head = {"work": work, "optimizer": optimizer, "variant": variant}
                lines.append(head | compare(by_seed, runs["plain"], runs["fixed"]))
    return lines


def compare(own: dict[int, Row], plain: dict[int, Row], fixed: dict[int, Row]) -> Row:
    """Return one variant's numbers, and its pairs with the plain and the fixed run of each seed."""
    reached = [row["accuracy"] for row in own.values()]
    differences = [own[seed]["accuracy"] - plain[seed]["accuracy"] for seed in own if seed in plain]
    base = [row["accuracy"] for row in plain.values()]
    enough = len(base) > 1 and len(differences) > 1
    spread = statistics.stdev(base) if enough else None
    steps = [row["optimizer_steps"] for row in own.values()]
    return {
        "n": len(own),
        "accuracy": statistics.mean(reached),
        "standard_error": statistics.stdev(reached) / len(reached) ** 0.5 if enough else None,
        "lowest": min(reached),
        "highest": max(reached),
        "difference": measure.bootstrap(differences, statistics.mean) if enough else None,
        "plain_spread": spread,
        "within_spread": statistics.mean(differences) >= -spread if spread is not None else None,
        "steps": [min(steps), max(steps)],
        "cpu_to_plain": pairs(own, plain, "cpu_s"),
        "cpu_to_fixed": pairs(own, fixed, "cpu_s"),
        "wall_to_plain": pairs(own, plain, "wall_s"),
    }


def pairs(own: dict[int, Row], other: dict[int, Row], field: str) -> measure.Interval | None:
    ratios = [own[seed][field] / other[seed][field] for seed in own if seed in other]
    return measure.bootstrap(ratios) if ratios else None


def report(lines: Sequence[Row], facts: Row) -> str:
    """Return the Markdown page of a benchmark's lines."""
    shown = []
    for line in lines:
        error = line["standard_error"]
        shown.append(
            {
                "work": line["work"],
                "optimizer": line["optimizer"],
                "run": line["variant"],
                "n": line["n"],
                "accuracy %": f"{line['accuracy']:.2f}" + (f" ± {error:.2f}" if error else ""),
                "range": f"{line['lowest']:.1f} to {line['highest']:.1f}",
                "against plain, points": line["difference"] or "",
                "plain's seed spread": f"{line['plain_spread']:.2f}" if error else "",
                "within": {True: "yes", False: "**no**", None: ""}[line["within_spread"]],
                "optimizer steps": "-".join(map(str, dict.fromkeys(line["steps"]))),
                "CPU time / plain": line["cpu_to_plain"] or "",
                "CPU time / fixed": line["cpu_to_fixed"] or "",
            }
        )
    return f"{INTRODUCTION}\n{measure.table(shown)}\n{measure.header(facts)}"


INTRODUCTION = """# Accuracy at equal epochs

`plain` is a hand-written FP32 loop; `fixed` is `hm.train` with the loader's batch and FP32 kept;
`hybrid` is `hm.train` as it comes. Weights and sample order are the same per seed. Accuracy: mean ±
standard error over seeds. Differences are paired by seed, mean with a 95 % bootstrap interval (too
narrow at so few seeds). *Within*: the mean difference is no worse than minus one standard deviation
of the plain loop over its seeds. Times are medians of ratios paired by seed.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", choices=WORKS, action="append", help="default: all")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1 (default 5)")
    parser.add_argument("--epochs", type=int, help="in place of each work's own")
    parser.add_argument("--report", action="store_true", help="train nothing; write the page anew")
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)

    seeds = f"0 to {arguments.seeds - 1}"
    facts = measure.environment("python -m benchmarks.accuracy", seeds)
    path = arguments.results / "accuracy.jsonl"
    works = [WORKS[name] for name in arguments.work or WORKS]
    wanted = list(jobs(works, arguments))
    if not arguments.report:
        train_missing(path, wanted, arguments.variant or VARIANTS)
    done = load(path)
    rows = [done[identity(key)] for key in wanted if identity(key) in done]
    if rows:
        loads = [row["load"] for row in rows if row.get("load") is not None]
        facts["load"] = f"{min(loads)} to {max(loads)}" if loads else None
        page = report(summarise(rows), facts)
        (arguments.results / "accuracy.md").write_text(page)
        print(page)


def train_missing(path: pathlib.Path, wanted: Sequence[Row], variants: Sequence[str]) -> None:
    """Train and write the wanted runs of `variants` that `path` does not hold yet."""
    done = load(path)
    for key in wanted:
        if identity(key) in done or key["variant"] not in variants:
            continue
        before = measure.system_load()
        work = WORKS[key["work"]]
        found = train(work, key["optimizer"], key["variant"], key["seed"], key["epochs"])
        row = key | found | {"load": before}
        write(path, row)
        print(
            f"{row['work']:12} {row['optimizer']:6} {row['variant']:7} seed {row['seed']}  "
            f"{row['accuracy']:.1f} %  {row['optimizer_steps']} steps  {row['cpu_s']:.1f} s CPU",
            flush=True,
        )


if __name__ == "__main__":
    main()
