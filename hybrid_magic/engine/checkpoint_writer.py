"""The file of one checkpoint: what `torch.save` writes, and a digest that knows damage.

Knows no training, no folder and no other checkpoint. `torch.load` opens such a file; its zip
comment ends in a digest of every byte before it: damage is known before anything is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FORMAT = 1
CHUNK_BYTES = 2**24  # written at a time: how soon a writer that is to stop does so
SYNC_BYTES = 2**28  # synced at a time: a full disk shows early, and little waits in the page cache
_TAIL_BYTES = 512  # of a file, in which its comment begins
_NO_LENGTH = b"\0\0"  # the last bytes of a zip file without a comment
_COMMENT = re.compile(
    rb"hybrid_magic checkpoint format=(\d{1,4}) step=(\d{16}) serial=(\d{16}) "
    rb"sha256=([0-9a-f]{64})\Z"
)
_ANY_FORMAT = re.compile(rb"hybrid_magic checkpoint format=(\d{1,4}) ")
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # some network folders cannot


@dataclass(frozen=True, slots=True)
class Label:
    """What a file says of itself; `serial` counts the checkpoints written to its folder."""

    step: int
    serial: int
    format: int = FORMAT


class _Digesting:
    """A file that is written through a digest, in chunks, synced as it grows."""

    def __init__(self, file: Any, moved: Callable[[], None]) -> None:
        self._file = file
        self._moved = moved
        self._unsynced = 0
        self.digest = hashlib.sha256()
        self.fault: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            return self._write(memoryview(data))
        except BaseException as error:
            self.fault = error
            raise

    def _write(self, view: memoryview) -> int:
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            self._moved()
            self.digest.update(chunk)
            self.put(chunk)
            self._unsynced += len(chunk)
            if self._unsynced >= SYNC_BYTES:
                sync(self._file.fileno())
                self._unsynced = 0
        return len(view)

    def put(self, chunk: Any) -> None:
        """Write all of `chunk`, past the digest: an unbuffered file may take a part of it."""
        view = memoryview(chunk)
        while view:
            view = view[self._file.write(view) :]

    def flush(self) -> None:
        """Nothing waits here: `torch.save` asks for it."""


def write(path: pathlib.Path, tree: Any, label: Label, moved: Callable[[], None]) -> None:
    """Write `tree` to `path` and sync it; `path` is a temporary name, for a fault leaves a part.

    Args:
        moved: called before every chunk; what it raises ends the writing.
    Raises:
        OSError: the disk is full, read-only, gone.
    """
    # Unbuffered: a process that is forked meanwhile has nothing to write when it ends.
    with open(path, "wb", buffering=0) as file:
        out: Any = _Digesting(file, moved)  # of a file, it has what `torch.save` uses
        try:
            torch.save(tree, out)
        except Exception:
            if out.fault is not None:  # torch tells of its own fault on the way out instead
                raise out.fault from None
            raise
        finally:
            out.fault = None  # or it and this frame keep the tree alive
        comment = (
            f"hybrid_magic checkpoint format={FORMAT} step={label.step:016d} "
            f"serial={label.serial:016d} sha256="
        ).encode()
        out.digest.update(comment)
        comment += out.digest.hexdigest().encode()
        file.seek(-len(_NO_LENGTH), os.SEEK_END)
        out.put(len(comment).to_bytes(2, "little") + comment)
        sync(file.fileno())


def sync(descriptor: int) -> None:
    """Wait until the file is on the disk, as far as its file system can tell.

    Raises:
        OSError: it could not be brought there.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def label_of(path: pathlib.Path) -> Label | None:
    """Return what the end of the file says, None where it is not the end of a checkpoint; of
    another format only that.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        tail = file.read()
    found = _COMMENT.search(tail)
    if found and int(found[1]) == FORMAT:
        return Label(int(found[2]), int(found[3]))
    found = _ANY_FORMAT.search(tail)
    return Label(-1, -1, int(found[1])) if found and int(found[1]) != FORMAT else None


def read(path: pathlib.Path) -> Any:
    """Return the tree in the file, on the host.

    Not memory-mapped: optimizers keep the tensors that they load, and a file that is changed or
    unmounted under a mapping ends the process.

    Raises:
        ValueError: its bytes are not those that were written, or this torch cannot read them.
        OSError: it cannot be read at all.
    """
    if not _is_whole(path):
        raise ValueError("its bytes are not those that were written")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"torch {torch.__version__} cannot read it") from error


def _is_whole(path: pathlib.Path) -> bool:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
        found = _COMMENT.search(tail)
        if found is None:
            return False
        comment = found[0][: -len(found[4])]
        if tail[found.start() - 2 : found.start()] != len(found[0]).to_bytes(2, "little"):
            return False
        left = size - len(found[0]) - len(_NO_LENGTH)
        file.seek(0)
        while left > 0 and (chunk := file.read(min(CHUNK_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
    digest.update(_NO_LENGTH + comment)
    return digest.hexdigest().encode() == found[4]
