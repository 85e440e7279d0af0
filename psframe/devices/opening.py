"""Memory on a GPU that several processes of one node use: CUDA IPC.

CUDA lets others open whole allocations of cudaMalloc alone, and CuPy's pool gives parts of them. So
what a process lends is one allocation of its own, cut into arrays. The one who opens it reads it on
a device of its own, the same or a peer; the owner frees it when nobody has it open any more. That
what is opened is the owner's memory is proved by a nonce at its end: a mapping alone is no proof,
where copies between devices go astray in between.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from psframe.devices.sharing import identify
from psframe.paired import BorrowedArray

__all__ = ["HANDLE_BYTES", "NONCE_BYTES", "Lent", "Opened", "check_reach", "lent_bytes"]

HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE
NONCE_BYTES = 16
# CUDA may cut smaller allocations from one block, all of which would be opened.
_WHOLE_BYTES = 2 << 20
_ALIGN_BYTES = 512


class Lent:
    """One allocation for others to open, of `count` arrays of `size`.

    It lives as long as this or one of its arrays.

    Args:
        gpu: such as "cuda:0".
        count, size, dtype: of the arrays.

    Attributes:
        handle: what others open it by.
        nonce: what they find at its end, until it is used.

    Raises:
        RuntimeError: CUDA has no memory, or does not let others open it.
    """

    def __init__(self, gpu: str, count: int, size: int, dtype: Any) -> None:
        import cupy

        self._size, self._step = size, _step(size, dtype)
        n_bytes = lent_bytes(count, size, dtype)
        self.nonce = os.urandom(NONCE_BYTES)
        with cupy.cuda.Device(_ordinal(gpu)):
            self._whole = _allocate(cupy, n_bytes // np.dtype(dtype).itemsize, dtype)
            address = int(self._whole.data.ptr)
            self.handle = bytes(cupy.cuda.runtime.ipcGetMemHandle(address))
            _write(cupy, address + n_bytes - NONCE_BYTES, self.nonce)

    def array(self, index: int) -> Any:
        """Give array `index`, CuPy's; what is in it at first is undefined."""
        begin = index * self._step
        return self._whole[begin : begin + self._size]


class Opened:
    """Another process's allocation, open in this one.

    Args:
        gpu: that is to reach it, such as "cuda:0".
        handle: the owner's.
        size, dtype: of its arrays.

    Raises:
        RuntimeError: CUDA does not open it.
    """

    def __init__(self, gpu: str, handle: bytes, size: int, dtype: Any) -> None:
        import cupy

        runtime = self._runtime = cupy.cuda.runtime
        self._device = cupy.cuda.Device(_ordinal(gpu))
        self._size, self._step, self._dtype = size, _step(size, dtype), np.dtype(dtype)
        with self._device:
            flags = runtime.cudaIpcMemLazyEnablePeerAccess
            self._address = int(runtime.ipcOpenMemHandle(handle, flags))
        self._open = True

    def prove(self, count: int, nonce: bytes) -> None:
        """Check that a copy as those of the arrays brings the nonce, which is behind all `count`.

        Raises:
            RuntimeError: it does not, or fails (MemoryError: there is none for 16 bytes). It is
                closed then.
        """
        try:
            came = self._read_nonce(count)
        except (RuntimeError, MemoryError):
            self.close()
            raise
        if came != nonce:
            self.close()
            raise RuntimeError("it opens, but copies from it bring other bytes than are in it")

    def _read_nonce(self, count: int) -> bytes:
        import cupy

        end = self._address + lent_bytes(count, self._size, self._dtype) - NONCE_BYTES
        with self._device:
            found, stream = cupy.empty(NONCE_BYTES, np.uint8), cupy.cuda.get_current_stream()
            kind = self._runtime.memcpyDeviceToDevice
            self._runtime.memcpyAsync(int(found.data.ptr), end, NONCE_BYTES, kind, stream.ptr)
            return bytes(found.get().tobytes())

    def array(self, index: int) -> BorrowedArray:
        """Give array `index`."""
        offset = index * self._step * self._dtype.itemsize
        return BorrowedArray(self._address + offset, self._size, self._dtype)

    def close(self) -> None:
        """Close it, once; no copy from it is under way."""
        if self._open:
            self._open = False
            with self._device:
                self._runtime.ipcCloseMemHandle(self._address)


def lent_bytes(count: int, size: int, dtype: Any) -> int:
    """Count the bytes of the allocation for `count` arrays of `size`; none for none."""
    n_bytes = count * _step(size, dtype) * int(np.dtype(dtype).itemsize)
    return -(-n_bytes // _WHOLE_BYTES) * _WHOLE_BYTES


def check_reach(name: str, other: bytes) -> None:
    """Check that a GPU reaches the memory of another, if this process sees that one.

    Of one that it does not see, opening its memory tells.

    Args:
        name: the GPU, such as "cuda:0".
        other: the other's id, as `identify` gives it.

    Raises:
        RuntimeError: it does not.
    """
    if identify(name) == other:
        return
    import cupy

    runtime, mine = cupy.cuda.runtime, _ordinal(name)
    for ordinal in range(int(runtime.getDeviceCount())):
        if identify(f"cuda:{ordinal}") == other and not runtime.deviceCanAccessPeer(mine, ordinal):
            raise RuntimeError(f"{name} does not reach the memory of cuda:{ordinal}")


def _allocate(cupy: Any, size: int, dtype: Any) -> Any:
    """Allocate with cudaMalloc itself; if it fails, once more without what CuPy's pool keeps."""
    with cupy.cuda.using_allocator(None):
        try:
            return cupy.empty(size, dtype)
        except RuntimeError:  # CUDA's own: it is the pool that makes a MemoryError of it
            cupy.get_default_memory_pool().free_all_blocks()
            return cupy.empty(size, dtype)


def _write(cupy: Any, address: int, data: bytes) -> None:
    """Write some bytes to the current device, and wait until they are there."""
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(len(data)), np.uint8, len(data))
    pinned[:] = np.frombuffer(data, np.uint8)
    kind, stream = cupy.cuda.runtime.memcpyHostToDevice, cupy.cuda.get_current_stream()
    cupy.cuda.runtime.memcpyAsync(address, pinned.ctypes.data, len(data), kind, stream.ptr)
    stream.synchronize()


def _ordinal(gpu: str) -> int:
    return int(gpu.partition(":")[2])


def _step(size: int, dtype: Any) -> int:
    """Elements from one array to the next."""
    align = _ALIGN_BYTES // int(np.dtype(dtype).itemsize)
    return -(-max(1, size) // align) * align
