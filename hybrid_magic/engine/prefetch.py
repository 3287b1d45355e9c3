"""Micro-batches on their way to the device, the next one copied while this one computes.

On a GPU the copy runs on one side stream for the whole run; the computing stream waits for it, and
the memory is marked as in use there, so that it is not given away too early. Only tensors that lie
on the host go that way: what memory the person's own objects take cannot be marked, and tensors on
the device may be still to be computed. Copies from pinned memory overlap, others do not. Knows no
loader and draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from . import nested
from .data import StepData
from .device import attempt


class Mover:
    """Copies to a device on its only stream."""

    def __init__(self, device: torch.device, *, channels_last: bool = False) -> None:
        self._device, self._channels_last = device, channels_last

    def copying(self) -> AbstractContextManager[Any]:
        """Return the context in which copies run."""
        return nullcontext()

    def send(self, batch: Any) -> Any:
        """Begin to copy a host batch and return it, for `receive`."""
        return nested.to_device(batch, self._device, channels_last=self._channels_last)

    def receive(self, moved: Any) -> Any:
        """Return what `send` returned, ready to be computed on."""
        return moved

    def __call__(self, batch: Any) -> Any:
        return self.receive(self.send(batch))


class SideStreamMover(Mover):
    """Copies to a CUDA device on a stream of its own."""

    def __init__(self, device: torch.device, *, channels_last: bool = False) -> None:
        super().__init__(device, channels_last=channels_last)
        self._stream = torch.cuda.Stream(device)

    def copying(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def send(self, batch: Any) -> Any:
        with self.copying():
            return nested.from_host(batch, self._moved)

    def receive(self, moved: Any) -> Any:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for leaf in nested.leaves(moved):
            if nested.is_plain(leaf) and leaf.is_cuda:
                leaf.record_stream(computing)
        return nested.to_device(moved, self._device, channels_last=self._channels_last)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return nested.tensor_to(tensor, self._device, channels_last=self._channels_last)


def mover_for(device: torch.device, *, channels_last: bool = False) -> Mover | None:
    """Return the mover to `device`, None where batches are there already."""
    if device.type == "cpu":
        return None
    kind = SideStreamMover if device.type == "cuda" else Mover
    return kind(device, channels_last=channels_last)


def one_step_ahead(steps: Iterable[StepData], mover: Mover) -> Iterator[StepData]:
    """Yield `steps`, each after the next one was drawn and its first micro-batch sent.

    Only for a feed that draws no random numbers as it goes on, so that nothing is drawn in another
    order than the plain loop's.
    """
    held: StepData | None = None
    for step in steps:
        if step.batches:
            step.coming, _ = attempt(mover.send, step.batches[0])  # no room yet: sent in its step
        if held is not None:
            yield held
        held = step
    if held is not None:
        yield held
