"""Buffers that are on the host and on a device, and know where their bytes are."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from psframe.layout import Array

__all__ = ["BorrowedArray", "Card", "Paired"]


class Card(Protocol):
    """A device as a store uses it; `psframe.server_device.Card` is a GPU.

    As a context manager it makes the kernels within run on it, in order. Arrays of the device are
    cut with slices and computed with kernels; all else is done here.

    Attributes:
        name: such as "cuda:0".
        bad: one int32 on the device, set by kernels whose results are not finite.
    """

    name: str
    bad: Any

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...

    def empty(self, size: int, dtype: np.dtype[Any]) -> Any:
        """Allocate an array on the device."""

    def zeros(self, size: int, dtype: np.dtype[Any]) -> Any:
        """Allocate an array of zeros on the device."""

    def half(self, index: int, size: int, dtype: np.dtype[Any]) -> Any:
        """Give the array on the device for a store's buffer, asked for once."""

    def send(self, source: Any, target: Any, *, alone: bool = False) -> None:
        """Copy from the host, or another process's device memory; kernels from now on find it.

        `source` is to stay as it is until `verdict` or `settle`; `alone` if nothing is to be done
        meanwhile.
        """

    def reuse(self) -> None:
        """Have what is sent from now on wait for the kernels so far, which read its targets."""

    def fetch(self, source: Any, target: Array, *, alone: bool = False) -> None:
        """Copy from the device to the host, behind the kernels so far; `fetched` waits for it."""

    def verdict(self) -> bool:
        """Wait for the kernels so far, and say whether all that they have written is finite."""

    def read(self, scalar: Any) -> float:
        """Wait for a kernel's one number, and give it."""

    def fetched(self) -> None:
        """Wait for what has been fetched, but not what was alone: for that `verdict` waits."""

    def settle(self) -> None:
        """Wait until nothing is under way any more."""

    def clear(self) -> None:
        """Forget the verdict; what is computed from now on has its own."""


class Paired:
    """A store's buffers, each on the host and, once it is used there, on a device.

    What indexing gives is the host's, with the bytes in it.

    Args:
        host: the host's, which others read by their index.
        card: the device.
        size, dtype: of each.
    """

    def __init__(self, host: Any, card: Card, size: int, dtype: np.dtype[Any]) -> None:
        self._host = host
        self._card = card
        self._make: Callable[[int], Any] = lambda index: card.half(index, size, dtype)
        self._device: list[Any] = [None] * len(host)
        self._on_host = [False] * len(host)
        self._on_device = [False] * len(host)
        self._asked = [False] * len(host)

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, index: int) -> Array:
        self.bring(index)
        array: Array = self._host[index]
        return array

    def was_asked_for(self, index: int) -> bool:
        """Whether somebody has asked for these bytes on the host."""
        return self._asked[index]

    def bring(self, index: int) -> None:
        """Have the bytes on the host, for somebody who asks for them."""
        self._asked[index] = True
        if self._on_device[index] and not self._on_host[index]:
            with self._card as card:
                card.fetch(self._device[index], self._host[index])
                card.fetched()
            self._on_host[index] = True

    def device(self, index: int) -> Any:
        """Give the device's array, with the bytes in it; within the card's context."""
        array = self._array(index)
        if self._on_host[index] and not self._on_device[index]:
            self._card.reuse()  # kernels may have still to use what its memory was before
            self._card.send(self._host[index], array)
            self._card.settle()
            self._on_device[index] = True
        return array

    def device_half(self, index: int) -> Any:
        """Give the device's array, if the bytes are in it and nothing writes it; else None."""
        return self._device[index] if self._on_device[index] else None

    def to_fill(self, index: int) -> Array:
        """Give the host's array, about to be written, all of it."""
        self._on_host[index], self._on_device[index] = True, False
        array: Array = self._host[index]
        return array

    def to_compute(self, index: int) -> tuple[Any, Array]:
        """Give both arrays, about to be written by kernels and by copies of what those write."""
        self._on_host[index] = self._on_device[index] = self._asked[index] = False
        return self._array(index), self._host[index]

    def computed(self, index: int, *, copied: bool) -> None:
        """Note that all of it has been computed, and perhaps copied to the host."""
        self._on_device[index], self._on_host[index] = True, copied

    def _array(self, index: int) -> Any:
        array = self._device[index]
        if array is None:
            array = self._device[index] = self._make(index)
        return array


class BorrowedArray:
    """An array in another process's allocation: where it is, for copies; no kernel is given it.

    Attributes:
        data: `.ptr` is its address in this process.
        size, dtype, itemsize, nbytes: as NumPy's.
    """

    def __init__(self, address: int, size: int, dtype: Any) -> None:
        self.data = SimpleNamespace(ptr=address)
        self.size = size
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.itemsize = self.dtype.itemsize
        self.nbytes = size * self.itemsize

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> BorrowedArray:
        begin, end, _ = part.indices(self.size)
        address = self.data.ptr + begin * self.itemsize
        return BorrowedArray(address, max(0, end - begin), self.dtype)
