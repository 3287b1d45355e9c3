"""Profile: where the time and the memory of a training step go. Plain data, readable without torch.

Seconds, bytes, floating-point operations; what is not known is None. What should be done about it
is decided in `policy.advice`, how it looks is the `report` room's business.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from dataclasses import dataclass, field
from typing import Any

from .errors import HybridMagicError
from .findings import (
    Advice,
    Fit,
    HostRead,
    MemoryLine,
    Module,
    Peak,
    Pipeline,
    Setting,
    Size,
    Stage,
    Work,
)
from .writing import written_whole

last_profile: Profile | None = None  # the newest one of this process
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Profile:
    """What a few steps showed.

    `step_s` is a whole step as a person waits for it, of `steps` that were measured; `batch`
    samples in a step, in micro-batches of `micro`. `modules` are in the order of the model;
    `outside_s` is the forward and backward time of a step outside of any module (the loss).
    """

    model: str
    device: str
    batch: int
    micro: int
    steps: int
    step_s: float
    step_spread_s: float | None
    stages: tuple[Stage, ...]
    modules: tuple[Module, ...]
    outside_s: float | None
    peaks: tuple[Peak, ...]
    sizes: tuple[Size, ...]
    line: MemoryLine | None
    pipeline: Pipeline
    work: Work | None
    reads: tuple[HostRead, ...]
    setting: Setting
    advice: tuple[Advice, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0  # that the profile itself took
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def samples_per_second(self) -> float:
        return self.batch / self.step_s

    @property
    def peak(self) -> Peak | None:
        """The stage in which most memory is in use."""
        return max(self.peaks, key=lambda peak: peak.total_bytes, default=None)

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def table(self) -> str:
        """Return everything as text."""
        from .report import profiles

        return profiles.text(self)

    def html(self) -> str:
        from .report import profiles

        return profiles.html(self)

    def figure(self) -> Any:
        """Return time, memory and the largest batch as a matplotlib Figure."""
        from .report import profile_plots

        return profile_plots.figure(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        from .report import profiles

        return profiles.mimebundle(self)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {"kind": "profile", "format": FORMAT, **dataclasses.asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to `path` as JSON, which `hm.load_profile` reads."""
        with written_whole(path) as file:
            file.write(json.dumps(self.as_json(), indent=1) + "\n")


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Return the Profile that `Profile.save` wrote; needs no torch.

    Raises:
        HybridMagicError: the file is not a saved profile, or is damaged.
    """
    try:
        held = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if (held.pop("kind"), held.pop("format")) != ("profile", FORMAT):
            raise ValueError("another file")
        for name, kind in _MANY.items():
            held[name] = tuple(kind(**values) for values in held[name])
        for name, kind in _ONE.items():
            held[name] = None if held[name] is None else kind(**held[name])
        if held["line"] is not None:
            fits = tuple(Fit(**values) for values in held["line"].fits)
            held["line"] = dataclasses.replace(held["line"], fits=fits)
        return Profile(**held | {"notes": tuple(held["notes"])})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise HybridMagicError(
            f"{path} is damaged, or not a profile that this version saved; wanted a whole .json "
            "file written by profile.save(); check its path, or save it again"
        ) from None


_MANY: dict[str, Any] = {
    "stages": Stage,
    "modules": Module,
    "peaks": Peak,
    "sizes": Size,
    "reads": HostRead,
    "advice": Advice,
}
_ONE: dict[str, Any] = {
    "line": MemoryLine,
    "pipeline": Pipeline,
    "work": Work,
    "setting": Setting,
}
