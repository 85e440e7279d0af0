"""Where a worker computes: NumPy arrays on the host, or CuPy arrays on a GPU.

CuPy is imported only when a GPU is wanted. Host memory given to the transport is complete when
these functions return: the stream that filled it has been synchronised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from psframe.layout import Array, Layout

__all__ = ["CudaDevice", "Device", "HostDevice", "choose_device", "make_device"]


class Device(Protocol):
    """What a worker needs of the place where it computes."""

    name: str
    xp: ModuleType

    def params(self, views: Mapping[str, Array]) -> tuple[dict[str, Any], bool]:
        """Bring host parameters here.

        Returns:
            The arrays, and whether they are copies (then the host's may change at once).
        """

    def gradients(self, grads: Mapping[str, Any]) -> Mapping[str, Array]:
        """Bring gradients to the host; NumPy arrays come back as they are."""

    def staging(self, views: Mapping[str, Array]) -> dict[str, Any]:
        """Give writable arrays for gradients: the host views themselves, or arrays here."""


class HostDevice:
    """The host: nothing is copied."""

    def __init__(self) -> None:
        self.name = "cpu"
        self.xp: ModuleType = np

    def params(self, views: Mapping[str, Array]) -> tuple[dict[str, Any], bool]:
        """Give the host arrays as they are."""
        return dict(views), False

    def gradients(self, grads: Mapping[str, Any]) -> Mapping[str, Array]:
        """Give the host arrays as they are."""
        return grads

    def staging(self, views: Mapping[str, Array]) -> dict[str, Any]:
        """Give the host views themselves."""
        return dict(views)


class CudaDevice:
    """One GPU, through CuPy; all copies are ordered by the calling thread's current stream.

    Parameters are copied into one of two sets of device arrays in turn, because a prefetched
    pull arrives while the earlier parameters are still computed on.

    Args:
        ordinal: the GPU's number among the visible ones.
        layout: the parameters.
    """

    def __init__(self, ordinal: int, layout: Layout) -> None:
        import cupy

        self.name = f"cuda:{ordinal}"
        self.xp: ModuleType = cupy
        self._layout = layout
        cupy.cuda.Device(ordinal).use()
        self._sets: list[dict[str, Any]] = [self._empty(), self._empty()]
        self._next = 0

    def _empty(self) -> dict[str, Any]:
        layout = self._layout
        flat = self.xp.empty(layout.size, layout.dtype)
        return layout.views(flat)

    def params(self, views: Mapping[str, Array]) -> tuple[dict[str, Any], bool]:
        """Copy the host arrays to the GPU; they may change once this returns."""
        arrays = self._sets[self._next]
        self._next = 1 - self._next
        for name, view in views.items():
            arrays[name].set(np.ascontiguousarray(view))
        self.xp.cuda.get_current_stream().synchronize()
        return dict(arrays), True

    def gradients(self, grads: Mapping[str, Any]) -> Mapping[str, Array]:
        """Copy the gradients to the host, ordered after the current stream's work.

        `asnumpy` returns when the bytes are there.
        """
        return {
            name: grad if isinstance(grad, np.ndarray) else self.xp.asnumpy(grad)
            for name, grad in grads.items()
        }

    def staging(self, views: Mapping[str, Array]) -> dict[str, Any]:
        """Give one set of device arrays for gradients."""
        return self._empty()


def choose_device(device: str, worker: int, visible: int | None = None) -> str:
    """Turn `device` into "cpu" or "cuda:k".

    Args:
        device: "auto", "cpu", "cuda" or "cuda:k".
        worker: index of the worker among those on its node; GPUs are given out in turn.
        visible: GPUs visible to this process; asked of CuPy if None.

    Raises:
        ValueError: the device is none of these, or there is no such GPU.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::([0-9]+))?", device)
    if found is None:
        raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:k', got {device!r}")
    if device == "cpu":
        return "cpu"
    count = _visible_gpus() if visible is None else visible
    if device == "auto" and not count:
        return "cpu"
    if not count:
        raise ValueError(
            f"device: {device!r} needs a GPU that CuPy can use, and there is none;"
            " take device='cpu' or 'auto', or install psframe[cuda12] or psframe[cuda13]"
        )
    ordinal = worker % count if found[1] is None else int(found[1])
    if ordinal >= count:
        raise ValueError(f"device: {device!r}, but the visible GPUs are cuda:0 to cuda:{count - 1}")
    return f"cuda:{ordinal}"


def make_device(name: str, layout: Layout) -> Device:
    """Open the device that `choose_device` has named."""
    if name == "cpu":
        return HostDevice()
    return CudaDevice(int(name.partition(":")[2]), layout)


def _visible_gpus() -> int:
    try:
        import cupy
    except ImportError:
        return 0
    return int(cupy.cuda.runtime.getDeviceCount()) if cupy.is_available() else 0
