"""`%hybrid_export FILE`: the last run as a script.

Takes the statements that the run depends on out of the notebook's history, checks that the script
stands by itself, and writes it. Runs nothing of the person's.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import pathlib
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ..adopt.arranging import arrange
from ..adopt.effects import UNSEEN
from ..adopt.gathering import Gathered, gather
from ..adopt.names import own_scope
from ..adopt.pieces import Piece, pieces_of, undefined
from ..errors import HybridMagicError
from .export_history import history_before, notebook_name, uses_ipython
from .export_memory import Trained, watch
from .export_script import Script
from .export_step import Step, step_of_cell, step_of_loop

_MARK = "# %hybrid_export replaces this file while it is as it was written: "
_ADDED = {"display", "get_ipython"}  # to the builtins, while IPython runs a cell
_KNOWN = {*dir(builtins), "__file__", "__name__", "__doc__"} - _ADDED


def export(shell: Any, line: str) -> None:
    """Write the last run as a script to the file that `line` names, and say what was done.

    Raises:
        HybridMagicError: no run, a file that is not ours to replace, or a script that would not
            stand by itself; nothing was written.
    """
    path = _path(line)
    runs = watch(shell).runs
    if not runs:
        raise HybridMagicError(
            "there is no run to write; wanted one of %%hybrid_train in this notebook; train first"
        )
    script, notes = _script(shell, runs[-1], path.name)
    text = script.text()
    _check(text, path.name)
    try:
        path.write_text(f"{text}\n{_MARK}{_stamp(text)}\n", encoding="utf-8")
    except OSError as error:
        raise HybridMagicError(
            f"{path} cannot be written ({error.strerror}); wanted a file of a folder that you may "
            "write to; give another name"
        ) from None
    said = [
        f"wrote {path}: {script.source}, from {_cells(script)}",
        *notes,
        f"start it with: python {path}",
        f"or: torchrun --standalone --nproc-per-node 2 {path}  (more in its first lines)",
    ]
    sys.stdout.write("\n".join(said) + "\n")


def _path(line: str) -> pathlib.Path:
    """Return the file to write.

    Raises:
        HybridMagicError: no name of a Python file, no such folder, or a file that is not ours.
    """
    given = line.strip().strip("\"'")
    if not given.endswith(".py") or len(given) < 4:
        raise HybridMagicError(
            f"%hybrid_export has {given or 'no file'}; wanted the name of a Python file; write "
            "%hybrid_export train.py"
        )
    path = pathlib.Path(given).expanduser()
    if not path.parent.is_dir():
        raise HybridMagicError(
            f"there is no folder {path.parent}; wanted one to write {path.name} to; make it first"
        )
    if path.is_file():
        text, mark, stamp = path.read_text(encoding="utf-8", errors="replace").rpartition(_MARK)
        if not mark or _stamp(text[:-1]) != stamp.strip():
            what = "was changed since it was exported" if mark else "is not of %hybrid_export"
            raise HybridMagicError(
                f"{given} is there already and {what}; wanted a new name; give another one, or "
                "remove the file"
            )
    return path


def _stamp(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _script(shell: Any, run: Trained, file: str) -> tuple[Script, list[str]]:
    """Return the script of a run, and what a person is told about it."""
    history = history_before(shell, run)
    namespace = shell.user_ns
    if run.names is None:
        step = step_of_loop(run.text, run.number, history.pieces, namespace, run.evals)
    else:
        step = step_of_cell(run.text, run.config.log or (), run.names)
    needed = {*step.names.values(), *step.needs()}
    if "get_ipython" in needed:
        _refuse_ipython(f"the step of cell [{run.number}]")
    if (needed & UNSEEN) - namespace.keys():
        _refuse_unseen(f"the step of cell [{run.number}]")
    gathered = gather([*history.pieces, *step.before], needed, step.names["model"], namespace)
    if gathered.unseen:
        _refuse_unseen(gathered.unseen[0].place)
    for piece in gathered.kept:
        if uses_ipython(piece):
            _refuse_ipython(piece.place)
        if _awaits(piece):
            raise HybridMagicError(
                f"{piece.place} awaits; wanted statements that a script can run; use asyncio.run"
            )
    _find_missing(gathered, namespace, history.pieces)
    arranged = arrange(gathered.kept, needed)
    notes = _notes(gathered, step, run, history.lines)
    source = f"cell [{run.number}] of {notebook_name(shell)}"
    return Script(file, source, notes, arranged, step, run.config), notes


def _awaits(piece: Piece) -> bool:
    return any(isinstance(part, ast.Await) for part in own_scope(piece.node))


def _refuse_ipython(where: str) -> None:
    raise HybridMagicError(
        f"{where} is needed and holds a line of IPython's own (%, ! or get_ipython()); wanted "
        "plain Python; write it without, run the cell and the training again"
    )


def _refuse_unseen(where: str) -> None:
    raise HybridMagicError(
        f"{where} reaches names by their text (exec, eval, globals, locals); wanted statements "
        "that show what they read and make; write the names themselves"
    )


def _find_missing(gathered: Gathered, namespace: dict[str, Any], pieces: Sequence[Piece]) -> None:
    """Write imports for what came into the notebook otherwise: `from torch import *`, `%run`.

    Raises:
        HybridMagicError: a name that no statement gives a value.
    """
    found = []
    for name in sorted(gathered.missing):
        value = namespace.get(name, getattr(builtins, name, None))
        text = _star_of(name, value, pieces)
        if name in _KNOWN and text is None:
            continue
        text = text or _import_of(name, value)
        if text is None:
            raise HybridMagicError(
                f"no cell that was run at the top level makes {name}, which the script needs; "
                "wanted the statement that makes it; run it in a cell, and the training again"
            )
        found += pieces_of(text, 0)
    gathered.kept[:0] = found


def _import_of(name: str, value: Any) -> str | None:
    """Return the statement that imports a value under a name, None for one that is of no module."""
    if isinstance(value, ModuleType):
        return f"import {value.__name__}" + (f" as {name}" if name != value.__name__ else "")
    module, own = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if own == "display" and str(module).startswith("IPython."):
        module = "IPython.display"  # where every version has it
    if module in (None, "__main__", "builtins") or own is None:
        return None
    if getattr(sys.modules.get(module), own, None) is not value:
        return None
    return f"from {module} import {own}" + (f" as {name}" if name != own else "")


def _star_of(name: str, value: Any, pieces: Sequence[Piece]) -> str | None:
    """Return the import of a name that `from math import *` gave, None where none did."""
    for piece in reversed(pieces):
        match piece.node:
            case ast.ImportFrom(module=str(module), names=[ast.alias(name="*")], level=0):
                if getattr(sys.modules.get(module), name, _KNOWN) is value:
                    return f"from {module} import {name}"
    return None


def _notes(gathered: Gathered, step: Step, run: Trained, lines: list[str]) -> list[str]:
    """Return what a person is told of what the script leaves out or cannot have."""
    notes = [
        f"Left out: cell [{piece.cell}] trained {step.names['model']} before. The script begins "
        "with the weights from before that."
        for piece in gathered.trained
    ]
    if step.left:
        notes.append("Left out of the loop: " + "; ".join(dict.fromkeys(step.left)) + ".")
    if moves := [piece.place for piece in gathered.kept if "chdir(" in piece.text]:
        notes.append(
            f"Start it in the folder that the notebook began in: {moves[0]} goes to another one."
        )
    if lines:
        notes.append("Left out, lines of IPython's own: " + "; ".join(dict.fromkeys(lines)) + ".")
    text = "\n".join([*(piece.text for piece in gathered.kept), step.text])
    if run.config.seed is None and "seed" not in text:
        notes.append(
            'No seed is set, so no two runs are alike; add "seed": 0 to OPTIONS, or seed the '
            "notebook's random numbers before the model is made."
        )
    elif gathered.drew or step.drew:
        where = "; ".join([*(piece.place for piece in gathered.drew), *["the loop"] * step.drew])
        notes.append(
            f"Left out, and may have drawn random numbers after a seed: {where}. So the first "
            "weights and the order of the samples may be others than the notebook's."
        )
    device = f"{run.config.device} {text}"
    if named := re.search(r"cuda:\d+|\.cuda\(\d+\)", device):
        notes.append(
            f"{named[0]} names one GPU, and every process would use that; write cuda in its place."
        )
    return list(dict.fromkeys(notes))


def _cells(script: Script) -> str:
    pieces = [*script.arranged.module, *script.arranged.main]
    numbers = sorted({piece.cell for piece in pieces} - {0})
    return "cells " + ", ".join(f"[{number}]" for number in numbers) if numbers else "no other cell"


def _check(text: str, file: str) -> None:
    """Raise HybridMagicError where a script would not compile, or reads a name it never makes."""
    try:
        compile(text, file, "exec")
    except SyntaxError as error:
        raise HybridMagicError(
            f"the script would not compile (line {error.lineno}: {error.msg}); wanted statements "
            "that a script can hold; write the model, the data and the training as plain cells"
        ) from None
    lost = sorted(undefined(text, _KNOWN))
    if lost:
        raise HybridMagicError(
            f"the script would read {', '.join(lost)}, which it never makes; wanted names that "
            "the cells make at their top level; make them there, and train again"
        )
