"""How a worker's training ended, in a form that travels.

Its error comes back with its traceback, whose frames show the same lines of the same cell. Loads no
torch.
"""

from __future__ import annotations

import ast
import os
import pathlib
import pickle
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..errors import HybridMagicError

_PACKAGE = os.path.join(pathlib.Path(__file__).parent.parent, "")


_Frame = tuple[str, str, int, int, int, int]  # file, function; lines and columns, from and to


@dataclass(frozen=True, slots=True)
class Ending:
    """`kind`: "whole", "interrupted", "lost" (another process was), "mistake" (told in one line) or
    "error" (of the person's code). `words` is the error's type and text, `frames` its traceback
    without our own, `before` the errors that it came from as text, `pickled` the error itself, None
    where it cannot be pickled. `begun`: training had begun, so there is a Run and something to hand
    over."""

    kind: str
    begun: bool
    words: str = ""
    frames: tuple[_Frame, ...] = ()
    before: str = ""
    pickled: bytes | None = None

    def error(self) -> Exception:
        """Return the error itself with its traceback, or one that says the same."""
        found: Any = None
        try:
            found = pickle.loads(self.pickled or b"")
        except Exception:  # noqa: BLE001 - whatever its class asks for; the words remain
            pass
        made = found if isinstance(found, Exception) else RuntimeError(self.words)
        return made.with_traceback(_traceback(self.frames))


def ending_of(error: BaseException | None, begun: bool) -> Ending:
    """Return how training ended: by `error`, or whole where it is None."""
    if error is None:
        return Ending("whole", begun)
    from ..engine.ranks import PeerLost

    words = f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        return Ending("interrupted", begun, words)
    if isinstance(error, HybridMagicError):
        kind = "lost" if isinstance(error, PeerLost) else "mistake"
        return Ending(kind, begun, words, pickled=_pickled(error))
    told = traceback.TracebackException.from_exception(error)
    frames = tuple(map(_frame, _theirs(told.stack)))
    return Ending("error", begun, words, frames, _before(told), _pickled(error))


def _pickled(error: BaseException) -> bytes | None:
    import cloudpickle

    try:
        return cloudpickle.dumps(error)
    except Exception:  # noqa: BLE001 - an error that holds a file, a lock, ...
        return None


def _theirs(stack: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Return the frames that are not of this package, all where there are no others."""
    theirs = [frame for frame in stack if not frame.filename.startswith((_PACKAGE, "<string>"))]
    return theirs or list(stack)


def _frame(frame: traceback.FrameSummary) -> _Frame:
    line = frame.lineno or 1
    place = (getattr(frame, name, None) for name in ("end_lineno", "colno", "end_colno"))  # 3.11
    end_line, column, end_column = place
    return frame.filename, frame.name, line, end_line or line, column or 0, end_column or 0


def _before(told: traceback.TracebackException) -> str:
    """Return the errors that this one was raised from, or during, as a traceback shows them."""
    each = told.__cause__ or (None if told.__suppress_context__ else told.__context__)
    if each is None:
        return ""
    each.stack[:] = _theirs(each.stack)
    return "".join(each.format()).rstrip()


class _Here(Exception):  # noqa: N818 - none that anybody sees
    """Raised to have a traceback."""


def _traceback(frames: Sequence[_Frame]) -> TracebackType | None:
    """Return a traceback of frames that are elsewhere: each is made anew, and raises at its
    place."""
    following: TracebackType | None = None
    for file, name, line, end_line, column, end_column in reversed(frames):
        at: Any = {"lineno": line, "end_lineno": end_line}
        at |= {"col_offset": column, "end_col_offset": end_column}
        raising = ast.Raise(ast.Name("here", ast.Load(), **at), None, **at)
        code = compile(ast.Module([raising], []), file, "exec").replace(co_name=name)
        try:
            exec(code, {"here": _Here})
        except _Here as error:
            made = error.__traceback__
            assert made is not None and made.tb_next is not None  # noqa: PT018 - the code's own
            made.tb_next.tb_next = following
            following = made.tb_next
    return following
