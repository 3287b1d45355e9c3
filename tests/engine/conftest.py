"""Training on a device that is simulated."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from hybrid_magic.engine import setup as setups
from hybrid_magic.engine import train as training


@pytest.fixture(autouse=True)
def _little_to_collect() -> Iterator[None]:
    """What earlier tests left and imported is not gone through again at each fault of this one."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function: on(probe, mover) -> probe; what trains from then on trains there."""

    def put(probe: Any, mover: Any = None) -> Any:
        monkeypatch.setattr(training, "probe_for", lambda device: probe)
        monkeypatch.setattr(setups, "mover_for", lambda device, channels_last=False: mover)
        return probe

    return put
