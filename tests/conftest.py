"""What every test stands on: marks that skip with a reason, and a steady hypothesis."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal

import pytest
from hypothesis import settings

# Before torch is loaded: tensors this small gain nothing from a second thread, and on a busy
# machine every operation waits for it (18 times as long, seen). Kernels that we start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with interrupts ignored, and their children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared two-core machine stalls now and then: a deadline would fail tests for the machine's sake.
settings.register_profile("house", deadline=None, print_blob=True)
settings.load_profile("house")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium for tests marked `browser`."""
    path = find_browser()
    assert path is not None, "a test that asks for `chromium` must be marked `browser`"
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted = {
        name: [item for item in items if name in item.keywords] for name in ("gpu", "browser")
    }
    missing = {
        "gpu": wanted["gpu"] and why_no_gpu(),
        "browser": wanted["browser"] and why_no_browser(),
    }
    for name, reason in missing.items():
        for item in wanted[name] if reason else ():
            item.add_marker(pytest.mark.skip(reason=reason))


def why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def why_no_browser() -> str | None:
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    return None if find_browser() else f"none of {', '.join(BROWSERS)} is installed"


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every collection to come: torch is a third of a second of
    it, and running out of memory collects each time."""
    gc.collect()
    gc.freeze()
