"""NVML as a module that a test makes: GPUs by UUID and PCI bus id, MIG instances, failures."""

from __future__ import annotations

import types
from typing import Any


class NVMLError(Exception):
    """What pynvml raises, whatever is wrong."""


class FakeGpu:
    """`failing`: calls that raise. `instances`: slot -> FakeGpu, None where a slot is empty."""

    def __init__(self, uuid: str, bus: str = "00000000:01:00.0", *, used: int = 5, **kept: Any):
        self.uuid, self.bus, self.used = uuid, bus, used
        self.total, self.failing, self.instances = 100, set(), None
        self.power_mw, self.energy_mj = 200_000, 7_000_000
        self.__dict__.update(kept)


class FakeNvml(types.ModuleType):
    """`calls` are the names asked for, in order; `open` counts inits less shutdowns."""

    NVMLError = NVMLError

    def __init__(self, *gpus: FakeGpu, failing: tuple[str, ...] = ()):
        super().__init__("pynvml")
        self.gpus, self.failing = list(gpus), set(failing)
        self.open, self.calls = 0, []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("nvml"):
            if name in self.failing:
                raise NVMLError(name)
            self.calls.append(name)
        return found

    def _all(self) -> list[FakeGpu]:
        slots = [slot for gpu in self.gpus for slot in gpu.instances or () if slot is not None]
        return [*self.gpus, *slots]

    def _one(self, name: str, value: str) -> FakeGpu:
        for gpu in self._all():
            if getattr(gpu, name) == value:
                return gpu
        raise NVMLError("Not Found")

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return "550.54.15"

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, at):
        return self.gpus[at]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self._one("uuid", uuid)

    def nvmlDeviceGetHandleByPciBusId(self, bus):
        return self._one("bus", bus)

    def nvmlDeviceGetMigMode(self, gpu):
        if gpu.instances is None:
            raise NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu):
        return len(gpu.instances)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu, at):
        if gpu.instances[at] is None:
            raise NVMLError("Not Found")
        return gpu.instances[at]

    def nvmlDeviceGetName(self, gpu):
        return b"Fake H200" if "bytes" in gpu.failing else "Fake H200"

    def _read(self, gpu: FakeGpu, call: str, value: Any) -> Any:
        if call in gpu.failing:
            raise NVMLError(call)
        return value

    def nvmlDeviceGetMemoryInfo(self, gpu):
        memory = types.SimpleNamespace(total=gpu.total, used=gpu.used, free=gpu.total - gpu.used)
        return self._read(gpu, "memory", memory)

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return self._read(gpu, "utilization", types.SimpleNamespace(gpu=93, memory=40))

    def nvmlDeviceGetPowerUsage(self, gpu):
        return self._read(gpu, "power", gpu.power_mw)

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return self._read(gpu, "limit", 700_000)

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        assert sensor == 0
        return self._read(gpu, "temperature", 61)

    def nvmlDeviceGetClockInfo(self, gpu, clock):
        assert clock == 1
        return self._read(gpu, "clock", 1740)

    def nvmlDeviceGetMaxClockInfo(self, gpu, clock):
        assert clock == 1
        return self._read(gpu, "clock", 1980)

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        return self._read(gpu, "energy", gpu.energy_mj)
