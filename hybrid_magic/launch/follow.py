"""Following the workers, on the notebook's main thread: what they send is shown, what is asked goes
to rank 0, and what goes wrong ends all of them.

Whatever happens, `end` leaves no process behind. Trains nothing and puts nothing back.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import queue
import signal
import sys
import time
from collections.abc import Iterable
from typing import Any

from ..engine.control import RunControl
from ..records import Sink, StepRecord
from ..telemetry.host import activity
from .agent import Agent
from .ending import Ending
from .faults import Fault
from .hanging import Hangs
from .hub import Hub
from .interrupts import Interrupts
from .worker import STACK, STACK_SIGNAL

TURN_S = 0.05  # the panel is asked as often as this, at least
ALONE_S = 1.0  # after the first fault, for the others to hear of it by themselves
# And as long as two steps, for a call into torch hears nothing until it is over:
GRACE_S = 5.0  # after the first fault, for the others to go back to their last whole step
PRESS_S, GIVE_UP_S = 3.0, 4.5  # after an interrupt: all but rank 0 end, and then rank 0
LOOK_S = 1.0  # between looks for one that hangs
SILENT_S = 3.0  # without a sign of life: it does not wait, whatever it said last
LEAVE_S, GONE_S = 2.0, 5.0  # to leave when told to; to be gone when ended


class Following:
    """What is known of the workers of `hub` and `agent`, one for each rank below `size`.

    `endings` are how their training ended, `fault` is what went wrong first, `own_error` what the
    sink or the panel raised here, and `trouble` what kept a worker from handing over.
    """

    def __init__(
        self,
        hub: Hub,
        agent: Agent,
        folder: str,
        size: int,
        sink: Sink | None,
        control: RunControl | None,
        interrupts: Interrupts,
    ) -> None:
        self.endings: dict[int, Ending] = {}
        self.fault: Fault | None = None
        self.own_error: Exception | None = None
        self.trouble: str | None = None
        self.written = False
        self._hub, self._agent, self._folder, self._size = hub, agent, folder, size
        self._sink, self._control, self._interrupts = sink, control, interrupts
        self._idle: dict[int, float] = {}  # since when those wait that are ready, or have ended
        self._gone: set[int] = set()
        self._ended_by_us: set[int] = set()
        self._started = False
        self._hurried_at: float | None = None
        self._asked_at: float | None = None
        self._step_at = math.inf  # when the step that runs began, as far as it is known
        self._pressed_at: float | None = None
        self._hangs, self._look_at, self._longest_s = Hangs(), 0.0, 0.0
        self._answers: list[str | None] = []

    # -- the way of a run --

    def train(self) -> None:
        """Start the workers and follow them until the last one's training is over."""
        self._agent.start()
        while len(self._idle) < self._size:
            self._turn()
            if self._agent.over and self.fault is None:
                self.fault = Fault(self._first_to_fail(), started=False)
            if self.fault is not None or self._interrupts.hits:
                self._kill(range(self._size))
                return
        self._idle.clear()
        self._started, self._step_at = True, time.monotonic()
        for rank in range(self._size):
            self._hub.send(rank, "go")
        while self._unfinished():
            self._turn()
            if self._hurried_at is not None and time.monotonic() > self._hurried_at + ALONE_S:
                # Some wait for one that has failed, and go on when it is gone.
                self.hand_over()
                self._kill(self.endings)

    def hand_over(self) -> bool:
        """Have the lowest rank that can write what came of it; return whether one did."""
        if self.written:
            return True
        for rank in sorted(rank for rank, ending in self.endings.items() if ending.begun):
            self._answers.clear()
            self._hub.send(rank, "deliver")
            while not self._answers and rank not in self._gone:
                self._turn()
            for trouble in self._answers:
                self.trouble, self.written = trouble, trouble is None
            if self.written:
                return True
        return False

    def end(self) -> None:
        """Have the workers leave, and end those that do not, with all that they started."""
        for rank in range(self._size):
            self._hub.send(rank, "leave")
        ends = time.monotonic() + LEAVE_S
        while len(self._gone) < len(self._hub.pids) and time.monotonic() < ends:
            self._take_messages()
        self._kill(range(self._size))
        self._hub.close()
        if self.fault is not None or len(self._hub.pids) < self._size:  # it tells how one ended
            self._agent.join(GONE_S)

    # -- one turn --

    def _turn(self) -> None:
        self._take_messages()
        self._ask()
        now = time.monotonic()
        self._obey_interrupts(now)
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look_for_a_hang(now)
        grace = GRACE_S + (0.0 if self.written else 2 * self._longest_s)
        if self._hurried_at is not None and now >= self._hurried_at + grace:
            self._kill(self._unfinished())

    def _take_messages(self) -> None:
        """Heed what has come, for one turn at most."""
        ends = time.monotonic() + TURN_S
        while (left := ends - time.monotonic()) > 0:
            try:
                rank, message = self._hub.inbox.get(timeout=left)
            except queue.Empty:
                return
            self._heed(rank, message)

    def _heed(self, rank: int, message: tuple[Any, ...]) -> None:
        match message:
            case ("record", record):
                if isinstance(record, StepRecord):
                    self._longest_s = max(self._longest_s, record.step_s or 0.0)
                    self._step_at = time.monotonic()
                if self._sink is not None and self.own_error is None:
                    with self._own():
                        self._sink(record)
            case ("printed", stream, text):
                getattr(sys, stream).write(text)
            case ("ready",):
                self._idle[rank] = time.monotonic()
            case ("ended", ending):
                self._idle[rank], self.endings[rank] = time.monotonic(), ending
                if ending.kind in ("error", "mistake"):
                    self._blame(Fault(rank, ending, started=self._started))
                if ending.kind != "whole":
                    self._hurry()
            case ("delivered", trouble):
                self._answers.append(trouble)
            case ("gone",):
                self._gone.add(rank)
                if rank not in self.endings and rank not in self._ended_by_us:
                    self._blame(Fault(rank, stack=self._stack(rank), started=self._started))
                    self._kill([rank])  # its loader's workers, which hold its lines open
                self._hurry()

    def _ask(self) -> None:
        """Let the panel in, and send on what it asks."""
        control = self._control
        if control is None:
            return
        if control.poll is not None:
            with self._own():
                control.poll()
        while control.mail:
            self._hub.send(0, "mail", *control.mail.popleft())

    @contextlib.contextmanager
    def _own(self) -> Any:
        """Keep what the caller's own code raises: it ends the run as an interrupt does."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised when the workers have ended
            self.own_error = self.own_error or error

    def _obey_interrupts(self, now: float) -> None:
        hits = self._interrupts.hits
        if not hits and self.own_error is None:
            return
        if self._asked_at is None:
            self._asked_at = now
            self._hub.send(0, "interrupt")
        asked, whole = self._asked_at, 2 * self._longest_s
        longer = max(whole, asked - self._step_at)  # a step longer than any before: as long again
        if self._pressed_at is None:
            if hits > 1 or now >= asked + PRESS_S + longer:
                self._pressed_at = now
                self._kill(rank for rank in self._unfinished() if rank)
                self._hub.send(0, "interrupt")
        elif now >= max(asked + whole + GIVE_UP_S, self._pressed_at + GIVE_UP_S - PRESS_S):
            self._kill(self._unfinished())

    # -- what goes wrong --

    def _unfinished(self) -> list[int]:
        ranks = range(self._size)
        return [rank for rank in ranks if rank not in self.endings and rank not in self._gone]

    def _blame(self, fault: Fault) -> None:
        self.fault = self.fault or fault

    def _hurry(self) -> None:
        if self._hurried_at is None:
            self._hurried_at = time.monotonic()

    def _kill(self, ranks: Iterable[int]) -> None:
        """End processes, each with all of its group."""
        for rank in ranks:
            self._ended_by_us.add(rank)
            if (pid := self._hub.pids.get(rank)) is not None:
                _signal_group(pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def _first_to_fail(self) -> int:
        """Return the rank whose process failed by itself; the agent ends the others."""
        codes = self._agent.exit_codes
        alone = [rank for rank, code in codes.items() if code != -signal.SIGTERM]
        return min(alone or codes or [0])

    def _look_for_a_hang(self, now: float) -> None:
        hub = self._hub
        waiting = {
            rank: self._idle.get(rank, self._since(rank, now))
            for rank in list(hub.pids)  # grows meanwhile
            if rank not in self._gone
        }
        late = [rank for rank, since in waiting.items() if since is None]
        watched = late if any(since is not None for since in waiting.values()) else []
        doing = {rank: activity(hub.pids[rank]) for rank in watched}
        found = self._hangs.look(now, waiting, doing, self._longest_s)
        if found is not None and found.rank not in self._ended_by_us:
            if STACK_SIGNAL is not None:
                _signal_group(hub.pids[found.rank], STACK_SIGNAL)
                time.sleep(0.3)  # a signal's handler writes at once, or never
            stack = self._stack(found.rank)
            self._blame(Fault(found.rank, None, found, stack, self._started))
            self._kill([found.rank])
            self._hurry()

    def _since(self, rank: int, now: float) -> float | None:
        heard = now - self._hub.heard.get(rank, 0.0) <= SILENT_S
        return self._hub.waiting.get(rank) if heard else None

    def _stack(self, rank: int) -> str:
        """Return what a process and its loader's workers were doing, as far as they have told."""
        path = pathlib.Path(self._folder, STACK.format(rank))
        return path.read_text(errors="replace") if path.exists() else ""


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
