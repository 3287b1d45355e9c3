"""What is remembered of a notebook for `%hybrid_export`: its trainings, and the cells that failed.

Loaded with the magics, so it loads nothing itself.
"""

from __future__ import annotations

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


@dataclass
class Memory:
    """What is remembered of a notebook: its runs, and the line at which a cell failed (0: none of
    it was run)."""

    runs: list[Trained] = field(default_factory=list)
    failed: dict[int, int] = field(default_factory=dict)


def watch(shell: Any) -> Memory:
    """Return the notebook's memory, which from its first call on knows the cells that fail."""
    if not hasattr(shell, "_hybrid_memory"):
        memory = shell._hybrid_memory = Memory()

        def after_cell(result: Any = None) -> None:
            if getattr(getattr(result, "info", None), "store_history", False):
                number = len(shell.history_manager.input_hist_raw) - 1
                if getattr(result, "error_before_exec", None) is not None:
                    memory.failed[number] = 0
                elif (error := getattr(result, "error_in_exec", None)) is not None:
                    memory.failed[number] = _line_of(error, shell.user_ns)

        shell.events.register("post_run_cell", after_cell)
    return shell._hybrid_memory


def _line_of(error: BaseException, namespace: dict[str, Any]) -> int:
    """Return the line of a cell at which it failed, 0 where that is not known."""
    entry = error.__traceback__
    while entry is not None:
        frame = entry.tb_frame
        if frame.f_globals is namespace and frame.f_code.co_name.startswith(
            "<"
        ):  # its name changes
            return entry.tb_lineno
        entry = entry.tb_next
    return 0


def remember(
    shell: Any, cell: Cell, config: TrainConfig, names: dict[str, str] | None, run: Run | None
) -> None:
    """Remember a run that the cell that is running has made; None: it has made none."""
    if run is not None:
        runs = watch(shell).runs
        number = len(shell.history_manager.input_hist_raw) - 1
        nth = sum(other.number == number for other in runs)
        runs.append(Trained(number, nth, cell.text, config, names))
