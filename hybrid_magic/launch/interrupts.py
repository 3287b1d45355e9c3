"""The notebook's interrupts while workers train: counted, and obeyed between two messages."""

from __future__ import annotations

import signal
import threading
from typing import Any

LAST = 3  # is let through, to end what hangs here


class Interrupts:
    """Takes the interrupts of the main thread; `hits` counts them. With `held` none is let through:
    for what must be whole."""

    def __init__(self) -> None:
        self.hits, self.held = 0, False
        self._found: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._found = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._found is not None:
            signal.signal(signal.SIGINT, self._found)

    def _note(self, *_: Any) -> None:
        self.hits += 1
        if self.hits >= LAST and not self.held:
            raise KeyboardInterrupt
