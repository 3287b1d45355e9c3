"""What training changes of the person's things, and puts back on every way out.

Device of model, optimizer state and criterion; train/eval modes; memory format; gradients; TF32
switches; the interrupt handler. Knows no policy and no record.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .precision import Precision


@contextlib.contextmanager
def prepared(
    model: nn.Module,
    optimizer: Any,
    criterion: Any,
    device: torch.device,
) -> Iterator[None]:
    """Have `model` in train mode on `device` without gradients, and everything as found afterwards.

    A model in train mode keeps the layers that the person put into eval mode (frozen BatchNorm).
    """
    home = next(model.parameters()).device
    try:
        with modes_kept(model):
            _move(model, optimizer, criterion, device)
            if not model.training:
                model.train()
            _clear_gradients(model)
            yield
    finally:
        _clear_gradients(model)
        if hasattr(optimizer, "found_inf"):
            del optimizer.found_inf
        _move(model, optimizer, criterion, home)


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every layer back into the train or eval mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _clear_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _move(model: nn.Module, optimizer: Any, criterion: Any, device: torch.device) -> None:
    if next(model.parameters()).device == device:
        return
    model.to(device)
    if isinstance(criterion, nn.Module):
        criterion.to(device)
    for state in optimizer.state.values():
        for name, value in state.items():
            # Adam's step count stays on the host unless it was on the device before
            if isinstance(value, torch.Tensor) and (value.dim() > 0 or value.device.type != "cpu"):
                state[name] = value.to(device)


@contextlib.contextmanager
def fast_formats(model: nn.Module, precision: Precision, device: torch.device) -> Iterator[bool]:
    """Use channels_last for convolutions, TF32 for the rest, on tensor cores; yield whether so.

    Only in mixed precision: FP32 computes exactly as the plain loop does.
    """
    if (
        device.type != "cuda"
        or not precision.mixed
        or torch.cuda.get_device_capability(device)[0] < 7
    ):
        yield False
        return
    convolutions = any(parameter.dim() == 4 for parameter in model.parameters())
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        if convolutions:
            _set_format(model, torch.channels_last)
        yield convolutions
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
        if convolutions:
            _set_format(model, torch.contiguous_format)


def _set_format(model: nn.Module, memory_format: Any) -> None:
    for tensor in model.parameters():
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


class Interrupts:
    """Holds the first Ctrl-C back until the step in hand is whole, and no second one."""

    def __init__(self) -> None:
        self.hit = False
        self._at_once = False
        self._found: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._found = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._found is not None:
            signal.signal(signal.SIGINT, self._found)

    def _note(self, *_: Any) -> None:
        if self.hit or self._at_once:
            raise KeyboardInterrupt
        self.hit = True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Hold nothing back: for work that leaves no half-made step."""
        if self.hit:
            raise KeyboardInterrupt
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


class RandomState:
    """The state of every random generator that a step may draw from, to be put back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._accelerator = None
        if device.type == "cuda":
            self._accelerator = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            self._accelerator = torch.mps.get_rng_state()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    def put_back(self) -> None:
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._device.type == "cuda" and self._accelerator is not None:
            torch.cuda.set_rng_state(self._accelerator, self._device)
        elif self._device.type == "mps" and self._accelerator is not None:
            torch.mps.set_rng_state(self._accelerator)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


@contextlib.contextmanager
def random_state_kept_on_error() -> Iterator[None]:
    """Put the host's random generators back when what is done here is refused or interrupted."""
    found = RandomState(torch.device("cpu"))
    try:
        yield
    except BaseException:
        found.put_back()
        raise


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy (when it is loaded) and torch on every device."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.manual_seed(seed)
