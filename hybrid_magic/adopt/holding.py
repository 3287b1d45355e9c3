"""What an expression hands on: the names whose objects, or parts of them, it may be; and what the
names that a statement makes for itself stand for.

Reads the syntax tree, and from the notebook only which names are functions of it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping

from .names import FUNCTIONS, bound, closure
from .world import World

Aliases = dict[str, set[str]]
_PASSING = {"list", "tuple", "dict", "set", "sorted", "enumerate", "zip", "iter", "next", "getattr",
            "reversed", "filter", "vars", "map"}  # fmt: skip
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp)


def handed_on(world: World, node: ast.AST | None, *, held: bool = False) -> set[str]:
    """Return the names whose objects an expression may hand on, or parts of them.

    Args:
        held: count what a call is given as handed on, too: what it returns may hold it.
    """

    def of(*parts: ast.AST | None) -> set[str]:
        return set().union(*(handed_on(world, part, held=held) for part in parts))

    match node:
        case ast.Name(id=name):
            return {name}
        case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Starred(value=inner):
            return of(inner)
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            return of(*parts)
        case ast.Dict(values=parts) | ast.BoolOp(values=parts):
            return of(*parts)
        case ast.IfExp(body=one, orelse=other):
            return of(one, other)
        case ast.BinOp(left=one, op=ast.Add(), right=other) if _is_list(one) or _is_list(other):
            return of(one, other)
        case ast.NamedExpr(value=inner) | ast.Await(value=inner):
            return of(inner)
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
            return of(*(part.iter for part in node.generators))
        case ast.Call(func=ast.Attribute(value=inner), args=args):
            root = of(inner)
            imported = any(world.is_package(name) for name in root)
            return root | (of(*args) if imported and held else set())
        case ast.Call(func=ast.Name(id=name), args=args):
            passes = name in _PASSING or isinstance(world.definition(name), FUNCTIONS)
            given = [*args, *(keyword.value for keyword in node.keywords)]
            return of(*given) if passes or held else set()
    return set()


def _is_list(node: ast.expr) -> bool:
    """Return whether an expression is written as a list."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return isinstance(node, (ast.List, *_COMPREHENSIONS)) or (called and node.func.id == "list")  # type: ignore[attr-defined]


def aliases(world: World, parts: Iterable[ast.AST]) -> Aliases:
    """Return what the names that `parts` make may stand for, one step back each."""
    found: Aliases = {}
    for part in parts:
        for target, value in _given(part):
            source = handed_on(world, value)
            for name in bound(target) if source else ():
                found.setdefault(name, set()).update(source - {name})
    return found


def behind(names: Iterable[str], standing: Mapping[str, set[str]]) -> set[str]:
    """Return `names`, and all that they may stand for."""
    return closure(names, lambda name: standing.get(name, ()))


def _given(part: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield (target, value) of what one node gives a value."""
    match part:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _pairs(target, value, unpacked=False)
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            yield target, value
        case ast.NamedExpr(target=target, value=value):
            yield target, value
        case ast.withitem(context_expr=value, optional_vars=ast.expr() as target):
            yield target, value
        case ast.For(target=target, iter=iterable) | ast.AsyncFor(target=target, iter=iterable):
            yield from _pairs(target, iterable, unpacked=True)
        case ast.comprehension(target=target, iter=iterable):
            yield from _pairs(target, iterable, unpacked=True)


def _pairs(
    target: ast.expr, value: ast.expr, *, unpacked: bool
) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield each target with what it is a part of; `unpacked`: with parts of the parts."""
    match target, value:
        case ast.Tuple(elts=targets), ast.Tuple(elts=parts) if not unpacked and len(targets) == len(
            parts
        ):
            for one, part in zip(targets, parts, strict=True):
                yield from _pairs(one, part, unpacked=False)
        case ast.Tuple(elts=targets), ast.Call(func=ast.Name(id="zip"), args=parts) if (
            unpacked and len(targets) == len(parts)
        ):
            for one, part in zip(targets, parts, strict=True):
                yield from _pairs(one, part, unpacked=True)
        case ast.Tuple(elts=[_, one]), ast.Call(func=ast.Name(id="enumerate"), args=[part, *_]):
            yield from _pairs(one, part, unpacked=True)
        case _:
            yield target, value
