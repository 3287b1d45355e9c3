"""The random generators that training draws from: kept, put back, seeded.

Python's, NumPy's (when it is loaded), torch's on the host and on the device that trains. Generators
that a person made for themselves are theirs.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

WATCHED = 8  # first steps, watched for draws from Python's and NumPy's generators
WATCH_EVERY = 64  # of the later ones; once a step was seen to draw, every step is kept


class RandomState:
    """The state of every generator, to be put back."""

    def __init__(self, device: torch.device) -> None:
        self._tensors = TensorRandom(device)
        self._host = _host_state()

    def put_back(self) -> None:
        self._tensors.put_back()
        _set_host_state(self._host)


class TensorRandom:
    """The state of torch's generators, on the host and on one device; no device is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._accelerator = None
        self.take()

    def take(self) -> None:
        self._torch = torch.default_generator.get_state()
        kind = self._device.type
        if kind == "cuda":
            self._accelerator = torch.cuda.get_rng_state(self._device)
        elif kind == "mps":
            self._accelerator = torch.mps.get_rng_state()

    def put_back(self) -> None:
        torch.set_rng_state(self._torch)
        if self._accelerator is None:
            return
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._accelerator, self._device)
        else:
            torch.mps.set_rng_state(self._accelerator)


class StepRandom:
    """What a step may draw from, as it was at its start.

    Reading Python's and NumPy's generators takes as long as a small step. They are read for steps
    like those that were seen to draw from them: the first ones are watched, then one in 64.
    """

    def __init__(self, device: torch.device) -> None:
        self._tensors = TensorRandom(device)
        self.draws = False  # a step was seen to draw from Python's or NumPy's
        self._host: Any = None

    def take(self, number: int) -> None:
        self._tensors.take()
        read = self.draws or number < WATCHED or number % WATCH_EVERY == 0
        self._host = _host_state() if read else None

    def done(self) -> None:
        """The step that `take` began is over: see whether it drew."""
        if self._host is not None and not self.draws:
            self.draws = not _same(self._host, _host_state())

    def put_back(self) -> None:
        self._tensors.put_back()
        if self._host is not None:
            _set_host_state(self._host)


def _host_state() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_host_state(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


def _same(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    if one[0] != other[0] or (one[1] is None) != (other[1] is None):
        return False
    return one[1] is None or all(
        bool((a == b).all()) if hasattr(a, "all") else a == b
        for a, b in zip(one[1], other[1], strict=True)
    )


class Boundary:
    """The random states between two steps, looked at before each: Python's and NumPy's as seldom as
    `StepRandom` does, while nothing is seen to draw from them."""

    def __init__(self, generators: Sequence[Any]) -> None:
        self._generators = generators
        self._looked, self._draws = 0, False
        self._host: Any = None

    def states(self) -> dict[str, Any]:
        """Return what `all_states` does."""
        number, self._looked = self._looked, self._looked + 1
        if self._draws or number < WATCHED or number % WATCH_EVERY == 0:
            found, self._host = self._host, _host_state()
            self._draws |= found is not None and not _same(found, self._host)
        return all_states(self._generators, self._host)


def all_states(generators: Sequence[Any], host: Any = None) -> dict[str, Any]:
    """Return the state of every generator that is in use, and of `generators`, as plain values;
    `host`: Python's and NumPy's, where they are known."""
    cuda = torch.cuda.is_initialized()
    return {
        "host": host or _host_state(),
        "torch": torch.default_generator.get_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "own": [generator.get_state() for generator in generators],
    }


def put_all_back(states: dict[str, Any], generators: Sequence[Any]) -> None:
    """Give every generator its state of `all_states`, also where that went through a file."""
    python, numpy = states["host"]
    random.setstate(python)
    if numpy is not None:
        np = importlib.import_module("numpy")
        np.random.set_state((numpy[0], np.asarray(numpy[1], dtype=np.uint32), *numpy[2:]))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_initialized():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
    for generator, state in zip(generators, states["own"], strict=True):
        generator.set_state(state)


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
