"""A worker process: reads the parcel, trains it, and hands over what came of it when asked.

Started by the elastic agent; what it does next the notebook says. It stays after its training, also
after an error, until it is told to leave: that its state is whole is worth more than an exit code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import sys
import tempfile
import time
import warnings
from typing import Any

from .. import run as runs
from ..errors import HybridMagicError
from .ending import Ending, ending_of
from .link import Link, Shown

STACK = "stack-{}"  # where a worker writes what it does when it crashes, or gets STACK_SIGNAL
_LONGEST_FOLDER = 60  # loaders put sockets into it, whose paths must be short
STACK_SIGNAL = getattr(signal, "SIGUSR1", None)


def main(folder: str, begin: dict[str, Any]) -> None:
    """Be the worker of torchrun's RANK; `begin` is what `begin.json` holds."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with contextlib.suppress(AttributeError, OSError):  # it leads its own group already
        os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if len(folder) < _LONGEST_FOLDER:
        tempfile.tempdir = folder  # what a worker leaves behind goes with it
    link = Link(folder, begin, rank)
    file = open(os.path.join(folder, STACK.format(rank)), "w")  # noqa: SIM115 - for good
    faulthandler.enable(file, all_threads=False)
    if STACK_SIGNAL is not None:
        faulthandler.register(STACK_SIGNAL, file, all_threads=False)
    if rank == 0:
        sys.stdout = Shown(link, "stdout", sys.__stdout__ or io.StringIO())
        sys.stderr = Shown(link, "stderr", sys.__stderr__ or io.StringIO())
    work = _Work(link, max(1, begin["threads"] // size))
    link.tell("ended", work.ending(begin["sources"]))
    while link.orders.get() == "deliver":
        link.tell("delivered", work.delivered())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking torch down politely costs a second


class _Work:
    """What this worker trains; an interrupt is heard while it does and at no other time."""

    def __init__(self, link: Link, threads: int) -> None:
        self._link, self._threads, self._heard = link, threads, False
        self._things: dict[str, Any] = {}
        signal.signal(signal.SIGINT, self._interrupted)

    def _interrupted(self, *_: Any) -> None:
        if self._heard:
            self._heard = False
            raise KeyboardInterrupt

    def ending(self, cells: dict[str, str]) -> Ending:
        """Train, and return how that ended."""
        ended: BaseException | None = None
        try:
            self._heard = True
            self._train(cells)
        except BaseException as error:  # noqa: BLE001 - SystemExit too: the notebook is told
            self._heard, ended = False, error
        self._heard = False
        return ending_of(ended, runs.last_run is not None)

    def _train(self, cells: dict[str, str]) -> None:
        import torch

        from ..engine import ranks
        from ..engine.train import train
        from . import parcel

        link = self._link
        parcel.show_sources(cells)
        torch.set_num_threads(self._threads)
        self._things, random = parcel.unpack(link.folder)
        link.tell("ready")
        if link.orders.get() != "go":
            raise KeyboardInterrupt
        # The agent ends all as soon as one has failed; the others still have to hand over.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # The scheduler's wrapping of `optimizer.step`, by which torch tells, is not pickled.
        warnings.filterwarnings("ignore", r"Seems like `optimizer\.step\(\)` has been overridden")

        def waited() -> float | None:
            here = ranks.current()
            since = None if here is None else here.waiting
            return None if since is None else time.monotonic() - since

        link.waited = waited
        things = dict(self._things)
        options = things.pop("options")
        if link.rank == 0:
            things |= {"sink": lambda record: link.tell("record", record), "control": link.control}
        parcel.draw_as_there(random, things["loader"])
        train(**things, **options)

    def delivered(self) -> str | None:
        """Write what came of the training; return what went wrong, wanted and to do, None where
        nothing did."""
        from . import pickling, results

        run = runs.last_run
        assert run is not None
        try:
            results.write(self._link.folder, self._things, run)
        except HybridMagicError as error:
            return f": {error}"
        except Exception as error:  # noqa: BLE001 - a full disk, a person's own state_dict: told
            wanted = "wanted a state that can be written; see what says so"
            if pickling.is_full(error):
                wanted = "wanted room for them in the folder for temporary files; free some"
            return f" ({type(error).__name__}: {error}); {wanted}, or train with --checkpoint"
        return None
