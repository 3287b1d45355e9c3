"""Batches of any nesting: how many samples they hold, a slice of them, their tensors on a device.

A batch is a tree of dicts, lists, tuples, namedtuples and dataclasses with tensors, arrays and
plain values at its leaves. Samples lie along the first dimension of every tensor that has one.
What is not understood is left whole; nothing here guesses. Knows no loader and no model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence


def map_leaves(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """Return `tree` rebuilt with `fn` applied to every leaf; the person's containers are kept."""
    if isinstance(tree, torch.Tensor):
        return fn(tree)
    return _rebuilt(tree, lambda part: map_leaves(part, fn), fn)


def _rebuilt(tree: Any, inner: Callable[[Any], Any], leaf: Callable[[Any], Any]) -> Any:
    """Return a container of the same kind with `inner` of every part, or `leaf` of what is none."""
    if isinstance(tree, list):
        return [inner(item) for item in tree]
    if isinstance(tree, tuple):
        items = [inner(item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, Mapping):
        if type(tree) is dict:
            return {key: inner(item) for key, item in tree.items()}
        clone: Any = copy.copy(tree)
        for key in tree:
            clone[key] = inner(tree[key])
        return clone
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        clone = copy.copy(tree)
        for name in _field_names(tree):
            object.__setattr__(clone, name, inner(getattr(tree, name)))  # frozen or not
        return clone
    return leaf(tree)


def _field_names(record: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(record)]


def leaves(tree: Any) -> Iterator[Any]:
    """Yield the leaves of `tree` in the order in which `map_leaves` visits them."""
    return (leaf for _, leaf in paths(tree))


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield (path, leaf) of every leaf; `at` finds it again in another batch of the same kind."""
    parts = _parts(tree)
    if parts is None:
        yield path, tree
        return
    for key, part in parts:
        yield from paths(part, (*path, key))


def _parts(tree: Any) -> Iterable[tuple[Any, Any]] | None:
    """Return (key, part) of what a container holds, None for a leaf."""
    if isinstance(tree, Mapping):
        return tree.items()
    if isinstance(tree, (list, tuple)):
        return enumerate(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return ((name, getattr(tree, name)) for name in _field_names(tree))
    return None


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """Return the leaf of `tree` at a path that `paths` gave."""
    for key in path:
        tree = tree[key] if isinstance(tree, (list, tuple, Mapping)) else getattr(tree, key)
    return tree


def joined(first: Any, *others: Any) -> Any:
    """Return batches of the same kind as one, None where they do not fit together."""
    if isinstance(first, Named):
        return first.whole()
    streams = [leaves(other) for other in others]

    def join(leaf: Any) -> Any:
        parts = [leaf, *(next(stream) for stream in streams)]
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return torch.cat(parts)
        if not all(part is leaf or _equal_plain(part, leaf) for part in parts):
            raise TypeError("values that differ between batches have no rows to be joined")
        return leaf

    try:
        return map_leaves(first, join)
    except (RuntimeError, StopIteration, TypeError):
        return None


def _equal_plain(one: Any, other: Any) -> bool:
    plain = (int, float, str, bool, bytes, type(None))
    return isinstance(one, plain) and isinstance(other, plain) and one == other


def is_plain(leaf: Any) -> bool:
    """Return whether this is a tensor in one piece of memory: neither sparse nor nested."""
    return isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_nested


def from_host(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return `tree` with `change` of its plain tensors on the host; all else stays as it is."""

    def at(leaf: Any) -> Any:
        return change(leaf) if is_plain(leaf) and leaf.device.type == "cpu" else leaf

    return _with_packed_whole(tree, at)


def to_device(tree: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """Return `tree` with its tensors, and objects that have a `.to`, on `device` (non-blocking)."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return tensor_to(leaf, device, channels_last=channels_last)
        mover = getattr(leaf, "to", None)
        if isinstance(leaf, PackedSequence) and mover:  # leaves its batch_sizes on the host
            return mover(device, non_blocking=True)
        return mover(device) if callable(mover) else leaf

    return _with_packed_whole(tree, move)


def tensor_to(
    tensor: torch.Tensor, device: torch.device, *, channels_last: bool = False
) -> torch.Tensor:
    """Return `tensor` on `device` (non-blocking), images with their channels last if asked to."""
    if channels_last and tensor.dim() == 4 and is_plain(tensor):
        return tensor.to(device, non_blocking=True, memory_format=torch.channels_last)
    return tensor.to(device, non_blocking=True)


def _with_packed_whole(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """Return what `map_leaves` does, but for packed sequences, which are leaves of their own."""
    if isinstance(tree, (torch.Tensor, PackedSequence)):
        return fn(tree)
    return _rebuilt(tree, lambda part: _with_packed_whole(part, fn), fn)


def count(batch: Any) -> int | None:
    """Return how many samples `batch` holds, None when it cannot be cut between samples.

    Every tensor (or array) with a dimension must agree on the first one. A pair of equally long
    lists of per-sample items, as `tuple(zip(*samples))` collates, holds their length.
    """
    if type(batch) in (list, tuple) and len(batch) == 2:  # (x, y) as most loaders yield it
        x, y = batch
        if type(x) is type(y) is torch.Tensor and x.dim() and y.dim():
            n = x.size(0)
            if n == y.size(0):
                return n
    if isinstance(batch, Named):
        return batch.size
    sizes = {leaf.shape[0] for leaf in leaves(batch) if _has_rows(leaf)}
    if len(sizes) == 1 and not _per_sample(batch, sizes):
        return None if _holds_packed(batch) else sizes.pop()
    columns = _columns(batch)
    return len(columns[0]) if columns else None


def _holds_packed(tree: Any) -> bool:
    """Return whether a packed sequence is in `tree`, whose rows are steps in time."""
    held = isinstance(tree, PackedSequence)
    return held or any(_holds_packed(part) for _, part in _parts(tree) or ())


def rows(batch: Any, start: int, stop: int) -> Any:
    """Return samples `start` to `stop` of a batch that `count` could count; tensors are views."""
    if isinstance(batch, Named):
        return batch.rows(start, stop)
    columns = _columns(batch)
    n = count(batch)
    if columns and _per_sample(batch, {leaf.shape[0] for leaf in leaves(batch) if _has_rows(leaf)}):
        return type(batch)(column[start:stop] for column in batch)
    return _rows(batch, n, start, stop)


def _rows(tree: Any, n: int | None, start: int, stop: int) -> Any:
    plain = isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields")
    if plain and len(tree) == n and not any(map(_has_rows, leaves(tree))):
        return tree[start:stop]  # one plain value a sample: strings, ids
    return _rebuilt(
        tree,
        lambda part: _rows(part, n, start, stop),
        lambda leaf: leaf[start:stop] if _has_rows(leaf) else leaf,
    )


def _has_rows(leaf: Any) -> bool:
    shape = getattr(leaf, "shape", None)
    return shape is not None and len(shape) > 0 and hasattr(leaf, "__getitem__")


def _columns(batch: Any) -> list[Any] | None:
    """Return the equally long lists that make up `batch`, None when it is not made of such."""
    if type(batch) not in (list, tuple) or not batch:
        return None
    if not all(type(column) in (list, tuple) and column for column in batch):
        return None
    return list(batch) if len({len(column) for column in batch}) == 1 else None


def _per_sample(batch: Any, sizes: set[int]) -> bool:
    """Return whether `batch` is columns of per-sample items rather than tensors over samples."""
    columns = _columns(batch)
    return columns is not None and sizes != {len(columns[0])}


class Named(dict[str, Any]):
    """The values of a step by name, or those of some of its samples.

    `size` is how many samples they hold, None where they cannot be cut; `cut` names what has a row
    (True) or an item of a list (False) for each of them. The others are whole in every cut.
    """

    def __init__(self, values: Mapping[str, Any], size: int | None, cut: dict[str, bool]) -> None:
        super().__init__(values)
        self.size, self.cut = size, cut
        self._all: Named = self

    def rows(self, start: int, stop: int) -> Named:
        """Return samples `start` to `stop`."""
        if (start, stop) == (0, self.size):
            return self
        part = Named(self, stop - start, self.cut)
        part._all = self._all
        for name, by_rows in self.cut.items():
            part[name] = rows(self[name], start, stop) if by_rows else self[name][start:stop]
        return part

    def whole(self) -> Named:
        """Return what these samples are a part of."""
        return self._all


def named(values: Mapping[str, Any], hint: int | None, uncut: Collection[str]) -> Named:
    """Return `values` as a batch that can be cut where it is clear how.

    Args:
        hint: how many samples the batch has as it was loaded, None where that is not known.
        uncut: names that are not to be cut.
    """
    found = {name: _lengths(value) for name, value in values.items() if name not in uncut}
    votes = Counter(n for lengths in found.values() for n in dict.fromkeys(lengths) if n)
    n = hint if hint in votes else max(votes, key=votes.__getitem__, default=None)
    both = any(lengths == (n, n) for lengths in found.values())
    if not n or both:  # a list of n tensors of n rows: there is no telling
        return Named(values, None, {})
    return Named(values, n, {name: of[0] == n for name, of in found.items() if n in of})


def _lengths(value: Any) -> tuple[int | None, int | None]:
    """Return how many rows and how many items there are, None for none."""
    if type(value) is torch.Tensor:  # as nearly always
        return (value.shape[0] if value.dim() else None), None
    if isinstance(value, (torch.nn.Parameter, torch.nn.Module)):
        return None, None
    return count(value), len(value) if type(value) in (list, tuple) else None
