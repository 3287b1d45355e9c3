"""The statements of a step as leaves: what is never divided, under the headers that may be.

A `with` or an `if` can be written twice, each time with some of its body; everything else stays
whole. Knows no loss and no loop.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .names import FUNCTIONS, bound, changed, own_scope, reads
from .roles import last_name, text_of
from .units import LOOPS

_CONTEXTS = ("set_grad_enabled", "enable_grad", "no_grad", "autocast", "record_function",
             "nullcontext", "detect_anomaly", "set_detect_anomaly", "inference_mode",
             "sdpa_kernel", "sdp_kernel", "catch_warnings")  # fmt: skip
_PLAIN_ROOTS = {"torch", "np", "numpy", "math", "random", "time", "len", "min", "max", "int",
                "float", "abs", "range", "round", "bool", "str", "list", "tuple", "dict", "next",
                "iter", "enumerate", "zip", "isinstance", "getattr"}  # fmt: skip
_PLAIN_METHODS = {"to", "cuda", "cpu", "float", "double", "half", "long", "int", "bool", "type",
                  "view", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "transpose",
                  "contiguous", "size", "dim", "numel", "items", "keys", "values", "get", "item",
                  "type_as", "requires_grad_", "clone", "detach"}  # fmt: skip


@dataclass
class Leaf:
    """A statement that is never divided, where it stands, and the headers that it stands under."""

    node: ast.stmt
    place: int
    headers: list[ast.stmt]
    header_reads: set[str]
    reads: set[str]
    bound: set[str]
    changed: set[str]
    jumps: bool

    @property
    def writes(self) -> set[str]:
        return self.bound | self.changed


def flatten(body: Sequence[ast.stmt], around: Sequence[ast.stmt] | None = None) -> list[Leaf]:
    """Return the leaves of a step's statements in the order of the text.

    Args:
        around: statements; what holds none of them is not divided. None: whatever can be is.
    """
    found: list[Leaf] = []
    _flatten(body, [], found, None if around is None else set(map(id, around)))
    return found


def _flatten(
    body: Sequence[ast.stmt], headers: list[ast.stmt], found: list[Leaf], around: set[int] | None
) -> None:
    for node in body:
        held = around is None or any(id(part) in around for part in ast.walk(node))
        if held and _divisible(node):
            inner: Any = node
            _flatten(inner.body, [*headers, node], found, around)
            _flatten(getattr(inner, "orelse", []), [*headers, node], found, around)
            continue
        seen = set().union(*map(header_reads, headers))
        found.append(
            Leaf(node, len(found), headers, seen, reads(node), bound(node), changed(node),
                 _jumps(node))
        )  # fmt: skip


def _divisible(node: ast.stmt) -> bool:
    """Return whether a compound statement may be written twice, each time with some of its body."""
    if isinstance(node, ast.With):
        return all(item.optional_vars is None for item in node.items)
    return isinstance(node, ast.If) and (_holds_backward(node) or not _jumps(node))


def _holds_backward(node: ast.AST) -> bool:
    return any(
        isinstance(part, ast.Call) and last_name(part.func) == "backward"
        for part in own_scope(node)
    )


def _jumps(node: ast.AST, within: bool = False) -> bool:
    """Return whether a statement may leave the step's body."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
        return False
    if isinstance(node, (ast.Break, ast.Continue)):
        return not within
    if isinstance(node, ast.Return):
        return True
    within = within or isinstance(node, LOOPS)
    return any(_jumps(child, within) for child in ast.iter_child_nodes(node))


def header_reads(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.If):
        return reads(node.test)
    return set().union(*(reads(item.context_expr) for item in getattr(node, "items", [])))


def repeatable(node: ast.stmt) -> bool:
    """Return whether a header can run twice in a step: once for each part of its body."""
    if isinstance(node, ast.If):
        return plain(node.test) and not _asks_anew(node.test)
    contexts = [item.context_expr for item in getattr(node, "items", [])]
    return all(
        last_name(context.func if isinstance(context, ast.Call) else context) in _CONTEXTS
        for context in contexts
    )


def _asks_anew(node: ast.AST) -> bool:
    """Return whether `node` may come to something else when it is asked again."""
    words = ("rand", "time", "next", "perf_counter", "bernoulli")
    return any(
        isinstance(part, ast.Call) and any(word in text_of(part.func) for word in words)
        for part in ast.walk(node)
    )


def plain(node: ast.AST) -> bool:
    """Return whether all that `node` calls only computes with data, numbers and shapes."""
    for part in own_scope(node):
        if isinstance(part, ast.Call):
            name = last_name(part.func)
            root = text_of(part.func).partition(".")[0]
            if root not in _PLAIN_ROOTS and name not in _PLAIN_METHODS:
                return False
        elif isinstance(part, (ast.Await, ast.Yield, ast.YieldFrom)):
            return False
    return True


def rebuilt(
    body: Sequence[ast.stmt], leaves: Sequence[Leaf], chosen: Callable[[Leaf], list[ast.stmt]]
) -> list[ast.stmt]:
    """Return the statements with every leaf replaced by those that `chosen` gives for it, headers
    that hold none left out."""
    at = {id(leaf.node): leaf for leaf in leaves}

    def again(body: Sequence[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for node in body:
            leaf = at.get(id(node))
            if leaf is not None:
                found += chosen(leaf)
                continue
            clone: Any = copy.copy(node)
            clone.body = again(clone.body)
            if isinstance(clone, ast.If):
                clone.orelse = again(clone.orelse)
            if clone.body or getattr(clone, "orelse", []):
                clone.body = clone.body or [ast.copy_location(ast.Pass(), node)]
                found.append(clone)
        return found

    return again(body)


def short(node: ast.AST) -> str:
    """Return the first line of what was written, cut off where it is long."""
    text = text_of(node).splitlines()[0]
    return text if len(text) <= 60 else text[:57] + "..."
