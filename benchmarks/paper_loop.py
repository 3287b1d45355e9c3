"""The loop that the paper's table is measured against, as a notebook has it: FP32, written by hand.

Knows the work and the clock, no variant and no report; hybrid_magic never meets what runs here.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torch.nn.functional as F

from .paper_works import Work, step


def train_by_hand(
    work: Work, model: torch.nn.Module, seed: int, device: torch.device
) -> dict[str, Any]:
    """Train `model` as a notebook does by hand; return seconds, peaks and (s, loss, accuracy) of
    every epoch. Validation is outside the clock and the peaks."""
    loader = work.loader(seed, pin=device.type == "cuda")
    optimizer = work.optimizer(model)
    scheduler = work.scheduler(optimizer)
    seconds, steps, curve = 0.0, 0, []
    allocated = reserved = None
    for _ in range(work.sizes.epochs):
        reset_peak(device)
        model.train()
        start = clock(device)
        for x, y in loader:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            steps += 1
        seconds += clock(device) - start
        if device.type == "cuda":
            allocated = max(allocated or 0, torch.cuda.max_memory_allocated(device))
            reserved = max(reserved or 0, torch.cuda.max_memory_reserved(device))
        curve.append((seconds, *judge(model, work, device)))
    return {
        "seconds": seconds,
        "steps": steps,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
        "curve": curve,
    }


@torch.no_grad()
def judge(model: torch.nn.Module, work: Work, device: torch.device) -> tuple[float, float]:
    """Return the loss and the accuracy, a share, on the validation split."""
    model.eval()
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for x, y in work.val_loader():
        loss, named = step(model, [x.to(device), y.to(device)])
        sums += len(y) * torch.stack([loss, named["accuracy"]]).double().cpu()
        count += len(y)
    loss, accuracy = (sums / count).tolist()
    return loss, accuracy


def warm_up(work: Work, model: torch.nn.Module, device: torch.device, steps: int = 3) -> float:
    """Take some steps on a copy of the model and return the seconds of the last one."""
    model = copy.deepcopy(model).train()
    optimizer = work.optimizer(model)
    batch = [tensor.to(device) for tensor in work.example()]
    start = 0.0
    for _ in range(steps):
        start = clock(device)
        optimizer.zero_grad()
        step(model, batch).backward()
        optimizer.step()
    return clock(device) - start


def clock(device: torch.device) -> float:
    """Return the seconds on the clock once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
