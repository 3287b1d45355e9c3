"""Checkpoints written behind the training: copied at once, written by a thread, the newest kept.

Knows no training: a checkpoint is a tree of plain values and tensors. Nothing stands under a
checkpoint's name before it is whole and on the disk, nothing older is removed before the newer one
stands, and what goes wrong with a disk is a sentence, not an exception.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from .checkpoint_copy import Copies, size_bytes
from .checkpoint_folder import MARGIN_BYTES, Folder, Found, in_words, what_went_wrong
from .checkpoint_writer import Label, write

SECOND_COPY_BYTES = 2**28  # up to which a second copy waits in memory; a larger one is waited for
STALL_S = 60.0  # without a byte written: the disk is not answering
STOP_S = 5.0  # for a writer that was told to stop to come to its next chunk


@dataclass(slots=True)
class _Job:
    tree: Any
    step: int
    size_bytes: int
    copies: Copies


class _StoppedError(Exception):
    """The writer was told to stop."""


class Store:
    """The checkpoints in one folder, which one run at a time writes.

    `check` comes before the first `save`, `close` at the end, in the same process: one that is
    forked meanwhile has no part in it. `newest` and `problems` may be called at any time.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 3,
        waiting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Nothing is read or made yet.

        Args:
            keep: how many whole checkpoints stay, at least 1.
            waiting: what `save` waits under, where it has to; what that raises comes through.
        """
        assert keep >= 1
        self._waiting = waiting
        self._folder = Folder(folder)
        self._keep = keep
        self._pid: int | None = None  # of the process that writes; None while none does
        self._state = threading.Condition()  # held for all that follows
        self._thread: threading.Thread | None = None
        self._busy = False
        self._job: _Job | None = None  # the one that waits
        self._free: list[Copies] = []
        self._moved = 0  # chunks written: the sign of a disk that answers
        self._stop = False
        self._problems: list[str] = []
        self._told: set[Any] = set()

    def check(self, needed_bytes: int) -> None:
        """Make the folder ready for checkpoints of `needed_bytes` and keep other runs out of it.

        Where fewer than `keep` have room, fewer are kept, and `problems` says so. What a killed
        process left half-written is removed.

        Raises:
            HybridMagicError: it is a file, cannot be written, is in use or has no room for two
                checkpoints; nothing was changed.
        """
        room = self._folder.room_for(needed_bytes)
        self._folder.open()
        self._pid, self._stop = os.getpid(), False
        if room < self._keep:
            self._tell(
                "room",
                f"{self._folder.path} has room for {room} checkpoints of {in_words(needed_bytes)} "
                f"and the one being written; wanted {self._keep}; the newest {room} are kept, free "
                "some space before the next run to keep more",
            )
            self._keep = room

    def save(self, tree: Any, *, step: int) -> None:
        """Copy `tree` now, write it in the background; one that still waits is replaced by it.

        Takes as long as the copy. Only while a large one is being written it takes until that is
        done, since two would fill the memory. What the disk refuses is told by `problems`.

        Raises:
            HybridMagicError: something is in the tree that no checkpoint can hold.
        """
        assert self._pid == os.getpid(), "check() comes first, in the process that saves"
        size = size_bytes(tree)
        copies = self._copies_for(size)
        if copies is None:
            self._tell("stall", self._stalled(f"the checkpoint of step {step} was left out"))
            return
        try:
            copy = copies.take(tree)
        except BaseException:
            with self._state:
                self._free.append(copies)
            raise
        with self._state:
            self._job = _Job(copy, step, size, copies)
            if not self._is_writing():
                self._busy = True
                self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
                self._thread.start()

    def wait(self) -> bool:
        """Wait until all is written, as long as the disk answers; return whether all is."""
        if self._pid != os.getpid():
            return True
        with self._state:
            done = self._until(lambda: not self._is_writing())
        if not done:
            self._tell("stall", self._stalled("its last checkpoint is not written"))
        return done

    def close(self) -> None:
        """Wait, give back memory and lock; an interrupt ends the waiting, and what is half-written.

        Afterwards no thread is left, unless the disk does not answer it.
        """
        if self._pid != os.getpid():
            return
        try:
            self.wait()
        finally:
            self.stop()
            try:
                if self._thread is not None:
                    self._thread.join(STOP_S)
            finally:
                self._thread, self._pid = None, None
                self._free.clear()
                self._folder.close()

    def stop(self) -> None:
        """Nothing more is written, and what is half-written ends."""
        with self._state:
            self._stop, self._job = True, None

    def newest(self, accept: Callable[[Any], str | None] | None = None) -> Found | None:
        """Return the checkpoint that was written last of those that are whole, None without one.

        Args:
            accept: says what is wrong with a tree, for it to be passed over, or None; what it
                raises comes through.
        Returns:
            (tree, step, notes), its tensors on the host; `notes` has a sentence for each one passed
            over. Where none is left, `problems` has the sentences.
        """
        found, notes = self._folder.newest(accept)
        if found is None:
            with self._state:
                self._problems += notes
        return found

    def problems(self) -> list[str]:
        """Return what the person has not been told yet: a sentence for each cause, told once until
        a checkpoint was written again."""
        with self._state:
            found, self._problems = self._problems, []
        return found

    def _tell(self, cause: Any, sentence: str) -> None:
        with self._state:
            if cause not in self._told:
                self._told.add(cause)
                self._problems.append(sentence)

    def _stalled(self, what: str) -> str:
        return (
            f"{self._folder.path} took no byte for {STALL_S:.0f} s and {what}; wanted a disk that "
            "answers; look whether it is still connected"
        )

    def _is_writing(self) -> bool:
        return self._busy and self._thread is not None and self._thread.is_alive()

    def _copies_for(self, size: int) -> Copies | None:
        """Return memory for a copy, None where a disk that does not answer holds all of it."""
        with self._state:
            if self._job is not None:
                replaced, self._job = self._job, None
                return replaced.copies
            if size > SECOND_COPY_BYTES:
                if self._is_writing():
                    with self._waiting():
                        self._until(lambda: not self._is_writing())
                if self._is_writing():
                    return None
                del self._free[1:]
            return self._free.pop() if self._free else Copies()

    def _until(self, done: Callable[[], bool]) -> bool:
        """Wait as long as bytes are being written; return whether it is done."""
        moved = None
        while not done() and moved != self._moved:
            moved = self._moved
            self._state.wait_for(lambda: done() or moved != self._moved, STALL_S)  # noqa: B023
        return done()

    def _run(self) -> None:
        """Write the job that waits, and those that come meanwhile. The thread's own function."""
        while True:
            with self._state:
                job, self._job = self._job, None
                if job is None:
                    self._busy = False
                    self._state.notify_all()
                    return
            try:
                self._write(job)
                with self._state:
                    self._told.clear()
                self._remove_old()
            except _StoppedError:
                pass
            except Exception as error:  # noqa: BLE001 - no fault of a checkpoint ends the training
                self._tell(*what_went_wrong(error, self._folder.path, job.step, job.size_bytes))
            with self._state:
                self._free.append(job.copies)
                self._state.notify_all()
            del job

    def _write(self, job: _Job) -> None:
        folder = self._folder.path
        if shutil.disk_usage(folder).free < job.size_bytes + MARGIN_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        final = folder / f"checkpoint-{job.step:08d}.pt"
        part = final.with_name(f"{final.name}.{self._pid}.part")
        try:
            write(part, job.tree, Label(job.step, self._folder.next_serial()), self._on_chunk)
            os.replace(part, final)
            self._folder.sync()
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _on_chunk(self) -> None:
        with self._state:
            self._moved += 1
            self._state.notify_all()
            if self._stop:
                raise _StoppedError

    def _remove_old(self) -> None:
        failed = self._folder.remove_old(self._keep)
        if failed:
            self._tell(
                "old",
                f"{failed} older checkpoints in {self._folder.path} cannot be removed; wanted only "
                f"the newest {self._keep}; remove them by hand",
            )


class NoStore:
    """In place of a Store in a process that leaves the writing to another one."""

    def check(self, needed_bytes: int) -> None:
        """Nothing is written."""

    def save(self, tree: Any, *, step: int) -> None:
        """Nothing is written."""

    def newest(self, accept: Any) -> None:
        del accept

    def problems(self) -> list[str]:
        return []

    def stop(self) -> None:
        """Nothing is written."""

    def close(self) -> None:
        """Nothing is open."""
