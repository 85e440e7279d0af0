"""CUDA IPC without a GPU: whole allocations that several processes see, as files in shared memory.

`FakeCupy` and `FakeCuda` take it in, so that a worker's device memory and a server's are the same
bytes. What psframe is not to do raises: to ask for a handle of what is no whole allocation; to open
one where it was made, twice in one process, or after it was freed; to close memory while a copy to
or from it is under way. Memory that is freed while somebody has it open is noted. It lives as long
as somebody has it open, also if its owner was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

__all__ = ["FakeIpc"]

_FOLDER = "/dev/shm/psframe-test-ipc-"
_HEADER = 4096  # of a file: how many have it open


class FakeIpc:
    """The calls of the runtime that lend and open, and the allocator that makes what is lent.

    Args:
        busy: (address, bytes) -> whether a copy to or from there is under way.
        total: bytes of a device's memory.

    Attributes:
        free: bytes of it that nobody has taken; kept: more that CuPy's pool has, and nobody uses.
        opened, lent: how often, in all.
        open_now: what this process has open, by address.
        wrong: what an owner did wrong where nothing can be raised.
        refuses: what opening raises, None if nothing.
        garbles: whether what is opened is other memory, zeros.
        full: whether there is no memory to lend.
        peers: whether devices reach each other.
    """

    cudaIpcMemLazyEnablePeerAccess = 1

    def __init__(
        self,
        busy: Callable[[int, int], bool] = lambda address, n: False,
        total: int = 8 << 30,
    ) -> None:
        self.opened = self.lent = 0
        self.open_now: dict[int, tuple[mmap.mmap, int, str]] = {}
        self.wrong: list[str] = []
        self.refuses: str | None = None
        self.garbles = False
        self.full = False
        self.total = self.free = total
        self.kept = 0
        self.peers = True
        self.whole = False  # whether what is allocated now is an allocation of its own
        self.files: dict[int, str] = {}  # of this process's, by address
        self._busy = busy

    @contextlib.contextmanager
    def using_allocator(self, allocator: None) -> Iterator[None]:
        assert allocator is None, "cudaMalloc"
        self.whole = True
        try:
            yield
        finally:
            self.whole = False

    def allocate(self, size: int, dtype: Any) -> np.ndarray:
        """Make an allocation of its own, NaN; it is freed with the last array of it."""
        n_bytes = size * np.dtype(dtype).itemsize
        if self.full or n_bytes > self.free:
            raise RuntimeError("cudaErrorMemoryAllocation: out of memory")
        name = f"{_FOLDER}{os.getpid()}-{os.urandom(6).hex()}"
        assert n_bytes % (2 << 20) == 0, "others would open what is beside it"
        mapping, number = _map(name, _HEADER + n_bytes)
        memory = np.frombuffer(mapping, dtype, size, _HEADER)
        memory.view(np.uint8)[:] = 0xFF
        address = memory.ctypes.data
        self.files[address] = name
        finalizer = weakref.finalize(memory, self._free, name, address, number)
        finalizer.atexit = True
        return memory

    def _free(self, name: str, address: int, number: int) -> None:
        if _count(number, 0):
            self.wrong.append("it is freed while others have it open")
        os.close(number)
        os.unlink(name)
        del self.files[address]

    def memGetInfo(self) -> tuple[int, int]:
        return self.free, self.total

    def free_bytes(self) -> int:
        """Of the pool."""
        return self.kept

    def free_all_blocks(self) -> None:
        """Of the pool."""
        self.free += self.kept
        self.kept = 0

    def ipcGetMemHandle(self, address: int) -> bytes:
        if address not in self.files:
            raise RuntimeError("cudaErrorInvalidValue: no whole allocation")
        self.lent += 1
        return self.files[address].encode().ljust(64, b"\0")

    def ipcOpenMemHandle(self, handle: bytes, flags: int) -> int:
        assert flags == self.cudaIpcMemLazyEnablePeerAccess
        assert type(handle) is bytes
        assert len(handle) == 64
        name = handle.rstrip(b"\0").decode()
        if self.refuses is not None:
            raise RuntimeError(self.refuses)
        if name in self.files.values() or any(name == n for _, _, n in self.open_now.values()):
            raise RuntimeError("cudaErrorInvalidContext: it is open in this process")
        try:
            mapping, number = _map(name, 0)
        except OSError as error:
            raise RuntimeError("cudaErrorInvalidResourceHandle") from error
        _count(number, 1)
        if self.garbles:
            mapping = mmap.mmap(-1, len(mapping))
        address = np.frombuffer(mapping, np.uint8, 1, _HEADER).ctypes.data
        self.open_now[address] = mapping, number, name
        self.opened += 1
        return address

    def ipcCloseMemHandle(self, address: int) -> None:
        mapping, number, _ = self.open_now.pop(address)
        assert not self._busy(address, len(mapping) - _HEADER), "it is being copied"
        _count(number, -1)
        os.close(number)

    def deviceCanAccessPeer(self, device: int, peer: int) -> int:
        assert device != peer
        return int(self.peers)

    def is_here(self, address: int, n_bytes: int) -> bool:
        """Whether this is memory that is open here."""
        return any(
            a <= address and address + n_bytes <= a + len(mapping) - _HEADER
            for a, (mapping, _, _) in tuple(self.open_now.items())
        )


def _map(name: str, length: int) -> tuple[mmap.mmap, int]:
    """Map a file, a new one of that length unless that is 0."""
    number = os.open(name, os.O_RDWR | (os.O_CREAT | os.O_EXCL if length else 0), 0o600)
    try:
        if length:
            os.ftruncate(number, length)
        return mmap.mmap(number, os.fstat(number).st_size), number
    except BaseException:
        os.close(number)
        raise


def _count(number: int, more: int) -> int:
    """Count those who have a file open."""
    fcntl.flock(number, fcntl.LOCK_EX)
    try:
        count = int.from_bytes(os.pread(number, 8, 0), "little") + more
        os.pwrite(number, count.to_bytes(8, "little"), 0)
        return count
    finally:
        fcntl.flock(number, fcntl.LOCK_UN)
