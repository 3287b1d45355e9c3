"""Answering what a person asked of the run, once per step: stop, pause, resume, and the settings.

Every answer is a record. A pause holds the loop here, where it goes on listening.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..records import BatchChangeRecord
from .control import RunControl

if TYPE_CHECKING:
    from .progress import TrainState

LISTEN_EVERY_S = 0.02  # while paused


def answer(state: TrainState, control: RunControl) -> bool:
    """Do all that is asked for; return whether the run ends here.

    Raises:
        KeyboardInterrupt: the kernel was interrupted during a pause.
    """
    while control.mail:
        name, value = control.mail.popleft()
        if name == "pause":
            if _pause(state, control):
                return True
        elif name == "stop":
            return _stop(state)
        elif name != "resume":
            state.sizing.by_hand(name, value, state.step)
    return False


def _pause(state: TrainState, control: RunControl) -> bool:
    """Wait for "resume" or "stop", taking in settings meanwhile; return whether the run ends."""
    _record(state, "running", "paused", "pause button")
    start = time.perf_counter()
    try:
        while True:
            if state.interrupts.hit:
                raise KeyboardInterrupt
            if not control.mail:
                if control.poll is not None:
                    control.poll()
                time.sleep(LISTEN_EVERY_S)
                continue
            name, value = control.mail.popleft()
            if name == "resume":
                _record(state, "paused", "running", "resume button")
                return False
            if name == "stop":
                return _stop(state)
            if name != "pause":
                state.sizing.by_hand(name, value, state.step)
    finally:
        state.paused(time.perf_counter() - start)


def _stop(state: TrainState) -> bool:
    _record(state, "running", "stopped", "stop button")
    state.run.outcome = "stopped"
    return True


def _record(state: TrainState, before: str, after: str, button: str) -> None:
    reason = f"{button}: {after} at step {state.step}"
    state.emit(BatchChangeRecord(state.step, before, after, "control", reason))
