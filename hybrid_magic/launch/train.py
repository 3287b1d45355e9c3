"""train(): in this process, or with `processes=N` in N new ones of this machine."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

from ..engine.train import train as train_here
from ..run import Run

_SIGNATURE = inspect.signature(train_here)


@functools.wraps(train_here)
def train(*args: Any, **keywords: Any) -> Run:
    __tracebackhide__ = True
    if keywords.get("processes", 1) in (1, "1") or _in_a_worker():
        return train_here(*args, **keywords)
    from .start import train_in_processes

    bound = _SIGNATURE.bind(*args, **keywords)
    bound.apply_defaults()
    things = dict(bound.arguments)
    return train_in_processes(things, things.pop("sink"), things.pop("control"))


def _in_a_worker() -> bool:
    """Return whether torchrun has started this process: there are as many as there shall be."""
    return "TORCHELASTIC_RUN_ID" in os.environ  # others set RANK by hand
