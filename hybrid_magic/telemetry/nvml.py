"""One GPU's gauges through NVML: memory, utilisation, power, temperature, clocks, energy.

Whatever goes wrong (no library, no driver, no permission, not supported, the GPU lost mid-run) a
reading is `None`: nothing here raises or prints, and what keeps failing is asked no more.
NVML's order of devices is not CUDA's, so a GPU is known by its UUID or PCI bus id, never by an
index. Imports pynvml when a GPU is opened; knows no torch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .asking import answer

FAILURES = 3  # in a row, after which a gauge is asked no more


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What a GPU's gauges showed at one moment; `None` is unknown.

    `used_bytes` is all that is taken of the device, by whomever. `energy_j` is the driver's own
    counter, which began before this run: only differences mean something.
    """

    used_bytes: int | None = None
    utilization_ratio: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    energy_j: float | None = None


class Gpu:
    """A GPU whose gauges can be read, or a MIG instance: then what is its own, which is its memory.

    Use it from one thread at a time; it holds NVML open until `close`.
    """

    def __init__(self, nvml: Any, handle: Any, *, instance: bool) -> None:
        self._nvml, self._handle = nvml, handle
        self._whole = not instance
        self._failures: dict[str, int] = {}
        self._open = True
        self.name: str | None = self._ask("nvmlDeviceGetName", text)
        self.driver_version: str | None = text(asked(nvml, "nvmlSystemGetDriverVersion"))
        self.total_bytes: int | None = self._ask("nvmlDeviceGetMemoryInfo", lambda m: int(m.total))
        self.power_limit_w = self._whole_device("nvmlDeviceGetEnforcedPowerLimit", thousandth)
        self._max_clock = self._whole_device("nvmlDeviceGetMaxClockInfo", float, _SM_CLOCK)

    def read(self) -> GpuReading:
        """Return what the gauges show now."""
        if not self._open:
            return GpuReading()
        whole = self._whole_device
        return GpuReading(
            used_bytes=self._ask("nvmlDeviceGetMemoryInfo", lambda memory: int(memory.used)),
            utilization_ratio=whole("nvmlDeviceGetUtilizationRates", lambda rate: rate.gpu / 100),
            power_w=whole("nvmlDeviceGetPowerUsage", thousandth),
            temperature_c=whole("nvmlDeviceGetTemperature", float, _ON_THE_CHIP),
            clock_mhz=whole("nvmlDeviceGetClockInfo", float, _SM_CLOCK),
            max_clock_mhz=self._max_clock,
            energy_j=whole("nvmlDeviceGetTotalEnergyConsumption", thousandth),
        )

    def close(self) -> None:
        """Let NVML go; readings are unknown from here on."""
        if self._open:
            self._open = False
            asked(self._nvml, "nvmlShutdown")

    def _whole_device(self, call: str, read: Callable[[Any], Any], *args: int) -> Any:
        """Ask for what a MIG instance shares with its neighbours, and cannot tell of itself."""
        return self._ask(call, read, *args) if self._whole else None

    def _ask(self, call: str, read: Callable[[Any], Any], *args: int) -> Any:
        failures = self._failures.get(call, 0)
        if failures >= FAILURES:
            return None
        found = answer(lambda: read(getattr(self._nvml, call)(self._handle, *args)))
        self._failures[call] = failures + 1 if found is None else 0
        return found


_SM_CLOCK = 1  # NVML_CLOCK_SM
_ON_THE_CHIP = 0  # NVML_TEMPERATURE_GPU
_MIG_ENABLED = 1  # NVML_DEVICE_MIG_ENABLE


def open_gpu(uuid: str | None, pci_bus_id: str | None = None) -> Gpu | None:
    """Return the GPU with this identity, None where NVML cannot show it.

    Args:
        uuid: of the device or the MIG instance: "GPU-...", "MIG-...", or the bare form that torch
            gives, without a prefix.
        pci_bus_id: such as "00000000:65:00.0"; asked for where the UUID is unknown. With neither,
            the machine's only GPU is meant, and of several none.
    """
    nvml: Any = answer(lambda: importlib.import_module("pynvml"))
    if nvml is None or not answer(lambda: (nvml.nvmlInit(), True)):
        return None
    found = _find(nvml, uuid, pci_bus_id)
    if found is None:
        asked(nvml, "nvmlShutdown")
        return None
    handle, instance = found
    return Gpu(nvml, handle, instance=instance)


def _find(nvml: Any, uuid: str | None, pci_bus_id: str | None) -> tuple[Any, bool] | None:
    """Return the device's handle, and whether it is a MIG instance."""
    names = [uuid] if uuid and uuid.startswith(("GPU-", "MIG-")) else []
    if uuid and not names:
        names = [f"GPU-{uuid}", f"MIG-{uuid}"]
    for name in names:
        handle = asked(nvml, "nvmlDeviceGetHandleByUUID", name)
        if handle is not None and name.startswith("MIG-"):
            return handle, True
        if handle is not None:
            return _of_this_process(nvml, handle)
    if pci_bus_id:
        handle = asked(nvml, "nvmlDeviceGetHandleByPciBusId", pci_bus_id)
    elif not uuid and asked(nvml, "nvmlDeviceGetCount") == 1:
        handle = asked(nvml, "nvmlDeviceGetHandleByIndex", 0)
    else:
        handle = None
    return None if handle is None else _of_this_process(nvml, handle)


def _of_this_process(nvml: Any, handle: Any) -> tuple[Any, bool] | None:
    """Return what this process has of a GPU: all of it or, of one that is cut up, its instance.

    CUDA gives a process one instance: the one named in CUDA_VISIBLE_DEVICES, or the only one there
    is; of several that it could be, none is shown.
    """
    mode = answer(lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
    if mode != _MIG_ENABLED:
        return handle, False
    name = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    if name.startswith("MIG-"):
        instance = asked(nvml, "nvmlDeviceGetHandleByUUID", name)
        return None if instance is None else (instance, True)
    most = asked(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0
    slots = (asked(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, n) for n in range(most))
    instances = [slot for slot in slots if slot is not None]
    return (instances[0], True) if len(instances) == 1 else None


def asked(nvml: Any, call: str, *args: Any) -> Any:
    """Return what the binding's `call` gives, None where it fails or an old one has no such."""
    return answer(lambda: getattr(nvml, call)(*args))


def thousandth(value: int) -> float:
    """Return milliwatts as watts, or millijoules as joules."""
    return value / 1000


def text(value: bytes | str | None) -> str | None:
    """Return a name as text; older bindings give bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
