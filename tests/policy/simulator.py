"""A device, a loss and a gradient as a few numbers, to run the steering against.

Knows nothing of how the steering decides. Time is simulated; randomness comes from one seed.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter, deque
from dataclasses import dataclass

from hybrid_magic.policy import steering
from hybrid_magic.policy.facts import Settings, StepFacts

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class World:
    """What a step costs, needs and teaches.

    Seconds of a micro-batch: overhead + per_sample * size, and `spill_s` for each sample above
    `cache`. Bytes: fixed + per_sample * size, plus the optimizer's state once it has stepped. The
    noise scale goes from `noise` to `noise_end` over the run, or jumps there at `decay` of it; the
    gradient has `dims` directions. Norms of a gradient take `norm_s`.
    """

    overhead_s: float = 5e-3
    sample_s: float = 1e-4
    spill_s: float = 0.0
    cache: int = 0
    optimizer_s: float = 1e-3
    norm_s: float = 0.0
    fixed_bytes: int = GIB
    optimizer_bytes: int = GIB // 2
    sample_bytes: int = 20 * 2**20
    capacity_bytes: int = 16 * GIB
    jitter: float = 0.02
    spikes: float = 0.01  # share of times that are up to three times too long
    warmup: float = 5.0  # factor on the first time of a size
    noise: float = 500.0
    noise_end: float = 500.0
    decay: float | None = None
    dims: int = 64
    loss_spread: float = 0.1
    prefetch: int = 2  # steps planned ahead
    reads_memory: bool = True

    def micro_s(self, size: int) -> float:
        spilled = self.spill_s * max(0, size - self.cache)
        return self.overhead_s + self.sample_s * size + spilled

    def bytes(self, size: int) -> int:
        return self.fixed_bytes + self.optimizer_bytes + self.sample_bytes * size

    def most(self, bytes_: int) -> int:
        return (bytes_ - self.bytes(0)) // self.sample_bytes

    def noise_at(self, share: float) -> float:
        if self.decay is not None:
            share = float(share >= self.decay)
        return self.noise * (self.noise_end / self.noise) ** share

    def best_step_s(self, batch: int, budget_bytes: int) -> float:
        """Seconds of a step of `batch`, cut in the fewest micro-batches that fit."""
        count = -(-batch // max(1, min(batch, self.most(budget_bytes))))
        return count * self.overhead_s + batch * self.sample_s + self.optimizer_s


@dataclass
class Trace:
    """What a simulated run did, a list item a step."""

    batches: list[int]
    sizes: list[tuple[int, ...]]
    seconds: list[float]
    progress: list[float]  # samples x efficiency
    changes: list
    ooms: int
    state: steering.State

    @property
    def goodput(self) -> float:
        return sum(self.progress) / sum(self.seconds)

    def rate(self, first: int, last: int | None = None) -> float:
        part = slice(first, last)
        return sum(self.batches[part]) / sum(self.seconds[part])


def simulate(world: World, settings: Settings, steps: int, *, seed: int = 0, hook=None) -> Trace:
    """Run `steps` steps; `hook(step, facts)` may alter what the steering is told of a step."""
    rng = random.Random(seed)
    state = steering.init(settings)
    trace = Trace([], [], [], [], [], 0, state)
    ran: Counter[int] = Counter()
    failed = math.inf
    if settings.batch_statistics:  # measured before the first step, and rolled back
        first = [max(1, settings.base // part) for part in (4, 2, 1)] * 2
        points = [
            (n, _time(world, n, ran, rng), world.fixed_bytes + world.sample_bytes * n)
            for n in first
        ]
        state, trace.changes[:] = steering.rehearsed(state, points)
    queue: deque[steering.StepPlan] = deque()
    for step in range(steps):
        while len(queue) <= world.prefetch:
            plan, state = steering.plan(state, None)
            queue.append(plan)
        plan = queue.popleft()
        batch = sum(plan.sizes)
        sizes = plan.sizes
        if max(sizes) >= failed:  # planned before that size failed
            sizes = steering.recut(state, batch)
        wasted = 0.0
        made = world.optimizer_bytes if step else 0
        while max(sizes) * world.sample_bytes + world.fixed_bytes + made > world.capacity_bytes:
            trace.ooms, failed = trace.ooms + 1, max(sizes)
            wasted += world.micro_s(max(sizes))
            state, changes = steering.oom(state, max(sizes), step)
            trace.changes += changes
            smaller = steering.recut(state, batch)
            assert max(smaller) < max(sizes), "nothing smaller is left"
            sizes = smaller
        times = tuple(_time(world, size, ran, rng) for size in sizes)
        peaks = tuple(world.fixed_bytes + made + world.sample_bytes * size for size in sizes)
        noise = world.noise_at(step / steps)
        facts = StepFacts(
            step=step,
            sizes=sizes,
            loss=1 + rng.gauss(0, world.loss_spread) * (settings.base / batch) ** 0.5,
            grad_norm=(1 + noise / batch) ** 0.5 * rng.lognormvariate(0, 0.2),
            micro_seconds=times,
            optimizer_seconds=(world.optimizer_s + world.norm_s * plan.probe)
            * rng.lognormvariate(0, world.jitter),
            peaks=peaks if world.reads_memory and step == 0 else None,
            peak_bytes=max(peaks) + world.optimizer_bytes * (not step)
            if world.reads_memory
            else None,
            noise=_probe(world, noise, sizes, rng) if plan.probe else None,
        )
        state, changes = steering.observe(state, hook(step, facts) if hook else facts)
        trace.changes += changes
        trace.batches.append(batch)
        trace.sizes.append(sizes)
        norms_s = world.norm_s * plan.probe * (1 + (len(sizes) == 1))
        trace.seconds.append(sum(times) + world.optimizer_s + norms_s + wasted)
        trace.progress.append(batch * (noise + settings.base) / (noise + batch))
    trace.state = state
    return trace


def _time(world: World, size: int, ran: Counter[int], rng: random.Random) -> float:
    ran[size] += 1
    factor = world.warmup
    if ran[size] > 1:
        factor = rng.uniform(1, 3) if rng.random() < world.spikes else 1.0
    return world.micro_s(size) * factor * rng.lognormvariate(0, world.jitter)


def _probe(world: World, noise: float, sizes: tuple[int, ...], rng: random.Random):
    """Squared norms of gradients drawn with |G|^2 = 1 and a covariance of trace `noise`."""
    if len(sizes) == 1:  # two steps' gradients, as for models with batch statistics
        pair = [gradient(noise, sizes[0], world.dims, rng) for _ in range(2)]
        small = sum(map(sq_norm, pair)) / 2
        return (
            small,
            sq_norm([(a + b) / 2 for a, b in zip(*pair, strict=True)]),
            sizes[0],
            2 * sizes[0],
        )
    n, share = sum(sizes), sizes[0] / sum(sizes)
    first = gradient(noise, sizes[0], world.dims, rng)
    rest = gradient(noise, n - sizes[0], world.dims, rng)
    large = [a * share + b * (1 - share) for a, b in zip(first, rest, strict=True)]
    apart = sq_norm([a - b for a, b in zip(first, large, strict=True)])
    return sq_norm(large) + apart, sq_norm(large), sizes[0], n


def gradient(noise: float, n: int, dims: int, rng: random.Random) -> list[float]:
    """The mean gradient of n samples: |G|^2 = 1, trace of the per-sample covariance = noise."""
    sigma, mean = (noise / dims / n) ** 0.5, dims**-0.5
    return [rng.gauss(mean, sigma) for _ in range(dims)]


def sq_norm(vector: list[float]) -> float:
    return sum(x * x for x in vector)


def oracle_goodput(world: World, settings: Settings, steps: int) -> float:
    """The goodput of one who knows the world, under the same rules: no growth before 24 probes (one
    in four steps), 40 steps between changes, growth and efficiency within what was asked."""
    batch, progress, seconds = settings.base, 0.0, 0.0
    budget = settings.budget_bytes or world.capacity_bytes
    for step in range(steps):
        noise = world.noise_at(step / steps)
        if step >= 96 and (step - 96) % 40 == 0:
            cap = settings.max_batch
            if settings.efficiency > 0:
                cap = min(cap, (noise + settings.base) / settings.efficiency - noise)
            reach = range(batch, int(min(batch * settings.growth_factor, cap)) + 1)
            reach = [b for b in reach if b == batch or b <= 16 or b % 8 == 0]
            batch = max(
                reach, key=lambda b: _goodput(world, settings, b, noise, budget), default=batch
            )
        seconds += world.best_step_s(batch, budget) * (1 + 2 * world.spikes)
        progress += batch * (noise + settings.base) / (noise + batch)
    return progress / seconds


def _goodput(world: World, settings: Settings, batch: int, noise: float, budget: int) -> float:
    efficiency = (noise + settings.base) / (noise + batch)
    return batch * efficiency / world.best_step_s(batch, budget)


def worlds(count: int, seed: int = 1) -> list[tuple[World, Settings]]:
    """Devices from launch-bound to saturated at a single sample, small memories and large ones."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        sample_s = 10 ** rng.uniform(-5, -2.5)
        base = rng.choice([8, 16, 32, 50, 64, 100, 128, 256])
        sample_bytes = int(10 ** rng.uniform(5.5, 8))
        fixed = int(10 ** rng.uniform(8, 9.7))
        world = World(
            sample_s=sample_s,
            overhead_s=sample_s * 10 ** rng.uniform(-1, 2),
            optimizer_s=sample_s * 10 ** rng.uniform(-1, 2),
            sample_bytes=sample_bytes,
            fixed_bytes=fixed,
            optimizer_bytes=fixed // 2,
            capacity_bytes=int(fixed * 1.5 + sample_bytes * base * 10 ** rng.uniform(-0.5, 1.5)),
            noise=10 ** rng.uniform(1.5, 3.5),
            jitter=rng.choice([0.01, 0.03, 0.1]),
            prefetch=rng.choice([0, 1, 2, 4]),
        )
        world = dataclasses.replace(world, noise_end=world.noise * 10 ** rng.uniform(0, 1))
        budget = int(0.9 * world.capacity_bytes)
        if world.most(budget) >= 8:
            found.append((world, Settings(base=base, max_batch=16 * base, budget_bytes=budget)))
    return found
