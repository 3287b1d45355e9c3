"""A cell's text: which form it is, and the step function that it makes.

The text goes through IPython's own transforms first, so that `%` and `!` lines work, and is
compiled under the cell's own name with the person's own line numbers, so that tracebacks and
`inspect.getsource` show what they wrote. Trains nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from ..engine.step import Compute
from ..errors import HybridMagicError

_FUNCTION = "step"
_MODEL = "_hybrid_model"  # a name that no notebook has: the person's own `model` stays theirs
_FIRST_LINE = 2  # the magic's line is the first of the cell
_INDENT = "    "


def make_step(shell: Any, cell: str, log: Sequence[str], line: str) -> Compute | None:
    """Return `step(model, batch)` made of the cell's text, None for a bare cell.

    Args:
        shell: the running InteractiveShell; its namespace holds the names that the text uses.
        cell: the text under the magic's line.
        log: names to be read from the body, beside the loss.
        line: the magic's own line, shown above the text in tracebacks.
    Raises:
        HybridMagicError: a training loop, a step without a loss, a name that cannot be logged.
        SyntaxError: as the person's own cell would raise it.
    """
    text = shell.transform_cell(cell)
    shown = "\n".join([_head(line), *(_INDENT + row for row in text.splitlines()), ""])
    name = shell.compile.cache(
        shown, shell.execution_count, raw_code=f"%%hybrid_train {line}\n{cell}"
    )
    tree = _parse(text, name)
    if not tree.body:
        return None
    _refuse_loop(tree)
    _refuse_accumulators(tree)
    last = tree.body[-1]
    if not _assigns(tree, "loss"):
        if not isinstance(last, ast.Expr):
            raise HybridMagicError(
                f"line {last.lineno + _FIRST_LINE - 1}: the cell leaves no loss; wanted `loss = "
                "...`, or the loss as its "
                "last expression; assign it"
            )
        tree.body[-1] = ast.copy_location(
            ast.Assign([ast.Name("loss", ast.Store())], last.value), last
        )
    for name in log:
        if not _assigns(tree, name):
            raise HybridMagicError(
                f"--log {name}: the cell assigns no {name}; wanted a name it assigns; check its "
                "spelling"
            )
    return _compile(tree, log, name, shell.user_ns)


def _refuse_loop(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "backward"
        ):
            raise HybridMagicError(
                f"line {node.lineno + _FIRST_LINE - 1}: {ast.unparse(node)} makes this a "
                "training loop, which this version "
                "does not take over yet; wanted the forward pass of one step; keep the lines "
                "that compute "
                "loss from batch, and name epochs with --epochs"
            )


def _refuse_accumulators(tree: ast.Module) -> None:
    """Refuse `running += loss.item()` of a notebook name: a step is a function, and its names "
    "its own."""
    known: set[str] = {"batch"}
    for statement in tree.body:
        if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            if name not in known:
                raise HybridMagicError(
                    f"line {statement.lineno + _FIRST_LINE - 1}: {name} is added to but belongs "
                    "to the notebook, and a step's "
                    "names are its own; wanted a number of this step; assign it and record it "
                    "with --log"
                )
        known |= _assigned(statement)


def _assigned(node: ast.AST) -> set[str]:
    return {
        inner.id
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
    }


def _assigns(tree: ast.Module, name: str) -> bool:
    return any(name in _assigned(statement) for statement in tree.body)


def _head(line: str) -> str:
    return f"def {_FUNCTION}({_MODEL}, batch):  # %%hybrid_train {line}".rstrip()


def _parse(text: str, name: str) -> ast.Module:
    """Return the cell's tree; a mistake in it is told at its line of the cell."""
    try:
        return ast.parse(text, filename=name)
    except SyntaxError as error:
        error.lineno = None if error.lineno is None else error.lineno + _FIRST_LINE - 1
        if getattr(error, "end_lineno", None) is not None:
            error.end_lineno = error.end_lineno + _FIRST_LINE - 1  # type: ignore[operator]
        raise


def _compile(tree: ast.Module, log: Sequence[str], name: str, namespace: dict[str, Any]) -> Compute:
    """Return the step function of a checked tree; its text is cached under `name`, indented."""
    names = [ast.Constant(item) for item in log]
    values = ast.Dict(names, [ast.Name(item, ast.Load()) for item in log])  # type: ignore[arg-type]
    loss = ast.Name("loss", ast.Load())
    returned = ast.Return(ast.Tuple([loss, values], ast.Load()) if log else loss)
    for statement in ast.fix_missing_locations(tree).body:
        ast.increment_lineno(statement, _FIRST_LINE - 1)
        for node in ast.walk(statement):
            if isinstance(node, (ast.stmt, ast.expr)):
                node.col_offset += len(_INDENT)
                node.end_col_offset = (node.end_col_offset or 0) + len(_INDENT)
    function = ast.parse(f"def {_FUNCTION}({_MODEL}, batch): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    function.body = [*tree.body, ast.copy_location(returned, tree.body[-1])]
    module = ast.fix_missing_locations(ast.Module([function], []))
    made: dict[str, Any] = {}
    exec(compile(module, name, "exec"), namespace, made)
    return made[_FUNCTION]
