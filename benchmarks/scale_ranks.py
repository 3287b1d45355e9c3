"""What the calculation is fed with and held against: facts published, and its small end measured.

Measured are 1, 2 and 3 local gloo processes that train one small model by turns. Gradients lie in
one buffer that a plain `all_reduce` sums after the backward: no overlap, no copies. All three
processes stay up; those that a phase does not need wait at a barrier, so that every ratio is formed
within a round. Knows no cost model but through `scale_model`.
"""

from __future__ import annotations

import datetime as dt
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn

from . import measure, models, scale_model
from .scale_model import Cluster, Link, Work

# Latency of a step of a ring (protocol "Simple") and NVLink 3's ceiling of 235 GB/s: NCCL's own
# tuning table, src/graph/tuning.cc at 01afd20. Other rates are nominal, one way.
LINKS = {
    link.name: link
    for link in (
        Link("NVLink 3", 3.4e-6, 235e9),
        Link("NVLink 2", 3.4e-6, 150e9),
        Link("PCIe 4 x16", 5.7e-6, 32e9),
        Link("PCIe 3 x16", 5.7e-6, 16e9),
        *(Link(f"{gigabits} Gb", 9.6e-6, gigabits * 1e9 / 8) for gigabits in (25, 100, 200, 400)),
    )
}
BETWEEN = ("100 Gb", "25 Gb", "200 Gb", "400 Gb")  # the first is shown in detail
OVERHEAD_S = 0.02  # assumed: of a ResNet-50 micro-batch of no samples; published is one size only


