"""How the benchmarks measure: paired blocks, bootstrap intervals, exact counts, the header.

A ratio is only as good as its pairing: the programs compared run by turns in one process, their
order rotates, and each ratio is formed within a turn. Knows no model and no training loop.
"""

from __future__ import annotations

import datetime as dt
import gc
import hashlib
import os
import pathlib
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import hybrid_magic
from hybrid_magic.policy import comparison

# Ways in which a program reads a tensor's value on the host, and so waits for the device.
HOST_READS = (
    # not numpy(): a tensor on a device has none, so a call of it reads the host
    *("item", "tolist", "cpu"),
    *("__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__"),
)


@dataclass(frozen=True)
class Timing:
    """CPU seconds of all threads, and seconds on the clock."""

    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Interval:
    """A statistic of `n` values with the 95 % bootstrap interval around it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = statistics.median,
    *,
    draws: int = 4000,
) -> Interval:
    """Return `statistic` of `values` with its 95 % percentile bootstrap interval (fixed seed)."""
    low, high = comparison.bootstrap(values, statistic, draws=draws)
    return Interval(statistic(values), low, high, len(values))


def timed(work: Callable[[], Any]) -> Timing:
    """Return what `work()` takes; garbage of what ran before is collected first."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timing(time.process_time() - cpu, time.perf_counter() - wall)


def paired_blocks(
    prepare: dict[str, Callable[[], Callable[[], Any]]], blocks: int, *, warmup: int = 1
) -> dict[str, list[Timing]]:
    """Return `blocks` timings of each work, run by turns in an order that rotates every block.

    Each `prepare[name]()` returns the work to time; itself it is outside the clock.
    """
    names = list(prepare)
    for _ in range(warmup):
        for name in names:
            prepare[name]()()
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    for _ in range(blocks):
        for name in names:
            timings[name].append(timed(prepare[name]()))
        names.append(names.pop(0))
    return timings


def ratio(ours: Sequence[Timing], theirs: Sequence[Timing], field: str = "cpu_s") -> Interval:
    """Return the median of the paired ratios ours / theirs with its interval."""
    pairs = zip(ours, theirs, strict=True)
    return bootstrap([getattr(our, field) / getattr(their, field) for our, their in pairs])


def count_calls(work: Callable[[], Any]) -> int:
    """Return how many Python functions `work()` enters, on all threads that it starts too."""
    calls: dict[int, int] = {}

    def profiler(_frame: Any, event: str, _arg: Any) -> None:
        if event == "call":
            thread = threading.get_ident()
            calls[thread] = calls.get(thread, 0) + 1

    threading.setprofile(profiler)
    sys.setprofile(profiler)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return sum(calls.values())


def count_host_reads(work: Callable[[], Any]) -> int:
    """Return how often `work()` reads a tensor's value (HOST_READS), on any thread."""
    reads: list[str] = []

    def counted(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.append(name)
            return read(self, *args, **kwargs)

        return reading

    own = {name: torch.Tensor.__dict__.get(name) for name in HOST_READS}
    for name in HOST_READS:
        setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    try:
        work()
    finally:
        for name, method in own.items():
            if method is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, method)
    return len(reads)


def digest(paths: Iterable[pathlib.Path]) -> str:
    """Return ten hexadecimal digits that change when any of the files does."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:10]


def package_digest() -> str:
    """Return the digest of the part of hybrid_magic that trains: all but notebook and report."""
    root = pathlib.Path(hybrid_magic.__file__).parent
    return digest([*root.glob("*.py"), *root.glob("engine/*.py"), *root.glob("policy/*.py")])


def environment(command: str, seed: str) -> dict[str, Any]:
    """Return what a reader must know to place a number: machine, versions, seed, command.

    To be called when a program starts: the sources may change while it runs.
    """
    return {
        "machine": _processor(),
        "cores": len(_cores()),
        "threads": torch.get_num_threads(),
        "load": system_load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hybrid_magic": f"{hybrid_magic.__version__} (source {package_digest()})",
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "seed": seed,
        "command": command,
    }


def system_load() -> float | None:
    """Return how many programs wanted a core in the last minute, None where no one says."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def header(facts: dict[str, Any]) -> str:
    """Return the environment as one Markdown paragraph."""
    return "; ".join(f"{name}: {value}" for name, value in facts.items() if name != "command") + (
        f".\n\n    {facts['command']}\n"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of equal keys as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plain(value: Any) -> Any:
    """Return Interval and Timing as dicts, for JSON; everything else as it is."""
    return asdict(value) if isinstance(value, (Interval, Timing)) else value
