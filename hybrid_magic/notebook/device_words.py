"""What `%hybrid_device` says of the facts that were read: sentences, and tables.

Reads no device itself. Knows no HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import TrainConfig
from ..report import quantities as q
from .device_advice import Gauges, Place, cores, notes, several

if TYPE_CHECKING:
    from ..engine.machine import AutoPrecision, DeviceFacts, Machine


MEMORY = TrainConfig().memory  # a fraction of the device's


@dataclass(frozen=True, slots=True)
class Grid:
    """A table with a row for each device; the columns of which nothing is known are left out.
    `numbers`: they are what follows the device's name."""

    title: str
    numbers: bool
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Page:
    """What is shown: names and sentences, tables, and what a person should know or do."""

    facts: tuple[tuple[str, str], ...]
    grids: tuple[Grid, ...]
    notes: tuple[str, ...]


def page_of(machine: Machine, gauges: Gauges, place: Place | None, last_error: str | None) -> Page:
    """Return what is said about `machine`.

    Args:
        gauges: what NVML shows, by device; "nvidia" is a GPU that torch does not see.
        last_error: the name of the error that the notebook still keeps, None without one.
    """
    facts = tuple(_facts(machine, gauges, place))
    grids = tuple(filter(None, _grids(machine, gauges)))
    return Page(facts, grids, tuple(notes(machine, gauges, place, last_error)))


# -- sentences


def _facts(machine: Machine, gauges: Gauges, place: Place | None) -> Iterator[tuple[str, str]]:
    if place is not None:
        counts = "; a session with a GPU counts against your quota as long as it is on"
        yield "notebook", place.name + (counts if len(machine.devices) > 1 else "")
    chosen = next((each for each in machine.devices if each.device == machine.chosen), None)
    if chosen is None:
        yield "a run takes", "not known: torch cannot say which device it is on"
    else:
        yield "a run takes", _where(machine, chosen)
        yield "--precision auto", auto(chosen.auto)
        yield f"--memory {MEMORY:g}", _budget(chosen)
    for device in machine.devices:
        yield device.device, _device(device) if device.device != "cpu" else _host(machine)
    yield "software", ", ".join(_software(machine, gauges))


def _device(device: DeviceFacts) -> str:
    said = [device.name or "a device that does not tell its name"]
    if device.capability is not None:
        said.append("compute capability {}.{}".format(*device.capability))
    if device.total_bytes is not None:
        said.append(q.size(device.total_bytes))
    return ", ".join(said)


def _host(machine: Machine) -> str:
    host, total = machine.host, machine.devices[-1].total_bytes
    said = [host.processor or "a processor that does not tell its name"]
    if host.cores is not None and host.usable_cores is not None:
        usable = f"{host.usable_cores:.3g}"
        few = host.usable_cores < host.cores
        said.append(f"{usable} of {host.cores} cores to be used here" if few else cores(machine))
    said.append(f"torch computes in {several(host.threads, 'thread')}")
    if total is not None:
        free = host.available_bytes
        said.append(q.size(total) + ("" if free is None else f", {q.size(free)} of it free"))
    return "; ".join(said)


def _where(machine: Machine, chosen: DeviceFacts) -> str:
    if len(machine.devices) == 1:
        return "the CPU, for want of a GPU that torch can use"
    others = "" if len(machine.devices) == 2 else " the model is on another GPU already, or"
    return f"{chosen.device}, unless{others} --device names another"


def auto(choice: AutoPrecision) -> str:
    """Return what `--precision auto` comes to, and why."""
    if choice.name is None and choice.measured is None:
        return f"not known: {choice.reason}"
    if choice.name is None:
        faster = f"the faster of fp32 and {choice.measured}"
        return f"{faster}, measured as each run starts: {choice.reason}"
    scaled = " with loss scaling" if choice.name == "fp16" else ""
    return f"{choice.name}{scaled}: {choice.reason}"


