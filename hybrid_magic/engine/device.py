"""DeviceProbe: memory and timing of the device that trains, one class a kind of device.

The base class is the case of a device that tells nothing: host clock, no memory. An unknown
reading is `None`. `late` says that readings are of queued work, to be taken a step later.
`is_out_of_memory` is the one place that recognises running out of memory. Knows no training.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import operator
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

READ_EVERY_S = 0.25  # a memory reading costs up to 400 us: at most 0.2 % of a run


class DeviceProbe:
    """A device that can only be timed from the host."""

    late = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._due = 0.0

    @property
    def total_bytes(self) -> int | None:
        return None

    @property
    def taken_bytes(self) -> int:
        """Bytes that others hold of the device, not to be had by this process."""
        return 0

    @property
    def name(self) -> str:
        return self.device.type

    # A point in the device's time; `seconds(end, start)` tells the time between two.
    mark: Callable[[], Any] = staticmethod(time.perf_counter)
    seconds: Callable[[Any, Any], float] = staticmethod(operator.sub)

    def fetch(self, values: torch.Tensor) -> Any:
        """Return a callable that gives `values` (1-D) as a list of floats, copied from now on."""
        return values.tolist

    def reset_peak(self) -> None:
        """Begin a new peak."""

    def peak(self) -> tuple[int | None, int | None]:
        """Return the highest (allocated, reserved) bytes since the last `reset_peak`."""
        return None, None

    def peak_if_due(self) -> tuple[int | None, int | None]:
        """Return `peak`, or Nones when it was read less than a quarter of a second ago."""
        now = time.monotonic()
        if now < self._due:
            return None, None
        self._due = now + READ_EVERY_S
        return self.peak()

    def pressure(self) -> bool:
        """Return whether the allocator had to free its cache and try again since the last call."""
        return False

    def synchronize(self) -> None:
        """Wait until the device's queued work is done."""

    def release(self) -> None:
        """Give back what nothing holds any more, after running out of memory."""
        gc.collect()

    def budget_bytes(self, memory: float | int) -> int | None:
        """Return what `--memory` allows: a fraction of what this process can have, or bytes."""
        if isinstance(memory, int) and memory > 1:
            return memory
        total = self.total_bytes
        return None if total is None else int(memory * (total - self.taken_bytes))


class CpuProbe(DeviceProbe):
    """The host: the peak resident set of this process, which Linux lets one reset."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._status = "/proc/self/status" if os.path.exists("/proc/self/status") else None

    @property
    def total_bytes(self) -> int | None:
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
        for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            try:
                with open(path) as file:
                    return min(total, int(file.read()))
            except (OSError, ValueError):
                continue
        return total

    @property
    def name(self) -> str:
        threads = torch.get_num_threads()
        return f"cpu, {threads} thread{'' if threads == 1 else 's'}"

    def reset_peak(self) -> None:
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:  # not Linux, or a container that forbids it: the peak is the process's own
            pass

    def release(self) -> None:
        super().release()
        if self._status is not None:
            with contextlib.suppress(AttributeError, OSError):  # glibc's: others give back at once
                ctypes.CDLL(None).malloc_trim(0)

    def peak(self) -> tuple[int | None, int | None]:
        if self._status is None:
            return _resource_peak(), None
        try:
            with open(self._status, "rb") as file:
                for line in file:
                    if line.startswith(b"VmHWM"):
                        return int(line.split()[1]) * 1024, None
        except OSError:
            pass
        return None, None


def _resource_peak() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class CudaProbe(DeviceProbe):
    """An NVIDIA (or ROCm) GPU: the allocator's own peaks, events for time, read one step late."""

    late = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._retries = 0
        self.pressure()  # what happened before this run is no pressure of it

    @property
    def total_bytes(self) -> int:
        total = torch.cuda.get_device_properties(self.device).total_memory
        share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.8 and later
        return total if share is None else int(total * share(self.device))

    @property
    def taken_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(0, self.total_bytes - free - torch.cuda.memory_reserved(self.device))

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def mark(self) -> Any:  # type: ignore[override]
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, end: Any, start: Any) -> float:  # type: ignore[override]
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def fetch(self, values: torch.Tensor) -> Any:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))

        def read() -> list[float]:
            done.synchronize()
            return host.tolist()

        return read

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> tuple[int | None, int | None]:
        device = self.device
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)

    def pressure(self) -> bool:
        before, stats = self._retries, torch.cuda.memory_stats(self.device)
        self._retries = stats.get("num_alloc_retries", 0)
        return self._retries > before

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        super().release()
        torch.cuda.synchronize(self.device)  # a broken context says so here
        torch.cuda.empty_cache()


class MpsProbe(DeviceProbe):
    """An Apple GPU: it tells what is allocated now, not a peak, so peaks are of the readings."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._peak = (0, 0)

    @property
    def total_bytes(self) -> int | None:
        return torch.mps.recommended_max_memory()

    def reset_peak(self) -> None:
        self._peak = (0, 0)

    def peak(self) -> tuple[int | None, int | None]:
        now = torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
        self._peak = max(self._peak[0], now[0]), max(self._peak[1], now[1])
        return self._peak

    def synchronize(self) -> None:
        torch.mps.synchronize()

    def release(self) -> None:
        super().release()
        torch.mps.empty_cache()


def probe_for(device: torch.device) -> DeviceProbe:
    """Return the probe of `device`."""
    return {"cpu": CpuProbe, "cuda": CudaProbe, "mps": MpsProbe}.get(device.type, DeviceProbe)(
        device
    )


_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, HIP and MPS
    "_ALLOC_FAILED",  # cuBLAS, cuDNN, cuFFT, cuSOLVER, cuSPARSE
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no room for a handle
    "CUDNN_STATUS_NOT_SUPPORTED",  # no room for the only workspace that would do
    "CUDNN_STATUS_INTERNAL_ERROR",
    "unable to find a valid cuDNN algorithm",  # each of them wanted more workspace
    "unable to find an engine to execute",
    "can't allocate memory",  # the CPU allocator
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
)
_BROKEN = (  # the device's context is lost, whatever else the message says
    "illegal memory access",
    "device-side assert",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "uncorrectable ecc",
    "device is lost",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is a device or the host running out of memory, in any of its faces.

    A broken CUDA context is not: whatever is tried in it fails.
    """
    words = str(error).lower()
    if any(face in words for face in _BROKEN):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(face.lower() in words for face in _OUT_OF_MEMORY)


def attempt(work: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, str | None]:
    """Return (what `work` returns, None); where memory runs out (None, the error's own words).

    The error is gone when this returns, and with it all that it held.
    """
    try:
        return work(*args, **options), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found = str(error).strip() or type(error).__name__
    return None, found.splitlines()[0]
