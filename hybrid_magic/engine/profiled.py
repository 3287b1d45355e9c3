"""From the looks of a lens to a Profile: stages, modules, memory by kind, the line over sizes.

Reads marks and ledgers; takes no step. Nothing here is a guess: what was not seen is None.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..config import ProfileConfig
from ..findings import HostRead, Pipeline, Setting, Stage, Work
from ..profiles import Profile
from ..records import StepRecord
from . import memory_line, module_times, occupancy, roofline
from . import precision as precisions
from .course import Course
from .device import DeviceProbe
from .host import read_host
from .lens import Lens, Look
from .occupancy import Occupancy
from .setup import environment


def assembled(
    course: Course,
    lens: Lens,
    records: Mapping[tuple[int, int], StepRecord],
    config: ProfileConfig,
    loader: tuple[float | None, int],
) -> Profile:
    """Return what a course has shown; `loader` is what it alone gives, samples a second."""
    probe = lens.state.probe
    usual = Counter(tuple(look.sizes) for look in course.timed).most_common(1)[0][0]
    timed = [look for look in course.timed if tuple(look.sizes) == usual]
    assert course.setting is not None
    ledgers = [occupancy.of(look) for look in course.ledgers if look.ledger is not None]
    base = next((o for o in ledgers if tuple(o.look.sizes) == usual), None)
    times = _Times(timed, records, probe, lens)
    copied = times.copied(base)
    within = lens.state.step_state.adopted or not lens.sends
    stages = _stages(times, copied, within=within)
    step_s = times.step_s()
    modules, outside = module_times.modules_of(course.followed, stages, lens, base, probe)
    line, highest = memory_line.line_of(ledgers, probe, config)
    setting = _told(course.setting, base, course.looks)
    return Profile(
        model=type(lens.state.step_state.model).__name__,
        device=probe.name,
        batch=sum(usual),
        micro=max(usual),
        steps=len(timed),
        step_s=step_s,
        step_spread_s=_spread(times.periods),
        stages=stages,
        modules=modules,
        outside_s=outside,
        peaks=() if base is None else tuple(base.peaks),
        sizes=memory_line.sizes_of([*timed, *course.cut], highest, probe),
        line=line,
        pipeline=_pipeline(lens, base, loader, sum(usual), step_s, stages),
        work=_work(base, stages, setting, probe),
        reads=_reads(base, probe, len(usual)),
        setting=setting,
        config=config.as_json(),
        environment=environment(probe),
    )


class _Times:
    """Seconds of the steps that were only timed."""

    def __init__(
        self,
        looks: Sequence[Look],
        records: Mapping[tuple[int, int], StepRecord],
        probe: DeviceProbe,
        lens: Lens,
    ) -> None:
        self.probe, self.looks, self._lens = probe, looks, lens
        self.periods = [look.period_s for look in looks if look.period_s is not None]
        known = [records.get((look.run, look.step)) for look in looks]
        self.data = [record.data_s or 0.0 for record in known if record is not None] or [0.0]
        spans = [look.spans for look in looks]
        self.forward = [self._pairs((s, m) for s, m, _ in each) for each in spans]
        self.backward = [self._pairs((m, e) for _, m, e in each) for each in spans]
        self.optimizer = [self._pairs(look.ends) for look in looks]

    def _pairs(self, pairs: Iterable[tuple[Any, Any]]) -> tuple[float, float]:
        """Return the seconds between marks, on the device's clock and on the host's."""
        device = host = 0.0
        for start, end in pairs:
            device += max(0.0, self.probe.seconds(end.device, start.device))
            host += end.host - start.host
        return device, host

    def step_s(self) -> float:
        if self.periods:
            return statistics.fmean(self.periods)
        return sum(statistics.fmean(d for d, _ in s) for s in (self.forward, self.backward))

    def copied(self, base: Occupancy | None) -> tuple[float | None, float]:
        """Return the seconds of a step's copies to the device, None where nothing is copied, and
        how much of them the host spends on nothing else."""
        sends, pieces = self._lens.sends, len(self.looks[0].sizes)
        if sends:
            device = statistics.fmean(self.probe.seconds(sent.end, sent.start) for sent in sends)
            host = statistics.fmean(sent.host_s for sent in sends)
            return max(device, host) * pieces, host * pieces
        if base is None or not base.copies:
            return None, 0.0
        found = sum(self.probe.seconds(c.marks[1], c.marks[0]) for c in base.copies)
        return found, found


def _stages(
    times: _Times, copied: tuple[float | None, float], *, within: bool
) -> tuple[Stage, ...]:
    """Return the stages of a step; `within`: its copies are done in the forward pass, by the
    person's own lines or their own objects."""
    late, n, step_s = times.probe.late, len(times.looks), times.step_s()
    copy_s, blocking = copied

    def stage(name: str, pairs: Sequence[tuple[float, float]], less: float = 0.0) -> Stage:
        device = [max(0.0, seconds - less) for seconds, _ in pairs]
        host = statistics.fmean(seconds for _, seconds in pairs) if late else None
        return Stage(name, statistics.fmean(device), _spread(device), host, n)

    passes = [
        stage("forward", times.forward, blocking if within else 0.0),
        stage("backward", times.backward),
        stage("optimizer", times.optimizer),
    ]
    computing = sum(found.seconds for found in passes)
    waited = max(0.0, statistics.fmean(times.data) - (0.0 if within else blocking))
    if late:  # what the device does not wait for costs nothing
        waited = min(waited, max(0.0, step_s - computing))
    stages = [Stage("data", waited, _spread(times.data), None, n)]
    if copy_s is not None:
        stages.append(Stage("copy", copy_s, None, None, n))
    rest = max(0.0, step_s - computing - waited - blocking)
    return (*stages, *passes, Stage("rest", rest, None, None, n))


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _pipeline(
    lens: Lens,
    base: Occupancy | None,
    loader: tuple[float | None, int],
    batch: int,
    step_s: float,
    stages: Sequence[Stage],
) -> Pipeline:
    waited = next(stage.seconds for stage in stages if stage.name == "data")
    host = read_host()
    pinned = [sent.pinned for sent in lens.sends]
    if not pinned and base is not None:
        pinned = [copy.pinned for copy in base.copies]
    return Pipeline(
        loader_samples_per_s=loader[0],
        model_samples_per_s=batch / max(step_s - waited, 1e-9),
        batches=loader[1],
        workers=getattr(lens.task.loader, "num_workers", None),
        cores=max(1, int(host.usable_cores or host.cores or 1)),
        pinned=all(pinned) if pinned else None,
    )


