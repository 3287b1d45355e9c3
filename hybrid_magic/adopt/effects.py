"""What a statement of a notebook does beside giving names values: what it changes in place, and
whether it trains.

A statement that is for its effect alone is taken to have one, unless its words say that it looks.
Runs nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .chance import seeds
from .names import FUNCTIONS, arguments, base, bound, changed, own_scope, own_scopes, reads
from .pieces import DEFINITIONS, IMPORTS, Piece
from .roles import holds_training, last_name
from .world import World

_SHOWING = {"matplotlib", "seaborn", "plotly", "bokeh", "altair", "IPython", "ipywidgets", "wandb",
            "tensorboard", "tqdm", "time", "gc", "pprint", "torchinfo", "torchsummary",
            "torchviz"}  # fmt: skip
_LOOKING = re.compile(
    r"(print|pprint|display|show|plot|hist|draw|view|visuali[sz]e|summar|describe|info|head|tail"
    r"|save|export|dump|watch|log|write|evaluat|validat|test|close|sleep|empty_cache|synchronize"
    r"|reset_peak|memory_|add_(graph|scalar|image|figure|hist)|zero_grad|item|numpy|tolist|unique"
    r"|value_counts|size|numel|mean|sum|min|max|argmax|state_dict|count|check|inspect|len|type)"
    r"\w*\Z",
    re.IGNORECASE,
)
_CHANGING = {"load_state_dict", "apply", "fit_transform", "add_tokens", "add_special_tokens",
             "resize_token_embeddings", "pop"}  # fmt: skip
_MOVING = {"to", "cuda", "cpu", "half", "float", "double", "bfloat16"}
_MODES = {"train", "eval", "zero_grad"}
_PASSING = {"list", "tuple", "enumerate", "zip", "iter", "next", "getattr", "reversed", "filter"}


@dataclass(frozen=True)
class Effect:
    """What a piece does: the names whose objects it changes; whether it seeds or trains."""

    changes: frozenset[str] = frozenset()
    seeds: bool = False
    trains: bool = False


def effect(world: World, piece: Piece) -> Effect:
    """Return what a piece does in a notebook whose names stand for what `world` says."""
    node = piece.node
    if piece.trained is not None:
        return Effect(trains=True)
    if isinstance(node, (*DEFINITIONS, *IMPORTS)):
        return Effect()
    if trains(world, node):
        return Effect(trains=True)
    names = set(_changes(world, piece))
    inside = names & bound(node)
    if inside and not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        aliases = {name for name in piece.now if world.is_data(name)}
        names |= aliases if inside & _touched(node) else set()
    return Effect(frozenset(names), seeds(world, node))


def _changes(world: World, piece: Piece) -> Iterator[str]:
    """Yield the names whose objects a statement may change."""
    for part in own_scope(piece.node):
        match part:
            case ast.Expr(value=ast.Call() as call):
                yield from _for_effect(world, call, nested=part is not piece.node)
            case ast.Call(func=ast.Attribute(value=owner, attr=attr)) if attr in _CHANGING | (
                _MOVING if world.is_module(base(owner)) else set()
            ):
                yield base(owner)
            case ast.Call(func=func) if _in_place(last_name(func)):
                yield from {base(func)} | _data_in(world, part)
            case ast.Call(func=ast.Name(id=name)) if _changes_arguments(world, name):
                yield from _data_in(world, part)
            case ast.Attribute() | ast.Subscript() | ast.AugAssign():
                yield from changed(part) if _stores(part) else ()


def _for_effect(world: World, call: ast.Call, *, nested: bool) -> Iterator[str]:
    """Yield what a call changes that stands for itself."""
    attr = last_name(call.func)
    root = base(call.func)
    if isinstance(call.func, ast.Name):
        made_by = world.given[root].made_by if root in world.given else None
        if made_by is None and not _LOOKING.match(attr):
            yield from _data_in(world, call)
        return
    given = world.given.get(root)
    package = given.package if given is not None else None
    if _LOOKING.match(attr) or package in _SHOWING or (nested and attr in _MODES):
        return
    yield root
    if package is not None:
        yield from _data_in(world, call)


def _data_in(world: World, call: ast.Call) -> set[str]:
    """Return the names in a call's arguments that are neither imported nor defined."""
    inside = [*call.args, *(keyword.value for keyword in call.keywords)]
    names = set().union(*map(reads, inside))
    return {name for name in names if name not in world.given or world.is_data(name)}


