"""What a statement of a notebook does beside giving names values: what it changes in place, what
its functions do to the notebook's names, whether it seeds, trains, or sets something up.

Runs nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .chance import seeds
from .changing import Change, Scope, called, changes, gives, turning_in
from .holding import aliases, behind
from .names import FUNCTIONS, base, exposed, own_scope
from .pieces import DEFINITIONS, IMPORTS, Piece
from .trainings import trains
from .world import World

UNSEEN = {"exec", "eval", "globals", "locals"}  # which reach names that nobody sees in the text
_SETTING = ("sys.path.", "os.chdir", "chdir", "os.putenv", "tqdm.pandas")


@dataclass(frozen=True)
class Effect:
    """What a piece does: the names whose objects it changes, with what these `hold` from then on;
    those that its functions give a value; whether it seeds, trains, or sets up what others do
    without a name (`sets_up`); whether it gives names values by their text (`unseen`)."""

    changes: frozenset[str] = frozenset()
    hold: tuple[tuple[frozenset[str], frozenset[str]], ...] = ()
    gives: frozenset[str] = frozenset()
    seeds: bool = False
    trains: bool = False
    sets_up: bool = False
    unseen: bool = False


def effect(world: World, piece: Piece) -> Effect:
    """Return what a piece does in a notebook whose names stand for what `world` says."""
    node = piece.node
    if piece.trained is not None:
        return Effect(trains=True)
    if isinstance(node, IMPORTS):
        return Effect()
    if isinstance(node, DEFINITIONS):
        return _of(list(_of_definition(world, node)), {})
    if trains(world, node):
        return Effect(trains=True)
    parts = list(own_scope(node))
    scope = _scope(world, parts)
    found = list(changes(scope, parts, node))
    return _of(
        found,
        aliases(world, parts),
        own=frozenset(piece.binds - exposed([node])),
        gives=gives(scope, parts),
        seeds=seeds(world, node),
        sets_up=any(map(_sets_up, parts)),
        unseen=any(map(_gives_unseen, parts)),
    )


def _scope(world: World, parts: Sequence[ast.AST]) -> Scope:
    return Scope(world, frozenset(), lambda function: called(world, function), turning_in(parts))


def _of(
    found: list[Change],
    standing: dict[str, set[str]],
    own: frozenset[str] = frozenset(),
    **more: Any,
) -> Effect:
    """Return the effect of changes in a statement whose `own` names stand for others."""
    full = [(behind(each.names, standing), behind(each.stored, standing)) for each in found]
    names = frozenset().union(*(names for names, _ in full)) - own
    hold = tuple((frozenset(a), frozenset(b)) for a, b in full if a and b)
    return Effect(names | more.get("gives", frozenset()), hold, **more)


def _of_definition(
    world: World, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
) -> Iterator[Change]:
    """Yield what the decorators of a definition, and the classes it derives from, do with it:
    `@add_to_class(Net)`, `@register`."""
    own = {node.name}
    for mark in node.decorator_list:
        parts = [mark, *own_scope(mark)]
        yield from (Change(c.names, c.stored | own) for c in changes(_scope(world, parts), parts))
        func = mark.func if isinstance(mark, ast.Call) else mark
        inside = [name for part in parts for name in [getattr(part, "id", "")]]
        names = {n for n in {base(func), *inside} if world.is_data(n) or _is_class(world, n)}
        made = world.definition(base(func))
        names |= called(world, made).outside if isinstance(made, FUNCTIONS) else set()
        yield Change(names, own | set(inside))
    for kind in node.bases if isinstance(node, ast.ClassDef) else ():
        above = world.definition(base(kind))
        if isinstance(above, ast.ClassDef) and "__init_subclass__" in ast.dump(above):
            yield Change({base(kind)}, own)


def _is_class(world: World, name: str) -> bool:
    return isinstance(world.definition(name), ast.ClassDef)


def _sets_up(part: ast.AST) -> bool:
    """Return whether a part of a statement sets up what others do: `sys.path.append("lib")`."""
    match part:
        case ast.Call(func=func):
            # a folder made for the time being is another one in every start, and in every process
            passing = any("temp" in ast.unparse(each) for each in part.args)
            return ast.unparse(func).startswith(_SETTING) and not passing
        case ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
            return ast.unparse(part).startswith("sys.path")
    return False


def _gives_unseen(part: ast.AST) -> bool:
    """Return whether a part of a statement may give names values by their text."""
    match part:
        case ast.Call(func=ast.Name(id="exec")):
            return True
        case ast.Subscript(value=ast.Call(func=ast.Name(id="globals")), ctx=ast.Store()):
            return True
        case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="globals")), attr=attr)):
            return attr in ("update", "setdefault", "__setitem__", "pop")
    return False
