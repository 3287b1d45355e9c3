"""The paper's table on real data: ResNet-50 on CIFAR-100 and a Transformer encoder on IMDB.

    HYBRID_MAGIC_DATA=... python -m benchmarks.paper [--work cifar] [--seeds 3] [--minutes 60]
    HYBRID_MAGIC_DATA=... python -m benchmarks.paper --smoke

`plain` is the loop of paper_loop.py, written by hand in strict FP32, which never meets the
package; `shipped` is the same with TF32 where PyTorch ships it; the ladder is `hm.ablate`'s, a run
at a time. What is trained is in paper_works.py. Every trial is a line of results/paper.jsonl, so an
interrupted benchmark goes on; a line counts as long as the sources that made it are unchanged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Sequence

import torch

import hybrid_magic as hm

from . import measure
from .accuracy import write
from .paper_loop import train_by_hand, warm_up
from .paper_report import BY_HAND, Row, ablations, described, device_name, environment, save
from .paper_works import ENCODERS, Sizes, Work, open_work, step, strict_fp32

HERE = pathlib.Path(__file__).parent
LADDER = ("fp32", "mp", "mp+ga", "hybrid")
ON_GPU = ("plain", "shipped", "fp32", "tf32", "mp", "mp+ga", "hybrid")
SOURCES = ("paper.py", "paper_loop.py", "paper_works.py", "data.py")

FULL: dict[str, Row] = {
    "cifar": {"epochs": 10, "batch": 128},
    "imdb": {"epochs": 3, "batch": 64, "val_samples": 5000},
}
SMOKE: dict[str, Row] = {
    "cifar": {"samples": 1000, "batch": 64, "depth": 18, "stem": 7},
    "imdb": {"samples": 1600, "batch": 32, "size": "tiny", "length": 128},
}
FOR_SMOKE = {"small": True, "epochs": 1, "val_samples": 500}


# -- one trial


def by_hand(work: Work, variant: str, seed: int, device: torch.device) -> hm.TrialRecord:
    """Return the trial of a hand-written loop; first steps are outside the clock."""
    given = hm.TrialRecord(variant=variant, seed=seed, outcome="oom", precision="fp32")
    with strict_fp32(BY_HAND[variant]):
        try:
            model = work.model(seed).to(device)
            warm_up(work, model, device)
            torch.manual_seed(seed)
            found = train_by_hand(work, model, seed, device)
        except torch.OutOfMemoryError as error:
            return dataclasses.replace(given, error=str(error).splitlines()[0])
    _, loss, accuracy = found.pop("curve")[-1]
    samples = work.sizes.epochs * len(work.train)  # type: ignore[arg-type]
    return dataclasses.replace(
        given, outcome="finished", loss=loss, accuracy=accuracy, samples_seen=samples, **found
    )


def by_package(work: Work, variant: str, seed: int, device: torch.device) -> hm.TrialRecord:
    """Return the trial of a rung of the ladder; `mp:fp16` is `mp` in that precision."""
    name, _, precision = variant.partition(":")
    model = work.model(seed).to(device)  # as the hand-written loop has it, outside the clock
    optimizer = work.optimizer(model)
    ablation = hm.ablate(
        model,
        work.loader(seed),
        step,
        optimizer=optimizer,
        scheduler=work.scheduler(optimizer),
        val=work.val_loader(),
        variants=(name,),
        seeds=(seed,),
        epochs=work.sizes.epochs,
        precision=precision or "auto",
        device=str(device),
    )
    return dataclasses.replace(ablation.trials[0], variant=variant)


# -- all trials


def run_trials(
    work: Work,
    variants: Sequence[str],
    seeds: int,
    log: pathlib.Path,
    device: torch.device,
    until: float | None = None,
) -> list[hm.TrialRecord]:
    """Train what `log` does not hold yet, seed by seed; which variant goes first rotates.

    A seed is not begun (but the first) when it would probably not end at `until`, a reading of
    `time.monotonic()`.
    """
    trials, longest = [], 0.0
    for seed in range(seeds):
        if seed and until is not None and time.monotonic() + longest > until:
            break
        spent = 0.0
        for turn in range(len(variants)):
            variant = variants[(seed + turn) % len(variants)]
            trial, seconds = _kept_or_run(work, variant, seed, log, device)
            trials.append(trial)
            spent += seconds
        longest = max(longest, spent)
    return trials


def _kept_or_run(
    work: Work, variant: str, seed: int, log: pathlib.Path, device: torch.device
) -> tuple[hm.TrialRecord, float]:
    """Return a trial, from `log` if it is there, and how long all of it took."""
    hand = variant in BY_HAND
    key = {
        "sizes": dataclasses.asdict(work.sizes),
        "variant": variant,
        "seed": seed,
        "device": device_name(device),
        "torch": torch.__version__,
        "recipe": measure.digest(HERE / name for name in SOURCES),
        "package": None if hand else measure.package_digest(),
    }
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if row["key"] == key:
            return hm.TrialRecord(**row["trial"]), row["all_s"]
    start = time.monotonic()
    trial = (by_hand if hand else by_package)(work, variant, seed, device)
    if device.type != "cuda":  # the peak of the process, which tells nothing of one trial
        trial = dataclasses.replace(trial, peak_allocated_bytes=None, peak_reserved_bytes=None)
    if trial.accuracy is not None:  # a mean of float32 means: what lies below is rounding
        trial = dataclasses.replace(trial, accuracy=round(trial.accuracy, 6))
    seconds = time.monotonic() - start
    write(log, {"key": key, "trial": dataclasses.asdict(trial), "all_s": seconds})
    said = "out of memory" if trial.seconds is None else f"{trial.seconds:.2f} s"
    reached = "" if trial.accuracy is None else f", {trial.accuracy:.2%}"
    print(f"{work.sizes.work} {variant} seed {seed}: {said}{reached}", flush=True)
    return trial, seconds


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--work", choices=FULL, action="append", help="default: both")
    add("--variants", help="joined by commas; default: all that this device can tell apart")
    add("--seeds", type=int, help="seeds 0 to N-1 (default 3; --smoke 2)")
    add("--minutes", type=float, help="begin no seed, but the first, that would end later")
    add("--smoke", action="store_true", help="both works, small, in 5 minutes on two CPU cores")
    add("--small", action="store_true", help="the small sets: 5,000 images, 4,000 reviews")
    for name in ("samples", "val_samples", "epochs", "batch", "length"):
        add("--" + name.replace("_", "-"), type=int)
    add("--workers", type=int, help="of the image loader (default 0 on a CPU, else up to 12)")
    add("--depth", type=int, choices=(18, 34, 50))
    add("--stem", type=int, choices=(3, 7), help="7: torchvision's own, with pooling")
    add("--size", choices=ENCODERS, help="of the encoder (default base)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=pathlib.Path, default=HERE / "results")
    return parser.parse_args(argv)


def sizes_of(work: str, given: Row, device: torch.device, *, smoke: bool = False) -> Sizes:
    """Return a work's sizes: its own, in place of which stand those given that are not None."""
    own: Row = SMOKE[work] | FOR_SMOKE if smoke else FULL[work]
    if work == "imdb":
        given = given | {"workers": 0}  # its samples lie ready
    elif device.type == "cuda":
        own = own | {"workers": max(0, min(12, (os.cpu_count() or 1) - 2))}
    own = own | {name: value for name, value in given.items() if value is not None}
    return Sizes(work, **own)