def _budget(device: DeviceFacts) -> str:
    if device.budget_bytes is None:
        return "not known: the device does not tell its memory"
    share = q.share(MEMORY)
    said = f"{q.size(device.budget_bytes)}: {share} of {q.size(device.total_bytes)}"
    if device.others_bytes and device.total_bytes:
        left = q.size(device.total_bytes - device.others_bytes)
        return (
            f"{q.size(device.budget_bytes)}: {share} of the {left} that others leave of "
            f"{q.size(device.total_bytes)}"
        )
    if device.others_bytes is None and device.device.startswith("cuda"):
        return f"{said}, less what others hold, which is known once a run has begun"
    return said


def _software(machine: Machine, gauges: Gauges) -> Iterator[str]:
    versions = machine.versions
    built = f"ROCm {versions.hip}" if versions.hip else "CPUs only"
    built = f"CUDA {versions.cuda}" if versions.cuda else built
    yield f"Python {versions.python}"
    yield f"torch {versions.torch} built for {built}"
    if versions.cudnn is not None:
        yield f"cuDNN {versions.cudnn}"
    driver = _driver(machine, gauges)
    if driver is not None:
        yield f"NVIDIA driver {driver}"


def _driver(machine: Machine, gauges: Gauges) -> str | None:
    told = (found.get("driver_version") for found in gauges.values())
    return next(filter(None, told), machine.host.nvidia_driver)


# -- tables


def _grids(machine: Machine, gauges: Gauges) -> Iterator[Grid | None]:
    devices = machine.devices
    precisions = tuple(devices[0].precisions)
    yield _grid(
        "precision",
        False,
        ("device", *precisions, "auto"),
        [
            (each.device, *(each.precisions[name] for name in precisions), _short(each.auto))
            for each in devices
        ],
    )
    yield _grid(
        "memory",
        True,
        ("device", "total", "allocated", "reserved", "others", "for a run"),
        [
            (
                each.device,
                *map(
                    _size,
                    (
                        each.total_bytes,
                        each.allocated_bytes,
                        each.reserved_bytes,
                        each.others_bytes,
                        each.budget_bytes,
                    ),
                ),
            )
            for each in devices
        ],
    )
    seen = [(each.device, gauges[each.device]) for each in devices if each.device in gauges]
    yield _grid(
        "at this moment",
        True,
        ("device", "busy", "power", "temperature", "clock"),
        [
            (
                device,
                _said(found["utilization_ratio"], q.share),
                _of(found["power_w"], found["power_limit_w"], "W"),
                _said(found["temperature_c"], lambda degrees: f"{degrees:.0f} \N{DEGREE SIGN}C"),
                _of(found["clock_mhz"], found["max_clock_mhz"], "MHz"),
            )
            for device, found in seen
        ],
    )


def _grid(
    title: str, numbers: bool, heads: Sequence[str], rows: Sequence[Sequence[str | None]]
) -> Grid | None:
    """Return a table less the columns of which nothing is known, None where nothing is left."""
    columns = (
        [
            (head, *(cell or "" for cell in column))
            for head, column in zip(heads, zip(*rows, strict=True), strict=True)
            if any(column)
        ]
        if rows
        else []
    )
    if len(columns) < 2:
        return None
    top, *body = zip(*columns, strict=True)
    return Grid(title, numbers, top, tuple(body))


def _short(choice: AutoPrecision) -> str | None:
    return choice.name or (f"fp32 or {choice.measured}, measured" if choice.measured else None)


def _said(value: Any, words: Callable[[Any], str]) -> str | None:
    return None if value is None else words(value)


def _size(number: int | None) -> str | None:
    return _said(number, q.size)


def _of(value: float | None, most: float | None, unit: str) -> str | None:
    if value is None:
        return None
    return f"{value:.0f} {unit}" if most is None else f"{value:.0f} of {most:.0f} {unit}"
