"""Profiles for the advice: one of a well-tuned training, what changes it, and any at all.

The well-tuned one is a convolutional model in bf16 on a GPU: 100 ms for 128 samples, of which 30 ms
are the forward and 60 the backward pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from hybrid_magic.findings import (
    KINDS,
    STAGES,
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

GIB = 2**30
TUNED = dict(data=0.001, copy=0.002, forward=0.03, backward=0.06, optimizer=0.004, rest=0.003)
PARTS = {
    "setting": Setting(
        device_type="cuda",
        works_ahead=True,
        precision="bf16",
        native="bf16",
        tensor_cores=True,
        channels_last=True,
        convolution_flops=9 * 10**12,
        attention_bytes=0,
        attention_scores=None,
        optimizer="AdamW",
        fused=True,
        batch_statistics=False,
        loader_batch=128,
        grows=True,
        retries=0,
    ),
    "pipeline": Pipeline(
        loader_samples_per_s=4000.0,
        model_samples_per_s=1300.0,
        batches=20,
        workers=4,
        cores=16,
        pinned=True,
    ),
    "work": Work(
        flops={"bf16": 10**13},
        traffic_bytes=60 * 10**9,
        seconds=0.09,
        peak_flops_per_s={"fp32": 2e13, "bf16": 3e14},
        bandwidth_bytes_per_s=1.5e12,
    ),
}


def tuned(**changes: Any) -> Profile:
    """A well-tuned training; a change to "setting", "pipeline" or "work" is a dict of fields."""
    for name in PARTS.keys() & changes.keys():
        if isinstance(changes[name], dict):
            changes[name] = dataclasses.replace(PARTS[name], **changes[name])
    held: dict[str, Any] = {
        **dict(model="ResNet", device="A GPU", batch=128, micro=128, steps=8),
        **dict(step_s=0.1, step_spread_s=0.001, outside_s=0.001, reads=()),
        "stages": stages(),
        "modules": (),
        "peaks": (peak(8 * GIB),),
        "sizes": straight(0.002, 0.088 / 128),
        "line": line(fixed=1 * GIB, each=7 * GIB / 128, budget=72 * GIB),
        **PARTS,
    }
    return Profile(**held | changes)


def stages(**seconds: float) -> tuple[Stage, ...]:
    return tuple(Stage(name, s, None, None, 8) for name, s in (TUNED | seconds).items())


def straight(overhead: float, each: float, *samples: int) -> tuple[Size, ...]:
    """Sizes whose seconds lie along a line."""
    return tuple(Size(n, overhead + each * n, None) for n in samples or (32, 64, 128, 256))


def peak(total: int, activations: float = 0.8) -> Peak:
    """A peak with a tenth of it parameters."""
    kinds = {"parameters": total // 10, "activations": int(activations * total)}
    return Peak("backward", total, kinds)


def line(fixed: float, each: float, budget: int) -> MemoryLine:
    largest = int((budget - fixed) // each) if each else 10**6
    here = Fit("A GPU", int(budget / 0.9), budget, largest if largest > 0 else None)
    return MemoryLine(fixed, each, (here, Fit("T4", 16 * GIB, 14 * GIB, 1)))


def blocks(n: int, *, held: float, forward_s: float, kind: str = "Block") -> tuple[Module, ...]:
    """A model of `n` equal blocks of ten layers each, which hold and take so much in all."""

    def module(path: str, kind: str, share: float) -> Module:
        return Module(
            *(path, kind, 1, share * forward_s, None, 0, int(share * held)),
            peak_bytes=None,
            flops=None,
        )

    found = [module("", "Model", 1.0)]
    for i in range(n):
        found.append(module(f"{kind.lower()}s.{i}", kind, 1 / n))
        found += [module(f"{kind.lower()}s.{i}.{j}", "Linear", 1 / n / 10) for j in range(10)]
    return tuple(found)


SECONDS = st.just(0.0) | st.floats(1e-9, 1e4)  # no clock tells less
BYTES = st.integers(0, 2**40)
COUNTS = st.integers(1, 4096)
RATES = st.just(0.0) | st.floats(1e-3, 1e15)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


ANY_PROFILE = st.builds(
    Profile,
    model=st.just("M"),
    device=st.just("D"),
    batch=COUNTS,
    micro=COUNTS,
    steps=COUNTS,
    step_s=SECONDS,
    step_spread_s=maybe(SECONDS),
    stages=st.lists(
        st.builds(Stage, st.sampled_from(STAGES), SECONDS, maybe(SECONDS), maybe(SECONDS), COUNTS)
    ).map(tuple),
    modules=st.lists(
        st.builds(
            Module,
            st.sampled_from(["", "a", "a.0", "a.1", "a.0.x", "a.1.x", "b.0", "b.0.y"]),
            st.sampled_from(["Linear", "Block"]),
            COUNTS,
            maybe(SECONDS),
            maybe(SECONDS),
            BYTES,
            maybe(BYTES),
            maybe(BYTES),
            maybe(BYTES),
        )
    ).map(tuple),
    outside_s=maybe(SECONDS),
    peaks=st.lists(
        st.builds(
            Peak,
            st.sampled_from(STAGES),
            BYTES,
            st.dictionaries(st.sampled_from(KINDS), BYTES),
        )
    ).map(tuple),
    sizes=st.lists(st.builds(Size, COUNTS, SECONDS, maybe(BYTES))).map(tuple),
    line=maybe(
        st.builds(
            MemoryLine,
            st.floats(-1e12, 1e12),
            st.floats(-1e12, 1e12),
            st.lists(st.builds(Fit, st.just("D"), BYTES, BYTES, maybe(COUNTS))).map(tuple),
        )
    ),
    pipeline=st.builds(
        Pipeline,
        maybe(RATES),
        RATES,
        COUNTS,
        maybe(st.integers(0, 64)),
        st.integers(1, 64),
        maybe(st.booleans()),
    ),
    work=maybe(
        st.builds(
            Work,
            st.dictionaries(st.sampled_from(["fp32", "bf16", "fp16"]), BYTES),
            BYTES,
            SECONDS,
            st.dictionaries(st.sampled_from(["fp32", "bf16", "fp16"]), RATES),
            maybe(RATES),
        )
    ),
    reads=st.lists(st.builds(HostRead, st.just("line 1"), st.floats(0, 99), SECONDS)).map(tuple),
    setting=st.builds(
        Setting,
        device_type=st.sampled_from(["cuda", "cpu", "mps"]),
        works_ahead=st.booleans(),
        precision=st.sampled_from(["fp32", "bf16", "fp16", "own"]),
        native=maybe(st.sampled_from(["bf16", "fp16"])),
        tensor_cores=st.booleans(),
        channels_last=maybe(st.booleans()),
        convolution_flops=BYTES,
        attention_bytes=BYTES,
        attention_scores=maybe(st.just("2 x 2")),
        optimizer=st.just("SGD"),
        fused=maybe(st.booleans()),
        batch_statistics=st.booleans(),
        loader_batch=maybe(COUNTS),
        grows=st.booleans(),
        retries=st.integers(0, 3),
    ),
    config=st.dictionaries(
        st.sampled_from(["micro", "accum", "batch", "precision"]), st.sampled_from(["auto", 8])
    ),
)
