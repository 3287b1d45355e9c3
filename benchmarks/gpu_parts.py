"""What the parts of benchmarks.gpu stand on, and two of them: memory at equal global batch, and
time to the plain loop's accuracy.

A part returns plain values and a Markdown body, and takes no longer than its Bench has left, give
or take a run. Knows no command line.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import torch

import hybrid_magic as hm
from hybrid_magic.datasets import FOLDER

from . import measure, paper
from .paper_loop import train_by_hand, warm_up
from .paper_report import Row, compared, described
from .paper_works import Sizes, Work, open_work, step, strict_fp32

# At most so much of the plain loop's time does a variant take on a GPU: to plan with, no result.
PLANNED = {"plain": 1.0, "fp32": 1.1, "shipped": 0.8, "tf32": 0.8}
PLANNED_OTHERS = 0.7
Found = tuple[Row, str]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where a part measures and how long it may; `dry` tries the program out, on made-up data."""

    device: torch.device
    out: pathlib.Path
    until: float  # of time.monotonic()
    seeds: int
    dry: bool

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()

    def stem(self, name: str) -> pathlib.Path:
        """Return the path of what a part writes, without its suffix; a dry run's is its own."""
        return self.out / f"{'dry_' if self.dry else ''}gpu_{name.replace('-', '_')}"

    def sizes(self, work: str, **given: Any) -> Sizes:
        """Return a work's sizes as the paper has them, or for a dry run next to nothing."""
        if not self.dry:
            return paper.sizes_of(work, {"small": only_small(work)} | given, self.device)
        tiny = {"made_up": True, "epochs": 1, "batch": 8, "samples": 32, "val_samples": 16}
        tiny |= {"depth": 18, "stem": 7, "size": "tiny", "length": 8, "workers": 0}
        return Sizes(work, **tiny)


def only_small(work: str) -> bool:
    """Return whether the data folder has the small set of a work and not the whole one."""
    folder = pathlib.Path(os.environ.get(FOLDER) or "nowhere")
    whole = folder / {"cifar": "cifar100", "imdb": "imdb"}[work]
    return (folder / "small").is_dir() and not whole.is_dir()


# -- what the clock allows


def fitted(
    sizes: Sizes, held: tuple[int, int], sample_s: float, shares: Sequence[float], seeds: int,
    seconds: float,
) -> tuple[Sizes, list[str]]:  # fmt: skip
    """Return `sizes` made small enough for `seeds` seeds in so many seconds, and what was cut.

    Epochs go first, down to one, then samples. `held` is how many there are to train and to judge
    on, `sample_s` what the plain loop takes for one, `shares` what each variant takes of that.
    """
    samples, judged = sizes.samples or held[0], sizes.val_samples or held[1]
    samples, judged = min(held[0], samples), min(held[1], judged)
    epoch_s = seeds * sample_s * (sum(shares) * samples + len(shares) * judged / 3)
    epochs = max(1, min(sizes.epochs, int(seconds / epoch_s)))
    part = min(1.0, seconds / epoch_s)
    few = min(samples, max(10 * sizes.batch, int(part * samples)))
    few_judged = min(judged, max(2 * sizes.batch, int(part * judged)))
    wanted = {"epochs": sizes.epochs, "samples": samples, "val_samples": judged}
    had = {"epochs": epochs, "samples": few, "val_samples": few_judged}
    cut = {name: now for name, now in had.items() if now < wanted[name]}
    return dataclasses.replace(sizes, **cut), [f"{n} {cut[n]} of {wanted[n]}" for n in cut]


def fit(work: Work, variants: Sequence[str], bench: Bench, seeds: int = 3) -> tuple[Work, str]:
    """Return the work cut down to what the clock allows, and that in words; some steps of the plain
    loop tell how fast this machine is."""
    with strict_fp32():
        taken = warm_up(work, work.model(0).to(bench.device), bench.device)
    start = time.perf_counter()
    count = len(work.example()[1])
    taken += (time.perf_counter() - start) / max(1, work.sizes.workers)
    gpu = bench.device.type == "cuda"
    shares = [PLANNED.get(name, PLANNED_OTHERS) if gpu else 1.2 for name in variants]
    held = len(work.train), len(work.val)  # type: ignore[arg-type]
    seeds, seconds = min(seeds, bench.seeds), 0.85 * bench.left_s
    sizes, said = fitted(work.sizes, held, taken / count, shares, seeds, seconds)
    if not said:
        return work, ""
    return work.cut(sizes), f"Cut to what the clock allowed: {', '.join(said)}."


# -- memory at equal global batch


