"""The time of each module in a step, from whose turn it was when. Takes no step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..findings import Module, Stage
from . import occupancy
from .device import DeviceProbe
from .lens import Lens, Look
from .occupancy import Occupancy


def modules_of(
    looks: Sequence[Look],
    stages: Sequence[Stage],
    lens: Lens,
    base: Occupancy | None,
    probe: DeviceProbe,
) -> tuple[tuple[Module, ...], float | None]:
    """Return the model's modules, and the seconds outside of all."""
    forward: Counter[str | None] = Counter()
    backward: Counter[str | None] = Counter()
    for look in looks:
        for start, middle, end in look.spans:
            _turns(forward, look, start, middle, probe)
            _turns(backward, look, middle, end, probe)
    by_name = {stage.name: stage.seconds for stage in stages}
    scale = [
        by_name[name] / total if (total := sum(found.values())) else None
        for name, found in (("forward", forward), ("backward", backward))
    ]
    inside = [_inclusive(found) for found in (forward, backward)]
    calls = looks[-1].calls if looks else {}
    activations = {} if base is None else base.activations
    flops = {} if base is None else base.flops_of

    made = []
    for path, module in lens.state.step_state.model.named_modules():
        held = {id(t): t for t in (*module.parameters(), *module.buffers())}
        ran = calls.get(path, 0)
        seconds = [
            found[path] * factor if ran and factor is not None else None
            for found, factor in zip(inside, scale, strict=True)
        ]
        made.append(
            Module(
                path, type(module).__name__, ran, seconds[0], seconds[1],
                sum(t.numel() * t.element_size() for t in held.values()),
                None if base is None else activations[path],
                None if base is None else base.module_peaks.get(path),
                None if base is None or path in base.uncounted else flops[path],
            )
        )  # fmt: skip
    outside = [
        found[None] * factor
        for found, factor in zip((forward, backward), scale, strict=True)
        if factor is not None
    ]
    return tuple(made), sum(outside) if outside else None


def _turns(
    seconds: Counter[str | None], look: Look, start: Any, end: Any, probe: DeviceProbe
) -> None:
    """Add the time from one mark to another to the modules whose turn it was."""
    path: str | None = None
    since = start
    for following, mark in look.switches:
        if start.host < mark.host < end.host:
            seconds[path] += max(0.0, probe.seconds(mark.device, since.device))  # type: ignore[assignment]
            path, since = following, mark
    seconds[path] += max(0.0, probe.seconds(end.device, since.device))  # type: ignore[assignment]


def _inclusive(own: Mapping[str | None, float]) -> Counter[str]:
    """Return the sums over each path and those in it; the model's is that of the empty path."""
    total: Counter[str] = Counter()
    for path, value in own.items():
        for above in occupancy.above(path):
            total[above] += value  # type: ignore[assignment]
    return total
