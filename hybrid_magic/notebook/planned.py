"""What `%%hybrid_train` would do with a cell: `hm.explain`. Parses only, runs nothing.

Functions of earlier cells that the cell calls are looked into as well: their text is in the
notebook.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from ..adopt.names import FUNCTIONS
from ..adopt.plan import Plan, plan_of
from ..adopt.rewriting import RUNTIME
from ..adopt.roles import RefusedError, holds_training, last_name
from .cell import transformed


def explain(source: str, namespace: Mapping[str, Any] | None = None) -> Plan:
    """Return what `%%hybrid_train` would do with a cell; parses only, runs nothing.

    Args:
        source: the cell's text, with or without its `%%hybrid_train` line; lines are counted in it.
        namespace: what the notebook holds, to tell models and optimizers apart and to look into the
            functions that the cell calls.
    Raises:
        SyntaxError: as the cell would raise it.
    """
    from IPython.core.inputtransformer2 import TransformerManager

    first, _, rest = source.partition("\n")
    magic = first.startswith("%%")
    text = transformed(TransformerManager().transform_cell, rest if magic else source)
    tree = ast.increment_lineno(ast.parse(text), int(magic))
    called = trainers(tree, namespace or {})
    plan = plan_of(tree, namespace, calls_training=bool(called))
    for name, function in called.items():
        found = plan_of_function(function, namespace or {})
        if found is not None:
            plan.notes.append(f"{name}() is of an earlier cell, at whose lines it is shown")
            plan.loops += found.loops
            plan.refusal = plan.refusal or refusal_at_call(tree, name, found)
    return plan


def refusal_at_call(tree: ast.Module, name: str, found: Plan) -> RefusedError | None:
    """Return the refusal of a function of an earlier cell, at the line that calls it."""
    if found.refusal is None:
        return None
    call = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and last_name(node.func) == name
    )
    return RefusedError(
        call, f"{name}(), line {found.refusal.line} of its cell: {found.refusal.text}"
    )


def trainers(tree: ast.Module, namespace: Mapping[str, Any]) -> dict[str, FunctionType]:
    """Return the notebook's functions that a program calls and that train, by their names in it."""
    found: dict[str, FunctionType] = {}
    made = dict(_instances(tree, namespace))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, value = _called(node.func, namespace, made)
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType) and function.__globals__ is namespace:
                parsed = source_of(function)
                if parsed is not None and holds_training(parsed):
                    found[name] = function
    return found


def _instances(tree: ast.Module, namespace: Mapping[str, Any]) -> Iterator[tuple[str, type]]:
    """Yield the names that a program gives objects of the notebook's classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id=made))):
                if isinstance(namespace.get(made), type):
                    yield name, namespace[made]


def _called(
    node: ast.expr, namespace: Mapping[str, Any], made: Mapping[str, type]
) -> tuple[str, Any]:
    """Return the name that is called and the function or method that it is in the notebook."""
    match node:
        case ast.Name(id=name):
            return name, namespace.get(name)
        case ast.Attribute(value=ast.Name(id=owner), attr=attr):
            kind = made.get(owner) or type(namespace.get(owner))
            return attr, getattr(kind, attr, None)
        case ast.Attribute(value=ast.Call(func=ast.Name(id=owner)), attr=attr):
            return attr, getattr(namespace.get(owner), attr, None)
    return "", None


def source_of(function: FunctionType) -> ast.Module | None:
    """Return a function's own tree, at its own lines; None where its text is not to be had."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(text)
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if len(tree.body) != 1 or not isinstance(tree.body[0], FUNCTIONS):
        return None
    tree.body[0].decorator_list = []
    return ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)


def plan_of_function(function: FunctionType, namespace: Mapping[str, Any]) -> Plan | None:
    tree = source_of(function)
    if tree is None or RUNTIME in function.__code__.co_names or function.__closure__:
        return None
    return plan_of(tree, namespace)