def memory(bench: Bench) -> Found:
    """Peak memory of a few steps at the same global batch."""
    values, body = {}, []
    precision = reduced(bench.device)
    variants = ("plain", "fp32", f"mp:{precision}", f"mp+ga:{precision}")
    for name, batch in (("cifar", 512), ("imdb", 64)):
        sizes = bench.sizes(name, batch=batch, samples=12 * batch, val_samples=batch, epochs=1)
        work = open_work(sizes)
        log = bench.stem("memory").with_suffix(".jsonl")
        seeds = min(2, bench.seeds)
        trials = paper.run_trials(work, variants, seeds, log, bench.device, bench.until)
        ablation = hm.Ablation(trials=trials, names=variants)
        plain = ablation.variants[0].peak_allocated_bytes
        halved = _within(work, int(plain / 2), precision, bench.device) if plain else None
        values[name] = {"trials": ablation.as_json(), "within_half": halved}
        body += [f"## {described(work)}\n", compared(ablation), _halved(halved)]
    return values, "\n".join(body)


def _within(work: Work, budget: int, precision: str, device: torch.device) -> Row:
    """Return what a run at the same global batch needed that was given so many bytes."""
    model = work.model(0).to(device)
    optimizer = work.optimizer(model)
    how: Row = {"batch": "fixed", "memory": budget, "precision": precision}
    loader = work.loader(0)
    try:
        run = hm.train(model, loader, step, optimizer=optimizer, device=str(device), **how)
    except hm.HybridMagicError as error:
        return {"budget_bytes": budget, "error": str(error)}
    return {
        "budget_bytes": budget,
        "peak_allocated_bytes": run.peak_allocated_bytes,
        "micro_batches": sorted({record.microbatch_size for record in run.history}),
        "out_of_memory_errors": run.retries,
    }


def _halved(found: Row | None) -> str:
    if found is None:
        return ""
    given = f"Given {found['budget_bytes'] / 2**20:.0f} MiB, half of `plain`'s peak: "
    if "error" in found:
        return f"{given}{found['error']}\n"
    return (
        f"{given}`hm.train` at the same global batch took "
        f"{found['peak_allocated_bytes'] / 2**20:.0f} MiB, in micro-batches of "
        f"{', '.join(map(str, found['micro_batches']))}, with "
        f"{found['out_of_memory_errors']} out-of-memory errors.\n"
    )


def reduced(device: torch.device) -> str:
    """Return the reduced precision that the device computes natively."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8:
        return "bf16"
    return "fp16"


# -- time to the plain loop's final accuracy


def accuracy_target(bench: Bench) -> Found:
    """Training time until a hybrid run is as accurate as the plain loop in the end."""
    work = open_work(bench.sizes("cifar"))
    work, cut = fit(work, ("plain", "hybrid"), bench)
    rows, longest = [], 0.0
    for seed in range(bench.seeds):
        start = time.monotonic()
        if seed and bench.left_s < longest:
            break
        rows.append({"seed": seed} | _race(work, seed, bench.device))
        longest = max(longest, time.monotonic() - start)
    lines = [
        {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    ]
    said = (
        "Per seed: the accuracy with which the plain FP32 loop ends, and the training time of a "
        "hybrid run with the same schedule until a validation (one an epoch, outside the clock) "
        "first reaches it; `never` where none does.\n"
    )
    values = {"what": described(work), "cut": cut, "rows": rows}
    return values, f"{described(work)} {cut}\n\n{said}\n{measure.table(lines)}"


def _race(work: Work, seed: int, device: torch.device) -> Row:
    """Return when the hybrid run of a seed reached what the plain loop ended with."""
    with strict_fp32():
        model = work.model(seed).to(device)
        warm_up(work, model, device)
        torch.manual_seed(seed)
        plain = train_by_hand(work, model, seed, device)
    target = plain["curve"][-1][2]
    model = work.model(seed).to(device)
    optimizer = work.optimizer(model)
    spent, curve = 0.0, []

    def watch(record: Any) -> None:
        nonlocal spent
        spent += getattr(record, "step_s", None) or 0.0
        if hasattr(record, "metrics"):
            curve.append((spent, record.metrics["accuracy"]))

    run = hm.train(
        model, work.loader(seed), step, optimizer=optimizer, scheduler=work.scheduler(optimizer),
        val=work.val_loader(), epochs=work.sizes.epochs, seed=seed, device=str(device), sink=watch,
    )  # fmt: skip
    # What the run takes beside its steps is spread over them.
    reached = next((at / spent * run.seconds for at, found in curve if found >= target), None)
    return {
        "plain, %": 100 * target,
        "plain, s": plain["seconds"],
        "hybrid, %": 100 * curve[-1][1],
        "hybrid, s": run.seconds,
        "to plain's accuracy, s": "never" if reached is None else reached,
        "of plain's time": "" if reached is None else reached / plain["seconds"],
    }
