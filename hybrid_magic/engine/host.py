"""The computer around the devices: its processor, the cores and memory that are ours of it.

Read from what Linux lists under /proc and /sys; elsewhere most of it is unknown, which is `None`.
Knows no torch, but for the number of its threads.
"""

from __future__ import annotations

import os
import pathlib
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

ROOT = pathlib.Path("/")  # of /proc and /sys
_FP16_UNITS = {"avx512_fp16", "amx_fp16", "fphp"}


@dataclass(frozen=True, slots=True)
class Host:
    """`cores` are the machine's, `usable_cores` what affinity and a container's quota leave of
    them; `process_bytes` is this process's resident memory. `nvidia_driver` and `nvidia_gpus` are
    what the system lists, whether torch can use them or not."""

    processor: str | None
    cores: int | None
    usable_cores: float | None
    threads: int
    available_bytes: int | None
    process_bytes: int | None
    fp16_units: bool | None
    nvidia_driver: str | None
    nvidia_gpus: tuple[str, ...]


def read_host() -> Host:
    """Return what the host has and gives us now."""
    flags = _listed("proc/cpuinfo", "flags", "features")
    driver = re.search(r"\s(\d+\.[\d.]+)\s", _text("proc/driver/nvidia/version") or "")
    return Host(
        processor=_listed("proc/cpuinfo", "model name") or platform.processor() or None,
        cores=os.cpu_count(),
        usable_cores=_usable_cores(),
        threads=torch.get_num_threads(),
        available_bytes=_kib("proc/meminfo", "MemAvailable"),
        process_bytes=_kib("proc/self/status", "VmRSS"),
        fp16_units=None if flags is None else not _FP16_UNITS.isdisjoint(flags.split()),
        nvidia_driver=None if driver is None else driver[1],
        nvidia_gpus=tuple(_nvidia_gpus()),
    )


def _nvidia_gpus() -> Iterator[str]:
    folder = "proc/driver/nvidia/gpus"
    for place in sorted((ROOT / folder).glob("*/information")):
        yield _listed(f"{folder}/{place.parent.name}/information", "model") or "NVIDIA GPU"


def _text(path: str) -> str | None:
    """Return what a file under ROOT holds, None where it cannot be read."""
    try:
        return (ROOT / path).read_text(errors="replace")
    except OSError:
        return None


def _listed(path: str, *names: str) -> str | None:
    """Return what a file of `name: value` lines says first under one of `names`."""
    for line in (_text(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in {each.lower() for each in names}:
            return value.strip()
    return None


def _kib(path: str, name: str) -> int | None:
    found = re.match(r"\d+", _listed(path, name) or "")
    return None if found is None else int(found[0]) * 1024


def _usable_cores() -> float | None:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min([allowed, *_quotas()]) if allowed else None


def _quotas() -> Iterator[float]:
    """Yield how many cores' time each control group around this process may use."""
    for line in (_text("proc/self/cgroup") or "").splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = "sys/fs/cgroup" if not controllers else "sys/fs/cgroup/cpu"
        for place in (pathlib.PurePosixPath(own), *pathlib.PurePosixPath(own).parents):
            folder = f"{top}{str(place).rstrip('/')}"
            if controllers:
                said = [_text(f"{folder}/cpu.cfs_{what}_us") for what in ("quota", "period")]
            else:
                said = (_text(f"{folder}/cpu.max") or "").split()
            if len(said) == 2 and all(part and part.strip().isdecimal() for part in said):
                quota, period = map(int, filter(None, said))
                yield quota / period
