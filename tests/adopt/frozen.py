"""What a notebook's values were at one moment, and what differs between two such moments.

Knows torch's objects and plain values, and looks into instances of the notebook's own classes; of
anything else only the type counts. Runs nothing.
"""

from __future__ import annotations

import copy
import math
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import nn

# Sums of 12 float32 numbers in another order differ by 1e-6 of their size; ten to fifteen steps of
# an optimizer that divides by the gradient's own size make at most some hundred times that.
ROUNDING = (1e-3, 2e-5)  # relative, absolute
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)\b", re.IGNORECASE)
_CLOCK = {"start", "since", "begin", "began", "t0", "tic", "start_time", "end", "elapsed", "took"}
_WEIGHTS = "weights"
_MOST = 12  # differences told of one comparison


@dataclass
class Frozen:
    """A value whose kind matters: compared by kind, then by its parts."""

    kind: str
    parts: Any = None


def freeze(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Return `value` as tensors of its own, numbers, text, lists, dicts and `Frozen`."""
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return value
    if id(value) in above or len(above) > 12:
        return Frozen("seen above")
    within = (*above, id(value))
    if isinstance(value, nn.Parameter):
        return Frozen("Parameter", [value.detach().clone(), freeze(value.grad)])
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return Frozen("array", value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, nn.Module):
        return Frozen(_WEIGHTS, _module(value))
    if isinstance(value, torch.optim.Optimizer):
        return Frozen(_WEIGHTS, freeze(value.state_dict(), within))
    if isinstance(value, (torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)):
        return Frozen(type(value).__name__, freeze(value.state_dict(), within))
    if isinstance(value, (list, tuple, deque)):
        return Frozen(type(value).__name__, [freeze(item, within) for item in value])
    if isinstance(value, (set, frozenset)):
        return Frozen(type(value).__name__, sorted(map(repr, value)))
    if isinstance(value, dict):
        return {name: freeze(item, within) for name, item in value.items()}
    if type(value).__module__ == "__main__" and hasattr(value, "__dict__"):
        return Frozen(type(value).__name__, freeze(vars(value), within))
    return Frozen(type(value).__name__)


def _module(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"training": [part.training for part in module.modules()]}
    found.update({name: copy.deepcopy(item) for name, item in module.state_dict().items()})
    found.update({f"{name}.grad": freeze(item.grad) for name, item in module.named_parameters()})
    return found


def weights(value: Any) -> Any:
    """Return of a frozen namespace only modules, parameters and optimizers, gradients left out."""
    if isinstance(value, Frozen) and value.kind == _WEIGHTS:
        parts = value.parts.items()
        return {name: item for name, item in parts if not str(name).endswith(".grad")}
    if isinstance(value, Frozen) and value.kind == "Parameter":
        return value.parts[0]
    if isinstance(value, Frozen):
        return weights(value.parts)
    if isinstance(value, dict):
        return {name: weights(item) for name, item in value.items()}
    if isinstance(value, list):
        return [weights(item) for item in value]
    return None


def differ(one: Any, two: Any, rounding: tuple[float, float] | None, where: str = "") -> list[str]:
    """Return where two frozen values differ; `rounding` None asks for every bit."""
    found: list[str] = []
    for line in _differ(one, two, rounding, where):
        found.append(line)
        if len(found) == _MOST:
            return [*found, "..."]
    return found


def _differ(one: Any, two: Any, rounding: Any, where: str) -> Iterator[str]:
    if type(one) is not type(two):
        yield f"{where}: {_short(one)} is now {_short(two)}"
    elif isinstance(one, Frozen):
        if one.kind != two.kind:
            yield f"{where}: {one.kind} is now {two.kind}"
        else:
            yield from _differ(one.parts, two.parts, rounding, where)
    elif isinstance(one, dict):
        for name in {**one, **two}:
            if name in _CLOCK:
                continue
            if name not in one or name not in two:
                yield f"{where}[{name}] is only in the {'first' if name in one else 'second'}"
            else:
                yield from _differ(one[name], two[name], rounding, f"{where}[{name}]")
    elif isinstance(one, list):
        if len(one) != len(two):
            yield f"{where}: {len(one)} items are now {len(two)}"
        for index, (left, right) in enumerate(zip(one, two, strict=False)):
            yield from _differ(left, right, rounding, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        yield from _tensors_differ(one, two, rounding, where)
    elif isinstance(one, float):
        if not _near(one, two, rounding):
            yield f"{where}: {one!r} is now {two!r}"
    elif isinstance(one, str):
        for line in differ_in_text(one, two, rounding):
            yield f"{where}: {line}"
    elif one != two:
        yield f"{where}: {_short(one)} is now {_short(two)}"


def _tensors_differ(one: Any, two: Any, rounding: Any, where: str) -> Iterator[str]:
    if one.shape != two.shape or one.dtype != two.dtype:
        yield f"{where}: {one.dtype}{list(one.shape)} is now {two.dtype}{list(two.shape)}"
    elif rounding is None or not one.dtype.is_floating_point:
        if not torch.equal(one.nan_to_num(), two.nan_to_num()):
            apart = (one.double() - two.double()).abs().max().item()
            yield f"{where}: tensor differs by up to {apart:.3g}"
    elif not torch.allclose(one, two, *rounding, equal_nan=True):
        apart = (one - two).abs().max().item()
        yield f"{where}: tensor differs by up to {apart:.3g} of {one.abs().max().item():.3g}"


def differ_in_text(one: str, two: str, rounding: tuple[float, float] | None) -> list[str]:
    """Return the lines that differ; with `rounding`, numbers with a point may be near.

    A printed number may also differ by one in its last place: rounding can fall either way.
    """
    found = []
    for index, (left, right) in enumerate(
        zip_longest(one.splitlines(), two.splitlines(), fillvalue="(nothing)"), 1
    ):
        if left != right and not (rounding and _lines_near(left, right, rounding)):
            found.append(f"text line {index}: {left!r} is now {right!r}")
    return found[:_MOST]


def _lines_near(one: str, two: str, rounding: tuple[float, float]) -> bool:
    # a sign or a digit more may move what follows: columns of a printed tensor
    skeletons = [re.sub(r"\s+", " ", _NUMBER.sub("#", line)) for line in (one, two)]
    numbers = [_NUMBER.findall(line) for line in (one, two)]
    return skeletons[0] == skeletons[1] and all(
        _numbers_near(left, right, rounding) for left, right in zip(*numbers, strict=True)
    )


def _numbers_near(one: str, two: str, rounding: tuple[float, float]) -> bool:
    if one == two:
        return True
    if "." not in one and "e" not in one.lower():
        return False
    digits, _, power = one.lower().partition("e")
    last_place = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    return abs(float(one) - float(two)) <= 1.01 * last_place or _near(
        float(one), float(two), rounding
    )


def _near(one: float, two: float, rounding: tuple[float, float] | None) -> bool:
    if rounding is None:
        return one == two or (math.isnan(one) and math.isnan(two))
    return math.isclose(one, two, rel_tol=rounding[0], abs_tol=rounding[1]) or (
        math.isnan(one) and math.isnan(two)
    )


def _short(value: Any) -> str:
    text = f"{value.kind}" if isinstance(value, Frozen) else repr(value)
    return text if len(text) < 80 else text[:77] + "..."
