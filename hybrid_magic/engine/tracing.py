"""Two steps as a torch.profiler trace, and the allocator's history of one, written to files.

A trace is kept small enough for a browser: above the limit its shortest events are left out, and
that is said. Files are written whole or not at all.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import ConfigError, HybridMagicError

STEPS = 2
MOST_BYTES = 100_000_000  # of a trace before it is packed: a tab of a browser bears that
_ENDINGS = (".json", ".json.gz")


def check(trace: str | None, snapshot: str | None, device: torch.device) -> None:
    """Refuse what cannot be written before anything is run.

    Raises:
        HybridMagicError: found, wanted, do.
    """
    if trace is not None and not trace.endswith(_ENDINGS):
        raise ConfigError(
            f"--trace {trace} ends in neither {_ENDINGS[0]} nor {_ENDINGS[1]}; wanted one of them, "
            "which trace viewers open; use trace.json.gz"
        )
    if snapshot is not None and device.type != "cuda":
        raise HybridMagicError(
            f"--snapshot is a history of the CUDA allocator, and the run is on {device.type}; "
            "wanted a CUDA device; leave it out: the table shows memory by kind here, too"
        )
    for flag, path in (("--trace", trace), ("--snapshot", snapshot)):
        folder = os.path.dirname(os.path.abspath(path)) if path is not None else None
        if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise HybridMagicError(
                f"{flag} {path}: {folder} is no folder that can be written to; wanted one; make "
                "it, or name another"
            )


class Tracer:
    """Told where each traced step begins and ends; `note` says what was left out, if anything."""

    def __init__(self, path: str, *, device_too: bool) -> None:
        self.note: str | None = None
        self._path, self._device_too = path, device_too
        self._profiler: Any = None
        self._left = STEPS

    def __call__(self, begins: bool) -> None:
        if begins and self._profiler is None:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self._device_too:
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()
        elif not begins:
            self._left -= 1
            if self._left == 0:
                self._write()

    def _write(self) -> None:
        self._profiler.stop()
        folder = os.path.dirname(os.path.abspath(self._path))
        with tempfile.TemporaryDirectory(dir=folder) as room:
            raw = os.path.join(room, "trace.json")
            self._profiler.export_chrome_trace(raw)
            if os.path.getsize(raw) > MOST_BYTES:
                self._shorten(raw)
            done = raw
            if self._path.endswith(".gz"):
                done = raw + ".gz"
                with open(raw, "rb") as source, gzip.open(done, "wb") as target:
                    while piece := source.read(1 << 20):
                        target.write(piece)
            os.replace(done, self._path)
        self._profiler = None

    def _shorten(self, path: str) -> None:
        """Leave out the shortest events, so many that the rest is small enough."""
        size = os.path.getsize(path)
        with open(path, encoding="utf-8") as file:
            trace = json.load(file)
        events = trace["traceEvents"]
        kept = max(1, int(0.9 * len(events) * MOST_BYTES / size))
        lengths = sorted((event.get("dur", float("inf")) for event in events), reverse=True)
        shortest = lengths[min(kept, len(lengths) - 1)]
        trace["traceEvents"] = [e for e in events if e.get("dur", float("inf")) > shortest]
        left_out = len(events) - len(trace["traceEvents"])
        with open(path, "w", encoding="utf-8") as file:
            json.dump(trace, file)
        self.note = (
            f"{left_out:,} of {len(events):,} events, those of {shortest:g} us and shorter, were "
            f"left out of {self._path}: the whole trace has {size / 1e6:.0f} MB"
        )

    def close(self) -> None:
        """End a trace that is open, without a file."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Have what the CUDA allocator does recorded, whatever ends it."""
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def write_snapshot(path: str) -> None:
    """Write what was recorded, for https://pytorch.org/memory_viz."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path))) as room:
        made = os.path.join(room, "snapshot.pickle")
        torch.cuda.memory._dump_snapshot(made)
        os.replace(made, path)
