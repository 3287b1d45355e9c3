"""How a loss is reduced over its samples, and so how the micro-batches of a step are weighted.

The first forward pass of a run is watched once: the loss functions that it calls tell whether the
loss is a mean or a sum, and whether a mean leaves targets out (`ignore_index`, padding in language
models) or weights them by class. From then on the weights of a step come from counting on the host,
before its first forward pass, so that however a step is cut its gradient is that of the whole.

Source: the gradient-accumulation bug of token losses (a mean of means is not the mean of tokens),
Hugging Face Transformers 4.46 `num_items_in_batch`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from . import nested


@dataclass(frozen=True)
class Reduction:
    """`kind` is "mean" over samples, "sum", or "targets": a mean over the targets that count.

    For "targets", `path` leads to the batch's leaf that holds them, `shift` how many
    positions the model drops at the front of the last dimension, `ignore_index` the target left out
    and `class_weight` the weight of each class (None: all equal). `why` says it in words.
    """

    kind: str
    why: str
    path: tuple[Any, ...] = ()
    shift: int = 0
    ignore_index: int = -100
    class_weight: torch.Tensor | None = None

    def counts(self, batches: Sequence[Any], sizes: Sequence[int]) -> list[float]:
        """Return what each micro-batch counts for: its samples, or its targets that count."""
        if self.kind != "targets":
            return [float(size) for size in sizes]
        return [self._targets(batch) for batch in batches]

    def _targets(self, batch: Any) -> float:
        target = nested.at(batch, self.path)
        target = target[..., self.shift :] if self.shift else target
        if self.class_weight is None and target.device.type == "cpu":
            # targets on the host are counted there, by NumPy: no device is read for them
            return float(np.count_nonzero(target.numpy() != self.ignore_index))
        kept = target != self.ignore_index
        if self.class_weight is None:
            return float(kept.sum())
        return float(self.class_weight.to(target.device, torch.float64)[target[kept]].sum())


def weights(reduction: Reduction, batches: Sequence[Any], sizes: Sequence[int]) -> list[float]:
    """Return the factor of each micro-batch's loss, so that their sum is the whole step's loss.

    With no target that counts in the whole step the factors are those of the samples: the loss is
    then as undefined as it would be in one piece.
    """
    if reduction.kind == "sum":
        return [1.0] * len(sizes)
    if len(sizes) == 1:
        return [1.0]
    counts = reduction.counts(batches, sizes)
    total = sum(counts)
    if total == 0:
        counts, total = [float(size) for size in sizes], float(sum(sizes))
    return [count / total for count in counts]


@dataclass
class _Call:
    name: str
    reduction: str
    target: Any
    ignore_index: int
    weight: torch.Tensor | None
    result: Any


class LossWatch(TorchFunctionMode):
    """While entered, notes every loss function of `torch.nn.functional` that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__module__", None) == "torch.nn.functional":
            self._note(func, args, kwargs or {}, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        try:
            given = inspect.signature(func).bind(*args, **kwargs)
        except (TypeError, ValueError):
            return
        if "reduction" not in inspect.signature(func).parameters:
            return
        given.apply_defaults()
        values = given.arguments
        self.calls.append(
            _Call(
                func.__name__,
                values["reduction"],
                values.get("target"),
                values.get("ignore_index", -100),
                values.get("weight") if func in (F.cross_entropy, F.nll_loss) else None,
                result,
            )
        )


def read(watch: LossWatch, loss: torch.Tensor, batch: Any, n: int, asked: str) -> Reduction:
    """Return how `loss`, computed under `watch` from `batch` of `n` samples, is reduced.

    Args:
        watch: what was called while the loss was computed.
        loss: the loss, one number, on any device.
        batch: the micro-batch as the step saw it.
        asked: `--reduction`; "auto" reads it off the criterion.
    """
    calls = watch.calls
    if asked == "sum":
        return Reduction("sum", "--reduction sum")
    own = next((call for call in calls if call.result is loss), None)
    if asked == "auto" and own is None and calls and all(call.reduction == "sum" for call in calls):
        # A sum divided by its samples is a mean; of one sample the two are the same number, and
        # then only a loss with more added to the sum is taken for a sum.
        value, part = abs(float(loss.detach())), abs(float(calls[-1].result.detach()))
        if value > (1.0001 if n == 1 else 0.9) * part:
            return Reduction("sum", f"the loss is made of sums ({calls[-1].name})")
    if asked == "auto" and own is not None and own.reduction == "sum":
        return Reduction("sum", f"{own.name} is called with reduction='sum'")
    for call in [own] if own is not None else calls:
        found = _targets(call, batch) if call.reduction == "mean" else None
        if found is not None:
            return found
    return Reduction(
        "mean", f"{own.name} is a mean over samples" if own else "taken as a mean over samples"
    )


def _targets(call: _Call, batch: Any) -> Reduction | None:
    """Return the counting rule of a cross-entropy whose targets are a leaf of the batch."""
    target = call.target
    if call.name not in ("cross_entropy", "nll_loss") or not isinstance(target, torch.Tensor):
        return None
    if target.is_floating_point():
        return None
    flat = target.reshape(-1)
    for path, leaf in nested.paths(batch):
        if not isinstance(leaf, torch.Tensor) or leaf.is_floating_point() or leaf.dim() == 0:
            continue
        for shift in (0, 1) if leaf.dim() > 1 else (0,):
            if _same(flat, leaf[..., shift:], call.ignore_index):
                why = f"{call.name} counts targets other than {call.ignore_index}"
                why += ", weighted by class" if call.weight is not None else ""
                return Reduction("targets", why, path, shift, call.ignore_index, call.weight)
    return None


def _same(flat: torch.Tensor, leaf: torch.Tensor, ignore_index: int) -> bool:
    """Return whether `flat` holds `leaf`'s targets in order, ignored ones aside."""
    if flat.numel() == leaf.numel():
        return bool(torch.equal(flat, leaf.reshape(-1)))
    kept = leaf.reshape(-1)
    kept, flat = kept[kept != ignore_index], flat[flat != ignore_index]
    return flat.numel() == kept.numel() > 0 and bool(torch.equal(flat, kept))
