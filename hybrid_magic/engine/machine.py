"""What this machine offers a run: devices, their memory and precisions, cores, versions.

Facts, read when asked. Knows no gauge (what NVML shows is handed in) and prints nothing; what
cannot be read is `None`, never an error.

Asking torch about its GPUs starts the CUDA driver in this process, which takes no memory of them.
Of all that is read here only how much of a GPU others hold costs a CUDA context (hundreds of MiB
of that GPU until the process ends), so torch is asked for it only where this process has one.
"""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from . import precision
from .device import CpuProbe, probe_for
from .host import Host, read_host
from .placement import choose_device

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
MEMORY = TrainConfig().memory  # the fraction that a run takes when `--memory` is not given

# (device, UUID, PCI bus id) of a GPU -> the bytes that are taken of it, by whomever
UsedBytes = Callable[[str, str | None, str | None], int | None]


@dataclass(frozen=True, slots=True)
class AutoPrecision:
    """What `--precision auto` comes to: `name`, or at a run's start the faster of fp32 and
    `measured`. A float64 model is computed as it is, whatever this says."""

    name: str | None
    measured: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One device that torch can use.

    `allocated_bytes` and `reserved_bytes` are this process's; `others_bytes` is what it cannot have
    of the rest: other processes', and CUDA's own. `budget_bytes` is what a run may take that is
    given no `--memory`. `precisions` says of each whether it is "native" (and what is lacking), is
    "emulated" (it can be stored, and is computed in fp32) or is there not at all ("none").
    `has_kernels`: whether this torch was built for it. `in_use`: this process has a context on it.
    """

    device: str
    name: str | None
    capability: tuple[int, int] | None
    total_bytes: int | None
    allocated_bytes: int | None
    reserved_bytes: int | None
    others_bytes: int | None
    budget_bytes: int | None
    precisions: dict[str, str | None]
    auto: AutoPrecision
    has_kernels: bool | None = None
    in_use: bool = True
    uuid: str | None = None
    pci_bus_id: str | None = None


@dataclass(frozen=True, slots=True)
class Versions:
    """`cuda` and `hip` are what torch was built with; `cudnn` is known where there is a GPU."""

    python: str
    torch: str
    cuda: str | None
    hip: str | None
    cudnn: str | None


@dataclass(frozen=True, slots=True)
class Machine:
    """`devices`: accelerators first, the CPU last. `chosen` is where a run goes whose model is on
    the CPU and that names no device. `troubles` are torch's own words on what does
    not work."""

    devices: tuple[DeviceFacts, ...]
    chosen: str | None
    host: Host
    versions: Versions
    visible_devices: str | None
    troubles: tuple[str, ...]


def read_machine(used_bytes: UsedBytes | None = None) -> Machine:
    """Return what this machine offers now; `used_bytes` is asked once for every GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here is among the facts
        troubles: list[str] = []
        found = [_cuda(number, used_bytes) for number in range(_gpus(troubles))]
        if torch.backends.mps.is_available():
            found.append(_mps())
        model = nn.ParameterList([torch.empty(0)])
        chosen = attempted(lambda: choose_device(None, model), troubles)
        host = read_host()
        return Machine(
            devices=(*found, _cpu(host)),
            chosen=None if chosen is None else str(chosen),
            host=host,
            versions=_versions(troubles),
            visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
            troubles=tuple(dict.fromkeys(troubles)),
        )


def attempted(read: Callable[[], Any], troubles: list[str] | None = None) -> Any:
    """Return what `read` returns; where it fails None, and its words go to `troubles`."""
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - whatever a broken device answers, it is only unknown
        if troubles is not None:
            troubles.append((str(error).strip() or type(error).__name__).splitlines()[0])
        return None


# -- devices


