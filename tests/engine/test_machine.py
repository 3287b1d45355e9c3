"""What the machine offers is what torch and the system say of it, and reading it costs nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import fake_machine
import pytest
import torch
from fake_machine import A100, GIB, H100, P100, T4, FakeGpu

from hybrid_magic.config import TrainConfig
from hybrid_magic.engine import host, machine, precision
from hybrid_magic.engine.device import probe_for
from hybrid_magic.engine.machine import read_machine

CARDS = {  # card: capability, and (fp32, tf32, fp16, bf16)
    "GTX 980": ((5, 2), ("native", "none", "emulated", "emulated")),
    "P100": ((6, 0), ("native", "none", "native, no tensor cores", "emulated")),
    "GTX 1080": ((6, 1), ("native", "none", "native, slow", "emulated")),
    "V100": ((7, 0), ("native", "none", "native", "emulated")),
    "T4": ((7, 5), ("native", "none", "native", "emulated")),
    "A100": ((8, 0), ("native", "native", "native", "native")),
    "RTX 4090": ((8, 9), ("native", "native", "native", "native")),
    "H100": ((9, 0), ("native", "native", "native", "native")),
    "RTX 5090": ((12, 0), ("native", "native", "native", "native")),
}


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """A /proc and a /sys to write into."""
    monkeypatch.setattr(host, "ROOT", tmp_path)
    return tmp_path


def write(root: pathlib.Path, path: str, content: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(content)


# -- devices


@pytest.mark.parametrize(("capability", "native"), CARDS.values(), ids=CARDS)
def test_native_precisions_come_from_the_capability(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # as on a T4
    fake_machine.install(monkeypatch, FakeGpu("a card", capability, 8 * GIB, free_bytes=8 * GIB))
    gpu = read_machine().devices[0]
    assert gpu.capability == capability
    assert tuple(gpu.precisions.values()) == native
    assert tuple(gpu.precisions) == ("fp32", "tf32", "fp16", "bf16")


@pytest.mark.parametrize("gpu", [T4, P100, A100, H100], ids=lambda gpu: gpu.name)
def test_auto_is_what_a_run_would_choose(monkeypatch, gpu):
    fake_machine.install(monkeypatch, gpu)
    device, auto = torch.device("cuda", 0), read_machine().devices[0].auto
    name, reason = precision.native(device)
    assert (auto.name, auto.reason) == (name, reason)
    assert auto.measured == (None if name else precision.worth_measuring(device))
    assert auto.name or auto.measured


def test_on_a_cpu_auto_is_measured_where_it_has_bf16_units(monkeypatch):
    for units, auto in ((True, (None, "bf16")), (False, ("fp32", None))):
        monkeypatch.setattr(precision, "_cpu_computes_bf16", lambda units=units: units)
        cpu = read_machine().devices[-1]
        assert (cpu.auto.name, cpu.auto.measured) == auto
        assert cpu.precisions["bf16"] == ("native" if units else "emulated")


def test_memory_is_what_the_probe_of_a_run_reads(monkeypatch):
    gpu = FakeGpu("a card", (8, 0), 16 * GIB, True, 10 * GIB, 1 * GIB, 2 * GIB)
    fake_machine.install(monkeypatch, gpu)
    found, probe = read_machine().devices[0], probe_for(torch.device("cuda", 0))
    assert (found.total_bytes, found.allocated_bytes, found.reserved_bytes) == (
        16 * GIB,
        1 * GIB,
        2 * GIB,
    )
    assert found.others_bytes == probe.taken_bytes == 4 * GIB
    assert found.budget_bytes == probe.budget_bytes(TrainConfig().memory)


def test_a_gpu_that_nobody_has_used_is_not_asked_for_what_others_hold(monkeypatch):
    """The fake fails where it is: it would cost a CUDA context."""
    fake_machine.install(monkeypatch, FakeGpu("a card", (8, 0), 16 * GIB, in_use=False))
    found = read_machine().devices[0]
    assert found.others_bytes is None
    assert found.budget_bytes == int(0.9 * 16 * GIB)
    asked = []

    def used_bytes(*identity: str | None) -> int:
        asked.append(identity)
        return 6 * GIB

    found = read_machine(used_bytes).devices[0]
    assert asked == [("cuda:0", "0a1b-2c3d", "00000000:3B:00.0")]
    assert found.others_bytes == 6 * GIB
    assert found.budget_bytes == int(0.9 * 10 * GIB)


def test_a_busy_gpu_leaves_unknown_what_it_does_not_tell(monkeypatch):
    fake_machine.install(monkeypatch, dataclasses.replace(T4, free_bytes=None))
    found = read_machine().devices[0]
    assert found.others_bytes is None
    assert (found.name, found.total_bytes) == ("Tesla T4", 15 * GIB)


def test_nor_does_a_broken_one_end_in_an_error(monkeypatch):
    fake_machine.install(monkeypatch, T4)

    def broken(*_):
        raise RuntimeError("CUDA error: unspecified launch failure\nsecond line")

    for name in ("get_device_properties", "get_device_capability", "current_device"):
        monkeypatch.setattr(torch.cuda, name, broken)
    monkeypatch.setattr(torch.backends.cudnn, "version", broken)
    read = read_machine()
    assert (read.devices[0].name, read.devices[0].total_bytes, read.chosen) == (None, None, None)
    assert read.devices[0].auto.reason == (
        "the device does not answer (CUDA error: unspecified launch failure)"
    )
    assert set(read.devices[0].precisions.values()) == {None}
    assert read.troubles == ("CUDA error: unspecified launch failure",)
    assert read.versions.cudnn is None


def test_of_several_gpus_a_run_takes_the_current_one(monkeypatch):
    fake_machine.install(monkeypatch, T4, dataclasses.replace(T4, in_use=False), current=1)
    read = read_machine()
    assert [each.device for each in read.devices] == ["cuda:0", "cuda:1", "cpu"]
    assert [each.in_use for each in read.devices] == [True, False, True]
    assert read.chosen == "cuda:1"


@pytest.mark.parametrize(
    ("capability", "built", "answer"),
    [
        ((6, 0), ["sm_70", "sm_75"], False),  # Kaggle's P100 since its torch is built for CUDA 12.8
        ((6, 0), ["sm_50", "sm_70"], False),
        ((6, 1), ["sm_60"], True),
        ((8, 9), ["sm_80", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((9, 0), [], None),
    ],
)
def test_whether_torch_was_built_for_a_gpu(monkeypatch, capability, built, answer):
    gpu = FakeGpu("a card", capability, 8 * GIB, free_bytes=8 * GIB)
    fake_machine.install(monkeypatch, gpu, built=built)
    assert read_machine().devices[0].has_kernels is answer


def test_where_torch_can_use_no_gpu_it_says_why(monkeypatch):
    fake_machine.install_none(monkeypatch, cuda="12.6", why="The NVIDIA driver is too old\nmore")
    read = read_machine()
    assert [each.device for each in read.devices] == ["cpu"]
    assert (read.chosen, read.troubles) == ("cpu", ("The NVIDIA driver is too old",))
    fake_machine.install_none(monkeypatch, cuda=None, why="never asked")
    assert read_machine().troubles == ()


@pytest.mark.parametrize(
    ("number", "words"), [(90_100, "9.1.0"), (92_600, "9.26.0"), (8_902, "8.9.2"), (7_605, "7.6.5")]
)
def test_versions_of_cudnn_are_read_as_they_are_written(monkeypatch, number, words):
    fake_machine.install(monkeypatch, T4)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert read_machine().versions.cudnn == words


def test_reading_changes_neither_random_state_nor_threads_nor_makes_a_context():
    before = torch.get_rng_state(), torch.get_num_threads()
    read = read_machine()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1] == read.host.threads
    json.dumps(dataclasses.asdict(read))


@pytest.mark.gpu
def test_a_real_gpu_gets_no_context_from_being_read():
    program = (
        "import torch; from hybrid_magic.engine.machine import read_machine; r = read_machine()\n"
        "assert r.devices[0].name and r.devices[0].total_bytes, r\n"
        "made = [torch._C._cuda_hasPrimaryContext(n) for n in range(torch.cuda.device_count())]\n"
        "assert not any(made) and not r.devices[0].in_use, made\n"
        "torch.ones(1, device='cuda'); r = read_machine()\n"
        "assert r.devices[0].in_use and r.devices[0].others_bytes > 0, r"
    )
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(machine.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)


# -- the host


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"self": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"self": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        ({"self": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "400000 100000\n"}, 4),
        (
            {
                "self": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
            },
            4,
        ),
        (
            {
                "self": "4:memory:/x\n3:cpu,cpuacct:/docker/1\n1:name=systemd:/\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "self": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
    ],
    ids=["no groups", "no quota", "v2", "v2, of a group above", "v2, the least", "v1", "v1, none"],
)
def test_cores_are_those_that_the_container_may_use(monkeypatch, system, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    for path, content in files.items():
        write(system, "proc/self/cgroup" if path == "self" else path, content)
    found = host.read_host()
    assert (found.cores, found.usable_cores) == (96, cores)


def test_the_host_tells_what_linux_lists(system):
    write(system, "proc/cpuinfo", "processor : 0\nmodel name : A & B\nflags : fpu avx512_fp16\n")
    write(system, "proc/meminfo", "MemTotal: 1000 kB\nMemAvailable:    500 kB\n")
    write(system, "proc/self/status", "Name: python\nVmRSS:\t  20 kB\n")
    write(
        system,
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
    )
    for number in range(2):
        where = f"proc/driver/nvidia/gpus/0000:0{number}:00.0/information"
        write(system, where, f"Model: \t\t Tesla T4\nIRQ: {number}\n")
    found = host.read_host()
    assert (found.processor, found.fp16_units) == ("A & B", True)
    assert (found.available_bytes, found.process_bytes) == (500 * 1024, 20 * 1024)
    assert (found.nvidia_driver, found.nvidia_gpus) == ("550.54.15", ("Tesla T4", "Tesla T4"))


def test_what_is_not_listed_is_unknown(system):
    found = host.read_host()
    assert (found.available_bytes, found.process_bytes, found.fp16_units) == (None, None, None)
    assert (found.nvidia_driver, found.nvidia_gpus) == (None, ())


def test_this_machine_is_read():
    read = read_machine()
    cpu = read.devices[-1]
    assert cpu.device == "cpu"
    assert read.chosen in [each.device for each in read.devices]
    assert read.host.usable_cores is None or 0 < read.host.usable_cores <= (read.host.cores or 0)
    probe = probe_for(torch.device("cpu"))
    assert cpu.budget_bytes == probe.budget_bytes(TrainConfig().memory)
