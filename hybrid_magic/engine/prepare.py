"""What training changes of the person's things, and puts back on every way out.

Device of model, optimizer state and criterion; train/eval modes; memory format; gradients; torch's
switches (gradients on, autocast, TF32); the interrupt handler. Knows no policy and no record.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .placement import move
from .undo import Undo
from .views import asks_for_views


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
    undo: Undo, model: nn.Module, optimizer: Any, ready: Any, device: torch.device
) -> bool:
    """Use channels_last for convolutions, TF32 for the rest, on tensor cores; return whether there
    are convolutions, and nobody asks for views of what they compute.

    Only in mixed precision: FP32 computes exactly as the plain loop does. An open step is to be
    taken back before `undo` puts the formats back: its copies go to where the weights are now.

    Args:
        ready: the run's StepState; it is told how to lay the weights out plainly again.
    """
    if (
        device.type != "cuda"
        or not ready.precision.mixed
        or torch.cuda.get_device_capability(device)[0] < 7
    ):
        return False
    images = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    if images and asks_for_views(model, ready.compute):
        images = []
    # what is laid out in a way of its own stays so
    changed = [weight for weight in images if weight.is_contiguous()]
    ready.lay_out_plainly = lambda: _set_format(changed, optimizer, torch.contiguous_format)
    undo.push(ready.lay_out_plainly)
    undo.push(_tf32_kept())
    _use_tf32()
    _set_format(changed, optimizer, torch.channels_last)
    return bool(images)


def _set_format(weights: Sequence[nn.Parameter], optimizer: Any, memory_format: Any) -> None:
    """Lay out weights, and what the optimizer keeps of their shape: fused ones refuse to mix."""
    for weight in weights:
        state = optimizer.state.get(weight, {}).values()
        same = [x for x in state if isinstance(x, torch.Tensor) and x.shape == weight.shape]
        for tensor in (weight, *same):
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


def tf32_places() -> tuple[Any, ...]:
    """Return where torch holds an `fp32_precision` of its own; older ones hold none."""
    cudnn = torch.backends.cudnn
    places = (torch.backends.cuda.matmul, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None))
    return tuple(place for place in places if hasattr(place, "fp32_precision"))


def _tf32_flags() -> list[tuple[Any, bool]] | None:
    """Return (place, allow_tf32), None where the person has set an `fp32_precision`: torch then
    refuses to tell the flags."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    try:
        return [(place, place.allow_tf32) for place in places]
    except RuntimeError:
        return None


def _use_tf32() -> None:
    """Allow TF32 in the way that the person does, if they do."""
    flags = _tf32_flags()
    if flags is None:
        for place in tf32_places():
            place.fp32_precision = "tf32"
    for place, allowed in flags or ():
        if not allowed:
            place.allow_tf32 = True


def _tf32_kept() -> Callable[[], None]:
    """Return what puts torch's switches for TF32 back to where they are now."""
    flags = _tf32_flags()
    found = [(place, place.fp32_precision) for place in tf32_places()]

    def put_back() -> None:
        for place, allowed in flags or ():
            if not allowed:
                place.allow_tf32 = False
        for place, precision in found:
            if place.fp32_precision != precision:
                place.fp32_precision = precision

    return put_back


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
