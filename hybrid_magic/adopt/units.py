"""Training steps in a person's program: where they are and what their statements do.

A unit is the body that is run once a step: of the innermost loop that calls `.backward()` and
steps an optimizer, of a function such as `train_step(x, y)`, or a stretch of plain statements.
What cannot be trained either way is refused here, at its line. Runs nothing.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .names import FUNCTIONS, arguments, bound, own_scope, own_scopes, reads
from .roles import (
    LEAVE,
    Kinds,
    RefusedError,
    Roles,
    last_name,
    methods,
    optimizer_steps,
    roles_of,
    text_of,
)

LOOPS = (ast.For, ast.AsyncFor, ast.While)
WRAPPERS = ("enumerate", "tqdm", "tqdm_notebook", "notebook_tqdm", "track", "progress_bar", "pbar")


@dataclass
class Unit:
    """The statements of one step. `node` is its loop or function, None for plain statements;
    `function` the function around it."""

    kind: str  # "loop", "function", "statements"
    node: Any
    body: list[ast.stmt]
    function: Any
    scope: Any  # the tree whose names it shares: a function, or the whole cell
    guards: list[ast.expr] = field(default_factory=list)
    roles: Roles = field(default_factory=Roles)
    loader: ast.expr | None = None  # what the loop reads, its wrappers peeled off
    aside: bool = False  # read through something whose length or order is its own: zip, islice

    @property
    def line(self) -> int:
        return self.node.lineno if self.node is not None else self.body[0].lineno


def find(tree: ast.Module, kinds: Kinds) -> list[Unit]:
    """Return the units of a program, in the order of the text.

    Raises:
        RefusedError: one of them cannot be taken over in any way.
    """
    _refuse_closures(tree, kinds)
    found: list[Unit] = []
    scopes: list[tuple[Any, Any]] = [(tree, None)]
    scopes += [(node, node) for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    for node, function in scopes:
        units: dict[int, Unit] = {}
        for path in _paths(node.body, []):
            call = path[-1]
            if isinstance(call, ast.Call) and last_name(call.func) in (
                "backward",
                "manual_backward",
            ):
                unit = _unit_of(node, function, path, kinds)
                units.setdefault(id(unit.node), unit)
        found += units.values()
    for unit in found:
        _refuse(unit, kinds)
    return sorted(found, key=lambda unit: unit.line)


def _paths(body: list[ast.stmt], above: list[Any]) -> Iterator[list[Any]]:
    """Yield, for every call in the scope, the nodes from the scope's body down to it."""
    for node in body:
        yield from _down(node, [*above, body])


def _down(node: ast.AST, above: list[Any]) -> Iterator[list[Any]]:
    path = [*above, node]
    if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
        return
    if isinstance(node, ast.Call):
        yield path
    for _, value in ast.iter_fields(node):
        if isinstance(value, list):
            for item in value:
                if isinstance(item, ast.AST):
                    yield from _down(item, [*path, value])
        elif isinstance(value, ast.AST):
            yield from _down(value, path)


def _unit_of(scope: Any, function: Any, path: list[Any], kinds: Kinds) -> Unit:
    """Return the unit that a `.backward()` call belongs to."""
    body: list[ast.stmt] = scope.body
    kind = "statements" if function is None else "function"
    if function is None:  # other loops of the cell are steps of their own
        body = [n for n in body if not (isinstance(n, LOOPS) and optimizer_steps(n.body, kinds))]
    unit = Unit(kind, function, body, function, scope)
    inside = path
    for at in range(len(path) - 1, -1, -1):
        node = path[at]
        if isinstance(node, LOOPS) and optimizer_steps(node.body, kinds):
            unit = Unit("loop", node, node.body, function, scope)
            inside = path[at:]
            break
    unit.guards = [
        node.test
        for node, below in itertools.pairwise(inside)
        if isinstance(node, ast.If) and below is node.body
    ]
    _choose_branch(unit, kinds)
    unit.roles = roles_of(unit.body, kinds)
    if unit.kind == "loop" and isinstance(unit.node, (ast.For, ast.AsyncFor)):
        unit.loader, unit.aside = _peeled(unit.node.iter)
    return unit


def _choose_branch(unit: Unit, kinds: Kinds) -> None:
    """Take, of an `if` that nothing in the loop decides anew and that calls backward() in both
    branches, the one that steps an optimizer: `if isinstance(updater, torch.optim.Optimizer)`."""
    for place, node in enumerate(unit.body):
        if not isinstance(node, ast.If) or not steady(unit, [node.test]):
            continue
        if all(any(methods(own_scopes(way), "backward")) for way in (node.body, node.orelse)):
            chosen = bool(optimizer_steps(node.body, kinds))
            way = node.body if chosen else node.orelse
            unit.body = [*unit.body[:place], *way, *unit.body[place + 1 :]]
            test = node.test if chosen else ast.UnaryOp(ast.Not(), node.test)
            unit.guards = [*unit.guards, ast.copy_location(test, node.test)]
            return


