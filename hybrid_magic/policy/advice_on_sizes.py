"""Advice on sizes: batches too small for the device, micro-batches too small or too large, and
activations that need not be kept.

Each rule is a pure function of a Profile, and None where it has nothing to say. Knows no other
rule: which of them are worth saying is decided in `advice`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from ..findings import Advice, Module
from ..profiles import Profile
from . import batch, timing
from .evidence import (
    FULL,
    bounded,
    count,
    duration,
    memory_hurts,
    pass_share,
    peak_bytes,
    peak_share,
    percent,
    size,
    stage_share,
    this_device,
)

NEARLY_FREE = 1.5  # times the seconds for twice the samples: below, overhead is most of them
OVERHEAD_LEFT = 1 / 3  # of a pass: from there on a larger batch brings little
PLATEAU = 0.03  # within this of the fastest, the smaller size is as good
REACH = 4  # times the largest size that was tried: nobody knows what is farther out
MOST = 16  # times the batch, as --max-batch has it
WORTH_RECOMPUTING = 0.1  # of the peak: less is not worth a slower step


def enlarge_batch(profile: Profile) -> Advice | None:
    """Speak where twice the batch would take less than half again as long.

    Seconds of a size are those that were measured, else along the line through all that were; the
    batch that is named leaves a third of a pass to overhead, and fits the memory. What it saves is
    time a sample: a larger batch takes fewer steps, which may learn less from each sample.
    """
    now = profile.batch
    if profile.micro < now or memory_hurts(profile) or len(profile.sizes) < 2:
        return None
    seconds, line = _seconds(profile)
    limit = min(_largest(profile), MOST * now)
    if limit < 2 * now or seconds(2 * now) >= NEARLY_FREE * seconds(now):
        return None
    sizes = [n for n in _candidates(profile, limit) if n >= 2 * now]
    enough = (n for n in sizes if line.overhead <= OVERHEAD_LEFT * seconds(n))
    wanted = next(enough, sizes[-1])
    quicker = 1 - seconds(wanted) / wanted / (seconds(now) / now)
    once = stage_share(profile, "optimizer", "rest")  # a step, however large
    saved = pass_share(profile) * quicker + once * (1 - now / wanted)
    return Advice(
        f"Train in batches of {wanted:,}",
        f"forward and backward take {duration(seconds(now))} for {now:,} samples and "
        f"{duration(seconds(wanted))} for {wanted:,}: {percent(1 - quicker)} of the time a sample",
        _batch_option(profile, wanted),
        saves=bounded(saved),
    )


def _batch_option(profile: Profile, wanted: int) -> str:
    if not profile.setting.grows:
        return f"batch_size={wanted} in the loader, and a learning rate that suits it"
    said = f"--batch {wanted} (the learning rate follows: --lr-scale)"
    if profile.config.get("batch") == "adaptive":
        return f"{said}; --batch adaptive grows only as far as the noise of the gradient allows"
    return f"{said}, or batch_size={wanted} in the loader"


def enlarge_micro(profile: Profile) -> Advice | None:
    """Speak where a step is cut into smaller micro-batches than memory asks for, which is slower.

    Silent where `auto` chooses the size: it settles on the fastest by itself. Batch statistics are
    then those of more samples, otherwise nothing changes in what is learned.
    """
    now, whole = profile.micro, profile.batch
    if memory_hurts(profile) or len(profile.sizes) < 2:
        return None
    if profile.config.get("micro") == profile.config.get("accum") == "auto":
        return None
    seconds, _ = _seconds(profile)
    limit = min(_largest(profile), whole)
    steps = {m: -(-whole // m) * seconds(m) for m in _candidates(profile, limit) if m > now}
    if not steps:
        return None
    best = min(steps.values())
    wanted = min(m for m in steps if steps[m] <= (1 + PLATEAU) * best)
    before = -(-whole // now) * seconds(now)
    return Advice(
        f"Cut a step into micro-batches of {wanted:,}",
        f"a step's {count(-(-whole // now))} micro-batches of {now:,} take {duration(before)}, "
        f"{count(-(-whole // wanted))} of {wanted:,} would take {duration(steps[wanted])} and fit",
        f"--micro {wanted}, and no --accum",
        saves=pass_share(profile) * bounded(1 - steps[wanted] / before),
    )


def _seconds(profile: Profile) -> tuple[Callable[[int], float], timing.SpeedModel]:
    """Return the seconds of a pass by its size, and the line that they lie along."""
    times = {
        one.samples: timing.Timing(one.seconds, (one.seconds,) * timing.SURE)
        for one in profile.sizes
        if one.seconds > 0
    }
    line = timing.model(times)
    return line.seconds, line


def _candidates(profile: Profile, limit: int) -> list[int]:
    """Return the sizes up to `limit` that may be named: rounded ones, and those that were tried."""
    tried = {one.samples for one in profile.sizes if one.samples <= limit}
    return sorted(tried | {*batch.ladder(limit), limit})


def _largest(profile: Profile) -> int:
    """Return the largest size that fits, as far as what was tried can tell."""
    tried = max((one.samples for one in profile.sizes), default=profile.micro)
    fit = this_device(profile)
    if fit is None:
        return tried
    return min(fit.largest or 0, REACH * tried)


def shrink_micro(profile: Profile) -> Advice | None:
    """Speak where the peak is at the budget or above it, and smaller micro-batches stay below.

    What is learned stays the same (without batch statistics): the gradient is that of the whole
    batch, however it is cut.
    """
    fit, line, now = this_device(profile), profile.line, min(profile.micro, profile.batch)
    peak, least = peak_bytes(profile), 2 if profile.setting.batch_statistics else 1
    if fit is None or line is None or not fit.largest:
        return None
    smaller = [rung for rung in batch.ladder(fit.largest) if least <= rung < now]
    if not smaller or (fit.largest >= now and peak < FULL * fit.budget_bytes):
        return None
    freed = peak_share(profile, line.per_sample_bytes * (now - smaller[-1]))
    kept = "but batch statistics are those of fewer samples" if least == 2 else "nothing is lost"
    return Advice(
        f"Cut a step into micro-batches of {smaller[-1]:,}",
        f"the peak with {now:,} samples at once is {size(peak)}, of {size(fit.budget_bytes)}"
        f"{_ran_out(profile)}; with {smaller[-1]:,} at once it is {size(freed * peak)} lower",
        f"--micro {smaller[-1]}: the step's gradient is summed up over them, {kept}",
        frees=freed,
    )


def recompute(profile: Profile) -> Advice | None:
    """Speak where memory is short, a repeated block holds much of it, and smaller micro-batches are
    no cheaper way out: not one sample fits, batch statistics need them whole, or the overhead of
    small ones costs more than computing twice (taken to be so where no sizes were timed).

    Of n blocks only the inputs are kept, and the activations of the one that is being computed
    again; an input is taken to be as large as what a module in the block leaves on average. Of the
    blocks that free a tenth of the peak those are named that free most for each second of their
    forward pass, which is done once more.

    Source:
        Chen et al. 2016, arXiv:1604.06174; torch.utils.checkpoint.
    """
    if not memory_hurts(profile):
        return None
    held = peak_bytes(profile, "activations")
    shares = {one: peak_share(profile, min(one.freed, held)) for one in _blocks(profile)}
    found = [one for one in shares if shares[one] >= WORTH_RECOMPUTING]
    if not found:
        return None
    best = max(found, key=lambda one: shares[one] / max(one.forward_s, 1e-9))
    costs = bounded(best.forward_s / profile.step_s)
    if _small_costs(profile) < costs:
        return None
    trap = "; batch statistics would be counted twice" if profile.setting.batch_statistics else ""
    return Advice(
        f"Recompute the {best.n} {best.kind} blocks in the backward pass",
        f"they hold {size(best.held)} of the peak of {size(peak_bytes(profile))}"
        f"{_ran_out(profile)}; computing them once more costs "
        f"{f'{percent(costs)} of a step' if costs else 'their forward pass'}",
        f"torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) for {best.first} and "
        f"its like (of Transformers: model.gradient_checkpointing_enable()){trap}",
        frees=shares[best],
    )


def _small_costs(profile: Profile) -> float:
    """Return the share of a step that micro-batches which fit take more than the batch at once;
    1 where they are no way out, or their time is not known."""
    fit = this_device(profile)
    if profile.setting.batch_statistics or fit is None or not fit.largest:
        return 1.0
    if len(profile.sizes) < 2:
        return 1.0
    seconds, _ = _seconds(profile)
    whole = max(profile.batch, profile.setting.loader_batch or 0)
    small = min(fit.largest, profile.micro, whole)
    slower = 1 - (seconds(whole) / whole) / (seconds(small) / small)
    return bounded(pass_share(profile) * slower)


@dataclass(frozen=True, slots=True)
class _Blocks:
    kind: str
    first: str
    n: int
    held: int
    freed: float
    forward_s: float


def _blocks(profile: Profile) -> list[_Blocks]:
    """Return the modules that hold others, by kind and depth; one of its kind frees nothing."""
    parents = {path for one in profile.modules for path in _above(one)}
    leaves = Counter(
        path for one in profile.modules if one.path not in parents for path in _above(one)
    )
    alike: defaultdict[tuple[str, int], list[Module]] = defaultdict(list)
    for module in profile.modules:
        if module.activation_bytes and module.path and leaves[module.path]:
            alike[module.kind, module.depth].append(module)
    found: list[_Blocks] = []
    for (kind, _), modules in alike.items():
        held = [one.activation_bytes or 0 for one in modules]
        inputs = sum(left / leaves[one.path] for left, one in zip(held, modules, strict=True))
        freed = sum(held) - max(held) - inputs
        forward_s = sum(one.forward_s or 0.0 for one in modules)
        found.append(_Blocks(kind, modules[0].path, len(modules), sum(held), freed, forward_s))
    return found


def _above(module: Module) -> list[str]:
    """Return the paths of the modules that this one is in, the model's own left out."""
    names = module.path.split(".")
    return [".".join(names[:depth]) for depth in range(1, len(names))]


def _ran_out(profile: Profile) -> str:
    retries = profile.setting.retries
    times = "once" if retries == 1 else f"{retries:,} times"
    return f", and memory ran out {times}" if retries else ""
