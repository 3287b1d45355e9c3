"""How a step of n samples is cut into micro-batches.

Knows sizes only: no memory, no time, no statistics. Every cut sums to n, in the order given.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise, takewhile


def ladder(most: int) -> list[int]:
    """Return the rounded sizes up to `most`: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, ...

    Powers of two and one size between each pair; multiples of 8 above 16. Few sizes, because
    kernels are tuned anew for each.
    """
    powers = (1 << i for i in range(most.bit_length() + 1))
    rungs = (
        rung for power in powers for rung in ((power,) if power < 2 else (power, power * 3 // 2))
    )
    return list(takewhile(lambda rung: rung <= most, rungs))


def rounded(size: int) -> int:
    """Return the largest size up to `size` that suits kernels: above 16 a multiple of 8 or more."""
    step = max(8, 1 << max(0, size.bit_length() - 5)) if size > 16 else 1
    return size - size % step


def even(n: int, micro: int) -> int:
    """Return the smallest size that cuts `n` into no more pieces than `micro` does, above 16 a
    multiple of 8 where that is not above `micro`."""
    if n <= micro:
        return n
    size = -(-n // -(-n // micro))
    eights = -(-size // 8) * 8
    return eights if size > 16 and eights <= micro else size


def shares(n: int, count: int) -> tuple[int, ...]:
    """Return `n` cut into `count` micro-batches (`n` at most) whose sizes differ by one at most."""
    size, larger = divmod(n, min(n, count))
    return (size + 1,) * larger + (size,) * (min(n, count) - larger)


def split(n: int, micro: int, *, floor: int = 1) -> tuple[int, ...]:
    """Return the sizes of a step: full micro-batches and one remainder.

    Args:
        n: samples in the step, at least 1.
        micro: most samples in a micro-batch.
        floor: fewest samples wanted in one (batch statistics): a smaller remainder is shared with
            its neighbours. Where floor and micro contradict each other micro wins, but a floor of 2
            or more never leaves a single sample unless n is 1 (micro 2 then makes a 3).
    Raises:
        ValueError: n or micro is below 1.
    """
    if n < 1 or micro < 1:
        raise ValueError(f"n={n} samples in micro-batches of {micro}; wanted at least 1 of each")
    if n <= micro:
        return (n,)
    count, rest = divmod(n, micro)
    if rest == 0 and (micro > 1 or floor < 2):
        return (micro,) * count
    if rest >= floor:
        return (micro,) * count + (rest,)
    if (micro + rest) // 2 >= floor:
        return (micro,) * (count - 1) + shares(micro + rest, 2)
    most = n // 2 if floor > 1 else n
    return shares(n, min(count + (rest > 0), most))


def rising(n: int, top: int, *, least: int = 2) -> tuple[int, ...]:
    """Return a first step's sizes: two rises to about `top`, then the rest; none below `least`, as
    people's code does not expect a single sample.

    `top` is well under what is thought to fit. Each size is a point (size, peak bytes, seconds) of
    the micro-batch model; twice, because the first time of a size pays for its kernels.
    """
    least = min(least, n)
    top = ladder(max(least, min(top, n)))[-1]
    rise = sorted({ladder(max(least, top // part))[-1] for part in (4, 2, 1)})
    sizes: list[int] = []
    for size in rise + rise:
        if sum(sizes) + size <= n:
            sizes.append(size)
    rest = n - sum(sizes)
    if 0 < rest < least:
        sizes[-1], rest = sizes[-1] + rest, 0
    return (*sizes, *split(rest, top, floor=least)) if rest else tuple(sizes)


def share(n: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return where the share of process `rank` in `n` samples begins and ends; the first ones have
    one more where they are not alike."""
    return -(-n * rank // ranks), -(-n * (rank + 1) // ranks)


def merged(sizes: Sequence[int], least: int) -> list[int]:
    """Return micro-batches put together with their neighbours until each has `least` samples; all
    of one size, where that keeps the largest nearer to what it was."""
    found: list[int] = []
    for size in sizes:
        if found and found[-1] < least:
            found[-1] += size
        else:
            found.append(size)
    if len(found) > 1 and found[-1] < least:
        found[-2:] = [found[-2] + found[-1]]
    if max(found) > max(sizes):
        alike = shares(sum(sizes), max(1, sum(sizes) // least))
        found = min(found, list(alike), key=max)
    return found


def proportional(n: int, whole: Sequence[int]) -> list[int]:
    """Return how a process cuts its `n` samples of a step whose micro-batches have `whole` samples
    over all processes: as many pieces, or fewer where it has fewer samples."""
    total = sum(whole)
    ends = [-(-end * n // total) for end in accumulate(whole)]
    return [end - start for start, end in pairwise([0, *ends]) if end > start]
