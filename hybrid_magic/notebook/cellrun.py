"""What one cell trains: the session and the view of its optimizer, opened and closed.

Knows where in the person's text a step is, and nothing of how it was rewritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from torch.optim import Optimizer

from ..config import TrainConfig
from ..engine.checks import check_optimizer_kind
from ..engine.session import Session
from ..errors import HybridMagicError
from ..run import Run
from . import live
from .frames import model_of, value_of


@dataclass(frozen=True, slots=True)
class Site:
    """A training step of a cell. `optimizer` and `scaler` are expressions of the person's, `reads`
    the names that the loss is made from, `notes` what the person is told."""

    line: int
    kind: str
    optimizer: str
    scaler: str | None
    loader: str | None
    grows: bool
    in_pieces: bool
    own_precision: bool
    reads: frozenset[str]
    notes: tuple[str, ...]
    config: TrainConfig


@dataclass
class CellRun:
    """What one cell trains: a session and a view for every optimizer, one at a time."""

    memories: Any
    open_view: Callable[..., Any] = live.open_view
    epochs: int | None = None
    stops: int = 0
    reading: dict[int, Session] = field(default_factory=dict)  # by the loader's id
    newest: Run | None = None
    begun: set[Session] = field(default_factory=set)  # those that a pass was begun of
    _open: tuple[Optimizer, Session, live.View] | None = None

    @property
    def trained(self) -> bool:
        """Whether anything was trained."""
        return self._open is not None or self.newest is not None

    @property
    def optimizer(self) -> Optimizer | None:
        """The one that trains now."""
        return None if self._open is None else self._open[0]

    def session(self, site: Site, frame: FrameType, loader: Any) -> Session:
        """Return the session of the optimizer that steps at `site`, opened where it must be."""
        optimizer = value_of(site.optimizer, frame)
        if self._open is not None and self._open[0] is optimizer:
            return self._open[1]
        self.close(None)
        check_optimizer_kind(optimizer, f"line {site.line}: {site.optimizer}")
        config, notes = site.config, list(site.notes)
        if config.checkpoint is not None and self.newest is not None:
            raise HybridMagicError(
                f"line {site.line} trains with a second optimizer, and --checkpoint holds one run; "
                "wanted one optimizer in the cell; give the other one a cell of its own"
            )
        if not site.grows and config.batch != "fixed":
            if config.batch != "adaptive":
                notes.append(
                    f"--batch {config.batch} is passed over: this loop's batches are its own"
                )
            config = replace(config, batch="fixed", max_batch=None)
        model, called = model_of(optimizer, site.reads, frame)
        if type(model).__name__ == "DistributedDataParallel":
            raise HybridMagicError(
                f"line {site.line}: {called} is a DistributedDataParallel; wanted the plain model; "
                f"use {called}.module, and its parameters in the optimizer"
            )
        view = self.open_view(plain=config.plain)
        try:
            session = Session(
                model,
                optimizer,
                config,
                loader=loader,
                epochs=self.epochs,
                names={"model": called, "optimizer": site.optimizer}
                | ({"loader": site.loader} if site.loader else {}),
                found=notes,
                sink=view,
                control=view.control,
                scaler=None if site.scaler is None else value_of(site.scaler, frame),
                own_precision=site.own_precision,
                before=self.memories.get(optimizer),
            )
        except BaseException:
            view.close(None)
            raise
        self._open = (optimizer, session, view)
        return session

    def close(self, error: BaseException | None) -> Run | None:
        """Close the open session and its view; return the newest Run."""
        if self._open is not None:
            (optimizer, session, view), self._open = self._open, None
            self.reading, self.begun = {}, set()
            try:
                run = session.close(error)
                self.memories[optimizer] = session.memory()
                self.newest = run if run.steps else self.newest
            finally:
                view.close(session.run if session.run.steps else None)
        return self.newest