def steady(unit: Unit, tests: list[ast.expr]) -> bool:
    """Return whether no statement of the loop can change what `tests` decide."""
    names = set().union(*map(reads, tests))
    return not names & (bound(unit.node or ast.Pass()) | set().union(*map(bound, unit.body)))


def _peeled(iterable: ast.expr) -> tuple[ast.expr, bool]:
    """Return what a loop reads, without enumerate and progress bars; True for what is left
    alone."""
    while isinstance(iterable, ast.Call) and last_name(iterable.func) in WRAPPERS:
        given = [k.value for k in iterable.keywords if k.arg in ("iterable", "sequence", "gen")]
        if not (iterable.args or given):
            return iterable, True
        iterable = (iterable.args or given)[0]
    return iterable, isinstance(iterable, ast.Call)


def counter(unit: Unit) -> set[str]:
    """Return the name of enumerate's counter in the loop's target."""
    target, iterable = getattr(unit.node, "target", None), getattr(unit.node, "iter", None)
    while isinstance(iterable, ast.Call) and iterable.args:
        if last_name(iterable.func) == "enumerate" and isinstance(target, (ast.Tuple, ast.List)):
            return {name.id for name in target.elts[:1] if isinstance(name, ast.Name)}
        iterable = iterable.args[0]
    return set()


def _refuse_closures(tree: ast.Module, kinds: Kinds) -> None:
    functions = {node.name for node in ast.walk(tree) if isinstance(node, FUNCTIONS)}
    for call, owner in methods(ast.walk(tree), "step"):
        kind = kinds.of(owner)
        given = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "closure")]
        closure = any(
            isinstance(each, ast.Lambda)
            or getattr(each, "id", "") in functions
            or (kind == "optimizer" and getattr(each, "value", each) is not None)
            for each in given
        )
        if closure and kind not in ("scheduler", "scaler"):
            raise RefusedError(
                call,
                f"{text_of(call)} asks its closure for the loss many times a step; wanted an "
                f"optimizer whose step() needs none; use AdamW or SGD, {LEAVE}",
            )


def _refuse(unit: Unit, kinds: Kinds) -> None:
    """Raise RefusedError for what can be trained neither in slices nor verbatim."""
    if not unit.roles.steps:
        raise RefusedError(
            unit.roles.backwards[0].call,
            "no optimizer steps where this backward() is called; wanted optimizer.step() in the "
            "same loop or function, or a step that leaves its loss and has no backward(); use one "
            f"of torch.optim for the weights' update, {LEAVE}",
        )
    call, owner = unit.roles.steps[0]
    if unit.kind == "loop" and reads(owner) & bound(getattr(unit.node, "target", ast.Pass())):
        raise RefusedError(
            call,
            f"{text_of(owner)} is another optimizer on every turn of this loop; wanted one; train "
            f"one model after the other, each in a loop of its own, {LEAVE}",
        )
    if (own := kinds.own_class(owner)) is not None:
        raise RefusedError(
            call,
            f"{text_of(owner)} is a {own}, a class of the notebook's; wanted a "
            f"torch.optim.Optimizer; derive {own} from it, {LEAVE}",
        )
    stepped = list(dict.fromkeys(text_of(owner) for _, owner in unit.roles.steps))
    if len(stepped) > 1:
        second = next(call for call, owner in unit.roles.steps if text_of(owner) == stepped[1])
        raise RefusedError(
            second,
            f"{len(stepped)} optimizers step in one loop ({', '.join(stepped)}); wanted one; give "
            f"one optimizer both groups of parameters, or a loop to each, {LEAVE}",
        )
    for node in ast.walk(unit.scope):
        if isinstance(node, ast.Call) and last_name(node.func) in (
            "DistributedDataParallel",
            "DDP",
            "scale_loss",
        ):
            raise RefusedError(
                node,
                f"{last_name(node.func)} (DistributedDataParallel or its like) runs a training of "
                f"its own kind; wanted the plain model; take it out, {LEAVE}",
            )


def parameters(unit: Unit) -> set[str]:
    """Return the parameters of a function that is a unit, of a method without its first."""
    given = arguments(unit.node)
    return {argument.arg for argument in given if argument.arg not in ("self", "cls")}


def reads_ahead(node: ast.AST) -> bool:
    """Return whether a statement takes the next batch by hand: `next(it)`."""
    return any(
        isinstance(part, ast.Call) and getattr(part.func, "id", "") == "next"
        for part in own_scope(node)
    )
