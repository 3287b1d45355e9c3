"""Nodes of ours for a person's syntax tree, at the place of what they stand for."""

from __future__ import annotations

import ast
from typing import Any


def is_path(node: ast.expr) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute, ast.Subscript))


def only(condition: ast.expr, node: ast.stmt) -> ast.stmt:
    """Return a statement that runs only under a condition."""
    return placed(ast.If(condition, [node], []), node)


def both(condition: str, test: ast.expr) -> ast.expr:
    asked = ast.parse(condition, mode="eval").body
    return placed(ast.BoolOp(ast.And(), [asked, test]), test)


def attribute(owner: str, attr: str) -> ast.Attribute:
    return ast.Attribute(ast.Name(owner, ast.Load()), attr, ast.Load())


def placed(made: Any, at: Any) -> Any:
    """Return a node of ours with the place of the person's node that it stands for."""
    for part in ast.walk(made):
        if (isinstance(part, (ast.stmt, ast.expr)) and not hasattr(part, "lineno")) or part is made:
            ast.copy_location(part, at)
    return made
