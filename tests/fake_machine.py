"""GPUs that are not there: what torch would say of them, for the tests of `%hybrid_device`."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

GIB = 2**30
BUILT = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


@dataclass
class FakeGpu:
    """`free_bytes` None: asking for it fails, as on a GPU that is busy or broken."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    in_use: bool = True
    free_bytes: int | None = None
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    uuid: str = "0a1b-2c3d"


T4 = FakeGpu("Tesla T4", (7, 5), 15 * GIB, free_bytes=14 * GIB)
P100 = FakeGpu("Tesla P100-PCIE-16GB", (6, 0), 16 * GIB, free_bytes=16 * GIB)
A100 = FakeGpu("NVIDIA A100-SXM4-40GB", (8, 0), 40 * GIB, free_bytes=40 * GIB)
H100 = FakeGpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, free_bytes=80 * GIB)


def install(
    patch: pytest.MonkeyPatch, *gpus: FakeGpu, built: Sequence[str] = BUILT, current: int = 0
) -> None:
    """Have torch, built for CUDA, answer as if these were the GPUs of the machine."""

    def at(device: object) -> FakeGpu:
        return gpus[torch.device(device).index if not isinstance(device, int) else device]  # type: ignore[arg-type]

    def properties(device: object) -> types.SimpleNamespace:
        gpu = at(device)
        major, minor = gpu.capability
        where = {"uuid": gpu.uuid, "pci_domain_id": 0, "pci_bus_id": 59, "pci_device_id": 0}
        return types.SimpleNamespace(
            name=gpu.name, major=major, minor=minor, total_memory=gpu.total_bytes, **where
        )

    def mem_get_info(device: object) -> tuple[int, int]:
        gpu = at(device)
        if not gpu.in_use:  # no Exception, which a reader of facts would take for a busy GPU
            pytest.fail("this makes a CUDA context on a GPU that nobody has used")
        if gpu.free_bytes is None:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")
        return gpu.free_bytes, gpu.total_bytes

    for name, fake in {
        "is_available": lambda: True,
        "device_count": lambda: len(gpus),
        "current_device": lambda: current,
        "get_device_properties": properties,
        "get_device_capability": lambda device: at(device).capability,
        "get_device_name": lambda device: at(device).name,
        "get_per_process_memory_fraction": lambda device: 1.0,
        "get_arch_list": lambda: list(built),
        "mem_get_info": mem_get_info,
        "memory_stats": lambda device: {},
        "memory_allocated": lambda device: at(device).allocated_bytes,
        "memory_reserved": lambda device: at(device).reserved_bytes,
    }.items():
        patch.setattr(torch.cuda, name, fake, raising=False)
    patch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda at: gpus[at].in_use, raising=False)
    patch.setattr(torch.backends.cudnn, "version", lambda: 90_100)
    patch.setattr(torch.version, "cuda", "12.6")
    patch.setattr(torch.version, "hip", None)
    patch.setattr(torch.backends.mps, "is_available", lambda: False)


def install_none(patch: pytest.MonkeyPatch, *, cuda: str | None, why: str = "") -> None:
    """Have torch answer as where it can use no GPU, because of `why`."""

    def init() -> None:
        raise RuntimeError(why)

    patch.setattr(torch.cuda, "is_available", lambda: False)
    patch.setattr(torch.cuda, "init", init)
    patch.setattr(torch.version, "cuda", cuda)
    patch.setattr(torch.version, "hip", None)
    patch.setattr(torch.backends.mps, "is_available", lambda: False)
