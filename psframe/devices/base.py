"""What a worker needs of the place where it computes; the host gives it for nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from psframe.codecs import Codec
from psframe.coding import Coded
from psframe.devices.intake import on_host
from psframe.layout import Array
from psframe.packing import GradientSlot

__all__ = ["Advance", "Close", "CodedHere", "Coder", "Device", "HostDevice"]

# Told how many elements from the start are in a slot; and, at the end, whether the gradient is
# finite, and its norm. They are those of `psframe.exchange.Progress`.
Advance = Callable[[int], None]
Close = Callable[[bool, float], None]


class CodedHere(NamedTuple):
    """What has become of a gradient: its payload for each server, and whether it is finite.

    The payloads are on the host, and good until their slot is coded again. `seconds` is how long
    the device has worked on them.
    """

    coded: list[Coded]
    finite: bool
    seconds: float


class Coder(Protocol):
    """Codes one worker's gradients where they are; see `psframe.devices.encoding`."""

    codec: Codec

    def encode(self, index: int, grads: Mapping[str, Any], slot: GradientSlot) -> CodedHere:
        """Code accepted and checked gradients; they may be overwritten when this returns.

        Args:
            index, slot: of the gradient; the slot's memory does not hold it afterwards.
            grads: names to arrays.
        """


class Device(Protocol):
    """What a worker needs of the place where it computes.

    Only the worker's thread calls it.

    Attributes:
        name: "cpu" or "cuda:k".
        xp: numpy or cupy.
    """

    name: str
    xp: ModuleType

    def accept(self, grads: Any, where: str) -> Any:
        """Make arrays of NumPy, or of this device's kind, of what a user pushes; nothing is copied.

        Args:
            grads: names to arrays; what else there is comes back as it is.
            where: beginning of the error's text, such as "push from worker 3".

        Raises:
            TypeError, ValueError: an array is on another device, or of a kind that does not exist
                there.
        """

    def staging(self, index: int, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """Give writable arrays for gradients: the host's themselves, or arrays here.

        Args:
            index: of the slot, asked for once.
            arrays: those of the slot.
        """

    def fetch(
        self,
        index: int,
        grads: Mapping[str, Any],
        slot: GradientSlot,
        judge: bool,
        advance: Advance | None,
    ) -> tuple[bool, float]:
        """Bring accepted gradients into gradient slot `index`; they are there when it returns.

        Args:
            index, slot: where to.
            grads: names to arrays that were accepted and checked.
            judge: whether to look at them.
            advance: called, some elements at a time, with how many are there from the start.

        Returns:
            As `GradientSlot.pack`.
        """

    def fetch_behind(
        self,
        index: int,
        grads: Mapping[str, Any],
        slot: GradientSlot,
        judge: Callable[[tuple[bool, float] | None], tuple[bool, float]] | None,
        advance: Advance,
        close: Close,
    ) -> bool:
        """Bring gradients into a slot behind the worker, if that can be; False if not.

        The arrays may be overwritten at once, by work on the current stream.

        Args:
            index, slot, grads, advance: as for `fetch`.
            judge: makes the verdict of what `fetch` would return; None if nobody looks at them.
            close: called once, at the end, from another thread.
        """

    def settle(self, index: int) -> None:
        """Wait until nothing is written into gradient slot `index` any more.

        Raises:
            Exception: what went wrong behind the worker, once.
        """

    def coder(
        self, codec: Codec, shards: Sequence[tuple[int, int]], seeds: Sequence[Sequence[int]]
    ) -> Coder | None:
        """Make what codes gradients here; None if they are coded on the host.

        Args:
            codec: which.
            shards: [begin, end) of each server's.
            seeds: of each one's encoder.
        """

    def params(self, shards: Sequence[Array]) -> dict[str, Any]:
        """Bring parameters here from the shards' snapshots; on the current stream they are there.

        The arrays are good until the call after the next. The snapshots must not change until
        `copied`.
        """

    def copied(self, *, waits: bool) -> bool:
        """Say whether the snapshots of the last `params` may change; with `waits`, wait till so."""

    def close(self) -> None:
        """Wait until all is done, and let host memory go."""


class HostDevice:
    """The host: nothing is copied that a worker does not copy anyway."""

    def __init__(self) -> None:
        self.name = "cpu"
        self.xp: ModuleType = np

    def accept(self, grads: Any, where: str) -> Any:
        """Make NumPy arrays of what has DLPack and is on the host.

        Raises:
            TypeError: an array is on a GPU. It is not copied for you: a worker that computes on the
                CPU and is given a GPU's arrays is set up in a way that nobody wants.
        """
        return on_host(grads, where)

    def staging(self, index: int, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """Give the host arrays themselves."""
        return dict(arrays)

    def fetch(
        self,
        index: int,
        grads: Mapping[str, Any],
        slot: GradientSlot,
        judge: bool,
        advance: Advance | None,
    ) -> tuple[bool, float]:
        """Copy and judge in one pass."""
        return slot.pack(grads, judge, advance)

    def fetch_behind(self, *arguments: Any) -> bool:
        """Say no: copying is the worker's own work."""
        return False

    def settle(self, index: int) -> None:
        """Do nothing: what is written has been written."""

    def coder(self, *arguments: Any) -> None:
        """Say that the host's own coder will do."""

    def params(self, shards: Sequence[Array]) -> dict[str, Any]:
        """Raise: parameters are read where they are."""
        raise AssertionError("parameters on the host are named, not brought")

    def copied(self, *, waits: bool) -> bool:
        """Say yes."""
        return True

    def close(self) -> None:
        """Do nothing: there is nothing to let go."""
