"""Everything that only a GPU can tell, in parts of under nine minutes that run apart.

    python -m benchmarks.gpu [--part resnet] [--data DIR] [--out DIR] [--minutes 8]

Without --part all of them, in half an hour. A part writes gpu_PART.json and .md when it is done,
with the environment; what the clock cut is said there. --data is a folder with any of cifar100/,
imdb/ and small/; given several times, the folders are taken together, so that data can be carried
in pieces. --dry-run tries every part out on a CPU, on made-up data, and writes dry_gpu_PART.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import torch

import hybrid_magic as hm
from hybrid_magic.datasets import FOLDER

from . import measure, paper
from .gpu_oom import oom
from .gpu_parts import Bench, Found, accuracy_target, fit, memory, reduced
from .gpu_tuned import handtuned
from .paper_report import INTRODUCTION, ablations, compared, described, environment
from .paper_works import open_work

ROOT = pathlib.Path(__file__).resolve().parent.parent
ALL_MINUTES = 30


def tests(bench: Bench) -> Found:
    """The tests marked `gpu`."""
    asked = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/engine/test_gpu.py"]
    if not bench.dry:
        asked.pop()
    try:
        done = subprocess.run(
            asked, cwd=ROOT, capture_output=True, text=True, timeout=max(60, bench.left_s)
        )
        said, code = done.stdout.splitlines() or done.stderr.splitlines(), done.returncode
    except subprocess.TimeoutExpired as error:
        said, code = [f"not done after {error.timeout:.0f} s"], None
    failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    closing = said[-1] if said else "nothing was said"
    body = "\n".join(["    pytest -m gpu -q", "", *(f"- {line}" for line in failed), closing, ""])
    return {"closing_line": closing, "failed": failed, "exit_status": code}, body


def resnet(bench: Bench) -> Found:
    """The paper's table: ResNet-50 on CIFAR-100."""
    return table(bench, "cifar")


def transformer(bench: Bench) -> Found:
    """The paper's table: a small Transformer encoder on IMDB."""
    return table(bench, "imdb", size="small")


def transformer_base(bench: Bench) -> Found:
    """The paper's table: an encoder of BERT-base's size on IMDB."""
    return table(bench, "imdb", size="base")


def table(bench: Bench, name: str, **given: str) -> Found:
    """Return the paper's table of a work: every variant in strict FP32, TF32, bf16 and fp16, as far
    as the device has them."""
    variants = variants_on(bench.device)
    if bench.dry:
        variants = ("plain", "fp32", "hybrid:bf16")
    work, cut = fit(open_work(bench.sizes(name, **given)), variants, bench)
    log = bench.stem("_".join([name, *given.values()])).with_suffix(".jsonl")
    trials = paper.run_trials(work, variants, bench.seeds, log, bench.device, bench.until)
    found = ablations(trials, variants)
    said = f"{described(work)} {cut}\n"
    body = "\n".join([INTRODUCTION.partition("\n\n")[2], said, *map(compared, found)])
    return {"what": said, "against": [one.as_json() for one in found]}, body


def variants_on(device: torch.device) -> tuple[str, ...]:
    """Return the variants that tell something apart on a device."""
    if device.type != "cuda":
        return ("plain", "fp32", "mp:bf16", "mp+ga:bf16", "hybrid:bf16")
    precisions = ("bf16", "fp16") if reduced(device) == "bf16" else ("fp16",)
    tf32 = ("shipped", "tf32") if reduced(device) == "bf16" else ()
    rungs = [f"{rung}:{one}" for rung in ("mp", "mp+ga", "hybrid") for one in precisions]
    return ("plain", "fp32", *tf32, *rungs)


PARTS: dict[str, Callable[[Bench], Found]] = {
    "tests": tests,
    "resnet": resnet,
    "transformer": transformer,
    "transformer-base": transformer_base,
    "memory": memory,
    "handtuned": handtuned,
    "oom": oom,
    "accuracy-target": accuracy_target,
}
NEED_CUDA = ("memory", "oom")  # what they measure exists on a GPU alone


@contextlib.contextmanager
def data_from(folders: Sequence[pathlib.Path]) -> Iterator[None]:
    """Have the data read from `folders`, several of them as if they were one."""
    if not folders:
        yield
        return
    with tempfile.TemporaryDirectory() as joined:
        for folder in folders:
            for path in folder.resolve().rglob("*"):
                link = pathlib.Path(joined) / path.relative_to(folder.resolve())
                if path.is_file() and not link.exists():
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(path)
        found, os.environ[FOLDER] = os.environ.get(FOLDER), joined
        try:
            yield
        finally:
            os.environ.pop(FOLDER)
            if found is not None:
                os.environ[FOLDER] = found


def run_part(name: str, bench: Bench, command: str) -> None:
    """Run a part and write what it found, or say in one line why there is nothing."""
    if bench.device.type != "cuda" and name in NEED_CUDA:
        print(f"{name}: needs a CUDA device; nothing was measured")
        return
    facts = environment(command, bench.seeds, bench.device)
    start = time.monotonic()
    try:
        values, body = PARTS[name](bench)
    except (hm.HybridMagicError, torch.OutOfMemoryError) as error:
        print(f"{name}: {str(error).splitlines()[0]}; nothing was measured")
        return
    facts["took"] = f"{time.monotonic() - start:.0f} s"
    title = (PARTS[name].__doc__ or name).strip().splitlines()[0].rstrip(".")
    dry = "**A dry run: nothing here is a measurement.**\n\n" if bench.dry else ""
    page = f"# {title}\n\n{dry}{body}\n{measure.header(facts)}"
    bench.out.mkdir(parents=True, exist_ok=True)
    stem = bench.stem(name)
    text = json.dumps({"environment": facts, "dry_run": bench.dry} | values, indent=1) + "\n"
    stem.with_suffix(".json").write_text(text, encoding="utf-8")
    stem.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--data", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--out", type=pathlib.Path, default=paper.HERE / "results")
    parser.add_argument("--minutes", type=float, help="for each part (default 8; all parts: 30)")
    parser.add_argument("--seeds", type=int, default=5, help="at most; three are aimed at")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, next to nothing")
    asked = parser.parse_args(argv)
    if not (asked.dry_run or torch.cuda.is_available()):
        raise SystemExit("no CUDA device was found; wanted one; --dry-run tries this out on a CPU")
    # Read when cuBLAS begins: without it, it does not repeat itself.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parts = asked.part or list(PARTS)
    minutes = asked.minutes or (8 if len(parts) == 1 else ALL_MINUTES / len(parts))
    device = paper.numbered("cpu" if asked.dry_run else "cuda")
    seeds = min(asked.seeds, 1) if asked.dry_run else asked.seeds
    dry = " --dry-run" if asked.dry_run else ""
    with data_from(asked.data):
        for name in parts:
            until = time.monotonic() + 60 * minutes
            bench = Bench(device, asked.out, until, seeds, asked.dry_run)
            run_part(name, bench, f"python -m benchmarks.gpu --part {name}{dry}")


if __name__ == "__main__":
    main()
