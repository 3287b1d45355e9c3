"""A cell's text: which form it is, and the step function that it makes.

The text goes through IPython's own transforms first, so that `%` and `!` lines work, and is
compiled under the cell's own name with the person's own line numbers, so that tracebacks and
`inspect.getsource` show what they wrote. Trains nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from ..engine.step import Compute
from ..errors import HybridMagicError

_FUNCTION = "step"
_MODEL = "_hybrid_model"  # a name that no notebook has: the person's own `model` stays theirs
_FIRST_LINE = 2  # the magic's line is the first of the cell
_INDENT = "    "
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


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
    number = len(shell.history_manager.input_hist_parsed) - 1  # of the cell that is running
    filename = shell.compile.cache(shown, number, raw_code=f"%%hybrid_train {line}\n{cell}")
    tree = _parse(text, filename)
    if not tree.body:
        return None
    _refuse_loop(tree)
    _refuse_accumulators(tree)
    assigned = _assigned(tree)
    last = tree.body[-1]
    if "loss" not in assigned:
        if not isinstance(last, ast.Expr):
            raise HybridMagicError(
                f"{_line_of(last)}: the cell leaves no loss; wanted `loss = ...`, or the loss "
                "as its last expression; assign it"
            )
        tree.body[-1] = ast.copy_location(
            ast.Assign([ast.Name("loss", ast.Store())], last.value), last
        )
    for name in log:
        if name not in assigned | {"loss"}:
            raise HybridMagicError(
                f"--log {name}: the cell assigns no {name}; wanted a name it assigns; check its "
                "spelling"
            )
    return _compile(tree, log, filename, shell.user_ns)


def _refuse_loop(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "backward"
        ):
            raise HybridMagicError(
                f"{_line_of(node)}: {ast.unparse(node)} makes this a training loop, which this "
                "version does not take over yet; wanted the forward pass of one step; keep the "
                "lines that compute loss from batch, and name epochs with --epochs"
            )


def _refuse_accumulators(tree: ast.Module) -> None:
    """Refuse `running += loss.item()` of a notebook name: the step's names are the step's own."""
    known = {"batch"}
    for node in _own_scope(tree):
        known |= _binds(node)
        if isinstance(node, (ast.AugAssign, ast.Assign)):
            for name in _assigned(node) & _read(node) - known:
                raise HybridMagicError(
                    f"{_line_of(node)}: {name} is changed but belongs to the notebook, and a "
                    "step's names are its own; wanted a number of this step; assign it and record "
                    "it with --log"
                )


def _own_scope(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs in the step's own scope, in the order of the text: no body of a function,
    no variable of a comprehension.
    """
    yield node
    if isinstance(node, _SCOPES):
        return
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.comprehension) and child is node.target):
            yield from _own_scope(child)


def _assigned(node: ast.AST) -> set[str]:
    """Return the names that `node` and what is in it give a value in the step's own scope."""
    return set().union(*map(_binds, _own_scope(node)))


def _binds(node: ast.AST) -> set[str]:
    match node:
        case ast.Name(id=name, ctx=ast.Store()):
            return {name}
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.alias(name=name, asname=other):
            return {other or name.partition(".")[0]}
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
            return {name}
        case ast.Global(names=names):
            return set(names)
    return set()


def _read(node: ast.AugAssign | ast.Assign) -> set[str]:
    """Return the names that an assignment reads before it assigns."""
    if isinstance(node, ast.AugAssign):
        return _assigned(node.target)
    local = {
        name
        for inner in ast.walk(node.value)
        if isinstance(inner, ast.comprehension)
        for name in _assigned(inner.target)
    }
    names = (inner for inner in _own_scope(node.value) if isinstance(inner, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Load)} - local


def _line_of(node: ast.stmt | ast.expr) -> str:
    return f"line {node.lineno + _FIRST_LINE - 1}"


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
