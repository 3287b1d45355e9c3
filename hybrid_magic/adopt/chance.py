"""Which statements of a notebook draw random numbers, and which seed them. Runs nothing."""

from __future__ import annotations

import ast
import re

from .names import FUNCTIONS, base, own_scope, own_scopes
from .roles import last_name
from .world import World

_STEADY = {"print", "len", "range", "int", "float", "str", "max", "min", "sum", "abs", "round",
           "list", "tuple", "dict", "set", "type", "isinstance", "zip", "enumerate", "sorted",
           "display", "format", "repr", "getattr", "hasattr", "open", "DataLoader", "Subset",
           "TensorDataset", "ConcatDataset"}  # fmt: skip
_RANDOM = re.compile(r"\A[A-Z]|rand|shuffle|perm|sampl|choice|normal|uniform|split|_\Z")


def draws(world: World, node: ast.AST) -> bool:
    """Return whether a statement may draw random numbers: it makes layers, calls functions, goes
    through a loader, or takes a sample of a data set."""
    for part in own_scope(node):
        match part:
            case ast.Subscript(value=owner, ctx=ast.Load()) if _is_data_set(world, base(owner)):
                return True
            case ast.For(iter=ast.Call(func=ast.Name(id="range"))):
                continue
            case ast.For():
                return True
            case ast.Call(func=ast.Name(id=name)) if name not in _STEADY:
                return True
            case ast.Call(func=ast.Attribute(attr=attr)) if attr not in _STEADY and _RANDOM.search(
                attr
            ):
                return True
    return False


def _is_data_set(world: World, name: str) -> bool:
    """Return whether a name is a data set's that may transform its samples at random."""
    kinds = world.kinds(name)
    return "Dataset" in kinds and "TensorDataset" not in kinds


def seeds(world: World, node: ast.AST, seen: frozenset[str] = frozenset()) -> bool:
    """Return whether a statement is there to seed: `torch.manual_seed(0)`, `fix_seeds()`.

    Args:
        seen: functions that are being read already.
    """
    if not (isinstance(node, (ast.Expr, ast.Assign)) and isinstance(node.value, ast.Call)):
        return False
    func = node.value.func
    imported = world.is_package(base(func))
    if "seed" in last_name(func).lower() and (imported or isinstance(func, ast.Name)):
        return True
    return isinstance(func, ast.Name) and _seeds_inside(world, func.id, seen)


def reseeds(world: World, node: ast.AST) -> bool:
    """Return whether a statement seeds, or anything of the notebook's that it calls does."""
    names = {part.id for part in own_scope(node) if isinstance(part, ast.Name)}
    return seeds(world, node) or any(_seeds_inside(world, name) for name in names)


def _seeds_inside(world: World, name: str, seen: frozenset[str] = frozenset()) -> bool:
    node = world.definition(name)
    if name in seen or not isinstance(node, FUNCTIONS):
        return False
    return any(seeds(world, part, seen | {name}) for part in own_scopes(node.body))