def _work(
    base: Occupancy | None, stages: Sequence[Stage], setting: Setting, probe: DeviceProbe
) -> Work | None:
    if base is None:
        return None
    wanted = {*base.flops, "fp32", setting.native} & set(precisions.NAMES)
    rates = {name: roofline.flops_per_s(probe, name) for name in sorted(map(str, wanted))}
    return Work(
        flops=dict(base.flops),
        traffic_bytes=base.traffic_bytes,
        seconds=sum(s.seconds for s in stages if s.name in ("forward", "backward")),
        peak_flops_per_s={name: rate for name, rate in rates.items() if rate is not None},
        bandwidth_bytes_per_s=roofline.bytes_per_s(probe),
    )


def _reads(base: Occupancy | None, probe: DeviceProbe, pieces: int) -> tuple[HostRead, ...]:
    if base is None or not probe.late:
        return ()
    found: dict[str, list[float]] = {}
    for read in base.reads:
        found.setdefault(read.where, []).append(read.seconds)
    return tuple(
        HostRead(where, len(seconds) / pieces, sum(seconds)) for where, seconds in found.items()
    )


def _told(setting: Setting, base: Occupancy | None, looks: Sequence[Look]) -> Setting:
    """Return the setting with what a ledger tells."""
    retries = sum(look.retried for look in looks)
    if base is None:
        return dataclasses.replace(setting, retries=retries)
    shapes = [shape for _, _, shape in base.attention]
    return dataclasses.replace(
        setting,
        convolution_flops=base.convolution_flops,
        attention_bytes=sum(size for _, size, _ in base.attention),
        attention_scores=" x ".join(map(str, shapes[0])) if shapes else None,
        retries=retries,
    )
