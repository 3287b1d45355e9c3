"""A part of benchmarks.gpu: running out of a GPU's memory, for real.

A process that may have less than its micro-batch takes recovers without a trace, and one that
chooses its own size meets no error. Knows no speed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import hybrid_magic as hm

from . import measure
from .gpu_parts import Bench, Found, reduced
from .paper_report import Row
from .paper_works import Sizes, open_work, step


def oom(bench: Bench) -> Found:
    """Real out-of-memory errors: forced ones leave no trace, the default budget meets none."""
    rows = []
    cases = [
        (name, precision)
        for precision in dict.fromkeys(("fp32", reduced(bench.device)))
        for name in ("cifar", "imdb")
    ]
    for name, precision in cases:
        if rows and bench.left_s < 60:
            break
        batch = 1024 if name == "cifar" else 512
        sizes = bench.sizes(name, batch=batch, samples=8 * batch, val_samples=1, epochs=1)
        sizes = dataclasses.replace(sizes, depth=18, size="small", workers=0)
        rows.append({"work": name, "in": precision} | Forced(sizes, precision, bench.device).row())
    left = [f"{name} in {precision}" for name, precision in cases[len(rows) :]]
    said = (
        "The process is allowed 70 % of what the tensors of a run in whole batches take. "
        "`retries` of a run that was told to use them all the same; its weights and statistics "
        "against a run that repeats its sizes with memory enough (`equal`), and that one against "
        "itself done twice (`repeats`: where the kernels do not repeat themselves, nothing can be "
        "said). Last: retries of a run that chooses its own size under the default budget, as "
        "little memory being allowed.\n"
    )
    missing = f"\nNot tried, the clock ran out: {', '.join(left)}.\n" if left else ""
    return {"rows": rows, "left_out": left}, f"{said}\n{measure.table(rows)}{missing}"


class Forced:
    """A run whose micro-batch is too large for what the process may have."""

    def __init__(self, sizes: Sizes, precision: str, device: torch.device) -> None:
        self.work, self.precision, self.device = open_work(sizes), precision, device

    def row(self) -> Row:
        batch, total = self.work.sizes.batch, torch.cuda.get_device_properties(self.device)
        whole: Row = {"batch": "fixed", "micro": batch, "memory": total.total_memory}
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved(self.device)
        free, _ = self._run(**whole)
        allowed = held + int(0.7 * (free.peak_allocated_bytes or 0))
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(allowed / total.total_memory, self.device)
        try:
            forced, ended = self._run(**whole)
            default, _ = self._run(batch="fixed")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        again, twice = (self._run(replay=forced)[1] for _ in range(2))
        repeats = _equal(again, twice)
        return {
            "batch": batch,
            "allowed, MiB": allowed >> 20,
            "retries": forced.retries,
            "went on with": min(record.microbatch_size for record in forced.history),
            "equal": ("yes" if _equal(ended, again) else "**no**") if repeats else "unknown",
            "repeats": "yes" if repeats else "no",
            "retries by default": default.retries,
        }

    def _run(self, **how: Any) -> tuple[hm.Run, list[Tensor]]:
        """Return a run from the same beginning and the tensors it ends with."""
        model = self.work.model(0).to(self.device)
        asked: Row = {
            "precision": self.precision,
            "epochs": 2,
            "device": str(self.device),
            "seed": 0,
        }
        optimizer, loader = self.work.optimizer(model), self.work.loader(0)
        found = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            run = hm.train(model, loader, step, optimizer=optimizer, **(asked | how))
        finally:
            torch.use_deterministic_algorithms(found)
        return run, [tensor.cpu() for tensor in model.state_dict().values()]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