def _gpus(troubles: list[str]) -> int:
    """Return how many GPUs torch can use; where it was built for them, why there is none."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    if torch.version.cuda or torch.version.hip:
        attempted(torch.cuda.init, troubles)
    return 0


def _cuda(number: int, used_bytes: UsedBytes | None) -> DeviceFacts:
    device = torch.device("cuda", number)
    held: Any = attempted(lambda: torch.cuda.get_device_properties(number))
    probe = attempted(lambda: probe_for(device))
    uuid, bus = identity(held)
    total = attempted(lambda: probe.total_bytes)
    reserved = attempted(lambda: torch.cuda.memory_reserved(number))
    in_use = _has_context(number)
    used = None if used_bytes is None else used_bytes(str(device), uuid, bus)
    others = attempted(lambda: probe.taken_bytes) if in_use else None
    if others is None and used is not None and reserved is not None:
        others = max(0, used - reserved)
    capability = None if held is None else (held.major, held.minor)
    return DeviceFacts(
        device=str(device),
        name=None if held is None else held.name,
        capability=None if torch.version.hip else capability,
        total_bytes=total,
        allocated_bytes=attempted(lambda: torch.cuda.memory_allocated(number)),
        reserved_bytes=reserved,
        others_bytes=others,
        budget_bytes=None if total is None else int(MEMORY * (total - (others or 0))),
        precisions=_of_cuda(capability),
        auto=_auto(device),
        has_kernels=_has_kernels(capability),
        in_use=in_use,
        uuid=uuid,
        pci_bus_id=bus,
    )


def identity(held: Any) -> tuple[str | None, str | None]:
    """Return a GPU's UUID and PCI bus id, names that do not hang on CUDA_VISIBLE_DEVICES, from its
    torch properties; older torch tells neither."""
    uuid = getattr(held, "uuid", None)
    place = [getattr(held, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    bus = None if None in place else "{:08X}:{:02X}:{:02X}.0".format(*place)
    return None if uuid is None else str(uuid), bus


def _has_context(number: int) -> bool:
    asked = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    found = attempted(lambda: asked(number)) if asked is not None else None
    return bool(attempted(lambda: torch.cuda.memory_reserved(number)) if found is None else found)


def _of_cuda(capability: tuple[int, int] | None) -> dict[str, str | None]:
    """Return what a GPU computes natively.

    Source: CUDA C++ Programming Guide, throughput of native arithmetic instructions.
    """
    if torch.version.hip:
        return dict(zip(PRECISIONS, ("native", "none", "native", "native"), strict=True))
    if capability is None:
        return dict.fromkeys(PRECISIONS)
    if capability >= (7, 0):
        fp16 = "native"
    elif capability in ((5, 3), (6, 0), (6, 2)):
        fp16 = "native, no tensor cores"
    else:
        fp16 = "native, slow" if capability == (6, 1) else "emulated"
    ampere = capability >= (8, 0)
    tf32, bf16 = ("native", "native") if ampere else ("none", "emulated")
    return dict(zip(PRECISIONS, ("native", tf32, fp16, bf16), strict=True))


def _has_kernels(capability: tuple[int, int] | None) -> bool | None:
    """Return whether this torch was built for such a GPU: a kernel of the same major version and
    no later minor one, or code that the driver compiles for it (PTX: compute_...)."""
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", a) for a in torch.cuda.get_arch_list()]
    if torch.version.hip or capability is None or not any(built):
        return None
    for arch in filter(None, built):
        made_for = int(arch[2]), int(arch[3])
        same = made_for == capability
        kin = made_for[0] == capability[0] and made_for <= capability and arch[4] != "a"
        if same or kin or (arch[1] == "compute" and not arch[4] and made_for <= capability):
            return True
    return False


def _auto(device: torch.device) -> AutoPrecision:
    troubles: list[str] = []
    found = attempted(lambda: precision.native(device), troubles)
    if found is None:
        return AutoPrecision(None, None, f"the device does not answer ({troubles[0]})")
    name, reason = found
    measured = precision.worth_measuring(device) if name is None else None
    return AutoPrecision(name or (None if measured else "fp32"), measured, reason)


def _mps() -> DeviceFacts:
    device = torch.device("mps")
    probe = probe_for(device)
    told = getattr(torch.backends.mps, "get_name", lambda: "Apple GPU")
    return DeviceFacts(
        device=str(device),
        name=attempted(told),
        capability=None,
        total_bytes=attempted(lambda: probe.total_bytes),
        allocated_bytes=attempted(torch.mps.current_allocated_memory),
        reserved_bytes=attempted(torch.mps.driver_allocated_memory),
        others_bytes=None,
        budget_bytes=attempted(lambda: probe.budget_bytes(MEMORY)),
        precisions=dict(zip(PRECISIONS, ("native", "none", "native", None), strict=True)),
        auto=_auto(device),
    )


def _cpu(host: Host) -> DeviceFacts:
    device = torch.device("cpu")
    probe, auto = CpuProbe(device), _auto(device)
    how = {True: "native", False: "emulated", None: None}
    fp16, bf16 = how[host.fp16_units], how[auto.measured == "bf16"]
    return DeviceFacts(
        device=str(device),
        name=host.processor,
        capability=None,
        total_bytes=probe.total_bytes,
        allocated_bytes=host.process_bytes,
        reserved_bytes=None,
        others_bytes=None,
        budget_bytes=probe.budget_bytes(MEMORY),
        precisions=dict(zip(PRECISIONS, ("native", "none", fp16, bf16), strict=True)),
        auto=auto,
    )


# -- versions


def _versions(troubles: list[str]) -> Versions:
    number = None
    if torch.cuda.is_available() and not torch.version.hip:
        number = attempted(torch.backends.cudnn.version, troubles)
    return Versions(
        python=platform.python_version(),
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        cudnn=None if number is None else _cudnn(number),
    )


def _cudnn(number: int) -> str:
    """Return 90100 as 9.1.0, and 8902, as it was written before, as 8.9.2."""
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"
