"""Reading an option's value, from text or from Python.

A reader returns the value, or raises ValueError with the words that complete "wanted ...". Knows
no option.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable
from typing import Any

Reader = Callable[[Any], Any]


def integer(least: int) -> Reader:
    def read(value: Any) -> int:
        number: int | None
        try:
            number = int(value) if isinstance(value, str) else operator.index(value)
        except (TypeError, ValueError):
            number = None
        if isinstance(value, bool) or number is None or number < least:
            raise ValueError(f"a whole number of at least {least}")
        return number

    return read


def number(least: float, most: float = math.inf, *, above: bool = False) -> Reader:
    wanted = f"a number {'above' if above else 'of at least'} {least:g}"
    wanted += f" and at most {most:g}" if most < math.inf else ""

    def read(value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if (
            not math.isfinite(number)
            or number > most
            or number < least
            or (above and number == least)
        ):
            raise ValueError(wanted)
        return number

    return read


def one_of(*names: str, otherwise: Reader | None = None) -> Reader:
    def read(value: Any) -> Any:
        if isinstance(value, str) and value in names:
            return value
        if otherwise is None:
            raise ValueError("one of " + ", ".join(names))
        try:
            return otherwise(value)
        except ValueError as error:
            raise ValueError(f"one of {', '.join(names)}, or {error}") from None

    return read


_SIZE = re.compile(r"\s*([0-9.]+)\s*([KMGT]i?B|B)\s*", re.IGNORECASE)


def memory(value: Any) -> float | int:
    """Return a fraction of the device's memory (float), or a number of bytes (int)."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match:
        unit = match[2].lower()
        try:
            size = float(match[1])
        except ValueError:
            size = 0.0
        size *= (1024 if "i" in unit else 1000) ** "bkmgt".index(unit[0])
        if 1 <= size < math.inf:
            return int(size)
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        return value
    try:
        return number(0, 1, above=True)(value)
    except ValueError:
        raise ValueError("a fraction such as 0.9, or a size such as 8GiB") from None


def names(value: Any) -> tuple[str, ...]:
    given: Any = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError("names such as acc,ppl")
    names = tuple(str(name).strip() for name in given)  # type: ignore[reportUnknownVariableType]
    if not all(map(_is_name, names)):
        raise ValueError("names such as acc,ppl")
    return names


ARITHMETIC = ("fp32", "tf32", "mp")  # a variant has one of them at most
TECHNIQUES = (*ARITHMETIC, "ga", "abs")


def variants(value: Any) -> tuple[str, ...]:
    """Return the names of ways to train, each once: words of TECHNIQUES joined by +, or hybrid."""
    wanted = f"hybrid, or of {', '.join(TECHNIQUES)} one or several joined by +, such as mp+ga"
    given: Any = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(wanted)
    found = tuple("".join(str(name).split()) for name in given)  # type: ignore[reportUnknownVariableType]
    for name in found:
        words = name.split("+")
        if name != "hybrid" and not set(words) <= set(TECHNIQUES):
            raise ValueError(wanted)
        if len(set(words)) < len(words) or sum(word in ARITHMETIC for word in words) > 1:
            raise ValueError(f"each word once, and one of {', '.join(ARITHMETIC)} at most: {name}")
    if len(set(found)) < len(found):
        raise ValueError("each variant once")
    return found


def seeds(value: Any) -> tuple[int, ...]:
    """Return seeds: those of a list, also of text such as 0,1,2; of a number so many, from 0."""
    listed: Any = value.split(",") if isinstance(value, str) and "," in value else value
    try:
        several = isinstance(listed, (list, tuple, range))
        found = tuple(map(integer(0), listed)) if several else tuple(range(integer(1)(value)))  # type: ignore[reportUnknownArgumentType]
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found):
        raise ValueError("a number of seeds such as 5, or a list such as 0,1,2, each once")
    return found


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def name(value: Any) -> str:
    if not isinstance(value, str) or not _is_name(value):
        raise ValueError("a name such as run")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a name")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value
