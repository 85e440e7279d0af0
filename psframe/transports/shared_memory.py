"""Memory that the processes of one node share: anonymous, and gone with its last user.

The maker creates it with memfd_create; others open it through /proc/<pid>/fd/<fd>, as long as
the maker lives. No file is left behind by any death, a container's small /dev/shm is no limit,
and a process that comes later can join. Whether an opened file is the right one is proved by a
nonce in its first page.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psframe.layout import Array

__all__ = ["Segment", "SegmentBuffers", "first_apart", "node_id"]

NONCE_BYTES = 16
_PAGE = 4096
_LINE = 64


def node_id() -> bytes:
    """16 bytes, equal for processes that can open each other's memory by process id."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    namespace = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{boot} {namespace}".encode()).digest()[:16]


class Segment:
    """`count` arrays of equal length in one mapping; pages exist once they are touched.

    Attributes:
        fd: the open file in the maker, -1 after `close_file` and in processes that opened it.
        nonce: 16 random bytes.
    """

    def __init__(self, mapping: mmap.mmap, fd: int, nonce: bytes, size: int, dtype: Any) -> None:
        self._mapping = mapping
        self.fd = fd
        self.nonce = nonce
        self._size = size
        self._dtype = np.dtype(dtype)

    @classmethod
    def create(cls, count: int, size: int, dtype: Any) -> Segment:
        """Make a segment of `count` arrays of `size` elements.

        Raises:
            OSError: the system refuses the memory.
        """
        length = _length(count, size, dtype)
        fd = os.memfd_create("psframe", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, length)
            mapping = mmap.mmap(fd, length)
        except BaseException:
            os.close(fd)
            raise
        nonce = os.urandom(NONCE_BYTES)
        mapping[:NONCE_BYTES] = nonce
        return cls(mapping, fd, nonce, size, dtype)

    @classmethod
    def open(
        cls, pid: int, fd: int, nonce: bytes, count: int, size: int, dtype: Any
    ) -> Segment | None:
        """Map another process's segment; None if it cannot be opened or is not that one."""
        length = _length(count, size, dtype)
        try:
            file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None  # another user's, another namespace's: there is the way through MPI
        try:
            if os.fstat(file).st_size != length:
                return None
            mapping = mmap.mmap(file, length)
        except OSError:
            return None
        finally:
            os.close(file)
        if mapping[:NONCE_BYTES] != nonce:
            return None
        return cls(mapping, -1, nonce, size, dtype)

    def array(self, index: int) -> Array:
        """Array `index`; the memory lives as long as some array of it does."""
        offset = _PAGE + index * _stride(self._size, self._dtype)
        return np.frombuffer(self._mapping, self._dtype, self._size, offset)

    def words(self, index: int, lines: int = 1) -> memoryview:
        """64 bytes of the first page, a cache line, or some; `index` is 0 to 62. 0 at first."""
        begin, end = _LINE * (1 + index), _LINE * (1 + index + lines)
        assert end <= _PAGE, "beyond the first page"
        return memoryview(self._mapping)[begin:end]

    def close_file(self) -> None:
        """Close the maker's file once everyone has opened it; the mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SegmentBuffers:
    """The first `count` arrays of a segment, as a store's buffers."""

    def __init__(self, segment: Segment, count: int) -> None:
        self._arrays = [segment.array(index) for index in range(count)]

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: int) -> Array:
        return self._arrays[index]


def _stride(size: int, dtype: Any) -> int:
    n_bytes: int = max(1, size) * np.dtype(dtype).itemsize
    return -(-n_bytes // _PAGE) * _PAGE


def _length(count: int, size: int, dtype: Any) -> int:
    return _PAGE + count * _stride(size, dtype)


def first_apart(nodes: Sequence[bytes], servers: int) -> int:
    """Give the first working rank of the line on another node than a server; else the first.

    Args:
        nodes: of each rank of the line, equal on one node; servers are in front.
        servers: S.
    """
    serving = set(nodes[:servers])
    apart = (rank for rank in range(servers, len(nodes)) if serving != {nodes[rank]})
    return next(apart, servers)
