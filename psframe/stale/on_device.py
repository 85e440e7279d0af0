"""The corrections of stale gradients on a device: stages of the kernel that applies a gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from psframe.optim.cuda import Stage, Staged, compile_distance
from psframe.stale import formulas

__all__ = [
    "DeviceAdaptive",
    "DeviceChain",
    "DeviceCorrection",
    "DeviceFixed",
    "DeviceGap",
    "Allocator",
    "as_device_correction",
]

_FIXED = Stage(formulas.fixed, reads=1)
_ADAPTIVE = Stage(formulas.adaptive, reads=1, states=1)
_SCALED = Stage(formulas.scaled)


class Allocator(Protocol):
    """What a correction needs of the device."""

    def empty(self, size: int, dtype: np.dtype[Any]) -> Any:
        """Allocate an array."""

    def zeros(self, size: int, dtype: np.dtype[Any]) -> Any:
        """Allocate an array of zeros."""

    def read(self, scalar: Any) -> float:
        """Wait for a kernel's one number, and give it."""


class DeviceCorrection(Protocol):
    """The state of a rule's correction for one shard on a device; as `Correction`.

    All is called within the device's context, with arrays of it.
    """

    def stages(self, card: Allocator, worker: int, params: Any, read: Any) -> tuple[Staged, ...]:
        """Say what is to be done with a worker's gradient; see `Correction.correct`."""

    def applied(self, card: Allocator, before: Any, after: Any) -> None:
        """Take note that the update with the last gradient has been published."""

    def rejected(self) -> None:
        """Go back to the state before `stages`."""


def as_device_correction(correction: Any) -> DeviceCorrection | None:
    """Give a correction its form for a device; None if it has none, such as one of a user's own."""
    make = getattr(correction, "on_device", None)
    made: DeviceCorrection | None = None if make is None else make()
    return made


class DeviceFixed:
    """Delay compensation with one lambda: no state."""

    def __init__(self, lam: float) -> None:
        self._scalars = (lam,)

    def stages(self, card: Allocator, worker: int, params: Any, read: Any) -> tuple[Staged, ...]:
        return (Staged(_FIXED, self._scalars, (read,)),)

    def applied(self, card: Allocator, before: Any, after: Any) -> None:
        pass  # no state

    def rejected(self) -> None:
        pass


class DeviceAdaptive:
    """Delay compensation with a running mean square for each worker, on the device.

    A kernel reads a worker's and writes a spare array; `applied` makes them change places.
    """

    def __init__(self, scalars: tuple[float, ...], size: int, dtype: np.dtype[Any]) -> None:
        self._scalars, self._size, self._dtype = scalars, size, dtype
        self._of: dict[int, Any] = {}
        self._blank: Any = None  # zeros, for a worker that has none
        self._old: Any = None
        self._spare: Any = None
        self._written: int | None = None  # the worker whose next one the spare is

    def stages(self, card: Allocator, worker: int, params: Any, read: Any) -> tuple[Staged, ...]:
        if self._spare is None:
            self._spare = card.empty(self._size, self._dtype)
        old = self._of.get(worker)
        if old is None:
            if self._blank is None:
                self._blank = card.zeros(self._size, self._dtype)
            old = self._blank
        self._written, self._old = worker, old
        return (Staged(_ADAPTIVE, self._scalars, (read,), (old,), (self._spare,)),)

    def applied(self, card: Allocator, before: Any, after: Any) -> None:
        worker = self._written
        assert worker is not None, "nothing has been corrected"
        if self._old is self._blank:
            self._blank = None
        self._of[worker], self._spare, self._written = self._spare, self._old, None

    def rejected(self) -> None:
        self._written = None


class DeviceGap:
    """Gap-aware scaling, whose distances are summed on the device.

    Args:
        decay: weight of the past.
        size: of the shard.
    """

    def __init__(self, decay: float, size: int) -> None:
        self._decay, self._size = decay, size
        self._sum, self._weight = 0.0, 0.0

    def stages(self, card: Allocator, worker: int, params: Any, read: Any) -> tuple[Staged, ...]:
        gap = 0.0 if read is params or not self._sum else self._between(card, params, read)
        if not gap:
            return ()  # not stale, or nothing that it could be compared to
        return (Staged(_SCALED, (1.0 / (1.0 + gap * self._weight / self._sum),)),)

    def applied(self, card: Allocator, before: Any, after: Any) -> None:
        step = self._between(card, after, before)
        if not step:
            return
        self._sum = self._decay * self._sum + (1.0 - self._decay) * step
        self._weight = self._decay * self._weight + (1.0 - self._decay)

    def rejected(self) -> None:
        pass  # only steps that are taken change the state

    def _between(self, card: Allocator, a: Any, b: Any) -> float:
        if not self._size:
            return 0.0
        return math.sqrt(card.read(compile_distance()(a, b)) / self._size)


class DeviceChain:
    """Several corrections one after the other, in one kernel."""

    def __init__(self, corrections: Sequence[DeviceCorrection]) -> None:
        self._corrections = corrections

    def stages(self, card: Allocator, worker: int, params: Any, read: Any) -> tuple[Staged, ...]:
        parts = [one.stages(card, worker, params, read) for one in self._corrections]
        return tuple(staged for part in parts for staged in part)

    def applied(self, card: Allocator, before: Any, after: Any) -> None:
        for correction in self._corrections:
            correction.applied(card, before, after)

    def rejected(self) -> None:
        for correction in self._corrections:
            correction.rejected()
