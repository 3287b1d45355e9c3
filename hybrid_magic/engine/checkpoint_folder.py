"""A folder of checkpoints: who may write it, what stands in it, which is the newest whole one.

Knows no training, no thread and no tree. Only files of our own names are ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import HybridMagicError
from .checkpoint_writer import FORMAT, Label, label_of, read, sync

if sys.platform != "win32":
    import fcntl

MARGIN_BYTES = 2**24  # left free on the disk, beside the checkpoint
LEFT_OVER_S = 3600.0  # where no lock tells: a part this old has no writer any more
LOCK = ".hybrid_magic.lock"
_NAME = re.compile(r"checkpoint-\d{8,}\.pt\Z")
_PART = re.compile(r"checkpoint-\d{8,}\.pt\.\d+\.part\Z")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # some network folders

_ours: set[pathlib.Path] = set()  # locked by this process: the system's locks are between processes


class Found(NamedTuple):
    """A checkpoint that was read; `notes`: a sentence for each newer one that was passed over."""

    tree: Any
    step: int
    notes: list[str]


class Folder:
    """One folder; `open` before it is written, `close` at the end."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path).expanduser().absolute()
        self._locked: pathlib.Path | None = None
        self._lock: int | None = None  # a file descriptor; None where locks are not to be had

    def room_for(self, checkpoint_bytes: int) -> int:
        """Return how many checkpoints can be kept while one more is written; changes nothing.

        Raises:
            HybridMagicError: a file stands there, or there is not room for two.
        """
        standing = next(place for place in (self.path, *self.path.parents) if place.exists())
        if not standing.is_dir():
            raise HybridMagicError(
                f"checkpoint={str(self.path)!r}: {standing.name!r} is a file; wanted a folder; "
                "give another name"
            )
        used = sum(path.stat().st_size for path in self._named(_NAME))
        free = shutil.disk_usage(standing).free
        # The first is written beside what stands there; later ones in the place of older ones.
        wanted = max(checkpoint_bytes, 2 * checkpoint_bytes - used) + MARGIN_BYTES
        if free < wanted:
            raise HybridMagicError(
                f"checkpoint={str(self.path)!r}: {in_words(free)} free; wanted {in_words(wanted)}, "
                "for a checkpoint and the next one beside it; free some space, or give a folder on "
                "another disk"
            )
        return int((free + used - MARGIN_BYTES) // max(checkpoint_bytes, 1)) - 1

    def open(self) -> None:
        """Make the folder, keep other writers out, remove what killed ones left half-written.

        Raises:
            HybridMagicError: it cannot be written, or another run writes it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise HybridMagicError(
                f"checkpoint={str(self.path)!r} cannot be written ({error.strerror}); wanted a "
                "folder in which files can be made; give another one"
            ) from error
        for path in self._named(_PART):
            with contextlib.suppress(OSError):
                if self._lock is not None or time.time() - path.stat().st_mtime > LEFT_OVER_S:
                    path.unlink()

    def _take_lock(self) -> None:
        place = self.path.resolve()
        if place in _ours:
            raise self._in_use("a run in this process")
        # Not flock: a forked data worker would hold it on after its parent was killed.
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        keep = False
        try:
            locked = _lock(lock)
            if locked is False:
                raise self._in_use(os.read(lock, 80).decode(errors="replace").strip())
            os.ftruncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            sync(lock)
            keep = bool(locked)
        finally:
            if not keep:
                os.close(lock)
        self._lock = lock if keep else None
        self._locked = place
        _ours.add(place)

    def _in_use(self, holder: str) -> HybridMagicError:
        return HybridMagicError(
            f"checkpoint={str(self.path)!r} is being written by {holder or 'another process'}; "
            "wanted a folder to itself; stop that run, or give another folder"
        )

    def close(self) -> None:
        """Let others write the folder."""
        if self._lock is not None:
            os.close(self._lock)
        if self._locked is not None:
            _ours.discard(self._locked)
        self._lock = self._locked = None

    def next_serial(self) -> int:
        """Return the number of the next checkpoint to be written here."""
        return 1 + max((label.serial for _, label in self._labelled() if label), default=0)

    def remove_old(self, keep: int) -> int:
        """Remove all checkpoints but those written last; return how many could not be.

        Those written last, not those of the highest steps: a run that begins anew in the folder of
        an older one would lose each of its own at once. Not by their times either, which copying
        changes. What another version wrote is left alone.

        Source:
            huggingface/transformers#37260, where steps and then times were tried.
        """
        failed = 0
        ours = [path for path, label in self._labelled() if not label or label.format == FORMAT]
        for path in ours[keep:]:
            try:
                path.unlink(missing_ok=True)
            except OSError:
                failed += 1
        return failed

    def newest(self, accept: Callable[[Any], str | None] | None) -> tuple[Found | None, list[str]]:
        """Return the newest whole checkpoint that `accept` has nothing against, and all notes."""
        notes: list[str] = []
        # Those that cannot be read first: they may have been the newest.
        for path, label in sorted(self._labelled(), key=_is_readable):
            if label is None:
                notes.append(f"{path.name} is half-written or damaged; it was passed over")
            elif label.format != FORMAT:
                notes.append(
                    f"{path.name} has format {label.format}; wanted {FORMAT}; it was passed over, "
                    "the version of hybrid_magic that wrote it can read it"
                )
            else:
                tree, why_not = _read(path)
                if why_not is None and accept is not None:
                    why_not = accept(tree)
                if why_not is None:
                    return Found(tree, label.step, notes), notes
                notes.append(f"{path.name}: {why_not}; it was passed over")
        return None, notes

    def sync(self) -> None:
        """Bring the folder's own names to the disk."""
        if sys.platform == "win32":
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            sync(folder)
        finally:
            os.close(folder)

    def _named(self, pattern: re.Pattern[str]) -> list[pathlib.Path]:
        try:
            names = os.listdir(self.path)
        except OSError:
            return []
        return [self.path / name for name in sorted(names) if pattern.match(name)]

    def _labelled(self) -> list[tuple[pathlib.Path, Label | None]]:
        """Return the checkpoints with their labels: last written first, unreadable ones last."""
        found: list[tuple[pathlib.Path, Label | None]] = []
        for path in self._named(_NAME):
            label = None
            with contextlib.suppress(OSError):
                label = label_of(path)
            found.append((path, label))
        return sorted(found, key=lambda one: one[1].serial if one[1] else -2, reverse=True)


def _is_readable(one: tuple[pathlib.Path, Label | None]) -> bool:
    return one[1] is not None and one[1].format == FORMAT


def _lock(descriptor: int) -> bool | None:
    """Return whether the file is ours now, None where its system has no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _read(path: pathlib.Path) -> tuple[Any, str | None]:
    try:
        return read(path), None
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    except ValueError as error:
        return None, f"damaged, {error}"


def what_went_wrong(
    error: Exception, path: pathlib.Path, step: int, size_bytes: int
) -> tuple[Any, str]:
    """Return the cause of a checkpoint of `size_bytes` not being written, and a sentence on it."""
    begin = f"the checkpoint of step {step} was not written to {path}"
    end = "the older ones are as they were, and the next one is tried again"
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL:
        free = "its disk is full"
        with contextlib.suppress(OSError):
            free = f"{in_words(shutil.disk_usage(path).free)} free"
        wanted = in_words(size_bytes + MARGIN_BYTES)
        return errno.ENOSPC, f"{begin}: {free}; wanted {wanted}; free some space: {end}"
    if number == errno.ENOENT:
        return number, f"{begin}: it is gone; wanted the folder of the run's start; make it anew"
    reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return number or type(error), (
        f"{begin}: {reason}; wanted a folder that can be written; mend that: {end}"
    )


def in_words(size_bytes: float) -> str:
    large = abs(size_bytes) >= 2**30
    return f"{size_bytes / (2**30 if large else 2**20):.3g} {'GiB' if large else 'MiB'}"
