"""The GPU of a server: its memory, three streams, and the word that says whether an update is good.

CuPy is imported only when a GPU is wanted. All copies here are asynchronous, ordered by events;
`verdict` and `settle` wait, and nothing else does.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from psframe.devices.choosing import pick_gpu
from psframe.devices.pinning import registered
from psframe.layout import Array

__all__ = ["Card", "check_server_device", "choose_server_device"]

_PAGE = 4096

_log = logging.getLogger("psframe")


class Card:
    """One GPU as one server uses it; see `psframe.paired.Card`.

    As a context manager it makes its device and its compute stream CuPy's current ones.

    Args:
        ordinal: the GPU's number among the visible ones.

    Attributes:
        bad: one int32 on the device, set by kernels whose results are not finite.
    """

    def __init__(self, ordinal: int) -> None:
        import cupy

        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self.name = f"cuda:{ordinal}"
        self._device = cupy.cuda.Device(ordinal)
        with self._device:
            self._compute = cupy.cuda.Stream(non_blocking=True)
            self._inward = cupy.cuda.Stream(non_blocking=True)
            self._outward = cupy.cuda.Stream(non_blocking=True)
            self._arrived = cupy.cuda.Event(disable_timing=True)
            self._computed = cupy.cuda.Event(disable_timing=True)
            # What the verdict is read from is pinned, or its copy would not be asynchronous.
            self._pinned = cupy.cuda.alloc_pinned_memory(4)
            self._word: Array = np.frombuffer(self._pinned, np.int32, 1)
            with self._compute:
                self.bad = cupy.zeros(1, cupy.int32)
            self._compute.synchronize()
        self._lent: Callable[[int], Any] | None = None
        self._fetching = False  # whether something may be under way on the outward stream
        self._seen: set[int] = set()  # addresses of memory that has been looked at,
        self._tried: set[int] = set()  # and of the whole that it is part of
        self._told = False
        self._registered: list[Array] = []  # which stays as long as it is registered
        self._unregister = weakref.finalize(self, _unregister, self._runtime, self._registered)
        self._unregister.atexit = False  # the driver may be gone by then

    def __enter__(self) -> Card:
        self._device.__enter__()
        self._compute.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._compute.__exit__(kind, error, trace)
        self._device.__exit__(kind, error, trace)

    def empty(self, size: int, dtype: np.dtype[Any]) -> Any:
        """Allocate an array on the device; within the context."""
        return self._cupy.empty(size, dtype)

    def zeros(self, size: int, dtype: np.dtype[Any]) -> Any:
        """Allocate an array of zeros on the device; within the context."""
        return self._cupy.zeros(size, dtype)

    def lend(self, array: Callable[[int], Any]) -> None:
        """Have the store's buffers in memory that others have opened: `array(buffer)`."""
        self._lent = array

    def half(self, index: int, size: int, dtype: np.dtype[Any]) -> Any:
        """Give the array on the device for a store's buffer; within the context."""
        return self._cupy.empty(size, dtype) if self._lent is None else self._lent(index)

    def open_to_others(self) -> None:
        """Make the device this thread's: MPI, which is given arrays of it, asks which it is."""
        self._device.use()

    def settled(self, size: int, dtype: np.dtype[Any]) -> Any:
        """Allocate an array that others than the streams may write at once.

        It may have been something else's, that kernels have still to use.
        """
        with self:
            array = self._cupy.empty(size, dtype)
        self._compute.synchronize()
        return array

    def send(self, source: Any, target: Any, *, alone: bool = False) -> None:
        """Copy from the host, or another process's device memory; kernels from now on find it.

        Args:
            source: contiguous; to stay as it is until `verdict` or `settle`.
            target: no kernel still reads it, but those before an earlier `reuse`.
            alone: nothing is to be done at the same time, so that one stream is enough.
        """
        stream = self._compute if alone else self._inward
        if isinstance(source, np.ndarray):
            self.register(source)
            kind = self._runtime.memcpyHostToDevice
            address = source.__array_interface__["data"][0]
        else:
            kind = self._runtime.memcpyDeviceToDevice
            address = source.data.ptr
        self._runtime.memcpyAsync(target.data.ptr, address, source.nbytes, kind, stream.ptr)
        if not alone:
            self._arrived.record(self._inward)
            self._compute.wait_event(self._arrived)

    def reuse(self) -> None:
        """Have what is sent from now on wait for the kernels so far, which read its targets."""
        self._computed.record(self._compute)
        self._inward.wait_event(self._computed)

    def fetch(self, source: Any, target: Array, *, alone: bool = False) -> None:
        """Copy from the device to the host, behind the kernels so far; `fetched` waits for it.

        Args:
            source, target: contiguous.
            alone: as for `send`; then `verdict` waits for it, too.
        """
        stream = self._compute if alone else self._outward
        if not alone:
            self._fetching = True
            self._computed.record(self._compute)
            self._outward.wait_event(self._computed)
        kind = self._runtime.memcpyDeviceToHost
        address = target.__array_interface__["data"][0]
        self.register(target)
        self._runtime.memcpyAsync(address, source.data.ptr, target.nbytes, kind, stream.ptr)

    def verdict(self) -> bool:
        """Wait for the kernels so far, and say whether all that they have written is finite."""
        kind, stream = self._runtime.memcpyDeviceToHost, self._compute
        address = self._word.__array_interface__["data"][0]
        self._runtime.memcpyAsync(address, self.bad.data.ptr, 4, kind, stream.ptr)
        stream.synchronize()
        return not self._word[0]

    def read(self, scalar: Any) -> float:
        """Wait for a kernel's one number, and give it."""
        return float(scalar.get(stream=self._compute).item())

    def fetched(self) -> None:
        """Wait for what has been fetched, but not what was alone."""
        if self._fetching:
            self._outward.synchronize()
            self._fetching = False

    def settle(self) -> None:
        """Wait until nothing is under way any more."""
        self._inward.synchronize()
        self._compute.synchronize()
        self._outward.synchronize()
        self._fetching = False

    def clear(self) -> None:
        """Forget the verdict; what is computed from now on has its own."""
        self._runtime.memsetAsync(self.bad.data.ptr, 0, 4, self._compute.ptr)

    def register(self, array: Array) -> None:
        """Have CUDA copy to and from memory that is shared with others without going through its
        own; memory of the heap stays as it is, also where it begins a page: others are on its last.
        """
        address = array.__array_interface__["data"][0]
        if address in self._seen:
            return
        self._seen.add(address)
        whole = array
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        first = whole.__array_interface__["data"][0]
        on_heap = whole.flags.owndata or first % _PAGE
        if on_heap or not whole.nbytes or first in self._tried:
            return
        self._tried.add(first)  # once: a gradient comes in many pieces
        try:
            registered.add(self._runtime, whole)
        except RuntimeError as error:  # CuPy's for CUDA's
            if not self._told:
                self._told = True
                _log.warning("gradients are copied to the GPU slowly: %s", error)
            return
        self._registered.append(whole)


def _unregister(runtime: Any, mine: list[Array]) -> None:
    while mine:
        registered.remove(runtime, mine.pop())


def check_server_device(device: object) -> str:
    """Return what `run(server_device=...)` is given.

    Raises:
        TypeError, ValueError: it is none of "cpu", "cuda", "cuda:k".
    """
    if not isinstance(device, str):
        raise TypeError(f"server_device: expected 'cpu' or 'cuda', got {device!r}")
    if re.fullmatch(r"cpu|cuda(:[0-9]+)?", device, re.ASCII) is None:
        raise ValueError(f"server_device: expected 'cpu', 'cuda' or 'cuda:k', got {device!r}")
    return device


def choose_server_device(device: str, server: int) -> int | None:
    """Turn `server_device` into the number of a GPU; None for the CPU.

    Args:
        device: as checked.
        server: index of the server among those on its node; GPUs are given out in turn.

    Raises:
        ValueError: there is no such GPU.
    """
    if device == "cpu":
        return None
    remedy = "server_device='cpu'"
    return pick_gpu("server_device", device, server, remedy)