def main(argv: Sequence[str] | None = None) -> None:
    began, asked = time.monotonic(), parsed(argv)
    device = numbered(asked.device)
    default = ON_GPU if device.type == "cuda" else ("plain", *LADDER)
    variants = tuple(asked.variants.split(",")) if asked.variants else default
    seeds = asked.seeds or (2 if asked.smoke else 3)
    sized = {item.name for item in dataclasses.fields(Sizes)} - {"work"}
    given = {name: value for name, value in vars(asked).items() if name in sized}
    given["small"] = asked.small or None
    works = asked.work or list(FULL)
    stem = asked.out / ("paper_smoke" if asked.smoke else "paper")
    facts = environment(command_of(asked), seeds, device)
    parts, page = [], ""
    for number, name in enumerate(works, 1):
        work = open_work(sizes_of(name, given, device, smoke=asked.smoke))
        until = began + 60 * asked.minutes * number / len(works) if asked.minutes else None
        log = stem.with_suffix(".jsonl")
        trials = run_trials(work, variants, seeds, log, device, until)
        parts.append((described(work), ablations(trials, variants)))
        page = save(stem, facts, parts)
    print(page)


def numbered(name: str) -> torch.device:
    """Return the device; a GPU with its number, as its tensors have it."""
    return torch.empty(0, device=name).device


def command_of(asked: argparse.Namespace) -> str:
    """Return the command with what was asked for, without this machine's paths."""
    said = ["python -m benchmarks.paper"]
    for name, value in vars(asked).items():
        for one in value if isinstance(value, list) else [value]:
            if name not in ("out", "device") and one is not None and one is not False:
                flag = "--" + name.replace("_", "-")
                said.append(flag if one is True else f"{flag} {one}")
    return " ".join(said)


if __name__ == "__main__":
    main()
