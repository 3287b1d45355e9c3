"""What is remembered of a notebook for `%hybrid_export`: its trainings, and the cells that failed.

Loaded with the magics, so it loads nothing itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import TrainConfig
    from ..run import Run
    from .cell import Cell


@dataclass(frozen=True)
class Trained:
    """A run that the training magic made: where, what its cell says, and with what. `names` is
    what the notebook calls model, loader, ...; None where the loop says that itself."""

    number: int  # of the cell
    nth: int  # of the cell's trainings
    text: str
    config: TrainConfig
    names: dict[str, str] | None
    evals: frozenset[str]  # the networks that were in eval mode before its cell


@dataclass
class Memory:
    """What is remembered of a notebook: its runs, the line at which a cell failed (0: none of it
    was run), and the networks that were in eval mode when the newest cell began."""

    runs: list[Trained] = field(default_factory=list)
    failed: dict[int, int] = field(default_factory=dict)
    evals: frozenset[str] = frozenset()
    shown: BaseException | None = None  # the newest error that was shown before that


def watch(shell: Any) -> Memory:
    """Return the notebook's memory, which from its first call on knows the cells that fail."""
    if not hasattr(shell, "_hybrid_memory"):
        memory = shell._hybrid_memory = Memory()

        def after_cell(result: Any = None) -> None:
            raws = shell.history_manager.input_hist_raw
            number = len(raws) - 1
            info = getattr(result, "info", None)
            head, body, above = parts_of(raws[number])
            stored = getattr(info, "store_history", False)
            within = str(getattr(info, "raw_cell", "")).strip() == body.strip()
            if not (stored or (head and within)):  # %%capture runs its cell as one of its own
                return
            if getattr(result, "error_before_exec", None) is not None:
                memory.failed[number] = 0
            elif (error := getattr(result, "error_in_exec", None)) is not None:
                line = _line_of(error, shell.user_ns, inside=bool(head) and stored)
                memory.failed[number] = line + above if line else 0
            elif head and number not in memory.failed:  # some magics show an error and go on
                shown = getattr(sys, "last_value", None)
                if shown is not None and shown is not memory.shown:
                    line = _line_of(shown, shell.user_ns, inside=False)
                    memory.failed[number] = line + above if line else 0

        def before_cell(info: Any = None) -> None:
            if getattr(info, "store_history", False):
                memory.evals = _in_eval_mode(shell.user_ns)
                memory.shown = getattr(sys, "last_value", None)

        shell.events.register("pre_run_cell", before_cell)
        shell.events.register("post_run_cell", after_cell)
    return shell._hybrid_memory


def parts_of(raw: str) -> tuple[str, str, int]:
    """Return the line of a cell's own magic ("" where it has none), the cell below it, and how many
    lines stand above that."""
    text = raw.lstrip("\n")
    if not text.startswith("%%"):
        return "", raw, 0
    head, _, body = text.partition("\n")
    return head, body, len(raw) - len(text) + 1


def _line_of(error: BaseException, namespace: dict[str, Any], *, inside: bool) -> int:
    """Return the line at which a cell failed, 0 where that is not known.

    Args:
        inside: a magic ran the cell, whose own call stands above it.
    """
    lines: list[int] = []
    entry = error.__traceback__
    while entry is not None:
        frame = entry.tb_frame
        name = frame.f_code.co_name
        if frame.f_globals is namespace and name.startswith(("<module>", "<cell line")):
            lines.append(entry.tb_lineno)
        entry = entry.tb_next
    return next(iter(lines[inside:]), 0)


def remember(
    shell: Any, cell: Cell, config: TrainConfig, names: dict[str, str] | None, run: Run | None
) -> None:
    """Remember a run that the cell that is running has made; None: it has made none."""
    if run is not None:
        memory = watch(shell)
        runs = memory.runs
        number = len(shell.history_manager.input_hist_raw) - 1
        nth = sum(other.number == number for other in runs)
        runs.append(Trained(number, nth, cell.text, config, names, memory.evals))


def _in_eval_mode(namespace: dict[str, Any]) -> frozenset[str]:
    """Return the names of the networks that are in eval mode."""
    return frozenset(
        name
        for name, value in list(namespace.items())
        if any(kind.__name__ == "Module" for kind in type(value).__mro__)
        and getattr(value, "training", None) is False
    )
