"""What training changes of the person's things, and puts back on every way out.

Device of model, optimizer state and criterion; train/eval modes; memory format; gradients; torch's
switches (gradients on, autocast, TF32); the interrupt handler. Knows no policy and no record.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .placement import move
from .precision import Precision
from .undo import Undo


def prepare(
    undo: Undo, model: nn.Module, optimizer: Any, criterion: Any, device: torch.device
) -> None:
    """Have `model` in train mode on `device` without gradients; `undo` puts everything back.

    A model in train mode keeps the layers that the person put into eval mode (frozen BatchNorm).
    """
    home = next(model.parameters()).device
    put_modes_back, put_switches_back = _modes(model), switches(device.type)

    def put_back() -> None:
        put_switches_back()
        _clear_gradients(model)
        put_modes_back()
        if hasattr(optimizer, "found_inf"):
            del optimizer.found_inf
        move(model, optimizer, criterion, home)

    undo.push(put_back)
    move(model, optimizer, criterion, device)
    if not model.training:
        model.train()
    _clear_gradients(model)


def switches(kind: str) -> Callable[[], None]:
    """Return what puts torch's switches for a kind of device back to where they are now: an
    interrupt may cut torch's own putting back short."""
    gradients, cast = torch.is_grad_enabled(), torch.amp.is_autocast_available(kind)
    casting = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) if cast else None
    depth = _autocast_depth()

    def put_back() -> None:
        torch.set_grad_enabled(gradients)
        if casting is not None:
            torch.set_autocast_enabled(kind, casting[0])
            torch.set_autocast_dtype(kind, casting[1])
        while _autocast_depth() > depth:
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()  # else a later run would compute with weights of this one

    return put_back


def _autocast_depth() -> int:
    """Return how many autocast contexts are entered."""
    # on one line: an interrupt between the two would enter one
    return (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())[1]


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every layer back into the train or eval mode that it was in."""
    put_back = _modes(model)
    try:
        yield
    finally:
        put_back()


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back what every layer holds beside its tensors: its mode, and what a forward pass leaves
    there, such as a hidden state."""
    put_back = attributes(model)
    try:
        yield
    finally:
        put_back()


def attributes(model: nn.Module) -> Callable[[], None]:
    """Return what gives every layer the attributes that it has now."""
    found = [(module, dict(module.__dict__)) for module in model.modules()]

    def put_back() -> None:
        for module, held in found:
            now = module.__dict__
            for name in now.keys() - held.keys():
                del now[name]
            now.update((name, value) for name, value in held.items() if now.get(name) is not value)

    return put_back


def _modes(model: nn.Module) -> Callable[[], None]:
    """Return what puts every layer back into the train or eval mode that it is in now."""
    modes = [(module, module.training) for module in model.modules()]

    def put_back() -> None:
        for module, training in modes:
            module.training = training

    return put_back


def _clear_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def use_fast_formats(
    undo: Undo, model: nn.Module, precision: Precision, device: torch.device
) -> bool:
    """Use channels_last for convolutions, TF32 for the rest, on tensor cores; return whether so.

    Only in mixed precision: FP32 computes exactly as the plain loop does.
    """
    if (
        device.type != "cuda"
        or not precision.mixed
        or torch.cuda.get_device_capability(device)[0] < 7
    ):
        return False
    convolutions = any(parameter.dim() == 4 for parameter in model.parameters())
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def put_back() -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
        if convolutions:
            _set_format(model, torch.contiguous_format)

    undo.push(put_back)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if convolutions:
        _set_format(model, torch.channels_last)
    return convolutions


def _set_format(model: nn.Module, memory_format: Any) -> None:
    for tensor in model.parameters():
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


class Interrupts:
    """Holds a Ctrl-C back until the step in hand is whole; a second one ends the step at once.

    `at_once` holds nothing back: for waiting and for work that leaves no half-made step. Once the
    run is `ending` nothing interrupts it any more.
    """

    def __init__(self) -> None:
        self.hit = self.at_once = self.ending = False
        self._found: Any = None

    def catch(self, undo: Undo) -> None:
        """Take the interrupts of the main thread; `undo` gives them back."""
        if threading.current_thread() is threading.main_thread():
            self._found = signal.getsignal(signal.SIGINT)
            undo.push(self._let_go)
            signal.signal(signal.SIGINT, self._note)

    def _let_go(self) -> None:
        signal.signal(signal.SIGINT, self._found)

    def _note(self, *_: Any) -> None:
        at_once = (self.hit or self.at_once) and not self.ending
        self.hit = True
        if at_once:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold back a second one, too: for a moment's work that cannot be taken back."""
        found, self.ending = self.ending, True
        try:
            yield
        finally:
            self.ending = found

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Hold nothing back in this stretch."""
        if self.hit:
            raise KeyboardInterrupt
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False
