"""Advice on how the model computes: precision, memory format, attention, the optimizer's kernels.

Each rule is a pure function of a Profile, and None where it has nothing to say. Knows no other
rule: which of them are worth saying is decided in `advice`.
"""

from __future__ import annotations

from ..findings import Advice
from ..profiles import Profile
from .evidence import bounded, count, pass_share, peak_bytes, peak_share, percent, size, stage_share

TENSOR_CORES_GAIN = 1.5  # times: the least that PyTorch names for mixed precision on them
CLEARLY_FASTER = 1.5  # times the fp32 peak: from here on a CPU gains by bf16 in spite of its casts
CHANNELS_LAST_GAIN = 1.22  # ResNet-50 in mixed precision, PyTorch's tutorial
FUSED_GAIN = 2.0  # one pass over the optimizer's state instead of one for each of its operations
PASSES = 4  # times that scores are read or written at least: scores, softmax, and both backwards


def reduce_precision(profile: Profile) -> Advice | None:
    """Speak where fp32 was asked for on a device that computes bf16 or fp16 natively, or was seen
    to compute it clearly faster.

    By the roofline: the operations' time at the fp32 peak shrinks by the ratio of the peaks, the
    bytes' time by a quarter (half the operations move half the bytes), the longer of the two is
    saved of, and what neither explains stays. Without peaks the passes are taken to be 1.5 times as
    fast. Activations halve, copies of the weights in reduced precision come on top.

    Source:
        Micikevicius et al. 2018, arXiv:1710.03740; PyTorch's blog, "What Every User Should Know
        About Mixed Precision Training" (1.5 times and more on tensor cores; what is bound by
        memory gains by its bytes).
    """
    setting, peaks = profile.setting, profile.work.peak_flops_per_s if profile.work else {}
    if setting.precision != "fp32" or profile.config.get("precision") == "auto":
        return None  # `auto` has measured, or found nothing: it knows better
    reduced = setting.native or ("bf16" if setting.device_type == "cpu" else "fp16")
    old, new = peaks.get("fp32", 0.0), peaks.get(reduced, 0.0)
    known = old > 0 and new > 0
    if not (new > CLEARLY_FASTER * old if known else setting.tensor_cores):
        return None
    passes = pass_share(profile)
    halved = peak_bytes(profile, "activations") - peak_bytes(profile, "parameters")
    faster = f"{count(new / old)} times as fast as fp32" if known else "natively"
    return Advice(
        f"Train in mixed precision ({reduced})",
        f"forward and backward take {percent(passes)} of a step in fp32, and this device computes "
        f"{reduced} {faster}",
        "--precision auto (leave --precision fp32 out)",
        saves=passes * (_saved_by_peaks(profile, old, new) if known else 1 - 1 / TENSOR_CORES_GAIN),
        frees=peak_share(profile, halved / 2) or None,
    )


def _saved_by_peaks(profile: Profile, old: float, new: float) -> float:
    work = profile.work
    if work is None or work.seconds <= 0:
        return 0.0
    arithmetic = bounded(work.flops.get("fp32", 0) / old / work.seconds)
    moving = 0.0
    if work.bandwidth_bytes_per_s:
        moving = bounded(work.traffic_bytes / work.bandwidth_bytes_per_s / work.seconds)
    return bounded(max(arithmetic, moving) - max(arithmetic * old / new, moving * 3 / 4))


def channels_last(profile: Profile) -> Advice | None:
    """Speak where convolutions in reduced precision do most of the work in the other format.

    Source:
        PyTorch's tutorial "Channels Last Memory Format" (22 % faster for ResNet-50, 8-35 % over
        other models, with tensor cores and mixed precision).
    """
    setting, work = profile.setting, profile.work
    if setting.channels_last is not False or setting.device_type != "cuda" or work is None:
        return None
    precision = work.main_precision
    if not setting.tensor_cores or precision not in ("bf16", "fp16"):
        return None
    share = bounded(setting.convolution_flops / work.total_flops)
    if share < 0.5:
        return None
    return Advice(
        "Lay images out with their channels last",
        f"convolutions in {precision} do {percent(share)} of the operations, and tensor cores take "
        "images channels last",
        "model = model.to(memory_format=torch.channels_last), and the images likewise",
        saves=pass_share(profile) * share * (1 - 1 / CHANNELS_LAST_GAIN),
    )


def fuse_attention(profile: Profile) -> Advice | None:
    """Speak where attention is written by hand, so that its scores go to memory and stay there.

    The scores' share of the passes' traffic is counted as time, at most half of it; each is written
    and read four times at least. All bytes that stay for the backward pass are freed.

    Source:
        Dao et al. 2022, arXiv:2205.14135 (traffic of the scores, 3.1, 3.2; BERT-large trains 15 %
        faster, GPT-2 3 times as fast); torch.nn.functional.scaled_dot_product_attention.
    """
    held = profile.setting.attention_bytes
    freed = peak_share(profile, held)
    if held <= 0:
        return None
    saved = 0.0
    if profile.work and profile.work.traffic_bytes:
        moved = PASSES * held * max(1.0, profile.batch / profile.micro)
        saved = pass_share(profile) * min(0.5, moved / profile.work.traffic_bytes)
    shape = profile.setting.attention_scores
    scores = f"scores of {shape}" if shape else "scores"
    of_peak = f", {percent(freed)} of the peak" if freed else ""
    return Advice(
        "Compute attention without keeping its scores",
        f"attention written out by hand makes {scores}, {size(held)} in all{of_peak}",
        "F.scaled_dot_product_attention(q, k, v, ...); of Transformers: "
        'attn_implementation="sdpa" in from_pretrained',
        saves=saved or None,
        frees=freed or None,
    )


def fuse_optimizer(profile: Profile) -> Advice | None:
    """Speak where the optimizer's step takes time, and its fused kernels are not in use.

    Source:
        torch.optim, "Algorithms" (fastest: fused, then foreach, then a loop). Adam's step moves
        seven numbers a weight if fused, some twice as many operation by operation. On two CPU cores
        AdamW was 3 times as fast fused (20 layers of 512 x 512, torch 2.15).
    """
    setting, stepping = profile.setting, stage_share(profile, "optimizer")
    if setting.fused is not False or not stepping:
        return None
    return Advice(
        "Use the optimizer's fused kernels",
        f"{setting.optimizer}'s step takes {percent(stepping)} of a step, and is not fused",
        f"fused=True in {setting.optimizer}(...)",
        saves=stepping * (1 - 1 / FUSED_GAIN),
    )