def _resnet(card: str, rate: float, size: int = 256) -> Work:
    """ResNet-50 from images a second at one size, and `OVERHEAD_S`."""
    taken = size / rate
    half = OVERHEAD_S + (taken - OVERHEAD_S) / 2
    return Work(
        name=f"ResNet-50, {card}", points=((size // 2, half), (size, taken)), micro=size,
        optimizer_s=0.0, gradient_bytes=4 * 25_557_032, base=256, noise=10_000.0,
    )  # fmt: skip


# Rates: NVIDIA/DeepLearningExamples, PyTorch, READMEs of ConvNets/resnet50v1.5 (21.03) and BERT
# (19.07; SQuAD, 384 tokens, V100 16 GB). They hold the optimizer's time. Noise scales are assumed.
WORKS = {
    "resnet50-a100": (_resnet("A100 mixed", 2470), "NVLink 3"),
    "resnet50-v100": (_resnet("V100 mixed", 1200), "NVLink 2"),
    "bert-large-v100": (
        Work(
            name="BERT-large, V100 mixed", points=((4, 4 / 35.88), (10, 10 / 45.2)), micro=10,
            optimizer_s=0.0, gradient_bytes=2 * 335_141_888, base=32, noise=1000.0, family="adam",
        ),
        "NVLink 2",
    ),
}  # fmt: skip
# (work, devices, samples each, published throughput over that of one device)
PUBLISHED = (
    ("resnet50-a100", 8, 256, 16621 / 2470),
    ("resnet50-v100", 8, 256, 8322 / 1200),
    ("bert-large-v100", 4, 4, 120.0 / 35.88),
    ("bert-large-v100", 8, 4, 227.84 / 35.88),
    ("bert-large-v100", 4, 10, 163.6 / 45.2),
    ("bert-large-v100", 8, 10, 327.2 / 45.2),
)

NOTES = """**A calculation, not a measurement**: no GPU was used, and nothing is claimed of one.
An all-reduce costs a latency a message and a time a byte (ring: Patarasuk & Yuan 2009; tree:
Sanders et al. 2009), first within machines of {per_machine}, then between them over one link a
machine (Goyal et al. 2017, section 4). Buckets of {bucket:.0f} MiB travel during the backward (2/3
of a micro-batch) of the last micro-batch; *no overlap* sends all after it. Links: {links}.
Latencies and NVLink 3's 235 GB/s are those of NCCL's tuning table (src/graph/tuning.cc, 01afd20),
other speeds nominal. Throughput is from NVIDIA's DeepLearningExamples (READMEs of ResNet-50, 21.03,
and BERT fine-tuning, 19.07). Seconds of a micro-batch lie on the policy's line through it.
**Assumed**: for ResNet-50 256 samples a device and, as one size is published, {overhead_ms:.0f} ms
at no samples; for BERT 2 bytes a gradient; all noise scales and base batches.

*Goodput* is samples a second, each counted for what it teaches (`policy.growth.efficiency`); one of
a base batch counts 1. *Fixed* keeps the base batch. *Policy* is where `growth.by_goodput` comes to
rest at the package's defaults (efficiency at least {efficiency}, 16 x base at most), *goodput
alone* the same with `--efficiency 0` and no bound. *Weak* gives each device its largest
micro-batch. *Of the best*: the policy's goodput over that of a search of all sizes within its
rules. *LR* is what the policy multiplies the learning rate by; *comm.* is communication that the
backward does not hide, of a step. A dash: some device would have no sample.

Left out: stragglers, the input pipeline, congestion, kernels that slow down while a collective
runs, memory beyond the largest micro-batch, batch statistics, the rise of the noise scale while
training, and sharded, pipeline and tensor parallelism. Real clusters are slower than this: see the
published numbers beside it.
"""

SMALL_END = """## The small end, measured: gloo on this machine

Seconds of a step over those predicted, medians of {n} rounds with their 95 % intervals. *From one
process*: its step and an all-reduce of the gradients, whose latency and rate two other sizes told
between two processes; with more processes than cores, compute takes as many times longer.
*From all at once*: the step of as many processes that exchange nothing. Likely reasons of what is
above 1, not told apart here: each step waits for the slowest, an all-reduce on CPUs needs the cores
that compute, and so do other programs (the load above, when it began).
"""

PROCESSES = 3
INPUTS, WIDTH, CLASSES = 256, 1024, 10
SIZES = (8, 16, 32, 64, 128)  # micro-batches whose seconds are measured
SMALL, LARGE = 2**16, 2**23  # bytes of the two all-reduces: below and above the gradient's
REDUCES = 12


@dataclass(frozen=True)
class Plan:
    """How much is measured: `steps` of `micro` samples in each phase of each of `rounds`."""

    rounds: int = 9
    steps: int = 10
    micro: int = 64
    seed: int = 1


def measured(plan: Plan) -> dict[str, Any]:
    """Return what rank 0 saw.

    Returns:
        `gradient_bytes`; `points` (seconds of forward and backward by micro-batch) and
        `optimizer_s` of one process alone; `rounds`, each with the median seconds of a step `alone`
        and of 2 and 3 processes that exchange (`together_2`) or do not (`apart_2`), and of a
        `small` and a `large` all-reduce between two.
    Raises:
        torch.multiprocessing.ProcessRaisedException: a process failed; the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, args=(folder, asdict(plan)), nprocs=PROCESSES)
        return json.loads(pathlib.Path(folder, "found.json").read_text())


def compared(found: dict[str, Any], plan: Plan, cores: int) -> tuple[Link, list[dict[str, Any]]]:
    """Return the link that two all-reduces of each round tell, in the median round, and measured
    over predicted seconds of a step. With more processes than cores, compute is taken to be as many
    times slower; the second ratio predicts from processes that run at once without exchange."""
    links = [_told(one) for one in found["rounds"]]
    lines = []
    for n in (2, 3):
        predicted: dict[str, list[float]] = {"from one process": [], "from all at once": []}
        for one, link in zip(found["rounds"], links, strict=True):
            crowd = max(1.0, n / cores)
            starts = (one["alone"] * crowd, one[f"apart_{n}"])
            for name, compute in zip(predicted, starts, strict=True):
                work = Work(
                    name="", points=((plan.micro, compute),), micro=plan.micro, optimizer_s=0.0,
                    gradient_bytes=found["gradient_bytes"], base=plan.micro, noise=1.0,
                )  # fmt: skip
                cluster = Cluster(link, link, per_machine=n)
                step = scale_model.step(work, cluster, n, n * plan.micro, None)
                predicted[name].append(one[f"together_{n}"] / step.step_s)
        ratios = {name: measure.bootstrap(values) for name, values in predicted.items()}
        middle = measure.bootstrap([1000 * one[f"together_{n}"] for one in found["rounds"]])
        crowded = " (oversubscribed)" if n > cores else ""
        lines.append({"processes": f"{n}{crowded}", "measured, ms": middle, **ratios})
    latency, rate = (
        measure.bootstrap([getattr(link, name) for link in links]).value
        for name in ("latency_s", "bytes_per_s")
    )
    return Link("gloo, this machine", latency, rate), lines


def _told(one: dict[str, float]) -> Link:
    """Return the link on which a ring of two takes the seconds of both all-reduces."""
    taken = max(one["large"] - one["small"], 1e-9)
    rate = (LARGE - SMALL) / taken
    return Link("gloo", max(0.0, (one["small"] - SMALL / rate) / 2), rate)


def here(found: dict[str, Any], plan: Plan) -> Work:
    """Return the small model as measured on one core here; its noise scale is assumed."""
    points = tuple((size, seconds) for size, seconds in found["points"])
    return Work(
        name="MLP, one core here", points=points, micro=points[-1][0],
        optimizer_s=found["optimizer_s"], gradient_bytes=found["gradient_bytes"],
        base=plan.micro, noise=1000.0,
    )  # fmt: skip


def published(bucket: int | None) -> list[dict[str, Any]]:
    """Return published throughput over one device's, beside what is calculated."""
    lines = []
    for name, devices, each, reached in PUBLISHED:
        work, inside = WORKS[name]
        cluster = Cluster(LINKS[inside], LINKS[BETWEEN[0]])
        one, some, bare = (
            scale_model.step(work, cluster, n, n * each, how).step_s
            for n, how in ((1, bucket), (devices, bucket), (devices, None))
        )
        found = {"calculated": devices * one / some, "no overlap": devices * one / bare}
        key = {"work": work.name, "devices": devices, "samples each": each}
        lines.append(key | {"published": reached} | found)
    return lines


class Trained:
    """The model of one process, its batch, and all its gradients in one buffer."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.model = models.mlp(INPUTS, WIDTH, 2, CLASSES)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        parameters = list(self.model.parameters())
        self.gradient = torch.zeros(sum(p.numel() for p in parameters))
        for p, part in zip(
            parameters, self.gradient.split([p.numel() for p in parameters]), strict=True
        ):
            p.grad = part.view_as(p)
        self.x = torch.randn(max(SIZES), INPUTS)
        self.y = torch.randint(0, CLASSES, (max(SIZES),))

    def backward(self, size: int) -> None:
        self.gradient.zero_()
        F.cross_entropy(self.model(self.x[:size]), self.y[:size]).backward()

    def step(self, size: int, group: Any, processes: int) -> None:
        self.backward(size)
        if group is not None:
            dist.all_reduce(self.gradient, group=group)
            self.gradient.div_(processes)
        self.optimizer.step()


def _rank(rank: int, folder: str, plan_fields: dict[str, int]) -> None:
    """One process, from its first line to its last."""
    torch.set_num_threads(1)
    plan = Plan(**plan_fields)
    dist.init_process_group(
        "gloo",
        init_method=pathlib.Path(folder, "store").as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=dt.timedelta(seconds=60),
    )
    try:
        groups = {2: dist.new_group([0, 1]), 3: dist.group.WORLD}
        found = _rounds(rank, plan, Trained(plan), groups)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        pathlib.Path(folder, "found.json").write_text(json.dumps(found))


def _rounds(rank: int, plan: Plan, work: Trained, groups: dict[int, Any]) -> dict[str, Any]:
    """Return what the phases took on this rank; every rank goes through all of them."""
    small, large = (torch.zeros(size // 4) for size in (SMALL, LARGE))
    phases: dict[str, tuple[int, int, Callable[[], Any]]] = {  # processes, repeats, work
        "alone": (1, plan.steps, lambda: work.step(plan.micro, None, 1)),
        "small": (2, REDUCES, lambda: dist.all_reduce(small, group=groups[2])),
        "large": (2, REDUCES, lambda: dist.all_reduce(large, group=groups[2])),
    }
    for n in groups:
        apart = lambda: work.step(plan.micro, None, 1)
        together = lambda n=n: work.step(plan.micro, groups[n], n)
        phases |= {
            f"apart_{n}": (n, plan.steps, apart),
            f"together_{n}": (n, plan.steps, together),
        }
    points = {size: _phase(rank, 1, 12, lambda size=size: work.backward(size)) for size in SIZES}
    optimizer_s = _phase(rank, 1, 12, work.optimizer.step)
    names, rounds = list(phases), []
    for number in range(plan.rounds + 1):  # the first is a warm-up
        one = {name: _phase(rank, *phases[name]) for name in names}
        rounds += [one] if number else []
        names.append(names.pop(0))
    return {
        "gradient_bytes": 4 * work.gradient.numel(),
        "points": list(points.items()),
        "optimizer_s": optimizer_s,
        "rounds": rounds,
    }


def _phase(rank: int, processes: int, repeats: int, work: Callable[[], Any]) -> float | None:
    """Return the median seconds of `work()` while ranks below `processes` do it, None on others."""
    dist.barrier()
    times = []
    for _ in range(repeats + 1 if rank < processes else 0):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:]) if times else None
