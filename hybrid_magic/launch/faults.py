"""What went wrong in the workers, and the one error that the person gets for it.

Found, wanted, do. An error of the person's own code stays what it is; where it happened is its
cause. Looks and changes nothing.
"""

from __future__ import annotations

import pathlib
import re
import signal
import sys
import sysconfig
from dataclasses import dataclass

from ..errors import HybridMagicError
from .ending import Ending
from .hanging import Hang

_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_NOT_THEIRS = (
    *filter(None, (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))),
    str(pathlib.Path(__file__).parent.parent),
    "<",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """What ended a run first: an `ending` by an error, a `hang`, or, where both are None, a process
    that was gone. `stack` is what faulthandler told of it; `started`: it had begun to train."""

    rank: int
    ending: Ending | None = None
    hang: Hang | None = None
    stack: str = ""
    started: bool = True


class InProcess(Exception):  # noqa: N818 - it tells where an error was, and is none
    """Which process an error was in, and the errors before it there."""

    def __init__(self, rank: int, size: int, before: str) -> None:
        super().__init__(rank, size, before)

    def __str__(self) -> str:
        rank, size, before = self.args
        return f"process {rank} of {size}" + (f"\n\n{before}" if before else "")


def error_of(fault: Fault, size: int, code: int | None, printed: str, kept: str) -> Exception:
    """Return the person's error for a fault.

    Args:
        size: number of processes.
        code: the exit code of the process, negative for a signal, None where it is not known.
        printed: what the process wrote to its standard error.
        kept: what became of the training until then, in words.
    """
    who = f"process {fault.rank} of {size}"
    if fault.ending is not None:
        error = fault.ending.error()
        if not isinstance(error, HybridMagicError):
            error.__cause__ = InProcess(fault.rank, size, fault.ending.before)
        return error
    if fault.hang is not None:
        return HybridMagicError(_hangs(who, fault.hang, _place(fault.stack)) + f"; {kept}")
    how = ended(code) + _place(fault.stack)
    if code is not None and code == -getattr(signal, "SIGKILL", 9):
        return HybridMagicError(
            f"{who} {how}, as the system does when memory runs out; wanted memory for {size} "
            f"copies of model and loader; use fewer --processes or loader workers; {kept}"
        )
    if not fault.started:
        return HybridMagicError(
            f"{who} {how} before it could train{_last_line(printed)}; wanted a Python like this "
            f"one's in a new process ({sys.executable}); mend what it says, or train without "
            "--processes"
        )
    return HybridMagicError(
        f"{who} {how}{_last_line(printed)}; wanted a step and a dataset that leave their process "
        f"running; see what in them ends it; {kept}"
    )


def ended(code: int | None) -> str:
    """Return in words how a process ended."""
    if code is None:
        return "was gone"
    if code >= 0:
        return f"ended by itself (exit code {code})"
    try:
        return f"was killed ({signal.Signals(-code).name})"
    except ValueError:
        return f"was killed (signal {-code})"


def _last_line(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return f" ({lines[-1]})" if lines else ""


def _hangs(who: str, hang: Hang, place: str) -> str:
    if hang.busy:
        return (
            f"{who} has kept the others waiting for {hang.waited_s:.0f} s{place}; wanted steps "
            "that take about as long everywhere; see what takes it so long there"
        )
    return (
        f"{who} hangs{place}: the others have waited {hang.waited_s:.0f} s for it, and it does "
        "nothing; wanted a step and a dataset that go on; see what waits there"
    )


def _place(stack: str) -> str:
    """Return in words where a process was: its innermost frame of the person's own, else its
    innermost; nothing where nothing was told."""
    frames: list[tuple[str, str, str]] = _FRAME.findall(stack)
    theirs = [frame for frame in frames if not frame[0].startswith(_NOT_THEIRS)]
    for file, line, function in (theirs or frames)[:1]:
        return f", at line {line} of {file}, in {function}"
    return ""
