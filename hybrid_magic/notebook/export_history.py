"""What a notebook has run, for `%hybrid_export`: the statements before a training.

Reads IPython's own history. A cell that failed counts up to the statement that failed. Lines that
are IPython's (`%`, `!`) are told apart; what a script needs is decided elsewhere.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..adopt.pieces import Piece, pieces_of
from ..adopt.roles import holds_training
from ..errors import HybridMagicError
from .cell import transformed
from .export_memory import Memory, Trained, parts_of, watch

_UNWRAPPED = ("time", "capture", "prun")  # cell magics that run the cell in the notebook
_TRAINING, _ABLATING = ("hybrid_train",), ("hybrid_ablate",)
_OURS = (*_TRAINING, *_ABLATING)
_OF_NO_MATTER = ("matplotlib", "load_ext", "reload_ext", "autoreload", "config", "time", "timeit",
                 "who", "whos", "pinfo", "pinfo2", "reset", "xdel", "history", "pdb",
                 "debug", "hybrid_")  # fmt: skip


@dataclass
class History:
    """The statements that were run before a training; `lines`: those of IPython's own that may
    have set something up, which a script cannot run."""

    pieces: list[Piece] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def notebook_name(shell: Any) -> str:
    """Return the notebook's file name, "a notebook" where the kernel does not know it."""
    told = os.environ.get("JPY_SESSION_NAME") or shell.user_ns.get("__vsc_ipynb_file__")
    name = os.path.basename(str(told or "")).replace("\\", "").replace('"', "")
    return name if name.endswith(".ipynb") else "a notebook"


def history_before(shell: Any, run: Trained) -> History:
    """Return what was run before a training.

    Raises:
        HybridMagicError: the training was started from inside another statement.
    """
    found = History()
    memory = watch(shell)
    cells = shell.history_manager.input_hist_raw
    for number in range(1, run.number + 1):
        _read_cell(shell, memory, run, number, cells[number], found)
    return found


def _read_cell(
    shell: Any, memory: Memory, run: Trained, number: int, raw: str, found: History
) -> None:
    """Add the statements of one cell, up to the one that failed or that is the training."""
    head, body, above = parts_of(raw)
    code, first_line = body, above + 1
    if head:
        name = head[2:].split()[0] if head[2:].split() else ""
        if name in _OURS:
            if number == run.number:
                return  # the training itself
            found.pieces += _runs_of(memory, number)
            if name == "hybrid_ablate":  # whose model is not remembered
                found.pieces.append(_training(number, frozenset(shell.user_ns)))
            if not _is_loop(shell, body):
                return
        elif name not in _UNWRAPPED:
            if not name.startswith(_OF_NO_MATTER):
                found.lines.append(f"{head} (cell [{number}])")
            return
    try:
        pieces = pieces_of(transformed(shell.transform_cell, code), number, first_line=first_line)
    except SyntaxError:
        return
    failed, trainings = memory.failed.get(number), 0
    for piece in pieces:
        is_ours, ablates = (_calls(piece.node, names) for names in (_TRAINING, _ABLATING))
        if is_ours and number == run.number and trainings == run.nth:
            if not isinstance(piece.node, (ast.Expr, ast.Assign)):
                break
            return
        if failed is not None and failed <= piece.end and number != run.number:
            break
        if ablates:  # its model is not remembered
            found.pieces.append(_training(number, frozenset(shell.user_ns)))
        elif is_ours:
            found.pieces += _runs_of(memory, number, trainings)
            trainings += 1
        elif (line := _own_line(piece.node)) is not None:
            if line.startswith("%time "):
                found.pieces += pieces_of(line[6:], number, first_line=piece.line)
            if not line[1:].startswith(_OF_NO_MATTER):
                found.lines.append(f"{line} (cell [{number}])")
        else:
            found.pieces.append(piece)
    if number == run.number:
        raise HybridMagicError(
            f"the last run was started from inside another statement of cell [{number}]; wanted it "
            "at the top level of a cell, so that what was run before it is known; run it in a cell "
            "of its own, and export that"
        )


def _is_loop(shell: Any, body: str) -> bool:
    """Return whether a cell under our line was run as written: its names are the notebook's."""
    try:
        return holds_training(ast.parse(transformed(shell.transform_cell, body)))
    except SyntaxError:
        return False


def _runs_of(memory: Memory, number: int, nth: int | None = None) -> Iterator[Piece]:
    """Yield our runs of a cell as pieces that train."""
    for run in memory.runs:
        if run.number == number and nth in (None, run.nth) and run.names is not None:
            names = frozenset(run.names.values())
            yield _training(number, names)


def _training(number: int, names: frozenset[str]) -> Piece:
    return Piece(ast.Pass(), "pass", number, 1, 1, apart=True, trained=names)


def _magic_call(node: ast.AST) -> tuple[str, list[str]] | None:
    """Return IPython's method and the words of a call of it: `get_ipython().system("ls")`."""
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Call(func=ast.Name(id="get_ipython")), attr=attr),
            args=args,
        ):
            return attr, [str(a.value) if isinstance(a, ast.Constant) else "..." for a in args]
    return None


def _calls(node: ast.AST, names: tuple[str, ...]) -> bool:
    """Return whether a statement calls one of the magics `names`."""
    calls = filter(None, map(_magic_call, ast.walk(node)))
    return any(words and words[0] in names for _, words in calls)


def _own_line(node: ast.stmt) -> str | None:
    """Return a statement that is a line of IPython's own as the person wrote it, else None."""
    called = _magic_call(node.value) if isinstance(node, ast.Expr) else None
    if called is None:
        return None
    attr, words = called
    mark = {"system": "!", "getoutput": "!!", "run_line_magic": "%", "run_cell_magic": "%%"}
    return mark.get(attr, "%") + " ".join(word for word in words[:2] if word)


def uses_ipython(piece: Piece) -> bool:
    """Return whether a statement asks for IPython, which a script has not."""
    return "get_ipython" in piece.now | piece.late
