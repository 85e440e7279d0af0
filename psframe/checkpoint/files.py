"""Files that are written whole or not at all, and read without following anything.

All is done with descriptors of folders, so that nothing that is renamed meanwhile is mistaken for
what was looked at. Within these functions an OSError is an OSError; `explained` makes it ours.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from psframe.checkpoint.names import checkpoint_name, temporary_name
from psframe.errors import CheckpointError

__all__ = [
    "NewFile",
    "digest_of",
    "explained",
    "file_size",
    "new_file",
    "open_file",
    "opened_checkpoint",
    "opened_folder",
    "read_exactly",
    "read_file",
    "unlink_file",
]

# Bytes that are hashed, written or read at a time. Each call lets other threads run and may then
# have to wait for them, up to 5 ms: fewer calls are faster beside a thread that computes in Python.
_PIECE_BYTES = 4 << 20

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that bears a shard's name must not wait for its other end.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EACCES: "see who may read and write there",
    errno.EPERM: "see who may read and write there",
    errno.EROFS: "see who may read and write there",
    errno.EIO: "the disk may be failing",
}

_log = logging.getLogger("psframe")


@contextmanager
def explained(path: str | Path, what: str) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that says what failed and where; prefix ours alike."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "")
        reason = f"{path}: {what}: {error.strerror or error}" + (remedy and f"; {remedy}")
        raise CheckpointError(reason) from error
    except CheckpointError as error:
        raise type(error)(f"{path}: {what}: {error}") from error


@contextmanager
def opened_folder(path: str | Path) -> Iterator[int]:
    """Open the folder that checkpoints are in; it may be reached through a link."""
    fd = os.open(path, _FOLDER)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def opened_checkpoint(parent: int, version: int, *, create: bool = False) -> Iterator[int]:
    """Open the folder of a version, never through a link; make it, durably, if `create`."""
    name = checkpoint_name(version)
    if create:
        with suppress(FileExistsError):  # another server was faster
            os.mkdir(name, 0o700, dir_fd=parent)
        os.fsync(parent)
    fd = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


class NewFile:
    """A file that is on the disk under a temporary name.

    Attributes:
        bytes: its size.
        sha256: of its content, in hexadecimal digits.
    """

    def __init__(self, folder: int, name: str) -> None:
        self.bytes = 0
        self.sha256 = ""
        self.temporary = temporary_name(name)
        self._folder = folder
        self._name = name

    def publish(self) -> None:
        """Give it its name, in place of a file that had it; durable when this returns."""
        folder = self._folder
        os.rename(self.temporary, self._name, src_dir_fd=folder, dst_dir_fd=folder)
        self.temporary = ""
        os.fsync(folder)


@contextmanager
def new_file(folder: int, name: str, content: Iterable[memoryview]) -> Iterator[NewFile]:
    """Write a file that nobody sees until it is published; otherwise it is removed at the end.

    Args:
        folder: descriptor of the folder.
        name: what it will be called.
        content: one buffer of bytes after the other; nothing is copied.
    """
    file = NewFile(folder, name)
    fd = os.open(file.temporary, _WRITE, 0o600, dir_fd=folder)
    try:
        try:
            _write(fd, content, file)
            os.fsync(fd)
        finally:
            os.close(fd)
        yield file
    finally:
        if file.temporary:
            _discard(folder, file.temporary)


def _write(fd: int, content: Iterable[memoryview], file: NewFile) -> None:
    digest = hashlib.sha256()
    for buffer in content:
        for begin in range(0, len(buffer), _PIECE_BYTES):
            piece = buffer[begin : begin + _PIECE_BYTES]
            digest.update(piece)
            file.bytes += len(piece)
            while piece:
                piece = piece[os.write(fd, piece) :]
    file.sha256 = digest.hexdigest()


def _discard(folder: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except OSError as error:  # what has brought us here is told already; pruning removes the file
        _log.info("%s: what was written of it is left behind: %s", name, error.strerror)


def unlink_file(folder: int, name: str) -> bool:
    """Remove a regular file, and nothing else; tell whether one was there."""
    if file_size(folder, name) is None:
        return False
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:  # another server was faster
        return False
    return True


def file_size(folder: int, name: str) -> int | None:
    """Tell the size of a regular file; None if there is none of this name."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def open_file(folder: int, name: str) -> tuple[int, int]:
    """Open a regular file to be read.

    Returns:
        Its descriptor, which the caller closes, and its size.

    Raises:
        CheckpointError: it is a link, or anything but a file, or is missing.
    """
    try:
        fd = os.open(name, _READ, dir_fd=folder)
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{name} is a link, which is not followed") from error
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{name} is not a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd, found.st_size


def read_file(folder: int, name: str, bytes_max: int) -> bytes:
    """Read a small file whole.

    Raises:
        CheckpointError: it is missing, no file, or larger than `bytes_max`; nothing was allocated.
    """
    fd, size = open_file(folder, name)
    try:
        if size > bytes_max:
            raise CheckpointError(f"{name} has {size} bytes, more than the {bytes_max} allowed")
        data = bytearray(size)
        read_exactly(fd, 0, memoryview(data), name)
    finally:
        os.close(fd)
    return bytes(data)


def read_exactly(
    fd: int,
    offset: int,
    into: memoryview,
    name: str,
    alive: Callable[[], None] | None = None,
) -> None:
    """Fill a buffer of bytes from a file, from `offset` on; call `alive` after each piece.

    Raises:
        CheckpointError: the file ends before.
    """
    while into:
        count = os.preadv(fd, [into[:_PIECE_BYTES]], offset)
        if count == 0:
            raise CheckpointError(f"{name} ends at byte {offset}, too early")
        offset, into = offset + count, into[count:]
        if alive is not None:
            alive()


def digest_of(fd: int, size: int, name: str, alive: Callable[[], None] | None = None) -> str:
    """Compute the sha256 of a file's first `size` bytes, in hexadecimal digits.

    `alive` is called after each piece.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(size, _PIECE_BYTES)))
    for begin in range(0, size, _PIECE_BYTES):
        piece = buffer[: size - begin]
        read_exactly(fd, begin, piece, name, alive)
        digest.update(piece)
    return digest.hexdigest()
