"""Host memory that a GPU's copy engine can reach: registered with CUDA, or a pinned buffer.

Memory is registered by whole pages and for the whole process, so that one table, which counts, is
kept for all workers of a process. What cannot be registered is copied through a pinned buffer of
the same length, which costs a copy on the host.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np

from psframe.layout import Array

__all__ = ["REGISTER_BYTES_MIN", "Pinned", "Pinning", "registered"]

# Small arrays of the heap share their pages with others, and a copy on the host costs little.
REGISTER_BYTES_MIN = 1 << 20
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU of the process

_log = logging.getLogger("psframe")


class Registered:
    """Ranges of this process that are registered: address -> (bytes, users)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranges: dict[int, tuple[int, int]] = {}

    def add(self, runtime: Any, array: Array) -> None:
        """Register an array's memory, or count one user more.

        Raises:
            RuntimeError: CUDA does not register it.
        """
        address = _address(array)
        with self._lock:
            n_bytes, users = self._ranges.get(address, (array.nbytes, 0))
            if not users:
                runtime.hostRegister(address, array.nbytes, _PORTABLE)
            elif n_bytes != array.nbytes:
                raise RuntimeError(f"{n_bytes} bytes at {address:#x} are registered already")
            self._ranges[address] = n_bytes, users + 1

    def remove(self, runtime: Any, array: Array) -> None:
        """Count one user less, and unregister what the last one leaves."""
        address = _address(array)
        with self._lock:
            n_bytes, users = self._ranges.pop(address)
            if users > 1:
                self._ranges[address] = n_bytes, users - 1
            else:
                runtime.hostUnregister(address)


registered = Registered()  # what a process has registered is registered for all of it


class Pinned:
    """An array of host memory and where a GPU reaches it.

    Attributes:
        array: the host memory itself.
        bounce: a pinned buffer of equal length that stands for it; None if it is registered.
        address: where copies of the GPU go to, or come from.
    """

    def __init__(self, array: Array, bounce: Array | None) -> None:
        self.array = array
        self.bounce = bounce
        self.address = _address(array if bounce is None else bounce)

    def fill(self) -> None:
        """Bring what the array holds to where the GPU reads."""
        if self.bounce is not None:
            self.bounce[:] = self.array

    def empty(self, begin: int, end: int) -> None:
        """Bring what the GPU has written to the array."""
        if self.bounce is not None:
            self.array[begin:end] = self.bounce[begin:end]


class Pinning:
    """What one worker has pinned.

    Args:
        cupy: the module; its current device is the worker's.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._pinned: dict[tuple[int, int], Pinned] = {}
        self._told = False

    def pin(self, array: Array) -> Pinned:
        """Pin a contiguous array, once; it is kept until `close`."""
        key = _address(array), array.nbytes
        pinned = self._pinned.get(key)
        if pinned is None:
            pinned = self._pinned[key] = Pinned(array, self._bounce_for(array))
        return pinned

    def buffer(self, size: int, dtype: Any) -> Array:
        """Allocate pinned memory of `size` elements."""
        memory = self._cupy.cuda.alloc_pinned_memory(max(1, size) * np.dtype(dtype).itemsize)
        return np.frombuffer(memory, dtype, size)

    def close(self) -> None:
        """Unregister all of it; no copy is under way."""
        pinned, self._pinned = self._pinned, {}
        for one in pinned.values():
            if one.bounce is None:
                registered.remove(self._cupy.cuda.runtime, one.array)

    def _bounce_for(self, array: Array) -> Array | None:
        if array.nbytes >= REGISTER_BYTES_MIN:
            try:
                registered.add(self._cupy.cuda.runtime, array)
                return None
            except RuntimeError as error:  # CuPy's for CUDA's
                if not self._told:
                    self._told = True
                    _log.warning(
                        "%.1f MiB of host memory cannot be registered with CUDA (%s): what is"
                        " copied to and from the GPU goes through pinned buffers, which costs a"
                        " copy on the host",
                        array.nbytes / 2**20,
                        error,
                    )
        return self.buffer(array.size, array.dtype)


def _address(array: Array) -> int:
    return int(array.ctypes.data)
