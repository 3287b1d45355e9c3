"""What `%hybrid_device` advises: why there is no GPU, or not all of one, and what to do.

Reads no device; only `place_here` looks around itself, for Colab's and Kaggle's own variables.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..report import quantities as q

if TYPE_CHECKING:
    from ..engine.machine import DeviceFacts, Machine

Gauges = dict[str, Any]  # device -> what NVML shows of it; "nvidia": a GPU that torch does not see

_LARGE = 0.1  # of a device's memory, held by others
_FREEABLE = 2**20  # bytes allocated, from which on an error may hold some


@dataclass(frozen=True, slots=True)
class Place:
    """A product that runs notebooks, and where a GPU is chosen in it. `tpu`: one was chosen."""

    name: str
    switch: str
    gpu: str
    tpu: bool


def place_here() -> Place | None:
    """Return the product that this notebook runs in, None where it is neither of the two."""
    tpu = "TPU_ACCELERATOR_TYPE" in os.environ
    # Kaggle's image is made from Colab's, and holds some of its variables and modules
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ or "KAGGLE_URL_BASE" in os.environ:
        return Place("Kaggle", "Settings > Accelerator", "GPU T4 x2", tpu)
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return Place("Google Colab", "Runtime > Change runtime type", "T4 GPU", tpu)
    return None


def notes(
    machine: Machine, gauges: Gauges, place: Place | None, last_error: str | None
) -> Iterator[str]:
    """Yield what a person should know or do, the weightiest first, a sentence each."""
    gpus = [each for each in machine.devices if each.device != "cpu"]
    if not gpus:
        yield _why_no_gpu(machine, gauges, place)
        yield (
            f"without a GPU a run computes on {cores(machine)} of the CPU; mixed precision and "
            "larger batches bring less there, and the memory is the host's"
        )
    else:
        yield from _hidden(machine, gpus)
        yield from machine.troubles
    for each in gpus:
        yield from _of_gpu(each, place)
    emulators = [each.device for each in gpus if each.precisions["bf16"] == "emulated"]
    if emulators:
        yield (
            f"bf16 is emulated on {', '.join(emulators)}, and slower than fp32, though "
            "torch.cuda.is_bf16_supported() says yes"
        )
    if len(gpus) > 1:
        other = next(each.device for each in gpus if each.device != machine.chosen)
        yield f"a run uses one of the {len(gpus)} GPUs; --device {other} takes another"
    if last_error is not None and any((e.allocated_bytes or 0) >= _FREEABLE for e in gpus):
        yield (
            f"the notebook keeps its last error ({last_error}), and with it perhaps memory of a "
            "step that failed; %hybrid_free gives that back"
        )
    usable = machine.host.usable_cores
    if usable is not None and machine.host.threads > math.ceil(usable):
        yield (
            f"torch computes in {machine.host.threads} threads on {cores(machine)}, which wait "
            f"for each other; torch.set_num_threads({max(1, int(usable))}) is faster on the CPU"
        )


def _why_no_gpu(machine: Machine, gauges: Gauges, place: Place | None) -> str:
    versions, there = machine.versions, _nvidia(machine, gauges)
    built, visible = versions.cuda or versions.hip, machine.visible_devices
    ours = bool(gauges) or place is None  # a product's own computer may have more than it lends
    if there and ours and not built:
        return (
            f"{there} is in this machine, and torch {versions.torch} is built for CPUs only; "
            "install a torch built for CUDA (pytorch.org/get-started/locally writes the line), "
            "and restart the kernel"
        )
    if there and built and visible is not None:
        return (
            f"CUDA_VISIBLE_DEVICES={visible!r} hides {there} from torch; unset it, or name the GPU "
            "in it, and restart the kernel: it is read when CUDA begins"
        )
    if place is not None and not gauges:
        found = (
            "a TPU was chosen, which nothing here trains on" if place.tpu else "no GPU was chosen"
        )
        return (
            f"{found}; {place.switch} > {place.gpu} in {place.name}'s menu gives one (the session "
            "starts anew: run the cells again)"
        )
    if there and machine.troubles:
        return (
            f"{there} is in this machine, and torch cannot use it: {machine.troubles[0]}; update "
            "the driver, or give the GPU to this container (docker run --gpus all)"
        )
    return "there is no GPU that torch can use: none was found"


def _nvidia(machine: Machine, gauges: Gauges) -> str | None:
    """Return the NVIDIA GPUs of the machine in words, whatever torch can use; None without one."""
    names = machine.host.nvidia_gpus or tuple(found["name"] for found in gauges.values())
    if not names and machine.host.nvidia_driver is None:
        return None
    if not names:
        return f"an NVIDIA driver ({machine.host.nvidia_driver})"
    name = names[0] or "an NVIDIA GPU"
    return name if len(names) == 1 else f"{len(names)} GPUs ({name} and others)"


def _hidden(machine: Machine, gpus: Sequence[DeviceFacts]) -> Iterator[str]:
    there, visible = len(machine.host.nvidia_gpus), machine.visible_devices
    if visible is not None and there > len(gpus):
        yield (
            f"CUDA_VISIBLE_DEVICES={visible!r} shows torch {len(gpus)} of the {there} GPUs; it is "
            "read when CUDA begins: change it and restart the kernel"
        )


def _of_gpu(device: DeviceFacts, place: Place | None) -> Iterator[str]:
    name, others = device.device, device.others_bytes
    if device.has_kernels is False and device.capability is not None:
        major, minor = device.capability
        other = f"choose {place.switch} > {place.gpu}" if place else "take another GPU"
        yield (
            f'this torch was not built for {device.name or name}, and fails on it with "no kernel '
            f'image"; {other}, or install a torch built for compute capability '
            f"{major}.{minor}"
        )
    if others is not None and device.total_bytes and others > _LARGE * device.total_bytes:
        yield (
            f"{q.size(others)} of {name} are held by others (other notebooks and programs, and "
            "CUDA itself); end those to have it too, %hybrid_free gives back what this one holds"
        )


def cores(machine: Machine) -> str:
    """Return how many cores can be used, in words."""
    return several(machine.host.usable_cores or 1, "core")


def several(number: float, what: str) -> str:
    """Return a number of things: 1 core, 2.5 cores."""
    return f"{number:.3g} {what}{'' if number == 1 else 's'}"
