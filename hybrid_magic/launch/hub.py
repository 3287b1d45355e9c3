"""The notebook's end of the lines to its workers.

A local socket, in a folder that only the person can open, and a key that only this folder tells.
One thread accepts, one reads each worker's line, so that a worker never waits for the notebook.
Knows no torch and no training.
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

_LONGEST_PATH = 100  # of a socket; systems allow 104 or more


class Hub:
    """The lines to `processes` workers.

    `inbox` holds (rank, message) in the order in which they came; a rank's last is ("gone",).
    `pids` are the workers' by rank. `heard` is when (`time.monotonic()`) each rank was last heard
    of, and `waiting` since when it waited for the others then, None where it did not.
    """

    def __init__(self, folder: str, processes: int) -> None:
        self.inbox: queue.SimpleQueue[tuple[int, tuple[Any, ...]]] = queue.SimpleQueue()
        self.pids: dict[int, int] = {}
        self.heard: dict[int, float] = {}
        self.waiting: dict[int, float | None] = {}
        self._key, self._left, self._closed = secrets.token_bytes(32), processes, False
        self._lines: dict[int, Connection] = {}
        path = os.path.join(folder, "hub")
        by_path = os.name == "posix" and len(path) < _LONGEST_PATH
        address: Any = path if by_path else ("127.0.0.1", 0)
        self._listener = Listener(address, backlog=processes, authkey=self._key)
        threading.Thread(target=self._accept, daemon=True).start()

    def where(self) -> dict[str, Any]:
        """Return what a worker needs to know to call, as plain JSON values."""
        return {"address": self._listener.address, "key": self._key.hex()}

    def send(self, rank: int, *order: Any) -> None:
        """Send an order; one to a worker that is gone is lost, and its ("gone",) says why."""
        try:
            self._lines[rank].send(order)
        except (KeyError, OSError):
            pass

    def close(self) -> None:
        """Accept no more and hang up; a worker that is still there ends."""
        self._closed = True
        if self._left:
            try:  # wakes the thread that accepts; without a key, for nobody may be there to answer
                Client(self._listener.address).close()
            except OSError:
                pass
        self._listener.close()
        for line in list(self._lines.values()):
            line.close()

    def _accept(self) -> None:
        while self._left and not self._closed:
            try:
                line = self._listener.accept()
            except (OSError, EOFError, AuthenticationError):  # it was no worker of ours
                continue
            self._left -= 1
            threading.Thread(target=self._read, args=(line,), daemon=True).start()

    def _read(self, line: Connection) -> None:
        rank = None
        try:
            rank, pid = line.recv()
            self._lines[rank], self.pids[rank] = line, pid
            while True:
                waited, messages = line.recv()
                now = time.monotonic()
                self.heard[rank] = now
                self.waiting[rank] = None if waited is None else now - waited
                for message in messages:
                    self.inbox.put((rank, message))
        except (EOFError, OSError):
            if rank is not None:
                self.inbox.put((rank, ("gone",)))
