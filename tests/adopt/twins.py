"""Runs a cell twice from one seed, plain and under the magic, and tells what came out different.

Lives in the notebook's process: tensors never cross the pipe. What a cell leaves is frozen into
plain values (`frozen.py`), so that the second run cannot touch what the first one left.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass
from typing import Any

import frozen
import numpy as np
import torch
from IPython.core.getipython import get_ipython
from IPython.utils.capture import capture_output

from hybrid_magic.engine.control import RunControl
from hybrid_magic.notebook import live

_EXACT = "--precision fp32 --batch fixed"
WHOLE = _EXACT + " --micro 12"  # the cells' batches are of 12
PIECES = _EXACT + " --micro 4"
_MAGIC = "%%hybrid_train"
_SHELLS_OWN = re.compile(r"_+|_?i+|_?i?\d+|_[ido]h|__\w+__|_i\d+|_exit_code|_pre_await_.*")
_UNSTEADY = re.compile(r"(CPU times|Wall time):.*\n?|0x[0-9a-f]+|Out\[\d+\]")
_GRAPH = re.compile(r", (grad_fn=<[^>]*>|requires_grad=True)")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Silent:
    """A view that shows nothing: what a cell prints is then all that there is."""

    def __init__(self, **_: Any) -> None:
        self.control = RunControl()

    def __call__(self, record: Any) -> None:
        pass

    def close(self, run: Any) -> None:
        pass


live.open_view = Silent  # type: ignore[assignment]
get_ipython().enable_gui = lambda gui=None: None  # `%matplotlib inline` asks for it


@dataclass
class Left:
    """What a cell left: its text, its error, and the notebook's values, frozen."""

    text: str
    error: str | None
    message: str
    values: dict[str, Any]


def differences(
    setup: str, source: str, after: str = "", *, pieces: bool = False, only: str = "everything"
) -> list[str]:
    """Return what differs between the plain cell and the hybrid one; a line a difference.

    Args:
        setup: an earlier cell. after: a later, plain cell.
        pieces: cut the batches in three, and compare to rounding; else every bit counts.
        only: "everything", or "weights": modules, parameters and optimizers alone.
    """
    return compare(plain(setup, source, after), hybrid(setup, source, after, pieces), pieces, only)


def unsteady(setup: str, source: str, after: str = "") -> list[str]:
    """Return what differs between two runs of the plain cell: nothing, or the cell is no test."""
    first = run(setup, source, after)
    if first.error is not None:
        return [f"the plain cell fails: {first.error}: {first.message}"]
    return compare(first, run(setup, source, after), False, "everything")


def other(setup: str, source: str, instead: str, *, pieces: bool = False) -> list[str]:
    """Return what differs between two plain cells: the comparison's own test."""
    return compare(run(setup, source, ""), run(setup, instead, ""), pieces, "everything")


def outcome(setup: str, source: str) -> dict[str, Any]:
    """Run a cell under the magic and return its error, its text, and what it changed."""
    _start(setup)
    shell = get_ipython()
    before, kept = frozen.freeze(_names(shell)), dict(_names(shell))
    seeds = frozen.freeze(_random_states())
    printed, result = _run(shell, f"{_MAGIC} {WHOLE}\n{source}")
    error = result.error_before_exec or result.error_in_exec
    now = _names(shell)
    changed = [f"{name} came or went" for name in now.keys() ^ kept.keys()]
    both = now.keys() & kept.keys()
    changed += [f"{name} is another object" for name in both if now[name] is not kept[name]]
    changed += frozen.differ(before, frozen.freeze(now), None)
    changed += frozen.differ(seeds, frozen.freeze(_random_states()), None, "random numbers")
    return {
        "error": None if error is None else type(error).__name__,
        "message": str(error),
        "text": printed,
        "changed": changed,
    }


def explained(setup: str, source: str) -> dict[str, Any]:
    """Return the plan of a cell, as JSON carries it."""
    import hybrid_magic as hm

    _start(setup)
    plan = hm.explain("%%hybrid_train\n" + source, get_ipython().user_ns)
    refusal = plan.refusal
    return {
        "form": plan.form,
        "loops": [[loop.line, loop.mode, str(loop.why)] for loop in plan.loops],
        "refusal": None if refusal is None else [refusal.line, refusal.text],
    }


def verdict(setup: str, source: str, after: str, pieces: bool) -> dict[str, Any]:
    """Return whether the hybrid cell was refused, and what is wrong with what came of it.

    In pieces the weights alone are compared: a verbatim body prints once a piece.
    """
    ran = hybrid(setup, source, after, pieces)
    if ran.error in ("UsageError", "HybridMagicError"):
        return {"refused": ran.message, "wrong": outcome(setup, source)["changed"]}
    only = "weights" if pieces else "everything"
    return {"refused": None, "wrong": compare(plain(setup, source, after), ran, pieces, only)}


def compare(one: Left, two: Left, pieces: bool, only: str) -> list[str]:
    rounding = frozen.ROUNDING if pieces else None
    if one.error != two.error:
        return [f"ended with {one.error} and with {two.error}: {one.message} {two.message}"]
    if only == "weights":
        return frozen.differ(frozen.weights(one.values), frozen.weights(two.values), rounding)
    found = frozen.differ_in_text(one.text, two.text, rounding)
    return found + frozen.differ(one.values, two.values, rounding)


@functools.lru_cache(maxsize=4)
def plain(setup: str, source: str, after: str) -> Left:
    return run(setup, source, after)


def hybrid(setup: str, source: str, after: str, pieces: bool) -> Left:
    return run(setup, f"{_MAGIC} {PIECES if pieces else WHOLE}\n{source}", after)


def run(setup: str, cell: str, after: str) -> Left:
    """Run setup, cell and the later cell in an empty notebook; return what they left."""
    _start(setup)
    shell = get_ipython()
    printed, result = _run(shell, cell)
    if after and result.success:
        more, result = _run(shell, after)
        printed += more
    error = result.error_before_exec or result.error_in_exec
    values = frozen.freeze({**_names(shell), "random numbers": _random_states()})
    message = "" if error is None else str(error)
    return Left(printed, None if error is None else type(error).__name__, message, values)


def _start(setup: str) -> None:
    shell = get_ipython()
    for name in set(shell.user_ns) - set(shell.user_ns_hidden):
        del shell.user_ns[name]
    _seed(0)
    printed, result = _run(shell, setup)
    assert result.success, f"the setup fails: {printed}"
    _seed(1)


def _run(shell: Any, cell: str) -> tuple[str, Any]:
    with capture_output() as printed:
        result = shell.run_cell(cell, store_history=True)
    text = _COLOURS.sub("", printed.stdout)
    return _GRAPH.sub("", _UNSTEADY.sub("", text)), result


def _seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - what notebooks use
    torch.manual_seed(number)


def _random_states() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]]  # noqa: NPY002


def _names(shell: Any) -> dict[str, Any]:
    """Return what the person has named."""
    hidden = shell.user_ns_hidden
    return {
        name: value
        for name, value in shell.user_ns.items()
        if name not in hidden and not _SHELLS_OWN.fullmatch(name)
    }
