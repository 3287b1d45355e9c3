"""What a data-parallel step takes on N devices, and what it teaches: arithmetic, nothing measured.

An all-reduce costs a latency a message and a time a byte; compute lies on the policy's own line
through measured micro-batches; efficiency, batch and learning rate are the policy's own functions.
Reads no clock, no device and no file, and knows no card: whoever calls brings the facts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybrid_magic.policy import batch as cutting
from hybrid_magic.policy import growth, timing
from hybrid_magic.policy.facts import Settings
from hybrid_magic.policy.noise_scale import NoiseEstimate

DEVICES = tuple(2**power for power in range(11))  # 1 to 1,024
BUCKET = 25 * 2**20  # bytes: DistributedDataParallel's default; Li et al. 2020, arXiv:2006.15704
HALF = 0.5  # of a step: communication above it is more than half
PAYS = 1.5  # a doubling of the devices that gives less than this gives under half of what it could
MOST_ACCUMULATED = 64
FACTOR = Settings(base=1, max_batch=1).growth_factor  # the package's default


@dataclass(frozen=True, slots=True)
class Link:
    """A link by its cost for a message of s bytes: `latency_s` + s / `bytes_per_s`."""

    name: str
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Machines of `per_machine` devices: `inside` joins these, `between` is a machine's one link
    to the others, which its devices share. `algorithm` is that between machines."""

    inside: Link
    between: Link
    per_machine: int = 8
    algorithm: str = "ring"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A model on one device.

    Attributes:
        points: (micro-batch, seconds of its forward and backward), measured.
        micro: largest micro-batch that fits.
        gradient_bytes: what every device sends in a step.
        base: global batch that the learning rate was chosen for.
        noise: gradient noise scale in samples.
        family: "sgd" or "adam": how the learning rate follows the batch.
        backward_ratio: share of the backward in a micro-batch, during which buckets travel.
    """

    name: str
    points: tuple[tuple[int, float], ...]
    micro: int
    optimizer_s: float
    gradient_bytes: int
    base: int
    noise: float
    family: str = "sgd"
    backward_ratio: float = 2 / 3


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step of `batch` samples; `exposed_s` is communication that nothing hides."""

    devices: int
    batch: int
    accumulation: int
    compute_s: float
    communication_s: float
    exposed_s: float

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def exposed_ratio(self) -> float:
        return self.exposed_s / self.step_s


def ring(link: Link, n: int, size: float) -> float:
    """Return the seconds of a ring all-reduce of `size` bytes over `n` ends.

    Source:
        Patarasuk & Yuan 2009, J. Parallel Distrib. Comput. 69(2): 2 (n - 1) messages of size / n.
    """
    return 2 * (n - 1) * (link.latency_s + size / n / link.bytes_per_s)


def tree(link: Link, n: int, size: float) -> float:
    """Return the seconds of a two-tree all-reduce: a reduction and a broadcast, each a pipeline of
    depth log2 n in the best whole number of pieces.

    Source:
        Sanders, Speck & Traeff 2009, Parallel Computing 35(12): two trees use a link's whole
        bandwidth; the pipeline's time is (depth - 1 + pieces) messages of size / pieces.
    """
    if n == 1:
        return 0.0
    depth, bytes_s = math.ceil(math.log2(n)), size / link.bytes_per_s
    if link.latency_s == 0:
        return 2 * bytes_s
    best = min(size, math.sqrt((depth - 1) * bytes_s / link.latency_s))  # no piece below a byte
    pieces = {max(1, math.floor(best)), max(1, math.ceil(best))}
    return 2 * min((depth - 1 + k) * (link.latency_s + bytes_s / k) for k in pieces)


ALGORITHMS: dict[str, Callable[[Link, int, float], float]] = {"ring": ring, "tree": tree}


