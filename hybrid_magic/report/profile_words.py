"""What a profile says in sentences: its first line, what it is of, data, arithmetic.

Knows no layout. Every sentence has its numbers.
"""

from __future__ import annotations

from ..findings import Advice, MemoryLine, Pipeline, Work
from ..profiles import Profile
from . import quantities as q

NOTHING = "Nothing here is worth changing, as far as these measurements tell."
SPENT = {
    "data": "waiting for data",
    "copy": "copying to the device",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer",
    "rest": "in the rest of the step",
}


def headline(profile: Profile) -> str:
    """Return speed, where most of the time goes, and peak memory."""
    speed = q.rate(profile.samples_per_second)
    if not _counted(profile):
        speed = f"{q.value(1 / profile.step_s)} steps/s"
    said = f"{speed}, {q.brief(profile.step_s)} a step"
    longest = max(profile.stages, key=lambda stage: stage.seconds, default=None)
    if longest is not None:
        share = q.share(longest.seconds / profile.step_s)
        said += f", {share} of it {SPENT.get(longest.name, longest.name)}"
    if profile.peak is None:
        return f"{said}; no reading of memory on this device"
    return f"{said}; peak memory {q.size(profile.peak.total_bytes)}"


def caption(profile: Profile) -> str:
    """Return what the numbers are of: model, device, steps, sizes, versions."""
    setting, known = profile.setting, profile.environment
    cut = f" in micro-batches of {q.count(profile.micro)}" if profile.micro < profile.batch else ""
    words = [
        f"{profile.model} on {profile.device}",
        _many(profile.steps, "step")
        + (f" of {_many(profile.batch, 'sample')}{cut}" if _counted(profile) else ""),
        f"{setting.precision} with {setting.optimizer}",
        *(f"{name} {known[name]}" for name in ("torch", "python", "hybrid_magic") if name in known),
        *([f"measured in {q.duration(profile.seconds)}"] if profile.seconds else []),
    ]
    return ", ".join(words)


def _counted(profile: Profile) -> bool:
    """Return whether it is known how many samples a step has: a loop without a loader tells not."""
    return profile.setting.loader_batch is not None or profile.batch > 1


def brings(advice: Advice) -> str:
    """Return what following the advice should bring."""
    said = [] if advice.saves is None else [f"takes about {q.share(advice.saves)} off a step"]
    said += [] if advice.frees is None else [f"frees about {q.share(advice.frees)} of the peak"]
    return ", ".join(said)


def place(stage: str) -> str:
    """Return where in a step a stage is: "in the backward pass"."""
    return SPENT.get(stage, f"in {stage}")


def sentences(profile: Profile) -> list[tuple[str, str]]:
    """Return what no table holds: a name and a sentence each."""
    said = [
        ("memory", _memory(profile.line)),
        ("data", _pipeline(profile.pipeline) if _counted(profile) else ""),
        ("arithmetic", _arithmetic(profile)),
        *(("note", note) for note in profile.notes),
    ]
    return [(name, sentence) for name, sentence in said if sentence]


def _memory(line: MemoryLine | None) -> str:
    if line is None:
        return ""
    fixed = f"{q.size(line.fixed_bytes)} + " if line.fixed_bytes > 0 else ""
    return f"a micro-batch of n samples takes {fixed}n {q.TIMES} {q.size(line.per_sample_bytes)}"


def _pipeline(held: Pipeline) -> str:
    model = f"the model alone does {q.rate(held.model_samples_per_s)}"
    if not held.loader_samples_per_s:
        return f"{model}; the loader was not timed alone"
    known = [_many(held.workers, "worker process", "es")] if held.workers else []
    known += [_many(held.cores, "core"), _many(held.batches, "batch", "es")]
    slower = "loader" if held.loader_samples_per_s < held.model_samples_per_s else "model"
    said = f"the loader alone gives {q.rate(held.loader_samples_per_s)} ({', '.join(known)})"
    pinned = {None: "", True: "; batches come pinned", False: "; batches do not come pinned"}
    turns = "" if held.workers else ", and without worker processes they take turns"
    return f"{said}, {model}: the {slower} is the slower one{turns}{pinned[held.pinned]}"


def _arithmetic(profile: Profile) -> str:
    """Return the roofline in a sentence: how much of the device is used, and what limits it."""
    work = profile.work
    if work is None or work.achieved_flops_per_s is None:
        return "the operations of a step could not be counted"
    achieved, name = q.flops_rate(work.achieved_flops_per_s), work.main_precision
    if not work.peak:
        return f"the step does {achieved}, mostly in {name}; what the device can do is not known"
    share = q.share(work.achieved_flops_per_s / work.peak)
    said = f"the step reaches {share} of what this device does in {name}"
    possible = q.flops_rate(work.peak)
    unit = possible.partition(" ")[2]
    said += f" ({achieved.removesuffix(f' {unit}')} of {possible})"
    return said + _limit(profile, work)


def _limit(profile: Profile, work: Work) -> str:
    """Return what keeps a step from doing more, "" where that cannot be told.

    Far under its roofline that is neither arithmetic nor memory traffic. Where the host then needs
    as long as the device it is the host, unless a host read made it wait for the device.
    """
    if not work.attainable_flops_per_s or not work.ridge or work.intensity is None:
        return ""
    if (work.achieved_flops_per_s or 0.0) < 0.5 * work.attainable_flops_per_s:
        passes = [found for name in ("forward", "backward") if (found := profile.stage(name))]
        host = sum(stage.host_seconds or 0.0 for stage in passes)
        device = sum(stage.seconds for stage in passes)
        if profile.setting.works_ahead and not profile.reads and 0 < 0.9 * device <= host:
            needed = f"needs {q.brief(host)} to launch {q.brief(device)} of work"
            return f"; it is limited by the host, which {needed}"
        allowed = f"they allow {q.flops_rate(work.attainable_flops_per_s)}"
        why = "its operations are too small, or do not suit this device"
        return f"; neither arithmetic nor memory traffic limits it ({allowed}): {why}"
    each = f"it does {q.value(work.intensity)} operations for each byte that it moves"
    ridge = q.value(work.ridge)
    if work.intensity < work.ridge:
        busy = f"fewer than the {ridge} that keep the arithmetic busy"
        return f"; it is limited by memory traffic: {each}, {busy}"
    return f"; it is limited by arithmetic: {each}, more than the {ridge} that keep it busy"


def _many(number: int, thing: str, plural: str = "s") -> str:
    return f"{q.count(number) if number else 'no'} {thing}{'' if number == 1 else plural}"