def _changes_arguments(world: World, name: str) -> bool:
    """Return whether a function of the notebook changes what it is given."""
    made_by = world.given[name].made_by if name in world.given else None
    function = made_by.node if made_by is not None else None
    if not isinstance(function, FUNCTIONS):
        return False
    given = {argument.arg for argument in arguments(function)}
    for node in function.body:
        for part in own_scope(node):
            match part:
                case ast.Assign(value=value):
                    given |= bound(part) if _roots(value) & given else set()
                case ast.For(target=target, iter=iterable):
                    given |= bound(target) if _roots(iterable) & given else set()
    for part in own_scopes(function.body):
        match part:
            case ast.Call(func=ast.Attribute(value=owner, attr=attr)) if attr in _CHANGING:
                names = {base(owner)}
            case ast.Call(func=func, args=args) if _in_place(last_name(func)):
                names = {base(func), *map(base, args)}
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=owner, attr=attr))):
                names = set() if attr in _MODES or _LOOKING.match(attr) else {base(owner)}
            case ast.Call(func=ast.Name(id=other)) if other != name:
                names = set(map(base, part.args)) if _changes_arguments(world, other) else set()
            case ast.Attribute() | ast.Subscript() if _stores(part):
                names = changed(part)
            case _:
                continue
        if names & given:
            return True
    return False


def trains(world: World, node: ast.AST, seen: frozenset[str] = frozenset()) -> bool:
    """Return whether a statement trains something, itself or in what it calls."""
    if holds_training(node):
        return True
    for call in ast.walk(node):
        if not isinstance(call, ast.Call):
            continue
        name, root = last_name(call.func), base(call.func)
        if name in seen:
            continue
        given = world.given.get(root)
        if given is not None and given.package == "hybrid_magic":
            return name in ("train", "ablate")
        if isinstance(call.func, ast.Attribute):
            if name in ("fit", "train") and _is_trainer(world, root, call):
                return True
            methods = _methods(world, name)
        else:
            made_by = given.made_by if given is not None else None
            methods = [made_by.node] if made_by is not None else []
        if any(isinstance(m, FUNCTIONS) and trains(world, m, seen | {name}) for m in methods):
            return True
    return False


def _is_trainer(world: World, root: str, call: ast.Call) -> bool:
    """Return whether `root.fit(...)` or `root.train(...)` trains a network."""
    value = world.namespace.get(root)
    if value is None or world.is_module(root):
        return last_name(call.func) == "fit" and len(call.args) > 1
    return type(value).__module__.partition(".")[0] != "sklearn"


def _methods(world: World, name: str) -> list[ast.stmt]:
    classes = [g.made_by.node for g in world.given.values() if g.made_by is not None]
    return [
        node
        for kind in classes
        if isinstance(kind, ast.ClassDef)
        for node in kind.body
        if isinstance(node, FUNCTIONS) and node.name == name
    ]


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and not name.startswith("_")


def _stores(node: ast.AST) -> bool:
    """Return whether `node` stores into an object."""
    if isinstance(node, ast.AugAssign):
        return True
    return isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))


def _touched(node: ast.AST) -> set[str]:
    """Return the names of a compound statement's own that it changes in place, not its counters:
    `p` of `for p in model.parameters(): p.requires_grad = False`."""
    found: set[str] = set()
    targets: set[str] = set()
    for part in own_scope(node):
        if isinstance(part, ast.For):
            targets |= bound(part.target)
        if isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name):
            found |= {part.target.id} & targets
        else:
            match part:
                case ast.Attribute() | ast.Subscript() if _stores(part):
                    found.add(base(part))
                case ast.Call(func=ast.Attribute(value=value, attr=attr)) if _in_place(attr):
                    found.add(base(value))
                    found |= {base(argument) for argument in part.args}
    return found


def _roots(node: ast.expr) -> set[str]:
    """Return the names whose objects an expression hands on, or parts of them."""
    match node:
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return set().union(*map(_roots, parts))
        case ast.Call(func=ast.Name(id=name), args=args):
            return set().union(*map(_roots, args)) if name in _PASSING else set()
    return {base(node)} - {""}
