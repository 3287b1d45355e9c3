"""Numbers as a person reads them: sizes, times, counts, batches.

Every quantity takes `None` for unknown and says so; nothing here knows where the words are shown.
"""

from __future__ import annotations

import math
import re

UNKNOWN = "unknown"
TIMES, PLUS_MINUS = "\N{MULTIPLICATION SIGN}", "\N{PLUS-MINUS SIGN}"


_BEFORE_UNIT = re.compile(
    r"(?<=\d) (?=(?:%|(?:[KMG]i)?B|[kMGTP]?FLOP(?:/s)?|[mµ]?s|min|h|steps?|samples(?:/s)?|times)"
    r"(?!\w))"
)


def unbroken(text: str) -> str:
    """Return `text` with each number kept on one line with its unit."""
    return _BEFORE_UNIT.sub("\N{NO-BREAK SPACE}", text)


def count(number: int | float | None) -> str:
    """Return a count with its thousands marked: 12,345."""
    return UNKNOWN if number is None else f"{number:,.0f}"


def value(number: float | None, digits: int = 3) -> str:
    """Return a measured value to `digits` significant digits: 0.412, 2.31, 1.2e-05."""
    if number is None:
        return UNKNOWN
    if not math.isfinite(number):
        return "not finite"
    if number and not 1e-3 <= abs(number) < 1e5:
        return f"{number:.{digits - 1}e}"
    before_point = math.floor(math.log10(abs(number))) + 1 if abs(number) >= 1 else 1
    return f"{number:.{max(0, digits + (abs(number) < 1) - before_point)}f}"


def size(number: int | float | None) -> str:
    """Return bytes in binary units: 312 MiB, 5.1 GiB."""
    if number is None:
        return UNKNOWN
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << power:
            amount = number / (1 << power)
            return f"{amount:.0f} {unit}" if amount >= 100 else f"{amount:.1f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float | None) -> str:
    """Return a time in the units that a person says it in: 12 ms, 8.2 s, 2 min 05 s, 1 h 03 min."""
    if seconds is None:
        return UNKNOWN
    if seconds < 0.0995:
        return f"{value(seconds * 1e3, 2)} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def seconds(number: float) -> str:
    """Return a training time to three digits: 0.129 s, 41.3 s; from a minute on 2 min 05 s."""
    return duration(number) if number >= 59.95 else f"{value(number)} s"


def brief(seconds: float | None, spread: float | None = None) -> str:
    """Return a part of a step to three digits, with its spread: 45.2 µs, 3.21 ms, 210 ± 3.1 ms."""
    if seconds is None or seconds >= 59.95:
        return duration(seconds)
    larger = max(seconds, spread or 0.0)
    power, unit = 1e6, "µs"
    if larger >= 0.9995e-3:
        power, unit = (1.0, "s") if larger >= 0.9995 else (1e3, "ms")
    beside = "" if spread is None else f" {PLUS_MINUS} {value(spread * power, 2)}"
    return f"{value(seconds * power)}{beside} {unit}" if seconds else "0 s"


def calm(number: float) -> str:
    """Return a time that passes in whole seconds, so that it does not flicker."""
    return f"{number:.0f} s" if number < 59.5 else duration(number)


def rate(samples_per_second: float | None) -> str:
    """Return a speed: 12,300 samples/s."""
    if samples_per_second is None:
        return UNKNOWN
    words = count(samples_per_second) if samples_per_second >= 100 else value(samples_per_second)
    return f"{words} samples/s"


def flops(number: float | None) -> str:
    """Return an amount of floating-point operations: 3.92 GFLOP."""
    if number is None:
        return UNKNOWN
    for least, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= least:
            return f"{value(number / least)} {letter}FLOP"
    return f"{count(number)} FLOP"


def flops_rate(flops_per_s: float | None) -> str:
    """Return a speed of arithmetic: 12.1 TFLOP/s."""
    return UNKNOWN if flops_per_s is None else f"{flops(flops_per_s)}/s"


def share(ratio: float) -> str:
    """Return a ratio as a percentage: 8.3 %, 61 %."""
    percent = 100 * ratio
    return f"{percent:.1f} %" if percent < 9.95 else f"{percent:.0f} %"


def batch(global_size: int, micro_size: int, micro_batches: int, processes: int = 1) -> str:
    """Return a global batch and how it is cut: 96 = 48 x 2, or 100 in 4 pieces of up to 32; of
    several processes 96 = 24 x 2 on each of 2."""
    where = "" if processes == 1 else f" on each of {processes}"
    if global_size == micro_size * micro_batches * processes:
        return f"{count(global_size)} = {count(micro_size)} {TIMES} {count(micro_batches)}{where}"
    pieces = f" in {count(micro_batches)} pieces of" if micro_batches > 1 else ","
    return f"{count(global_size)}{pieces} up to {count(micro_size)}{where}"


def change(before: object, after: object) -> str:
    """Return what went from what to what: 64 → 96; a setting given back is "auto"."""
    return f"{_setting(before)} → {_setting(after)}"


def _setting(thing: object) -> str:
    if thing is None:
        return "auto"
    if isinstance(thing, float):
        return f"{thing:g}"
    return str(thing)
