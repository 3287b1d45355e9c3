"""Pump: lets the front end's messages in while a cell trains on the main thread.

A kernel reads no message while a cell runs, so a slider would stand still until training ends.
Called at step boundaries, the pump drains the main shell's socket: widget messages are handled at
once, everything else (queued cells) is put back, in order, for after the cell.

It needs private attributes of ipykernel, which is why it is alone in this file. Where they are not
as expected the pump never pumps, `why` says so, and training goes on without live controls.
Knows no widget and no run.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EVERY_S = 0.25  # an answer is wanted within a second; to look costs 0.15 ms between two steps

_NOW = frozenset(
    {"comm_msg", "comm_open", "comm_close", "comm_info_request", "kernel_info_request"}
)


class Pump:
    """Called once per step on the main thread; `why` is None, or a sentence why it cannot pump.

    `due` is the `time.monotonic()` before which a call does nothing; read it first where the price
    of a call counts. `handled` counts messages answered, `held` messages put back.
    """

    def __init__(self, kernel: Any | None = None, *, every_s: float = EVERY_S) -> None:
        self.every_s, self.due = every_s, 0.0
        self.handled = self.held = 0
        self.why: str | None = None
        self._inside = False
        try:
            self._plumb(kernel if kernel is not None else _running_kernel())
        except Exception as error:  # noqa: BLE001 - any change inside ipykernel ends here, and is said
            self._stop(error)

    def _plumb(self, kernel: Any) -> None:
        """Find the socket that this thread's messages come on, and the way back for the rest."""
        import zmq
        from ipykernel.kernelbase import Kernel

        main = threading.main_thread()
        channel = getattr(kernel, "shell_channel_thread", None)
        if channel is None:  # ipykernel 6: the shell socket itself; the kernel's own queue
            stream = self._replies = kernel.shell_stream
            self._put_back: Callable[[Any], None] = lambda frames: kernel.schedule_dispatch(
                kernel.dispatch_shell, frames
            )
        else:  # ipykernel 7: a socket pair from the shell thread; the stream's own callback
            stream = channel.manager._shell_channel_to_main.to_stream
            self._replies = channel.manager.get_subshell_to_shell_channel_socket(None)
            self._put_back = _as_tasks(stream._recv_callback)
        if (
            threading.current_thread() is not main
            or getattr(channel, "parent_thread", main) is not main
        ):
            raise RuntimeError("the cell does not run on the kernel's main thread")
        self._kernel, self._socket = kernel, stream.socket
        self._parents = Kernel  # the subclass's set_parent would also move prints and displays
        self._no_more, self._no_block = zmq.Again, zmq.NOBLOCK
        self._events, self._waiting = zmq.EVENTS, zmq.POLLIN
        _ = (
            kernel._parent_ident["shell"],
            kernel.get_parent("shell"),
            kernel.shell_handlers["comm_msg"],
        )

    def __call__(self) -> None:
        """Handle what has arrived, if the pump is due.

        Raises:
            KeyboardInterrupt: the person interrupted; raised between messages, never inside one.
        """
        if self.why is not None or self._inside or time.monotonic() < self.due:
            return
        if threading.current_thread() is not threading.main_thread():
            return
        self._inside = True
        try:
            # Held already here: whoever has seen that messages wait must read them, as the kernel's
            # loop is not told of them again.
            with interrupts_held():
                if self._socket.getsockopt(self._events) & self._waiting:
                    self._drain()
        except Exception as error:  # noqa: BLE001 - see _stop
            self._stop(error)
        finally:
            self._inside = False
            self.due = time.monotonic() + self.every_s if self.why is None else math.inf

    def _stop(self, error: Exception) -> None:
        self.due = math.inf
        self.why = (
            "live controls are off, training is not affected: this kernel does not let messages in "
            f"while a cell runs ({type(error).__name__}: {error})"
        )

    def _drain(self) -> None:
        while True:
            try:
                frames = self._socket.recv_multipart(self._no_block, copy=False)
            except self._no_more:
                return
            self._take(frames)

    def _take(self, frames: list[Any]) -> None:
        kernel, kind = self._kernel, None
        try:
            identities, parts = kernel.session.feed_identities(frames, copy=False)
            kind = kernel.session.unpack(parts[1].bytes)["msg_type"]
        except Exception:  # noqa: BLE001 - not a message that we can read: the kernel's business
            parts, identities = [], []
        if kind not in _NOW:
            self.held += 1
            # Not deserialized: that would use up its signature, and it would be dropped as a copy.
            self._put_back(frames)
            return
        message = kernel.session.deserialize(parts, copy=False)
        self.handled += 1
        before = kernel._parent_ident["shell"], kernel.get_parent("shell")
        # Neither parent, busy nor idle may be left out: the front end would send once and stop.
        self._parents.set_parent(kernel, identities, message, "shell")
        try:
            kernel._publish_status("busy", "shell")
            self._handle(kernel.shell_handlers[kind](self._replies, identities, message))
        except Exception:
            kernel.log.exception("hybrid_magic: a front end's message could not be handled")
        finally:
            kernel._publish_status("idle", "shell")
            self._parents.set_parent(kernel, *before, "shell")
            kernel._publish_status("busy", "shell")

    @staticmethod
    def _handle(result: Any) -> None:
        """Run a handler that is a coroutine to its end; those handled here never wait."""
        if inspect.iscoroutine(result):
            try:
                result.send(None)
            except StopIteration:
                return
            result.close()


def _as_tasks(receive: Callable[[Any], Coroutine[Any, Any, Any]]) -> Callable[[Any], None]:
    """Return what has messages received after the cell, ahead of any that the loop reads then.

    A callback of the loop would start a turn later, and the kernel's own "stop aborting", which it
    sends itself when a cell fails, could overtake it: queued cells would run after an interrupt.
    """
    waiting: set[asyncio.Task[Any]] = set()  # a loop itself holds its tasks weakly

    def put_back(frames: Any) -> None:
        task = asyncio.get_running_loop().create_task(receive(frames))
        waiting.add(task)
        task.add_done_callback(waiting.discard)

    return put_back


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Put an interrupt off to the end of the block, so that no message is left half sent.

    A second interrupt is not put off: whatever hangs inside can be ended. On another thread than
    the main one, where no interrupt arrives, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []

    def act() -> None:
        (before if callable(before) else signal.default_int_handler)(*held[-1])

    def later(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        if len(held) > 1:
            act()

    before = signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
        if len(held) == 1:
            act()


def _running_kernel() -> Any:
    from IPython.core.getipython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    if kernel is None:
        raise RuntimeError("there is no kernel here")
    return kernel
