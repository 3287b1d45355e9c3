"""A device, a loss and a gradient as a few numbers, to run the steering against.

Knows nothing of how the steering decides: it is told what the engine would tell it, and a step that
runs out of memory is retried as the engine does it. Time is simulated; chance comes from one seed.
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hybrid_magic.policy import growth, steering
from hybrid_magic.policy.batch import shares
from hybrid_magic.policy.facts import Settings, StepFacts
from hybrid_magic.records import BatchChangeRecord

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class World:
    """What a step costs, needs and teaches. Shares are of the run, or of the capacity.

    Seconds of a micro-batch: overhead + per_sample * size, and `spill_s` for each sample above
    `cache`; norms of a gradient take `norm_s`. Bytes: fixed + per_sample * size, plus the
    optimizer's state once it has stepped. A sample's bytes and seconds go with its length, which
    spreads from step to step by `uneven` and has grown to `longest` when the run ends.
    """

    overhead_s: float = 5e-3
    sample_s: float = 1e-4
    spill_s: float = 0.0
    cache: int = 0
    optimizer_s: float = 1e-3
    norm_s: float = 0.0
    jitter: float = 0.02
    spikes: float = 0.01  # share of times that are up to three times too long
    warmup: float = 5.0  # factor on the first time of a size

    fixed_bytes: int = GIB
    optimizer_bytes: int = GIB // 2
    sample_bytes: int = 20 * 2**20
    capacity_bytes: int = 16 * GIB
    rough: float = 0.0  # how far a size's bytes lie from the line, by its kernels' workspaces
    uneven: float = 0.0
    longest: float = 1.0
    fragments: float = 0.0  # up to this share is lost until the allocator retries, half of it then
    neighbour: tuple[tuple[float, float], ...] = ()  # (from here on, others hold this share)
    evaluate_every: int = 0  # steps; what an evaluation leaves to the allocator is in the way of
    evaluate_bytes: int = 0  # the step after it, until the allocator retries
    reads_memory: bool = True

    noise: float = 500.0  # the noise scale, in samples; it goes to `noise_end` over the run,
    noise_end: float = 500.0
    jump: float | None = None  # or jumps there
    dims: int = 64  # directions of the gradient
    loss_spread: float = 0.1
    prefetch: int = 2  # steps planned ahead
    late: int = 0  # steps by which the steering hears late

    def micro_s(self, size: int, length: float = 1.0) -> float:
        spilled = self.spill_s * max(0, size - self.cache)
        return self.overhead_s + (self.sample_s * size + spilled) * length

    def bytes(self, size: int, length: float = 1.0, *, stepped: bool = True) -> int:
        optimizer = self.optimizer_bytes if stepped else 0
        rough = 1 + self.rough * math.sin(size * size + self.fixed_bytes)
        return self.fixed_bytes + optimizer + int(self.sample_bytes * size * length * rough)

    def most(self, bytes_: float, length: float = 1.0) -> int:
        """The largest micro-batch that surely needs no more than so many bytes."""
        return int((bytes_ - self.bytes(0)) / (self.sample_bytes * length * (1 + self.rough)))

    def capacity(self, share: float) -> int:
        held = [part for start, part in self.neighbour if start <= share]
        return int(self.capacity_bytes * (1 - (held[-1] if held else 0.0)))

    def length(self, share: float) -> float:
        """The length of the longest samples so far, where they come late."""
        return self.longest ** max(0.0, 2 * share - 1)

    def mean_length(self, share: float) -> float:
        u = self.uneven  # lengths are exp(-|x|) of the longest, x normal with this deviation
        return self.length(share) * math.exp(u * u / 2) * math.erfc(u / math.sqrt(2))

    def noise_at(self, share: float) -> float:
        if self.jump is not None:
            share = float(share >= self.jump)
        return self.noise * (self.noise_end / self.noise) ** share

    def step_s(self, sizes: tuple[int, ...], length: float = 1.0) -> float:
        """Seconds of a step, without luck, first times and norms."""
        counts = Counter(sizes).items()
        return self.optimizer_s + sum(n * self.micro_s(size, length) for size, n in counts)

    def best_step_s(self, batch: int, most: int, least: int = 1, length: float = 1.0) -> float:
        """Seconds of a step in the best micro-batches of at most `most` samples, if it can be of at
        least `least`."""
        return _best_step_s(self, batch, max(1, min(batch, most)), max(1, least), length)


@functools.lru_cache(maxsize=100_000)
def _best_step_s(world: World, batch: int, most: int, least: int, length: float) -> float:
    fewest = -(-batch // most)
    highest = max(fewest, batch // least)
    counts = range(fewest, min(highest, 8 * fewest) + 1) if world.spill_s else (fewest,)
    return min(world.step_s(shares(batch, count), length) for count in counts)


@dataclass
class Trace:
    """What a simulated run did, a list item a step."""

    state: steering.State
    batches: list[int] = field(default_factory=list)
    sizes: list[tuple[int, ...]] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)  # samples x efficiency
    changes: list[BatchChangeRecord] = field(default_factory=list)
    failures: list[tuple[int, int]] = field(default_factory=list)  # step, size
    asked: int = 0  # steps of the whole run
    ended: bool = False  # nothing smaller was left

    @property
    def ooms(self) -> int:
        return len(self.failures)

    @property
    def goodput(self) -> float:
        return sum(self.progress) / sum(self.seconds)

    @property
    def returns(self) -> int:
        """How often a size went A -> B -> A, micro-batches within steps of one global batch."""
        found = 0
        for what in ("micro", "global"):
            last = None
            for change in self.changes:
                if change.what == what:
                    found += last is not None and change.after == last.before
                    last = change
                elif what == "micro" and change.what == "global":
                    last = None
        return found

    def rate(self, first: int, last: int | None = None) -> float:
        part = slice(first, last)
        return sum(self.batches[part]) / sum(self.seconds[part])


def simulate(
    world: World,
    settings: Settings,
    steps: int,
    *,
    seed: int = 0,
    hook: Callable[[int, StepFacts], StepFacts] | None = None,
) -> Trace:
    """Run `steps` steps; `hook(step, facts)` may alter what the steering is told of a step."""
    device = _Device(world, random.Random(seed))
    trace = Trace(steering.init(settings), asked=steps)
    if settings.batch_statistics:
        _rehearse(trace, device, settings.base)
    plans: deque[steering.StepPlan] = deque()
    unheard: deque[StepFacts] = deque()
    for step in range(steps):
        while len(plans) <= world.prefetch:
            plan, trace.state = steering.plan(trace.state, None)
            plans.append(plan)
        plan = plans.popleft()
        device.begin(step, steps)
        sizes, wasted = _run(trace, device, plan.sizes)
        if not sizes:
            trace.ended = True
            break
        batch, noise = sum(sizes), world.noise_at(step / steps)
        times = tuple(device.seconds(size) for size in sizes)
        peak = max(device.peaks(sizes))
        optimizer_s = world.optimizer_s + world.norm_s * plan.probe
        facts = StepFacts(
            step=step,
            sizes=sizes,
            loss=1 + device.rng.gauss(0, world.loss_spread) * (settings.base / batch) ** 0.5,
            grad_norm=(1 + noise / batch) ** 0.5 * device.rng.lognormvariate(0, 0.2),
            micro_seconds=times,
            optimizer_seconds=optimizer_s * device.rng.lognormvariate(0, world.jitter),
            peaks=device.peaks(sizes) if world.reads_memory and step == 0 else None,
            peak_bytes=max(peak, world.bytes(0)) if world.reads_memory else None,
            pressure=device.pressed and world.reads_memory,
            noise=_probe(world, noise, sizes, device.rng) if plan.probe else None,
        )
        unheard.append(hook(step, facts) if hook else facts)
        while len(unheard) > world.late:
            trace.state, changes = steering.observe(trace.state, unheard.popleft())
            trace.changes += changes
        norms_s = world.norm_s * plan.probe * (1 + (len(sizes) == 1))
        trace.batches.append(batch)
        trace.sizes.append(sizes)
        trace.lengths.append(device.length)
        trace.seconds.append(sum(times) + world.optimizer_s + norms_s + wasted)
        trace.progress.append(batch * growth.efficiency(batch, settings.base, noise))
    return trace


def _rehearse(trace: Trace, device: _Device, base: int) -> None:
    """Measure rising sizes before the first step, as is done for batch statistics."""
    points = [
        (size, device.seconds(size), device.world.bytes(size, stepped=False))
        for size in [max(1, base // part) for part in (4, 2, 1)] * 2
        if device.world.bytes(size, stepped=False) <= device.world.capacity_bytes
    ]
    trace.state, changes = steering.rehearsed(trace.state, points)
    trace.changes += changes


def _run(
    trace: Trace, device: _Device, sizes: tuple[int, ...]
) -> tuple[tuple[int, ...] | None, float]:
    """Return the sizes that a step ran in, None where nothing smaller was left, and the seconds
    that failures took."""
    batch, wasted = sum(sizes), 0.0
    if not steering.fits(trace.state, sizes):
        sizes = steering.recut(trace.state, batch)
    while not device.runs(sizes):
        largest = max(sizes)
        wasted += device.seconds(largest)
        trace.failures.append((device.step, largest))
        trace.state, changes = steering.oom(trace.state, largest, device.step)
        trace.changes += changes
        sizes = steering.recut(trace.state, batch)
        if max(sizes) >= largest:
            return None, wasted
    return sizes, wasted


class _Device:
    """The world as it stands in one step."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.ran: Counter[int] = Counter()
        self.length = 1.0

    def begin(self, step: int, steps: int) -> None:
        world, self.step = self.world, step
        self.capacity = world.capacity(step / steps)
        self.lost = self.rng.uniform(0, world.fragments)
        self.length = world.length(step / steps)
        if world.uneven:
            self.length *= math.exp(-abs(self.rng.gauss(0, world.uneven)))
        evaluated = world.evaluate_every and step and step % world.evaluate_every == 0
        self.left = world.evaluate_bytes - world.fixed_bytes if evaluated else 0
        self.pressed = False

    def peaks(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        stepped = self.step > 0
        return tuple(self.world.bytes(size, self.length, stepped=stepped) for size in sizes)

    def runs(self, sizes: tuple[int, ...]) -> bool:
        needed = max(self.peaks(sizes))
        self.pressed |= needed + max(0, self.left) > self.capacity * (1 - self.lost)
        return needed <= self.capacity * (1 - self.lost / 2)

    def seconds(self, size: int) -> float:
        world, rng = self.world, self.rng
        self.ran[size] += 1
        factor = world.warmup
        if self.ran[size] > 1:
            factor = rng.uniform(1, 3) if rng.random() < world.spikes else 1.0
        return world.micro_s(size, self.length) * factor * rng.lognormvariate(0, world.jitter)


def _probe(
    world: World, noise: float, sizes: tuple[int, ...], rng: random.Random
) -> tuple[float, float, int, int]:
    """Squared norms of gradients with |G|^2 = 1 and a per-sample covariance of trace `noise`.

    The mean gradient of the larger number of samples, and how far that of the smaller lies from it,
    are independent; with one micro-batch two steps' gradients are compared.
    """
    n_small = sizes[0]
    n_large = sum(sizes) if len(sizes) > 1 else 2 * n_small
    large = sq_norm(noise / n_large, world.dims, rng, mean=1.0)
    apart = sq_norm(noise / n_small - noise / n_large, world.dims, rng)
    return large + apart, large, n_small, n_large


def sq_norm(variance: float, dims: int, rng: random.Random, *, mean: float = 0.0) -> float:
    """The squared norm of a Gaussian vector of `dims` directions and this variance in all."""
    each = variance / dims
    along = mean + rng.gauss(0, math.sqrt(each))
    return along * along + each * 2 * rng.gammavariate((dims - 1) / 2, 1.0)