def all_reduce(cluster: Cluster, devices: int, size: float) -> float:
    """Return the seconds of an all-reduce of `size` bytes: within each machine, then between
    machines over the link that its devices share.

    Source:
        Goyal et al. 2017, arXiv:1706.02677, section 4 (the three phases).
    """
    machines = -(-devices // cluster.per_machine)
    within = ring(cluster.inside, min(devices, cluster.per_machine), size)
    return within + ALGORITHMS[cluster.algorithm](cluster.between, machines, size)


@functools.cache
def _speed(points: tuple[tuple[int, float], ...]) -> timing.SpeedModel:
    return timing.model({size: timing.Timing(s, (s,) * timing.SURE) for size, s in points})


def exposed(backward_s: float, each_s: float, count: int) -> float:
    """Return the seconds that `count` buckets need after the backward has ended: they get ready at
    equal distances in it, the last at its end, and travel one after another, `each_s` long."""
    return max(each_s, count * each_s - backward_s * (1 - 1 / count))


def step(work: Work, cluster: Cluster, devices: int, batch: int, bucket: int | None) -> Step:
    """Return a step of `batch` samples, spread as evenly as they go: the fullest device counts.

    Gradients travel once a step, with the last micro-batch.

    Args:
        bucket: bytes of a bucket sent during the backward; None sends all after it.
    Raises:
        ValueError: fewer samples than devices.
    """
    if batch < devices:
        raise ValueError(f"batch={batch} on devices={devices}; wanted a sample each")
    speed, most = _speed(work.points), -(-batch // devices)
    cuts = -(-most // work.micro)
    size, larger = divmod(most, cuts)  # sizes that differ by one at most
    compute = larger * speed.seconds(size + 1) if larger else 0.0
    compute += (cuts - larger) * speed.seconds(size) + work.optimizer_s
    if devices == 1:
        return Step(1, batch, cuts, compute, 0.0, 0.0)
    count = 1 if bucket is None else max(1, math.ceil(work.gradient_bytes / bucket))
    each = all_reduce(cluster, devices, work.gradient_bytes / count)
    last = 0.0 if bucket is None else work.backward_ratio * speed.seconds(size)
    late = exposed(last, each, count)
    return Step(devices, batch, cuts, compute, count * each, late)


def goodput(work: Work, one: Step) -> float:
    """Return samples a second, each counted for what it teaches relative to the base batch."""
    return one.batch / one.step_s * growth.efficiency(one.batch, work.base, work.noise)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of the batch policy: `efficiency`, `max_batch` (None: what `MOST_ACCUMULATED`
    full micro-batches hold), and the bucket of the gradients (None: no overlap)."""

    efficiency: float
    max_batch: int | None
    bucket: int | None = BUCKET

    def most(self, work: Work, devices: int) -> int:
        """Return the largest batch that may be chosen, whatever it teaches."""
        return self.max_batch or max(work.base, devices * work.micro * MOST_ACCUMULATED)

    def ceiling(self, work: Work, devices: int) -> float:
        """Return the largest batch that may be chosen."""
        efficient = growth.largest_efficient(work.base, work.noise, self.efficiency)
        return min(self.most(work, devices), efficient)


def chosen(work: Work, cluster: Cluster, devices: int, asked: Asked) -> Step | None:
    """Return the step at which the goodput policy comes to rest: from the base batch (or a sample
    each) by its own moves. None where its ceiling leaves devices without a sample."""
    batch = max(work.base, devices)
    if devices > max(work.base, asked.ceiling(work, devices)):
        return None
    noise = NoiseEstimate(
        noise_scale=work.noise, middle=work.noise, grad_sq=1.0, grad_sq_error=0.0,
        variance=work.noise, variance_error=0.0, probes=0,
    )  # fmt: skip
    while True:
        standing = growth.Standing(
            batch=batch,
            base=work.base,
            max_batch=asked.most(work, devices),
            factor=FACTOR,
            least=asked.efficiency,
            may_grow=True,
            fits=lambda size: size >= devices,
        )
        move = growth.by_goodput(
            standing, noise, lambda size: step(work, cluster, devices, size, asked.bucket).step_s
        )
        if move is None or move.batch < batch:
            return step(work, cluster, devices, batch, asked.bucket)
        batch = move.batch


def best(work: Work, cluster: Cluster, devices: int, asked: Asked) -> Step | None:
    """Return the step of the most goodput among the base batch, the ceiling, and all sizes between
    that are as large on every device or full micro-batches: what one who sees all would choose."""
    ceiling = int(asked.ceiling(work, devices))
    each = [*range(1, work.micro), *(work.micro * k for k in range(1, MOST_ACCUMULATED + 1))]
    sizes = {work.base, ceiling, *(devices * n for n in each if devices * n <= ceiling)}
    steps = [step(work, cluster, devices, n, asked.bucket) for n in sizes if n >= devices]
    return max(steps, key=lambda one: goodput(work, one), default=None)


def ways(work: Work, cluster: Cluster, devices: int, asked: Asked) -> dict[str, Step | None]:
    """Return the steps to compare on `devices`; None where a device would be without a sample."""
    of = functools.partial(step, work, cluster, devices, bucket=asked.bucket)
    return {
        "fixed batch": of(work.base) if devices <= work.base else None,
        "policy": chosen(work, cluster, devices, asked),
        "goodput alone": chosen(work, cluster, devices, Asked(0.0, None, asked.bucket)),
        "weak scaling": of(devices * work.micro),
    }


def row(work: Work, one: Step) -> dict[str, Any]:
    """Return a step's numbers: its own, and what they come to."""
    return asdict(one) | {
        "step_s": one.step_s,
        "exposed_ratio": one.exposed_ratio,
        "samples_per_second": one.batch / one.step_s,
        "efficiency": growth.efficiency(one.batch, work.base, work.noise),
        "goodput": goodput(work, one),
        "lr_factor": growth.lr_factor("auto", work.family, one.batch, work.base, work.noise),
    }


def accumulated(work: Work, cluster: Cluster, devices: int, asked: Asked) -> tuple[int, float]:
    """Return the accumulation of full micro-batches with the most goodput, and its gain."""
    found = {
        k: goodput(work, step(work, cluster, devices, devices * work.micro * k, asked.bucket))
        for k in cutting.ladder(MOST_ACCUMULATED)
    }
    most = max(found, key=lambda k: found[k])
    return most, found[most] / found[1] - 1


def pays_to(goodputs: Sequence[float | None]) -> int:
    """Return to how many devices (1, 2, 4, ...) every doubling gives at least `PAYS`."""
    for place, (before, after) in enumerate(itertools.pairwise(goodputs)):
        if before is None or after is None or after < PAYS * before:
            return DEVICES[place]
    return DEVICES[len(goodputs) - 1]


def verdict(work: Work, cluster: Cluster, asked: Asked) -> dict[str, Any]:
    """Return where the batch policy stops paying, and where accumulation helps.

    `ceiling_at`: fewest devices on which the batch rests at its ceiling; `half_at`: on which over
    half of the policy's step is communication; None is nowhere. `pays_to`: see there.
    `accumulation`: {devices: (steps, gain)} where more than one gains `growth.WORTH` or more;
    `held_by_accumulation`: most devices on which the base batch needs it; 0 is none.
    """
    found = {n: ways(work, cluster, n, asked) for n in DEVICES}
    policy = [(n, steps["policy"]) for n, steps in found.items()]
    rests = lambda n, one: growth.grown(one.batch, FACTOR, asked.ceiling(work, n)) is None
    gains = {n: accumulated(work, cluster, n, asked) for n in DEVICES}
    return {
        "ceiling": asked.ceiling(work, 1),
        "ceiling_at": min((n for n, one in policy if one and rests(n, one)), default=None),
        "half_at": min((n for n, one in policy if one and one.exposed_ratio > HALF), default=None),
        "pays_to": {
            way: pays_to([one and goodput(work, one) for one in (found[n][way] for n in DEVICES)])
            for way in ("fixed batch", "policy", "goodput alone")
        },
        "accumulation": {n: gain for n, gain in gains.items() if gain[1] >= growth.WORTH},
        "held_by_accumulation": -(-work.base // work.micro) - 1,
    }
