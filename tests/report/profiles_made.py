"""Profiles to show: of a GPU, of a CPU, tiny, unknown, hostile. Their numbers add up."""

from __future__ import annotations

import dataclasses

from hybrid_magic.findings import (
    KINDS,
    STAGES,
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
from hybrid_magic.profiles import Profile

MIB, GIB = 2**20, 2**30
HOSTILE = "<script>alert('x')</script>&\""

ADVICE = (
    Advice(
        "Load data in 4 worker processes",
        "the model waits 31 % of a step: the loader alone gives 410 samples/s, the model 640",
        "--workers 4, or num_workers=4 in the DataLoader",
        saves=0.31,
    ),
    Advice(
        "Compute in bf16",
        "97 % of the operations are done in fp32, which this device does at an eighth of the speed",
        "leave --precision fp32 out",
        saves=0.22,
        frees=0.38,
    ),
    Advice(
        "Recompute layer1 in the backward pass",
        "layer1 holds 1.9 GiB of the 4.6 GiB of activations and takes 9 % of the forward pass",
        "torch.utils.checkpoint.checkpoint(self.layer1, x, use_reentrant=False)",
        frees=0.4,
    ),
)
SETTING = Setting(
    device_type="cuda",
    works_ahead=True,
    precision="fp16",
    native="fp16",
    tensor_cores=True,
    channels_last=True,
    convolution_flops=3 * 10**12,
    attention_bytes=0,
    attention_scores=None,
    optimizer="SGD",
    fused=True,
    batch_statistics=True,
    loader_batch=256,
    grows=True,
    retries=0,
)
CARDS = (("T4 16 GB", 14.7), ("P100 16 GB", 15.9), ("L4 24 GB", 22.0), ("A100 40 GB", 39.4),
         ("A100 80 GB", 79.2))  # fmt: skip


def fits(device: str, total: float, line: tuple[float, float]) -> tuple[Fit, ...]:
    """Return what `--memory 0.9` leaves of each card, and the largest size by the line."""
    made = []
    for name, gib in ((device, total), *CARDS):
        budget = int(0.9 * gib * GIB)
        largest = int((budget - line[0]) / line[1])
        made.append(Fit(name, int(gib * GIB), budget, largest if largest > 0 else None))
    return tuple(made)


def stages(*seconds: float, host: tuple[float, ...] | None = None) -> tuple[Stage, ...]:
    return tuple(
        Stage(name, time, 0.02 * time, None if host is None else host[at], 8)
        for at, (name, time) in enumerate(zip(STAGES, seconds, strict=True))
    )


def peaks(*amounts: tuple[str, tuple[float, ...]]) -> tuple[Peak, ...]:
    """Return peaks of kinds in MiB."""
    made = []
    for stage, mib in amounts:
        kinds = {name: int(amount * MIB) for name, amount in zip(KINDS, mib, strict=True)}
        made.append(Peak(stage, sum(kinds.values()), kinds))
    return tuple(made)


def resnet_modules(step_s: float = 0.2) -> tuple[Module, ...]:
    """Return ResNet-50's 150-odd modules with plausible numbers; a level adds up."""
    leaves: list[tuple[str, str, float]] = [
        ("conv1", "Conv2d", 6.0), ("bn1", "BatchNorm2d", 2.5), ("relu", "ReLU", 0.4),
        ("maxpool", "MaxPool2d", 1.1),
    ]  # fmt: skip
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            here = f"layer{layer}.{block}"
            for at, weight in ((1, 1.0), (2, 2.0), (3, 1.1)):
                leaves.append((f"{here}.conv{at}", "Conv2d", weight * (1.25 - 0.08 * layer)))
                leaves.append((f"{here}.bn{at}", "BatchNorm2d", 0.8 - 0.15 * layer))
            leaves.append((f"{here}.relu", "ReLU", 0.5 - 0.1 * layer))
            if block == 0:
                leaves.append((f"{here}.downsample.0", "Conv2d", 1.2))
                leaves.append((f"{here}.downsample.1", "BatchNorm2d", 0.4))
    leaves += [("avgpool", "AdaptiveAvgPool2d", 0.1), ("fc", "Linear", 0.2)]
    return tree(leaves, step_s, "ResNet")


def tree(leaves: list[tuple[str, str, float]], step_s: float, root: str) -> tuple[Module, ...]:
    """Return the leaves and what they are in, a third of the time forward."""
    whole = sum(weight for *_, weight in leaves)
    paths = [""]
    for path, *_ in leaves:
        parts = path.split(".")
        paths += [".".join(parts[:at]) for at in range(1, len(parts) + 1)]
    kinds = {path: kind for path, kind, _ in leaves}
    made = []
    for path in dict.fromkeys(paths):
        inside = [w for name, _, w in leaves if not path or f"{name}.".startswith(f"{path}.")]
        part = sum(inside) / whole
        made.append(
            Module(
                path=path,
                kind=kinds.get(path, "Sequential") if path else root,
                calls=1,
                forward_s=0.29 * step_s * part,
                backward_s=0.55 * step_s * part,
                parameter_bytes=int(94 * MIB * part),
                activation_bytes=int(4700 * MIB * part),
                peak_bytes=int((300 + 4700 * part) * MIB),
                flops=int(3.1e12 * part),
            )
        )
    return tuple(made)


GPU_LINE = (0.42 * GIB, 38.5 * MIB)
GPU = Profile(
    model="ResNet",
    device="cuda:0 (Tesla T4)",
    batch=256,
    micro=128,
    steps=8,
    step_s=0.2134,
    step_spread_s=0.0031,
    stages=stages(
        0.0112, 0.0041, 0.0615, 0.1174, 0.0098, 0.0112,
        host=(0.0112, 0.0009, 0.0283, 0.0411, 0.0022, 0.0061),
    ),
    modules=resnet_modules(0.2134),
    outside_s=0.0007,
    peaks=peaks(
        ("data", (94, 0, 94, 0, 74, 12)),
        ("copy", (94, 94, 94, 0, 148, 20)),
        ("forward", (94, 94, 94, 4700, 148, 160)),
        ("backward", (94, 94, 94, 4712, 148, 402)),
        ("optimizer", (94, 94, 94, 0, 74, 96)),
        ("rest", (94, 94, 94, 0, 74, 30)),
    ),
    sizes=tuple(
        Size(n, 0.006 + 0.00131 * n, int(GPU_LINE[0] + GPU_LINE[1] * n)) for n in (16, 32, 64, 128)
    ),
    line=MemoryLine(*GPU_LINE, fits("Tesla T4", 14.6, GPU_LINE)),
    pipeline=Pipeline(2140.0, 1312.0, 24, 4, 8, True),
    work=Work(
        {"fp16": 3_080_000_000_000, "fp32": 20_000_000_000},
        52_000_000_000,
        0.1789,
        {"fp16": 42.3e12, "fp32": 7.9e12},
        2.61e11,
    ),
    reads=(),
    setting=SETTING,
    advice=ADVICE,
    notes=("the profile was taken on a copy: the model and the optimizer are as they were",),
    seconds=14.2,
    environment={"torch": "2.15.0", "python": "3.11.9", "hybrid_magic": "0.5.0"},
)  # fmt: skip

CPU = dataclasses.replace(
    GPU,
    model="SmallCNN",
    device="cpu (x86_64)",
    batch=32,
    micro=32,
    step_s=0.0312,
    step_spread_s=None,
    stages=tuple(
        dataclasses.replace(stage, host_seconds=None, spread=None)
        for stage in stages(0.0021, 0.0, 0.0088, 0.0169, 0.0021, 0.0013)
    ),
    modules=tree(
        [("features.0", "Conv2d", 4.0), ("features.1", "ReLU", 0.5), ("features.2", "Conv2d", 5.0),
         ("features.3", "MaxPool2d", 0.6), ("classifier", "Linear", 0.8)],
        0.0312,
        "SmallCNN",
    ),
    outside_s=0.0004,
    peaks=peaks(
        ("forward", (1.2, 1.2, 2.4, 31, 0.4, 2)), ("backward", (1.2, 1.2, 2.4, 33, 0.4, 6)),
        ("optimizer", (1.2, 1.2, 2.4, 0, 0.4, 1.2)),
    ),
    sizes=tuple(Size(n, 0.002 + 0.0007 * n, int((8 + 1.1 * n) * MIB)) for n in (4, 8, 16, 32)),
    line=MemoryLine(8 * MIB, 1.1 * MIB, fits("this machine", 12.5, (8 * MIB, 1.1 * MIB))),
    pipeline=Pipeline(905.0, 1201.0, 12, 0, 2, None),
    work=Work({"fp32": 2_400_000_000}, 410_000_000, 0.0257, {"fp32": 2.1e11}, 1.9e10),
    setting=dataclasses.replace(
        SETTING, device_type="cpu", works_ahead=False, precision="fp32", native=None,
        tensor_cores=False, optimizer="AdamW", fused=None, batch_statistics=False, loader_batch=32,
    ),
    advice=ADVICE[:1],
    notes=(),
    seconds=3.4,
)  # fmt: skip

TINY = dataclasses.replace(
    CPU,
    model="MLP",
    batch=8,
    micro=8,
    step_s=0.000412,
    stages=stages(0.00003, 0.0, 0.00009, 0.00017, 0.00008, 0.000042),
    modules=tree([("0", "Linear", 2.0), ("1", "ReLU", 0.2), ("2", "Linear", 1.0)], 0.0004, "MLP"),
    peaks=(Peak("backward", 41_210, {"parameters": 12_040, "gradients": 12_040, "rest": 17_130}),),
    sizes=(Size(8, 0.00026, 41_210),),
    line=None,
    outside_s=None,
    advice=(),
)

UNKNOWN = Profile(
    model="Net",
    device="cpu",
    batch=1,
    micro=1,
    steps=1,
    step_s=0.5,
    step_spread_s=None,
    stages=(),
    modules=(Module("", "Net", 1, None, None, 0, None, None, None),),
    outside_s=None,
    peaks=(),
    sizes=(Size(1, 0.4, None),),
    line=None,
    pipeline=Pipeline(None, 2.0, 0, None, 1, None),
    work=None,
    reads=(),
    setting=dataclasses.replace(CPU.setting, optimizer="SGD"),
)

READS = dataclasses.replace(
    GPU,
    reads=(
        HostRead("cell, line 7: running += loss.item()", 1.0, 0.0312),
        HostRead("cell, line 8: correct += (out.argmax(1) == y).sum().item()", 2.0, 0.0044),
    ),
    advice=(),
)

HOSTILE_NAMES = dataclasses.replace(
    READS,
    model=HOSTILE,
    device=HOSTILE,
    stages=(Stage(HOSTILE, 0.1, None, None, 1),),
    modules=(Module(HOSTILE, HOSTILE, 1, 0.1, 0.1, 1, 1, 1, 1),),
    peaks=(Peak(HOSTILE, 10, {HOSTILE: 10}),),
    line=MemoryLine(1.0, 1.0, (Fit(HOSTILE, 10, 9, 8),)),
    work=Work({HOSTILE: 10}, 10, 1.0, {HOSTILE: 10.0}, 1.0),
    reads=(HostRead(HOSTILE, 1.0, 0.1),),
    setting=dataclasses.replace(SETTING, optimizer=HOSTILE, precision=HOSTILE),
    advice=(Advice(HOSTILE, HOSTILE, HOSTILE, 0.5, 0.5),),
    notes=(HOSTILE,),
    environment={"torch": HOSTILE},
)

_DEEP = "a_very_long_name_of_an_attribute_that_nobody_would_choose_but_somebody_did"
LONG_PATHS = dataclasses.replace(
    GPU,
    model="AModelWithAnUncommonlyLongNameForItsClass",
    modules=tree(
        [
            (".".join([f"{_DEEP}_{group}", *[_DEEP] * 4, str(at)]), "Linear" * 6, 1.0 + at)
            for group in range(60)
            for at in range(20)
        ],
        0.2,
        "AModelWithAnUncommonlyLongNameForItsClass",
    ),
)

MADE = {
    "a GPU": GPU,
    "a CPU": CPU,
    "a tiny model": TINY,
    "all unknown": UNKNOWN,
    "host reads": READS,
    "hostile names": HOSTILE_NAMES,
    "long paths": LONG_PATHS,
}
