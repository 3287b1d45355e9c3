"""A cell's text, parsed, and the step function that it makes.

The text goes through IPython's own transforms first, so that `%` and `!` lines work, and is
compiled under the cell's own name with the person's own line numbers, so that tracebacks and
`inspect.getsource` show what they wrote. Trains nothing.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..adopt.names import binds, bound, own_scope
from ..errors import HybridMagicError

if TYPE_CHECKING:
    from ..engine.step_state import Compute

_FUNCTION = "step"
_MODEL = "_hybrid_model"  # a name that no notebook has: the person's own `model` stays theirs
_FIRST_LINE = 2  # the magic's line is the first of the cell
_INDENT = "    "


@dataclass
class Cell:
    """A cell under the magic's line, `head`; `tree` has the lines of its `text`, the first of which
    is the notebook's second."""

    raw: str
    head: str
    text: str
    tree: ast.Module

    def named(self, shell: Any, shown: str) -> str:
        """Return the name under which tracebacks find `shown`, the text that they show."""
        number = len(shell.history_manager.input_hist_parsed) - 1  # of the cell that is running
        return shell.compile.cache(shown, number, raw_code=f"{self.head}\n{self.raw}")


def read_cell(shell: Any, cell: str, head: str) -> Cell:
    """Return the cell under the line `head`, its `%` and `!` lines transformed.

    Raises:
        SyntaxError: as the person's own cell would raise it.
    """
    text = transformed(shell.transform_cell, cell)
    found = Cell(cell, head, text, ast.Module([], []))
    with contextlib.suppress(SyntaxError):
        found.tree = ast.parse(text)
        return found
    found.tree = _parse(text, found.named(shell, f"{head}\n{text}"))
    return found


def transformed(transform: Callable[[str], str], cell: str) -> str:
    """Return a cell transformed, with the blank lines at its head that IPython takes away."""
    head = len(cell) - len(cell.lstrip())
    return "\n" * cell[:head].count("\n") + transform(cell)


def make_step(shell: Any, cell: Cell, log: Sequence[str]) -> Compute | None:
    """Return `step(model, batch)` made of a cell's text, None for a bare cell.

    Args:
        shell: the running InteractiveShell; its namespace holds the names that the text uses.
        log: names to be read from the body, beside the loss.
    Raises:
        HybridMagicError: a step without a loss, a name that cannot be logged.
    """
    tree = cell.tree
    if not tree.body:
        return None
    _refuse_accumulators(tree)
    assigned = bound(tree)
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
    rows = (_INDENT + row for row in cell.text.splitlines())
    shown = "\n".join([_head(cell.head), *rows, ""])
    return _compile(tree, log, cell.named(shell, shown), shell.user_ns)


def _refuse_accumulators(tree: ast.Module) -> None:
    """Refuse `running += loss.item()` of a notebook name: the step's names are the step's own."""
    known = {"batch"}
    for node in own_scope(tree):
        known |= binds(node)
        if isinstance(node, (ast.AugAssign, ast.Assign)):
            for name in bound(node) & _read(node) - known:
                raise HybridMagicError(
                    f"{_line_of(node)}: {name} is changed but belongs to the notebook, and a "
                    "step's names are its own; wanted a number of this step; assign it and record "
                    "it with --log"
                )


def _read(node: ast.AugAssign | ast.Assign) -> set[str]:
    """Return the names that an assignment reads before it assigns."""
    if isinstance(node, ast.AugAssign):
        return bound(node.target)
    local = {
        name
        for inner in ast.walk(node.value)
        if isinstance(inner, ast.comprehension)
        for name in bound(inner.target)
    }
    names = (inner for inner in own_scope(node.value) if isinstance(inner, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Load)} - local


def _line_of(node: ast.stmt | ast.expr) -> str:
    return f"line {node.lineno + _FIRST_LINE - 1}"


def _head(magic: str) -> str:
    return f"def {_FUNCTION}({_MODEL}, batch):  # {magic}".rstrip()


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
