"""Advice on what the model waits for: its samples, their way to the device, a host that reads.

Each rule is a pure function of a Profile, and None where it has nothing to say. Knows no other
rule: which of them are worth saying is decided in `advice`.
"""

from __future__ import annotations

import math

from ..findings import Advice
from ..profiles import Profile
from .evidence import LEAST, bounded, count, counted, duration, percent, stage_share

WAITING = 0.1  # of a step: less waiting for data than this is not what makes it slow
SPARE = 1.25  # what workers should load more than the model takes: their samples differ
HANDOVER_S = 1e-3  # of a batch from another process; see load_faster
PINNED_SPEED = 2.0  # times the speed of a copy out of pageable memory


def load_faster(profile: Profile) -> Advice | None:
    """Speak where a step waits for its samples, and more processes or less work a sample help.

    A loader that is faster than the model makes it wait too, where both take turns in one process:
    one worker then hides it. With `n` workers n times the rate of one is expected, and a step is
    never shorter than the model alone or than all that it does besides waiting; on a CPU, whose
    cores the model shares with the workers, not shorter than the work of both on all cores. Handing
    over a batch costs about a millisecond: where loading it costs no more, workers make it slower.

    Source:
        PyTorch Performance Tuning Guide, "Enable asynchronous data loading and augmentation";
        torch.utils.data.DataLoader warns of more workers than cores. The handing over was measured:
        batches of 32 x 16 numbers, ready before they were asked for, torch 2.15, two shared cores:
        2.0 ms from one worker, 2.8 ms from two, 0.5 ms made in the process itself.
    """
    line, step_s = profile.pipeline, profile.step_s
    waiting = stage_share(profile, "data")
    if waiting < WAITING or line.model_samples_per_s <= 0:
        return None
    measured = line.loader_samples_per_s
    loading_s = profile.batch / measured if measured else waiting * step_s
    model_s = profile.batch / line.model_samples_per_s
    least_s = max((1 - waiting) * step_s, model_s)
    if not profile.setting.works_ahead:
        least_s = max(least_s, model_s + loading_s / max(1, line.cores))
    now = line.workers or 0
    if not now:
        least_s += HANDOVER_S
    one_s = loading_s * max(1, now)  # of one process
    # Never one alone: a slow sample would still be waited for.
    wanted = max(2, math.ceil(SPARE * one_s / least_s))
    workers = max(1, min(wanted, line.cores))
    said = (
        f"the model waits for data {percent(waiting)} of a step: the loader alone gives "
        f"{count(profile.batch / loading_s)} samples/s{_by(line.workers)}, the model alone "
        f"{count(line.model_samples_per_s)}"
    )
    if workers > now:
        saved = 1 - max(least_s, one_s / workers) / step_s
        processes = "1 worker process" if workers == 1 else f"{workers} worker processes"
        do = _workers_option(profile, workers)
        return Advice(f"Load data in {processes}", said, do, saves=bounded(saved))
    if wanted <= now:
        return None  # workers enough by their rate: what is waited for is not more of them
    saved = 1 - max(least_s, loading_s / 2) / step_s
    return Advice(
        "Do less work for each sample in the loader",
        f"{said}, and its workers have all {counted(line.cores, 'core')}",
        "decode and resize the data once and keep the result, or transform whole batches on the "
        "device; halving the work of a sample is what is counted here",
        saves=bounded(saved),
    )


def _by(workers: int | None) -> str:
    return f" with {counted(workers, 'worker')}" if workers else ""


def _workers_option(profile: Profile, workers: int) -> str:
    if profile.pipeline.workers is None:
        return f"give the dataset to a DataLoader with num_workers={workers}"
    if profile.setting.grows:
        return f"--workers {workers}, or num_workers={workers} in the DataLoader"
    return (
        f"num_workers={workers} in the DataLoader (an IterableDataset must share its samples out "
        "by get_worker_info)"
    )


def pin_memory(profile: Profile) -> Advice | None:
    """Speak where batches are copied to the device out of pageable memory.

    Counted is the speed of the copy alone; a pinned one can overlap with computing besides.

    Source:
        NVIDIA, "How to Optimize Data Transfers in CUDA C/C++" (pinned copies are about twice as
        fast, more on some machines); PyTorch's tutorial on pin_memory and non_blocking (let the
        DataLoader pin: pinning in the training's own thread costs what it brings).
    """
    copying = stage_share(profile, "copy")
    if profile.pipeline.pinned is not False or not profile.setting.works_ahead or not copying:
        return None
    known = profile.pipeline.workers is not None
    return Advice(
        "Pin the memory that batches are copied from",
        f"copying batches to the device takes {percent(copying)} of a step, out of memory that is "
        "not pinned",
        "pin_memory=True in the DataLoader" + ("" if known else " (make the loader one)"),
        saves=bounded(copying * (1 - 1 / PINNED_SPEED)),
    )


def read_less(profile: Profile) -> Advice | None:
    """Speak where a line makes the host wait for the device in every micro-batch.

    The wait itself is not lost: the device computes meanwhile. Lost is what it then waits for the
    host, which prepared nothing. Without reads a step lasts as long as the longer of what the host
    does (the step less the wait) and what the device does (the wait at least), so that the shorter
    of the two is the most to be won; half of it is counted, as the device is not idle all the time
    that the host works. Where that is too little to count, the line is named without a number.

    Source:
        PyTorch Performance Tuning Guide, "Avoid unnecessary CPU-GPU synchronization".
    """
    reads = sorted(profile.reads, key=lambda read: -read.seconds)
    times = sum(read.times for read in reads)
    waited = bounded(sum(read.seconds for read in reads) / profile.step_s)
    if not profile.setting.works_ahead or (times < 1 and waited < WAITING):
        return None
    lines = " and ".join(read.where for read in reads[:2])
    if len(reads) > 2:
        lines += f" and {counted(len(reads) - 2, 'more line')}"
    saved = min(waited, 1 - waited) / 2
    return Advice(
        "Let the host run ahead of the device",
        f"{lines} {'makes' if len(reads) == 1 else 'make'} the host wait for the device "
        f"{_often(times)}, {duration(waited * profile.step_s)} of a step "
        f"({percent(waited)})",
        "add up loss.detach() on the device, and read it (.item(), print, float) once an epoch",
        saves=saved if saved >= LEAST else None,
    )


def _often(times: float) -> str:
    if times < 1:
        return f"every {count(1 / times)} micro-batches" if times > 0 else "now and then"
    return "once a micro-batch" if times < 1.05 else f"{count(times)} times a micro-batch"
