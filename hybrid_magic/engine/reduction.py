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
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..errors import HybridMagicError
from . import nested

_COUNTING = ("cross_entropy", "nll_loss")  # their mean is over the targets that count
_LABELS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Reduction:
    """`kind` is "mean" over samples, "sum", or "targets": a mean over the targets that count.

    For "targets", `path` leads to the batch's leaf that holds them, `shift` how many
    positions the model drops at the front of the last dimension, `ignore_index` the target left out
    and `class_weight` the weight of each class (None: all equal). `why` says it in words; `note`
    is what the person should know, None when nothing is surprising. `certain`: read off the
    criterion, with nothing left to be tried.
    """

    kind: str
    why: str
    certain: bool = True
    note: str | None = None
    path: tuple[Any, ...] = ()
    shift: int = 0
    ignore_index: int = -100
    class_weight: torch.Tensor | None = None

    def counts(self, batches: Sequence[Any], sizes: Sequence[int]) -> list[float]:
        """Return what each micro-batch counts for: its samples, or its targets that count."""
        if self.kind != "targets" or not batches:
            return [float(size) for size in sizes]
        targets = [nested.at(batch, self.path) for batch in batches]
        if self.class_weight is None and not self.shift and all(map(_is_host_row, targets)):
            whole = torch.cat(targets).numpy()
            if np.count_nonzero(whole != self.ignore_index) == whole.size:  # none is left out
                return [float(target.numel()) for target in targets]
        return [self._counted(target) for target in targets]

    def _counted(self, target: torch.Tensor) -> float:
        target = target[..., self.shift :] if self.shift else target
        if self.class_weight is None and target.device.type == "cpu":
            # targets on the host are counted there, by NumPy: no device is read for them
            return float(np.count_nonzero(target.numpy() != self.ignore_index))
        kept = target != self.ignore_index
        if self.class_weight is None:
            return float(kept.sum())
        chosen = target[kept].long()  # a uint8 index would be a mask
        return float(self.class_weight.to(target.device, torch.float64)[chosen].sum())


def _is_host_row(target: torch.Tensor) -> bool:
    return target.dim() == 1 and target.device.type == "cpu"


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
        if torch.compiler.is_compiling():  # what is traced cannot be noted, and is settled by trial
            return result
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


def check(loss: Any) -> None:
    """Raise HybridMagicError unless `loss` is one number that a gradient can be taken of."""
    if not isinstance(loss, torch.Tensor):
        found, do = f"a {type(loss).__name__}", "return the loss of the batch"
    elif loss.numel() != 1 or loss.dim() > 0:
        found, do = f"a tensor of shape {tuple(loss.shape)}", "take its .mean()"
    elif not loss.requires_grad:
        found, do = (
            "a loss without a gradient",
            "compute it from the model, without .item() or no_grad",
        )
    else:
        return
    raise HybridMagicError(
        f"the step gave {found}; wanted one number that depends on the model; {do}"
    )


def read(watch: LossWatch, loss: torch.Tensor, batch: Any, asked: str) -> Reduction:
    """Return how `loss`, computed under `watch` from `batch`, is reduced.

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
    if asked == "auto" and own is not None and own.reduction == "sum":
        return Reduction("sum", f"{own.name} is called with reduction='sum'")
    for call in [own] if own is not None else calls:
        found = _targets(call, batch) if call.reduction == "mean" else None
        if found is not None:
            return found if own is not None else replace(found, certain=asked == "mean")
    counted = own is not None and own.name in _COUNTING and not own.target.is_floating_point()
    certain = asked == "mean" or (own is not None and not counted)
    why = f"{own.name} is a mean over samples" if own else "taken as a mean over samples"
    return Reduction("mean", why, certain)


def settle(found: Reduction, pieces: Sequence[Any], sizes: Sequence[int], losses: Any) -> Reduction:
    """Return how a loss is reduced whose criterion does not tell, by trying it out.

    Args:
        found: the first guess.
        pieces: two parts of a batch, with their `sizes`.
        losses: the losses (floats) of the whole batch and of the two parts.
    """
    whole, *parts = losses
    if not all(map(math.isfinite, losses)):
        return found  # nothing can be told from it: another step is looked at
    for guess in (found, Reduction("mean", "a mean over samples"), Reduction("sum", "a sum")):
        factors = weights(guess, pieces, sizes)
        joined = sum(factor * part for factor, part in zip(factors, parts, strict=True))
        if abs(joined - whole) <= 1e-4 * max(abs(whole), 1e-12):
            note = None
            if guess.kind == "sum":
                note = "the loss is a sum over samples: micro-batches are added up, not averaged"
            return replace(guess, why=f"{guess.why}, by trial", certain=True, note=note)
    factors = weights(found, pieces, sizes)
    joined = sum(factor * part for factor, part in zip(factors, parts, strict=True))
    note = (
        "the loss of a batch is not the mean of its parts' losses "
        f"({whole:.4g} in one piece, {joined:.4g} in two): the gradient depends on how a step is "
        "cut; keep --micro at the loader's batch if that matters (in-batch or masked losses)"
    )
    return replace(found, certain=True, note=note)


def _targets(call: _Call, batch: Any) -> Reduction | None:
    """Return the counting rule of a cross-entropy whose targets are a leaf of the batch.

    Of several leaves that hold the same numbers the one that is the target's own memory counts,
    else one that is called after labels, else the last.
    """
    target = call.target
    if call.name not in _COUNTING or not isinstance(target, torch.Tensor):
        return None
    if target.is_floating_point():
        return None
    flat, best = target.reshape(-1), (-1, 0)
    found: Reduction | None = None
    for number, (path, leaf) in enumerate(nested.paths(batch)):
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            continue
        if isinstance(batch, nested.Named) and path[0] not in batch.cut:
            continue  # the same in every micro-batch
        flat = flat.to(leaf.device)  # it may have been moved on its way to the criterion
        shared = leaf.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
        called = bool(path) and str(path[-1]) in _LABELS
        for shift in (0, 1) if leaf.dim() > 1 else (0,):
            rank = (2 * shared + called, number)
            if rank > best and _same(flat, leaf[..., shift:], call.ignore_index):
                why = f"{call.name} counts targets other than {call.ignore_index}"
                why += ", weighted by class" if call.weight is not None else ""
                best = rank
                found = Reduction(
                    "targets", why, True, None, path, shift, call.ignore_index, call.weight
                )
    return found


def _same(flat: torch.Tensor, leaf: torch.Tensor, ignore_index: int) -> bool:
    """Return whether `flat` holds `leaf`'s targets in order, ignored ones aside; they may have been
    reshaped, and made whole numbers of another kind."""
    if flat.numel() == leaf.numel():
        return bool((flat == leaf.reshape(-1)).all())
    if leaf.is_floating_point():
        return False
    kept = leaf.reshape(-1)
    kept, flat = kept[kept != ignore_index], flat[flat != ignore_index]
    return flat.numel() == kept.numel() > 0 and bool((flat == kept).all())
