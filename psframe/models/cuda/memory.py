"""One thread's memory on a device: workspaces, and values on their way to and from the host."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from psframe.models.layers.base import Context

__all__ = ["DeviceLoss", "Memory", "Readout", "Upload"]

_READOUTS = 4  # losses on their way to the host before the oldest is waited for
_UPLOADS = 2


class Memory(Context):
    """A `Context` that keeps its views too: making one costs as much as launching a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self._views: dict[Any, Any] = {}

    def array(self, layer: Any, role: str, shape: tuple[int, ...], dtype: Any, xp: Any) -> Any:
        """As `Context.array`; `layer` is whoever owns the memory."""
        key = id(layer), role, shape
        view = self._views.get(key)
        if view is None or view.dtype != dtype:
            before = self._memory.get((id(layer), role, xp))
            view = super().array(layer, role, shape, dtype, xp)
            if before is not None and self._memory[id(layer), role, xp] is not before:
                for other in [one for one in self._views if one[:2] == key[:2]]:
                    del self._views[other]  # they hold the memory that was too small
            self._views[key] = view
        return view


class DeviceLoss:
    """A loss that is still being computed; `float` waits for it, and for nothing after it.

    Its bytes travel as soon as it is known, before the backward pass, so that who reads it when
    that has been queued, leaves the GPU with work to do.
    """

    def __init__(self, event: Any, host: Any) -> None:
        self._event = event
        self._host = host
        self._value: float | None = None

    def __float__(self) -> float:
        if self._value is None:
            self._event.synchronize()
            self._value = float(self._host[0])
            self._event = self._host = None
        return self._value

    def __repr__(self) -> str:
        return repr(float(self))

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)

    def __eq__(self, other: object) -> bool:
        return float(self) == other

    def __hash__(self) -> int:
        return hash(float(self))


class Readout:
    """Copies numbers to the host without waiting, through a few places in pinned memory."""

    def __init__(self, xp: Any, size: int) -> None:
        self._places: deque[tuple[Any, Any, DeviceLoss | None]] = deque(
            (_pinned(xp, size, np.float32), _event(xp), None) for _ in range(_READOUTS)
        )

    def copy(self, array: Any) -> DeviceLoss:
        """Send `array` on its way, on the current stream."""
        host, event, before = self._places.popleft()
        if before is not None:
            float(before)  # so long ago that it has long arrived
        array.data.copy_to_host_async(host.ctypes.data, host.nbytes)
        event.record()
        loss = DeviceLoss(event, host)
        self._places.append((host, event, loss))
        return loss

    def wait(self, array: Any) -> tuple[float, ...]:
        """Copy `array`, and wait for its numbers."""
        self.copy(array)
        host, event, _ = self._places[-1]
        event.synchronize()
        return tuple(host.tolist())


class Upload:
    """Copies host arrays of one size to the device without waiting, through pinned memory."""

    def __init__(self, xp: Any, size: int, dtype: Any) -> None:
        self._places = deque(
            (_pinned(xp, size, dtype), xp.empty(size, dtype), _event(xp)) for _ in range(_UPLOADS)
        )
        self._used = 0

    def copy(self, values: Any) -> Any:
        """Send `values`; the device array is good until the call after the next."""
        host, device, event = self._places[0]
        self._places.rotate(-1)
        if self._used >= _UPLOADS and not event.done:
            event.synchronize()  # the copy before the last one from here is still under way
        self._used += 1
        np.copyto(host, values.reshape(-1))
        device.data.copy_from_host_async(host.ctypes.data, host.nbytes)
        event.record()
        return device


def _pinned(xp: Any, size: int, dtype: Any) -> Any:
    """Allocate page-locked host memory; the array keeps it."""
    count = size * np.dtype(dtype).itemsize
    return np.frombuffer(xp.cuda.alloc_pinned_memory(count), dtype, size)


def _event(xp: Any) -> Any:
    return xp.cuda.Event(disable_timing=True)
