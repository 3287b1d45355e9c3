"""What single statements of a step do, as far as their text tells."""

from __future__ import annotations

import ast

from .leaves import Leaf, plain
from .names import bound, own_scope
from .roles import last_name
from .units import Unit


def iterates(node: ast.AST, name: str) -> bool:
    """Return whether `name` is an iterator made anew: `it = iter(loader)`."""
    return any(
        isinstance(part, ast.Assign)
        and name in bound(part)
        and isinstance(part.value, ast.Call)
        and last_name(part.value.func) == "iter"
        for part in own_scope(node)
    )


def counts(leaf: Leaf, data: set[str]) -> bool:
    """Return whether a statement counts on from the step before, by no more than sizes."""
    node = leaf.node
    if not leaf.bound & leaf.reads or not plain(node):
        return False
    sized: set[int] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and part.attr in ("size", "shape", "numel"):
            sized.add(id(part.value))
        elif isinstance(part, ast.Call) and last_name(part.func) == "len":
            sized |= set(map(id, part.args))
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name) and part.id in data]
    return all(id(name) in sized for name in names)


def reads_gradients(leaf: Leaf) -> bool:
    """Return whether a statement looks at `.grad`."""
    return any(
        isinstance(part, ast.Attribute) and part.attr == "grad" for part in ast.walk(leaf.node)
    )


def data_only(leaf: Leaf) -> bool:
    """Return whether a statement of the work only unpacks, moves or reshapes data: it can run for
    the whole batch, too."""
    return (
        isinstance(leaf.node, (ast.Assign, ast.AnnAssign)) and not leaf.changed and plain(leaf.node)
    )


def declared(unit: Unit) -> set[str]:
    """Return the names that the function around a unit takes from outside."""
    if unit.function is None:
        return set()
    return {
        name
        for node in own_scope(ast.Module(unit.function.body, []))
        if isinstance(node, (ast.Global, ast.Nonlocal))
        for name in node.names
    }
