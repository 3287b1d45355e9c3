"""A tree of plain values and tensors, its copy on the host, and how large its file will be.

Knows no file and no training. What a checkpoint can hold is decided here: what `weights_only=True`
reads back, so nothing whose reading would run code.
"""

from __future__ import annotations

import codecs
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import HybridMagicError

_ATOMS: tuple[type[Any], ...] = (bool, int, float, complex, str, bytes, bytearray)
# What older torch does not read by itself, though it writes it.
torch.serialization.add_safe_globals([set, complex, codecs.encode])
_AS_THEY_ARE = (type(None), torch.dtype, torch.device, torch.Size)


class Copies:
    """A copy of a tree on the host, whose memory the next copy uses again."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Any, Tensor]] = []  # (what it fits, the memory)
        self._used = 0

    def take(self, tree: Any) -> Any:
        """Return a copy of `tree` as it is now; the one that was taken before is written over.

        Args:
            tree: numbers, text, tensors of any device and NumPy arrays, in dicts, lists, tuples and
                sets. A tensor that occurs twice is copied once.
        Returns:
            The same with every tensor on the host (pinned if it came from CUDA), arrays as tensors
            and NumPy's numbers as Python's, so that `weights_only=True` reads it. Its tensors are
            this object's until the next `take`.
        Raises:
            HybridMagicError: something else is in the tree; its place is named.
        """
        self._used = 0
        seen: dict[Any, tuple[Tensor, Tensor]] = {}
        devices: set[torch.device] = set()

        def copied(tensor: Tensor) -> Tensor:
            if tensor.layout != torch.strided:
                return tensor.to("cpu", copy=True)
            place = _place(tensor)
            if place not in seen:
                copy = self._buffer(tensor).copy_(tensor, non_blocking=tensor.is_cuda)
                seen[place] = tensor, copy  # the tensor too: nothing else may come to its place
                if tensor.is_cuda:
                    devices.add(tensor.device)
            return seen[place][1]

        with torch.no_grad():
            copy = _walked(tree, "checkpoint", copied)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        del self._buffers[self._used :]
        return copy

    def _buffer(self, tensor: Tensor) -> Tensor:
        fits = (tensor.is_cuda, tensor.dtype, tensor.shape, tensor.stride())
        at, self._used = self._used, self._used + 1
        if at == len(self._buffers) or self._buffers[at][0] != fits:
            self._buffers[at:] = []  # what comes after would hardly fit either
            self._buffers.append((fits, _memory_like(tensor)))
        return self._buffers[at][1]


def _memory_like(tensor: Tensor) -> Tensor:
    if tensor.is_cuda:
        try:
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError:  # no more memory can be pinned: the copy is slower, and no less right
            pass
    return torch.empty_like(tensor, device="cpu")


def _place(tensor: Tensor) -> Any:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def size_bytes(tree: Any) -> int:
    """Return about how many bytes the file of `tree` will have, rather too many than too few.

    Raises:
        HybridMagicError: something is in the tree that no checkpoint can hold; its place is named.
    """
    seen: dict[Any, Tensor] = {}

    def counted(tensor: Tensor) -> None:
        seen[_place(tensor) if tensor.layout == torch.strided else id(tensor)] = tensor

    total = 2**16 + len(pickle.dumps(_walked(tree, "checkpoint", counted)))
    for tensor in seen.values():
        sparse = tensor.layout != torch.strided  # values, and an index for each dimension
        each = tensor.element_size() + (8 * tensor.dim() if sparse else 0)
        total += (tensor._nnz() if sparse else tensor.numel()) * each + 1024
    return total


def _walked(value: Any, where: str, tensors: Callable[[Tensor], Any]) -> Any:
    """Return `value` made plain, with what `tensors` gives for each tensor in it."""

    def into(inner: Any, key: Any) -> Any:
        return _walked(inner, f"{where}[{key!r}]", tensors)

    if isinstance(value, Tensor):
        return tensors(_plain_tensor(value, where))
    if type(value).__module__ == "numpy":
        made = _without_numpy(value)
        if made is not None:
            return _walked(made, where, tensors)
    if isinstance(value, _AS_THEY_ARE):
        return value
    for kind in _ATOMS:
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, dict):
        made = {into(key, key): into(inner, key) for key, inner in value.items()}
        if isinstance(value, OrderedDict):
            made = OrderedDict(made)
            if hasattr(value, "_metadata"):  # a module's state_dict: the versions of its parts
                made.__dict__["_metadata"] = into(value.__dict__["_metadata"], "_metadata")
        return made
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(into(inner, number) for number, inner in enumerate(value))
    raise HybridMagicError(
        f"{where} is a {type(value).__name__}; wanted numbers, text, tensors, lists and dicts, "
        "which can be read back without running code; leave it out of the state_dict()"
    )


def _plain_tensor(tensor: Tensor, where: str) -> Tensor:
    plain = tensor.detach()
    if type(plain) is not Tensor or plain.is_meta:
        kind = "meta tensor, without values" if plain.is_meta else type(plain).__name__
        raise HybridMagicError(
            f"{where} is a {kind}; wanted a plain tensor; train without a checkpoint, or make it "
            "one in the state_dict()"
        )
    return plain


def _without_numpy(value: Any) -> Any:
    """Return a tensor for an array and a Python number for NumPy's, None for what is neither."""
    if not hasattr(value, "dtype") or value.dtype.hasobject:
        return None
    if getattr(value, "ndim", 0) == 0:
        return value.item()
    if value.dtype.kind == "u" and value.dtype.itemsize > 1:  # older torch cannot save these
        return value.tolist() if value.dtype.itemsize > 4 else torch.tensor(value.astype("int64"))
    try:
        return torch.tensor(value)
    except TypeError:  # texts, dates: torch has no such dtype
        return value.tolist()
