"""What a rewritten loop calls: its loader, its micro-batches, its optimizer step.

Finds the model and the optimizer where the loop runs, opens the engine's session and the view for
them, and closes both when the cell ends. Decides nothing about the training itself.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from ..engine.session import Session
from ..errors import HybridMagicError
from ..run import Run
from .cellrun import CellRun, Site


class Stopped(KeyboardInterrupt):
    """Training that was stopped by hand and is asked to go on by code that cannot know."""

    def _render_traceback_(self) -> list[str]:
        return ["stopped: the run ended at a whole step; hm.last_run holds it"]


class Loops:
    """All loops of a notebook that were taken over; what `_hybrid_magic` is in its namespace.

    Args:
        ended: called with a function, once, which is to be called when the running cell has ended.
    """

    def __init__(self, ended: Callable[[Callable[[BaseException | None], Any]], None]) -> None:
        self.sites: list[Site] = []
        self.cell: CellRun | None = None
        self._memories: Any = weakref.WeakKeyDictionary()  # optimizer -> what was learned about it
        self._ended = ended

    def begin(self) -> CellRun:
        """Begin a cell's run."""
        self.cell = CellRun(self._memories)
        return self.cell

    def begin_afresh(self, open_view: Callable[..., Any]) -> CellRun:
        """Begin a cell's run that knows nothing of earlier ones, shown in its own way."""
        self.cell = CellRun(weakref.WeakKeyDictionary(), open_view)
        return self.cell

    def end(self, error: BaseException | None = None) -> Run | None:
        """End the cell's run and return the newest Run, None where nothing was trained."""
        cell, self.cell = self.cell, None
        return None if cell is None else cell.close(error)

    def loop(self, number: int) -> Loop:
        """Return the loop of site `number`, which runs in the calling frame."""
        if self.cell is None:  # a function taken over, called from an ordinary cell
            self.begin()
            self._ended(self.end)
        assert self.cell is not None
        return Loop(self.sites[number], self.cell, sys._getframe(1))

    def epochs(self, iterable: Iterable[Any]) -> Iterator[Any]:
        """Yield what is in `iterable` until the training in it is stopped."""
        cell, begun = self.cell, self.mark()
        counted = getattr(iterable, "iterable", iterable)  # that of a progress bar
        if cell is not None and isinstance(counted, range):
            cell.epochs = len(counted)
        try:
            for item in iterable:
                if not self.going(begun):
                    return
                yield item
        finally:
            if cell is not None and isinstance(counted, range):
                cell.epochs = None

    def mark(self) -> int:
        """Return how many trainings were stopped so far; for `going`."""
        return 0 if self.cell is None else self.cell.stops

    def going(self, mark: int) -> bool:
        """Return whether no training was stopped since `mark`."""
        return self.mark() == mark

    def length(self, item: Any) -> int:
        """Return `len(item)`; of a loader that is read at other sizes, the truth about this run."""
        cell = self.cell
        if cell is not None and isinstance(item, DataLoader):
            session = cell.reading.get(id(item))
            if session is not None:
                return session.length(item)
        return len(item)


class Loop:
    """One running of a loop, or of a function that takes one step; the body asks it."""

    def __init__(self, site: Site, cell: CellRun, frame: FrameType) -> None:
        self._site, self._cell = site, cell
        self._frame: FrameType | None = frame
        self._opened: Session | None = None
        self._read: Any = None
        self._bars: list[tuple[Any, Any]] = []
        self._work: Any = None
        self._compute: Any = None

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for bar, found in self._bars:
            bar.iterable = found
        if self._opened is not None and self._site.kind == "loop":
            self._opened.end_pass(whole=kind is None)
        self._frame = None  # it holds this

    @property
    def _session(self) -> Session:
        if self._opened is None:
            assert self._frame is not None
            session = self._cell.session(self._site, self._frame, self._read)
            if self._site.kind == "loop" or session not in self._cell.begun:
                session.begin_pass()
            self._cell.begun.add(session)
            self._opened = session
        return self._opened

    def loader(self, item: Any) -> Any:
        """Return what the loop reads in place of `item`."""
        bar = getattr(item, "iterable", None)
        if bar is not None and isinstance(bar, DataLoader):  # a progress bar made before the loop
            self._bars.append((item, bar))
            item.iterable = self.loader(bar)
            return item
        if not isinstance(item, DataLoader):
            return _Reading(self, item, None)
        self._read = item
        self._cell.reading[id(item)] = self._session
        return _Reading(self, item, self._session)

    @property
    def going(self) -> bool:
        return self._opened is None or not self._opened.over

    @property
    def first(self) -> bool:
        return self._session.first

    @property
    def last(self) -> bool:
        return self._session.last

    def accumulate(
        self, work: Callable[..., Any], values: dict[str, Any], kept: Sequence[str]
    ) -> Mapping[str, Any]:
        """Run `work` forward and backward over `values` in micro-batches; return what it made."""
        __tracebackhide__ = True
        if work is not self._work:
            self._work, self._compute = work, _computing(work, kept)
        session = self._session
        if session.over:
            raise Stopped
        return session.accumulate(self._compute, values)

    def forwarding(self) -> Any:
        """Return the context in which a verbatim step computes its loss."""
        if self._session.over:
            raise Stopped
        return self._session.forwarding()

    def backward(self, loss: Any) -> None:
        __tracebackhide__ = True
        self._session.backward(loss)

    def step(self, optimizer: Any) -> None:
        """Step the optimizer with what was accumulated."""
        __tracebackhide__ = True
        session = self._session
        if optimizer is not self._cell.optimizer:
            raise HybridMagicError(
                f"line {self._site.line}: {self._site.optimizer} was another optimizer when the "
                "loop began; wanted one for the whole loop; make it before the loop"
            )
        if not session.last:
            return
        over = session.over
        session.apply()
        if session.over and not over:
            self._cell.stops += 1

    def advance(self, scheduler: Any, *arguments: Any, **named: Any) -> None:
        """Step a scheduler by what the optimizer's step has covered."""
        if self._session.last:
            self._session.advance(scheduler, *arguments, **named)

    def pieces(self, item: Any) -> Iterator[Any]:
        """Yield what the loop is to see of one pass over `item`."""
        session = self._session
        for batch in session.batches(item):
            if self._site.in_pieces:
                yield from session.pieces(batch)
            else:
                yield batch


class _Reading:
    """What a loop reads in its loader's place; as long as what is read."""

    def __init__(self, loop: Loop, item: Any, session: Session | None) -> None:
        self._loop, self._item, self._session = loop, item, session

    def __iter__(self) -> Iterator[Any]:
        if self._session is not None:
            yield from self._loop.pieces(self._item)
            return
        for item in self._item:
            if not self._loop.going:
                return
            yield item

    def __len__(self) -> int:
        return len(self._item) if self._session is None else self._session.length(self._item)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._item, name)


def _computing(work: Callable[..., Any], kept: Sequence[str]) -> Any:
    def compute(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        __tracebackhide__ = True
        loss, found = work(**values)
        return loss, {name: found[name] for name in kept if name in found}

    return compute
