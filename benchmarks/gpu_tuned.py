"""A part of benchmarks.gpu: speed against a loop that was written and tuned by hand.

Reduced precision, channels_last, TF32, cuDNN's benchmark mode, fused optimizer, pinned copies, and
the batch at which doubling stops to pay. Knows no accuracy.
"""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm

from . import measure
from .gpu_parts import Bench, Found, reduced
from .paper_loop import clock
from .paper_report import Row, described
from .paper_works import Work, open_work, step

TURNS, TURN_S = 7, 5.0  # at most so many, of about so many seconds
SAID = """The hand-written loop: reduced precision, channels_last, TF32, cuDNN's benchmark mode, a
fused optimizer, pinned copies, no reading of anything; its batch was doubled until memory ran out
or a doubling gained less than 3 %. Ours: `hm.train` with an ordinary optimizer; `whole run` counts
what it takes to begin and to end, `steady` is the last half of its steps. Inputs lie ready on the
host. Medians of ratios paired by turns, with their 95 % bootstrap intervals.
"""


def handtuned(bench: Bench) -> Found:
    """Speed against a loop that was written and tuned by hand."""
    values, lines = {}, []
    works = ("cifar", "imdb")
    for at, name in enumerate(works):
        until = time.monotonic() + bench.left_s / (len(works) - at)
        work = open_work(bench.sizes(name, samples=256, val_samples=8192))
        best, tried = _largest(work, bench.device)
        count = len(work.val)
        passes = 2 if bench.dry else max(2, math.ceil(TURN_S * (tried[best] or 0) / count))
        base = work.sizes.batch
        pairs = {
            f"both at {base}": (base, base, {"batch": "fixed"}),
            f"both at {best}": (best, best, {"batch": "fixed"}),
            f"hand at {best}, ours as it comes from {base}": (best, base, {}),
        }
        turns: dict[str, list[list[float]]] = {key: [] for key in pairs}
        for turn in range(1 if bench.dry else TURNS):
            if turn and time.monotonic() > until:
                break
            for key, pair in pairs.items():
                turns[key].append(_turn(work, pair, turn, passes, bench.device))
        values[name] = {"what": described(work), "batches_tried": tried, "turns": turns}
        lines += [_speeds(name, key, rows) for key, rows in turns.items()]
    return values, f"{SAID}\n{measure.table(lines)}"


def _turn(
    work: Work, pair: tuple[int, int, Row], turn: int, passes: int, device: torch.device
) -> list[float]:
    """Return samples a second of the hand-written loop, of our whole run and of its last half;
    which goes first alternates."""
    theirs, own, how = pair
    if turn % 2:
        ours = _ours(work, own, how, passes, device)
        return [_by_hand(work, theirs, passes, device), *ours]
    return [_by_hand(work, theirs, passes, device), *_ours(work, own, how, passes, device)]


def _speeds(name: str, key: str, rows: list[list[float]]) -> Row:
    hand, whole, steady = zip(*rows, strict=True)
    ratio = {
        kind: measure.bootstrap([ours / theirs for ours, theirs in zip(own, hand, strict=True)])
        for kind, own in (("whole run", whole), ("steady", steady))
    }
    middle = sorted(hand)[len(hand) // 2]
    return {"work": name, "batches": key, "n": len(rows), "hand, samples/s": f"{middle:.0f}"} | {
        f"ours / hand, {kind}": str(found) for kind, found in ratio.items()
    }


def _largest(work: Work, device: torch.device) -> tuple[int, dict[int, float | None]]:
    """Return the batch at which doubling stops to pay, and samples a second of each one tried (None
    where memory ran out)."""
    best = work.sizes.batch
    speed = _by_hand(work, best, 1, device)
    tried: dict[int, float | None] = {best: speed}
    while best * 2 <= len(work.val):
        tried[best * 2] = None
        try:
            faster = tried[best * 2] = _by_hand(work, best * 2, 1, device)
        except torch.OutOfMemoryError:
            break
        if faster < 1.03 * speed:
            break
        best, speed = best * 2, faster
    return best, tried


def _by_hand(work: Work, batch: int, passes: int, device: torch.device) -> float:
    """Return the samples a second of the loop tuned by hand, its first steps outside the clock."""
    x, y = work.val.tensors  # ready inputs: the loop is compared, not the loading
    gpu = device.type == "cuda"
    model = work.model(0).to(device).train()
    images = x.dim() == 4
    if images:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = work.optimizer(model, fused=True) if gpu else work.optimizer(model)
    dtype = torch.float16 if reduced(device) == "fp16" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    found = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")

    def go_through(batches: int) -> int:
        order = torch.randperm(len(x))
        for start in range(0, batches * batch, batch):
            at = order[start : start + batch]
            inputs, target = x[at], y[at]
            if images:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            if gpu:
                inputs, target = inputs.pin_memory(), target.pin_memory()
            inputs = inputs.to(device, non_blocking=True)
            target = target.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=dtype):
                loss = F.cross_entropy(model(inputs), target)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return batches * batch

    try:
        go_through(min(3, len(x) // batch))
        start = clock(device)
        seen = sum(go_through(len(x) // batch) for _ in range(passes))
        return seen / (clock(device) - start)
    finally:
        torch.backends.cudnn.benchmark = found[0]
        torch.set_float32_matmul_precision(found[1])


def _ours(
    work: Work, batch: int, how: Row, passes: int, device: torch.device
) -> tuple[float, float]:
    """Return the samples a second of `hm.train`: of the whole run, and of its last half."""
    x, y = work.val.tensors
    model = work.model(0).to(device)
    kept = len(x) // batch * batch  # as the other loop, which leaves the rest
    loader = DataLoader(TensorDataset(x[:kept], y[:kept]), batch_size=batch, shuffle=True)
    asked: Row = {"epochs": passes, "precision": reduced(device), "device": str(device)} | how
    run = hm.train(model, loader, step, optimizer=work.optimizer(model), **asked)
    half = list(run.history)[len(run.history) // 2 :]
    seconds = sum((record.step_s or 0.0) for record in half)
    seen = sum(record.global_batch_size for record in half)
    return run.samples_seen / run.seconds, seen / seconds
