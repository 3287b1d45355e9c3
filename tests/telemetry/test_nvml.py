"""Whatever NVML does, a reading is right or unknown: never an error, never another GPU's."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from fake_nvml import FakeGpu, FakeNvml

from hybrid_magic.telemetry.nvml import FAILURES, Gpu, GpuReading, open_gpu

A, B = "GPU-aaaa", "GPU-bbbb"
GAUGES = {  # what is unknown of a reading without it
    "memory": {"used_bytes"},
    "utilization": {"utilization_ratio"},
    "power": {"power_w"},
    "limit": set(),
    "temperature": {"temperature_c"},
    "clock": {"clock_mhz", "max_clock_mhz"},
    "energy": {"energy_j"},
}
READS = ("MemoryInfo", "UtilizationRates", "PowerUsage", "Temperature", "ClockInfo",
         "TotalEnergyConsumption")  # fmt: skip


@pytest.fixture
def nvml(monkeypatch):
    """Return a function that puts a FakeNvml of some GPUs in pynvml's place."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(*gpus: FakeGpu, **options) -> FakeNvml:
        made = FakeNvml(*gpus, **options)
        monkeypatch.setitem(sys.modules, "pynvml", made)
        return made

    return put


def opened(*identity: str | None) -> Gpu:
    gpu = open_gpu(*identity)
    assert gpu is not None
    return gpu


def test_every_gauge_is_read_in_its_unit(nvml):
    nvml(FakeGpu(A))
    gpu = opened(A)
    assert (gpu.name, gpu.driver_version, gpu.total_bytes) == ("Fake H200", "550.54.15", 100)
    assert gpu.power_limit_w == 700
    assert gpu.read() == GpuReading(
        used_bytes=5,
        utilization_ratio=0.93,
        power_w=200,
        temperature_c=61,
        clock_mhz=1740,
        max_clock_mhz=1980,
        energy_j=7000,
    )


def test_names_that_an_older_binding_gives_as_bytes_are_text(nvml):
    nvml(FakeGpu(A, failing={"bytes"}))
    assert opened(A).name == "Fake H200"


@pytest.mark.parametrize(
    "identity", [(B,), ("bbbb",), ("unknown", "00000000:02:00.0"), (None, "00000000:02:00.0")]
)
def test_a_gpu_is_known_by_uuid_or_bus_and_not_by_its_place(nvml, monkeypatch, identity):
    nvml(FakeGpu(A, used=1), FakeGpu(B, "00000000:02:00.0", used=2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # so that torch's device 0 is NVML's 1
    assert opened(*identity).read().used_bytes == 2


def test_without_an_identity_the_only_gpu_is_meant_and_of_two_none(nvml):
    nvml(FakeGpu(A, used=1))
    assert opened(None).read().used_bytes == 1
    fake = nvml(FakeGpu(A), FakeGpu(B))
    assert open_gpu(None) is None
    assert fake.open == 0


@pytest.mark.parametrize("failing", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_no_driver_no_permission_no_such_gpu_is_no_gpu(nvml, failing, capfd):
    fake = nvml(FakeGpu(A), failing=(failing,))
    assert open_gpu(A) is None
    assert fake.open == 0
    nvml(FakeGpu(A))
    assert open_gpu(B) is None
    assert capfd.readouterr() == ("", "")


def test_without_the_library_there_is_no_gpu(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_gpu(A) is None
    assert capfd.readouterr() == ("", "")


def test_the_real_binding_without_a_driver_says_nothing():
    program = "from hybrid_magic.telemetry.nvml import open_gpu; print(open_gpu('GPU-none'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("None\n", "")


@pytest.mark.parametrize("gauge", GAUGES)
def test_a_gauge_that_is_not_supported_is_unknown_and_the_others_are_read(nvml, gauge):
    nvml(FakeGpu(A))
    whole = dataclasses.asdict(opened(A).read())
    nvml(FakeGpu(A, failing={gauge}))
    gpu = opened(A)
    found = dataclasses.asdict(gpu.read())
    assert (gpu.power_limit_w is None) == (gauge == "limit")
    unknown = {name for name, value in found.items() if value is None}
    assert unknown == GAUGES[gauge]
    assert {name: whole[name] for name in found if name not in unknown} == {
        name: value for name, value in found.items() if name not in unknown
    }


def test_a_gauge_that_keeps_failing_is_asked_no_more_and_one_that_recovers_is(nvml):
    device = FakeGpu(A)
    fake = nvml(device)
    gpu = opened(A)
    for _ in range(FAILURES - 1):
        device.failing = {"power"}
        assert gpu.read().power_w is None
    device.failing = set()
    assert gpu.read().power_w == 200
    device.failing = {"power"}
    fake.calls.clear()
    for _ in range(20):
        gpu.read()
    assert fake.calls.count("nvmlDeviceGetPowerUsage") == FAILURES
    assert fake.calls.count("nvmlDeviceGetMemoryInfo") == 20


def test_a_driver_that_goes_mid_run_leaves_readings_unknown_at_a_bounded_cost(nvml):
    fake = nvml(FakeGpu(A))
    gpu = opened(A)
    assert gpu.read().used_bytes == 5
    fake.failing = {f"nvmlDeviceGet{name}" for name in READS} | {"nvmlShutdown"}
    for _ in range(10):
        found = dataclasses.asdict(gpu.read())
        assert {name for name, value in found.items() if value is not None} == {"max_clock_mhz"}
    gpu.close()


def test_inits_and_shutdowns_are_balanced_and_a_closed_gpu_shows_nothing(nvml):
    fake = nvml(FakeGpu(A))
    gpu = opened(A)
    assert fake.open == 1
    gpu.close()
    gpu.close()
    assert fake.open == 0
    fake.calls.clear()
    assert gpu.read() == GpuReading()
    assert fake.calls == []


def mig(*instances: FakeGpu | None) -> FakeGpu:
    return FakeGpu(A, used=90, total=100, instances=list(instances))


def instance(number: int) -> FakeGpu:
    return FakeGpu(f"MIG-{number}", "none", used=number, total=10)


@pytest.mark.parametrize("identity", ["MIG-3", "3"])
def test_a_mig_instance_shows_its_own_memory_and_nothing_of_its_parent(nvml, identity):
    nvml(mig(instance(2), instance(3)))
    gpu = opened(identity)
    assert (gpu.total_bytes, gpu.power_limit_w) == (10, None)
    assert gpu.read() == GpuReading(used_bytes=3)


def test_of_a_gpu_cut_up_the_instance_of_this_process_is_shown(nvml, monkeypatch):
    nvml(mig(None, instance(2), instance(3)))
    assert open_gpu(A) is None  # it could be either
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-3")
    assert opened(A).read() == GpuReading(used_bytes=3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-gone")
    assert open_gpu(A) is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    fake = nvml(mig(None, instance(2)))
    gpu = opened(A)
    assert gpu.read() == GpuReading(used_bytes=2)
    gpu.close()
    assert fake.open == 0
