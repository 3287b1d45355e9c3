"""The pages of the paper's table: what was compared with which baseline, and on which machine.

Knows trials and estimates, no training.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

import hybrid_magic as hm

from . import measure
from .paper_works import ENCODERS, Work

BY_HAND = {"plain": True, "shipped": False}  # whether in strict FP32
Row = dict[str, Any]


def ablations(trials: Sequence[hm.TrialRecord], variants: Sequence[str]) -> list[hm.Ablation]:
    """Return the trials compared with each baseline among them: by hand, and in the package."""
    found = []
    for first in [name for name in ("plain", "fp32") if name in variants] or variants[:1]:
        others = (name for name in variants if first != "fp32" or name not in BY_HAND)
        names = tuple(dict.fromkeys((first, *others)))
        kept = [trial for trial in trials if trial.variant in names]
        found.append(hm.Ablation(trials=kept, names=names))
    return found


def compared(ablation: hm.Ablation) -> str:
    """Return the paper's columns as a Markdown table, and what may be said below."""
    lines = [
        {
            "run": row.name,
            "in": row.precision or "",
            "n": row.seconds.n if row.seconds else row.outcome,
            "steps": f"{row.steps:.0f}" if row.steps else "",
            "time, s": shown(row.seconds, "{:.2f}"),
            "time saved, %": interval(row.time_reduction_ratio, 100),
            "speedup": shown(row.speedup, "{:.2f}"),
            "peak, MiB": shown(row.peak_allocated_bytes, "{:.0f}", 2**-20),
            "memory saved, %": interval(row.memory_reduction_ratio, 100),
            "accuracy, %": shown(row.accuracy, "{:.2f}", 100),
            "difference, points": interval(row.accuracy_delta, 100, 2),
        }
        for row in ablation.variants
    ]
    said = "".join(f"- {sentence}\n" for sentence in ablation.verdicts)
    return f"Against `{ablation.names[0]}`:\n\n{measure.table(lines)}\n{said}"


def shown(value: Any, form: str, factor: float = 1.0) -> str:
    """Return an Estimate with its spread over the seeds, nothing where it is unknown."""
    if value is None:
        return ""
    spread = f" ± {form.format(factor * value.spread)}" if value.spread is not None else ""
    return form.format(factor * value) + spread


def interval(value: Any, factor: float = 1.0, digits: int = 1) -> str:
    """Return an Estimate with its 95 % interval where there is one."""
    if value is None:
        return ""
    ends = "" if value.low is None else f" [{factor * value.low:.{digits}f}, "
    ends += f"{factor * value.high:.{digits}f}]" if ends else ""
    return f"{factor * value:.{digits}f}{ends}"


def described(work: Work) -> str:
    """Return in words what is trained, and what of the paper's was scaled down."""
    sizes, samples = work.sizes, (len(work.train), len(work.val))  # type: ignore[arg-type]
    if sizes.work == "cifar":
        stem = "3x3 stem" if sizes.stem == 3 else "7x7 stem and pooling"
        what = f"ResNet-{sizes.depth} on CIFAR-100 ({stem}), SGD"
        whole = {"ResNet-50": sizes.depth == 50, "the 3x3 stem": sizes.stem == 3}
        most = 50_000, 10_000
    else:
        width, layers, heads, *_ = ENCODERS[sizes.size]
        what = f"Transformer encoder on IMDB ({layers} layers, {width} wide, {heads} heads, "
        what += f"{sizes.length} tokens), AdamW"
        whole = {"BERT-base's size": sizes.size == "base", "256 tokens": sizes.length == 256}
        most = 25_000, 25_000
    whole[f"{most[0]:,} samples to train on"] = samples[0] == most[0]
    whole[f"{most[1]:,} to judge on"] = samples[1] == most[1]
    scaled = [f"not {name}" for name, kept in whole.items() if not kept]
    made_up = "**made-up data**, " if sizes.made_up else ""
    return (
        f"{what}: {made_up}{samples[0]:,} samples, {sizes.epochs} epoch(s), batch {sizes.batch}, "
        f"judged on {samples[1]:,}; cosine over samples, {sizes.workers} loader workers."
        + (f" Scaled down: {', '.join(scaled)}." if scaled else "")
    )


INTRODUCTION = """# The paper's table

`plain`: written by hand, strict FP32; `shipped`: the same with TF32 where PyTorch ships it. The
other runs are `hm.ablate`'s: `fp32` strict, `tf32` as PyTorch ships, `mp` mixed precision, `ga`
accumulation, `hybrid` everything; after a colon the precision asked for. Same weights and order of
samples per seed, the order of runs rotates, validation and first steps are outside the clock, all
are judged in strict FP32 after the last epoch. ± is the standard deviation over seeds; in brackets
the 95 % interval of the mean of pairs with the first run, from three seeds on. Memory is the peak
that tensors took on a GPU; on a CPU none is given.
"""


def save(stem: pathlib.Path, facts: Row, parts: Sequence[tuple[str, list[hm.Ablation]]]) -> str:
    """Write the parts, each described, as JSON, Markdown and LaTeX; return the Markdown."""
    page = [INTRODUCTION]
    for words, found in parts:
        page += [f"## {words.partition(' (')[0]}\n\n{words}\n", *map(compared, found)]
    page.append(measure.header(facts))
    held = [{"what": words, "against": [one.as_json() for one in found]} for words, found in parts]
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": facts, "works": held}, indent=1) + "\n"
    stem.with_suffix(".json").write_text(text, encoding="utf-8")
    stem.with_suffix(".md").write_text("\n".join(page), encoding="utf-8")
    tables = [f"% {words}\n{one.latex()}" for words, found in parts for one in found]
    stem.with_suffix(".tex").write_text("\n".join(tables), encoding="utf-8")
    return "\n".join(page)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def environment(command: str, seeds: int, device: torch.device) -> Row:
    """Return the machine, versions, seeds and command; of a GPU its name, memory and driver."""
    facts = measure.environment(command, f"0 to {seeds - 1}")
    if device.type != "cuda":
        return facts
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        found = []
    total = torch.cuda.get_device_properties(device).total_memory
    gpu = {
        "gpu": device_name(device),
        "gpu memory": f"{total / 2**30:.0f} GiB",
        "driver": found[0] if found else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    return gpu | facts
