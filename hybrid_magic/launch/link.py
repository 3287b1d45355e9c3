"""A worker's end of its line to the notebook.

Two threads own it: one sends what was told since it last looked, and a sign of life; the other
receives orders. When the notebook is gone, so is the worker, at once and with all that it started.
Loads no torch: the line stands before that is loaded.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from typing import Any, NoReturn, TextIO

from ..engine.control import RunControl

EVERY_S = 0.05  # a batch of messages: a step's record must cost the loop no more than an append
BEAT_S = 0.5


class Link:
    """`orders` holds what the main thread is asked to do; `control` takes what the panel asks.
    `waited` tells for how many seconds this process has been waiting for the others, if it is."""

    def __init__(self, folder: str, where: dict[str, Any], rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.orders: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.control = RunControl()
        self.waited: Callable[[], float | None] = lambda: None
        self._told: deque[tuple[Any, ...]] = deque()
        self._parent = os.getppid()
        address = where["address"]
        place = address if isinstance(address, str) else tuple(address)
        try:
            self._line = Client(place, authkey=bytes.fromhex(where["key"]))
            self._line.send((rank, os.getpid()))
        except (OSError, EOFError, AuthenticationError):
            self._end_all()
        if hasattr(os, "register_at_fork"):  # a loader's worker must not hold the line open
            os.register_at_fork(after_in_child=self._line.close)
        for work in (self._send, self._receive):
            threading.Thread(target=self._or_none, args=(work,), daemon=True).start()

    def tell(self, *message: Any) -> None:
        """Send `message`, in order, soon."""
        self._told.append(message)

    def _or_none(self, work: Callable[[], None]) -> None:
        """Do `work`; where it fails there must be no worker that nobody hears of."""
        try:
            work()
        except Exception:  # noqa: BLE001 - told in the worker's log
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)

    def _send(self) -> None:
        beat = 0.0
        while True:
            messages = [self._told.popleft() for _ in range(len(self._told))]
            now = time.monotonic()
            if messages or now - beat >= BEAT_S:
                beat = now
                try:
                    self._line.send((self.waited(), messages))
                except OSError:
                    self._end_all()
            if os.getppid() != self._parent:  # also where a child of the notebook holds the line
                self._end_all()
            time.sleep(EVERY_S)

    def _receive(self) -> None:
        try:
            while True:
                match self._line.recv():
                    case ("mail", name, value):
                        self.control.mail.append((name, value))
                    case ("interrupt",):
                        _interrupt_main_thread()
                    case (order,):
                        self.orders.put(order)
        except (EOFError, OSError):
            self._end_all()

    def _end_all(self) -> NoReturn:
        """End this process and those that it started: there is nobody to train for."""
        gone = f"{self.folder}-gone"
        with contextlib.suppress(OSError):  # another worker has; nobody puts more into it now
            os.rename(self.folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
        if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def _interrupt_main_thread() -> None:
    if hasattr(signal, "pthread_kill"):  # also ends a sleep
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        import _thread

        _thread.interrupt_main()


class Shown(io.TextIOBase):
    """A standard stream whose text is shown in the notebook, and kept in the worker's log."""

    def __init__(self, link: Link, name: str, kept: TextIO) -> None:
        self._link, self._name, self._kept, self._owner = link, name, kept, os.getpid()

    @property
    def encoding(self) -> str:
        return "utf-8"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._kept.fileno()

    def write(self, text: str) -> int:
        if os.getpid() == self._owner:  # a forked child has no thread that sends
            self._link.tell("printed", self._name, text)
        return self._kept.write(text)

    def flush(self) -> None:
        self._kept.flush()
