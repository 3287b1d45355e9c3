"""Values that a person's loop keeps of its micro-batches, merged into those of the whole step.

Losses become the step's loss, what has a row a sample is joined, counts are added up. What does not
tell how it goes together raises: nothing is guessed. Pure; knows no step.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import nested


class Unmergeable(Exception):  # noqa: N818 - an answer, not a mistake
    """Parts that do not tell what the whole would have been."""


def merge(parts: Sequence[Any], sizes: Sequence[int], weights: Sequence[float]) -> Any:
    """Return the value that a step has as a whole.

    Args:
        parts: its value in each micro-batch; two or more.
        sizes: the samples of each.
        weights: the factor of each one's loss in the step's loss.
    Returns:
        The object itself where all parts are the same one, else a new value; tensors are detached,
        on the device of the parts.
    Raises:
        Unmergeable: there is no telling; it says why.
    """
    first: Any = parts[0]
    if type(first) is not int and all(part is first for part in parts):
        return first
    kinds = sorted({type(part).__name__ for part in parts})
    if len(kinds) > 1:
        raise Unmergeable(f"it is now a {kinds[0]} and now a {kinds[1]}")
    if isinstance(first, Tensor):
        return _tensors(parts, sizes, weights)
    if isinstance(first, (list, tuple)) and not hasattr(first, "_fields"):
        return _sequences(parts, sizes, weights)
    if isinstance(first, Mapping) or (dataclasses.is_dataclass(first) and not _is_class(first)):
        return _fields(parts, lambda each: merge(each, sizes, weights))
    if hasattr(first, "_fields"):
        return type(first)(*(merge(each, sizes, weights) for each in zip(*parts, strict=True)))
    if hasattr(first, "shape") and hasattr(first, "dtype"):  # of NumPy
        return _arrays(parts, sizes, weights)
    return _plain(parts, sizes, weights)


def _arrays(parts: Sequence[Any], sizes: Sequence[int], weights: Sequence[float]) -> Any:
    whole = merge([torch.as_tensor(part) for part in parts], sizes, weights).numpy()
    return type(parts[0])(whole) if parts[0].ndim == 0 else whole


def _is_class(value: Any) -> bool:
    return isinstance(value, type)


def _tensors(found: Sequence[Tensor], sizes: Sequence[int], weights: Sequence[float]) -> Tensor:
    parts = [part.detach() for part in found]
    first = parts[0]
    if any(part.dim() != first.dim() or part.dtype != first.dtype for part in parts):
        raise Unmergeable("its tensors differ in kind between micro-batches")
    if first.dim() == 0:
        return _scalars(parts, weights)
    if not all(len(part) == size for part, size in zip(parts, sizes, strict=True)):
        if _alike(parts):
            return first
        raise Unmergeable(
            f"its shapes, {list(first.shape)} and {list(parts[1].shape)}, do not go by the "
            f"{sizes[0]} and {sizes[1]} samples"
        )
    if not found[0].requires_grad and _alike(parts):  # a mask, or samples that are all equal
        raise Unmergeable(f"it is the same {list(first.shape)} in every micro-batch")
    try:
        return torch.cat(parts)
    except (RuntimeError, TypeError):
        raise Unmergeable("its rows differ in shape between micro-batches") from None


def _alike(parts: list[Tensor]) -> bool:
    return all(part.shape == parts[0].shape and torch.equal(part, parts[0]) for part in parts[1:])


def _scalars(parts: list[Tensor], weights: Sequence[float]) -> Tensor:
    kind = parts[0].dtype
    if kind == torch.bool:
        if len({bool(part) for part in parts}) > 1:
            raise Unmergeable("it is true in one micro-batch and false in another")
        return parts[0]
    if kind.is_floating_point or kind.is_complex:
        return _weighted(parts, weights)
    return torch.stack(parts).sum().to(kind)  # a count


def _weighted(parts: Sequence[Any], weights: Sequence[float]) -> Any:
    """Return the sum by weight; what weighs nothing may be no number, and is left out."""
    counted = [part * by for part, by in zip(parts, weights, strict=True) if by]
    return sum(counted[1:], start=counted[0])


def _plain(parts: Sequence[Any], sizes: Sequence[int], weights: Sequence[float]) -> Any:
    """Return numbers, words and other objects: a count, what is equal, or a mean."""
    first, kind = parts[0], type(parts[0])
    if kind is int and list(parts) == list(sizes):
        return sum(parts)
    try:
        equal = all(bool(part == first) for part in parts)
    except Exception:  # noqa: BLE001 - comparing may do anything
        equal = False
    if equal:
        return first
    if isinstance(first, float):
        return _weighted(parts, weights)
    raise Unmergeable(f"it is a {kind.__name__} that differs between micro-batches")


def _sequences(parts: Sequence[Any], sizes: Sequence[int], weights: Sequence[float]) -> Any:
    """Return lists joined that hold an item a sample, others merged item by item."""
    kind: Any = type(parts[0])
    lengths, alike = [len(part) for part in parts], len({len(part) for part in parts}) == 1
    if lengths == list(sizes) and (kind is list or not alike):
        if alike and any(_may_be_of_all(item, lengths[0]) for part in parts for item in part):
            raise Unmergeable(f"it holds {lengths[0]} values, as many as samples")
        return kind(item for part in parts for item in nested.map_leaves(part, _cut_off))
    if not alike:
        raise Unmergeable(f"it holds {lengths[0]} items and {lengths[1]}, of other samples")
    return kind(merge(each, sizes, weights) for each in zip(*parts, strict=True))


def _may_be_of_all(item: Any, n: int) -> bool:
    """Return whether an item could be of all `n` samples as well as of one: losses, outputs."""
    if isinstance(item, Tensor):
        return item.dim() == 0 or len(item) == n
    return isinstance(item, float)


def _cut_off(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _fields(parts: Sequence[Any], inner: Callable[[list[Any]], Any]) -> Any:
    """Return a dict, or a record such as a model's output, with each of its fields merged."""
    first = parts[0]
    whole = {} if type(first) is dict else copy.copy(first)
    if isinstance(first, Mapping):
        if any(list(part) != list(first) for part in parts):
            raise Unmergeable("it has other keys in each micro-batch")
        for key in first:
            whole[key] = _field(key, inner, [part[key] for part in parts])
        return whole
    for item in dataclasses.fields(first):
        values = [getattr(part, item.name) for part in parts]
        object.__setattr__(whole, item.name, _field(item.name, inner, values))  # frozen or not
    return whole


def _field(name: Any, inner: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    try:
        return inner(values)
    except Unmergeable as found:
        raise Unmergeable(f"of its {name}: {found}") from None


def merged(
    kept: Sequence[Mapping[str, Any]], sizes: Sequence[int], weights: Sequence[float]
) -> dict[str, Any]:
    """Return the named values of a step; those of a single micro-batch are the very objects.

    Raises:
        Unmergeable: it names the value.
    """
    first = dict(kept[0])
    if len(kept) == 1:
        return first
    whole: dict[str, Any] = {}
    for name in first:
        if not all(name in part for part in kept):
            raise Unmergeable(f"{name}: not every micro-batch has it")
        try:
            whole[name] = merge([part[name] for part in kept], sizes, weights)
        except Unmergeable as found:
            raise Unmergeable(f"{name}: {found}") from None
    return whole


def full_precision(value: Any, reduced: torch.dtype | None) -> Any:
    """Return a value with tensors of the `reduced` dtype, which autocast made, in float32: the
    person's own statements see what they would see without it. None: there is none such."""

    def of_it(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dtype == reduced

    if reduced is None or not any(map(of_it, nested.leaves(value))):
        return value
    return nested.map_leaves(value, lambda leaf: leaf.float() if of_it(leaf) else leaf)
