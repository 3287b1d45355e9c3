"""The ledger of one training step: which bytes of the device live when, and what is computed.

Every operation passes by (a TorchDispatchMode): tensors it makes are entered with their module, and
struck out when their memory is given back. Operations are counted by torch's own formulas. It works
on any device and asks no allocator; workspaces inside an operation are not seen. Slow: for single
steps. Knows no clock but the host's.
"""

from __future__ import annotations

import linecache
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import nested

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_UNCOUNTED = frozenset(  # recurrent layers in one operation, which torch has no formula for
    name + way
    for name in ("_cudnn_rnn", "miopen_rnn", "mkldnn_rnn_layer")
    for way in ("", "_backward")
)
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
_FOLDERS = os.path.dirname(os.path.dirname(__file__)), os.path.dirname(torch.__file__)
_OURS = tuple(os.path.join(folder, "") for folder in _FOLDERS)
_LEAST_SCORES = 64  # tokens from which a square softmax is taken for attention
_CUDA_BLOCK = 512  # bytes that CUDA's allocator rounds up to


@dataclass(slots=True)
class Entry:
    """A piece of the device's memory. `born` and `died` are moments (None: it lives on); `kind` is
    None until it is known what it was."""

    size: int
    born: int
    path: str | None
    kind: str | None = None
    died: int | None = None


@dataclass(slots=True)
class Copied:
    """A copy from host to device."""

    at: int
    pinned: bool
    marks: tuple[Any, Any]


@dataclass(slots=True)
class Read:
    """The host waited for the device's value."""

    at: int
    where: str
    seconds: float


class Ledger(TorchDispatchMode):
    """Enter it as a context for one step; moments are numbers that only grow.

    `entries` are the pieces of memory; `flops` hold (moment, path, precision, operations, whether
    of a convolution), `uncounted` (moment, path) of arithmetic that has no formula, `traffic`
    (moment, bytes), `attention` (moment, bytes, shape) of scores that were written out. `path` is
    of the module whose turn it is.
    """

    def __init__(self, device: torch.device, mark: Callable[[], Any]) -> None:
        """Count the memory of `device`; `mark` takes a moment of its time."""
        from torch.utils.flop_counter import flop_registry  # imports triton: 0.2 s, for few

        super().__init__()
        self._formulas = flop_registry
        self.entries: list[Entry] = []
        self.flops: list[tuple[int, str | None, str, int, bool]] = []
        self.uncounted: list[tuple[int, str | None]] = []
        self.traffic: list[tuple[int, int]] = []
        self.copies: list[Copied] = []
        self.reads: list[Read] = []
        self.attention: list[tuple[int, int, tuple[int, ...]]] = []
        self.path: str | None = None
        self.now = 0
        self._device, self._mark = device, mark
        self._known: dict[int, tuple[Entry, Any]] = {}

    def moment(self) -> int:
        """Return a new moment."""
        self.now += 1
        return self.now

    def note(self, tensors: Iterable[Any], kind: str) -> None:
        """Say what the memory of `tensors` is; what was not entered yet was there before."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and self._counts(tensor):
                self._entry(tensor, 0).kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        before = self._mark() if name in ("_to_copy", "copy_") else None
        began = time.perf_counter()
        out = func(*args, **kwargs)
        taken = time.perf_counter() - began
        self.now += 1
        given = list(_tensors((args, kwargs)))
        made = list(_tensors(out))
        for tensor in given:
            if self._counts(tensor):
                self._entry(tensor, 0)
        for tensor in made:
            if self._counts(tensor):
                self._entry(tensor, self.now)
        self._work(func, name, given, made, args, kwargs, out)
        self._crossing(name, given, made, before, taken)
        return out

    # -- memory --

    def _counts(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device.type and tensor.layout == torch.strided

    def _entry(self, tensor: Tensor, born: int) -> Entry:
        storage = tensor.untyped_storage()
        key = id(storage)
        found = self._known.get(key)
        if found is None:
            size = storage.nbytes()
            if self._device.type == "cuda":
                size = -(-size // _CUDA_BLOCK) * _CUDA_BLOCK
            entry = Entry(size, born, self.path if born else None)
            self.entries.append(entry)
            found = self._known[key] = entry, weakref.ref(storage, lambda _: self._died(key))
        return found[0]

    def _died(self, key: int) -> None:
        entry, _ = self._known.pop(key)
        entry.died = self.moment()

    def close(self) -> None:
        """Forget the tensors; what was written stays."""
        self._known.clear()

    # -- arithmetic and traffic --

    def _work(
        self, func: Any, name: str, given: Any, made: Any, args: Any, kwargs: Any, out: Any
    ) -> None:
        if not func._schema.is_mutable and _is_view(given, made):
            return
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        if not name.startswith("empty"):
            self.traffic.append((self.now, moved))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None and given:
            count = int(formula(*args, **kwargs, out_val=out))
            dtype = given[0].dtype  # the last one may be a scale, or a random seed
            precision = NAMES.get(dtype, str(dtype).removeprefix("torch."))
            self.flops.append((self.now, self.path, precision, count, "conv" in name))
        elif name in _UNCOUNTED:
            self.uncounted.append((self.now, self.path))
        if name == "_softmax" and made[0].dim() > 2:
            shape = tuple(made[0].shape)
            if shape[-1] == shape[-2] >= _LEAST_SCORES:
                size = made[0].numel() * made[0].element_size()
                self.attention.append((self.now, size, shape))

    # -- between host and device --

    def _crossing(self, name: str, given: Any, made: Any, before: Any, taken: float) -> None:
        waited = name in _READS and any(tensor.device.type == self._device.type for tensor in given)
        if waited or (
            name == "_to_copy" and given[0].device != made[0].device and not _is_host(given[0])
        ):
            self.reads.append(Read(self.now, _site(), taken))
        elif before is not None and _is_host(given[-1]) and not _is_host(made[0]):
            copied = Copied(self.now, given[-1].is_pinned(), (before, self._mark()))
            self.copies.append(copied)
            self.note(made, "input")


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in nested.leaves(tree) if isinstance(leaf, Tensor))


def _is_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _is_view(given: list[Tensor], made: list[Tensor]) -> bool:
    """Return whether an operation only looks at memory that was there."""
    if not made or not given:
        return False
    there = {id(tensor.untyped_storage()) for tensor in given if tensor.layout == torch.strided}
    return all(
        tensor.layout == torch.strided and id(tensor.untyped_storage()) in there for tensor in made
    )


def _site() -> str:
    """Return the person's line that an operation was called from: "line 4: total += loss.item()".

    Lines of torch and of this package are passed over; a file other than a cell is named.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "the step"
    path, number = frame.f_code.co_filename, frame.f_lineno
    said = linecache.getline(path, number, frame.f_globals).strip()
    name = os.path.basename(path)
    place = f"{name}, line {number}" if os.path.isfile(path) and name.endswith(".py") else ""
    in_cell = place if "ipykernel" not in path else ""
    return f"{in_cell or f'line {number}'}: {said}" if said else in_cell or f"line {number}"
