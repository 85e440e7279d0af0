"""A worker on a GPU whose arrays others take where they are: MPI, or a server on a GPU of the node.

    the user's stream:  kernels that make the gradient, ready
    the side stream:    waits for ready; squares; copies into a flat buffer of the slot's; done
    the host:           done: its norm; MPI may read the buffer, until its requests are complete,
                        and a server that has opened it, until it answers

and for parameters

    MPI:                receives into one of two landing buffers
    the side stream:    once all requests are complete: a copy into the next set of parameters

while a server's that this process has opened are copied from its snapshot, which is held meanwhile.

What a codec is to code, or is partly on the host, or is not finite, takes the way of `CudaDevice`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from psframe.devices.base import Advance
from psframe.devices.cuda import CudaDevice, measurable
from psframe.devices.outgoing import Packer
from psframe.layout import Array, Layout
from psframe.packing import GradientSlot

__all__ = ["DirectDevice", "Door"]


class Door(Protocol):
    """A worker's end of MPI, as far as it knows of devices."""

    @property
    def near(self) -> Sequence[tuple[int, int]]:
        """The runs [begin, end) of a gradient that servers read from the slot in any case."""

    def leave_from(self, slot: int, array: Any) -> None:
        """Have the next gradient of a slot leave from an array on the device; None for the slot."""

    def land_in(self, empty: Any) -> None:
        """Have parameters land in arrays that `empty(size)` gives, which nothing is under way to
        and from."""


class DirectDevice(CudaDevice):
    """One GPU whose memory MPI reads and writes.

    Memory on the device: 4 P for parameters, and 2 P more for gradients; those of `gradients()`
    are part of these.

    Args:
        ordinal, layout: as for `CudaDevice`.
        door: this worker's end of MPI.
        gradients: whether they leave from the device.
        parameters: whether MPI lets them land there.
        slots: gives a slot's buffer, if others have opened that.
    """

    def __init__(
        self,
        ordinal: int,
        layout: Layout,
        door: Door,
        *,
        gradients: bool,
        parameters: bool,
        slots: Callable[[int], Any] | None = None,
    ) -> None:
        super().__init__(ordinal, layout)
        self._door = door
        self._gradients = gradients
        self._slots = slots
        self._packers: dict[int, Packer] = {}
        if parameters:
            door.land_in(self._settled)

    def _settled(self, size: int) -> Any:
        """Allocate memory that others than the streams may write at once.

        It may have been something else's, that the side stream has still to use.
        """
        with self._stream:
            array = self.xp.empty(size, self._layout.dtype)
        self._stream.synchronize()
        return array

    # ---- gradients -----------------------------------------------------------------------

    def staging(self, index: int, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """Give views of the buffer that leaves: what is written there is not copied."""
        if not self._gradients:
            return super().staging(index, arrays)
        return self._layout.views(self._packer(index).flat)

    def fetch(
        self,
        index: int,
        grads: Mapping[str, Any],
        slot: GradientSlot,
        judge: bool,
        advance: Advance | None,
    ) -> tuple[bool, float]:
        """Pack the gradients on the device; when this returns others may read them there.

        What a server reads on the host comes into the slot, too.
        """
        if not self._gradients:
            return super().fetch(index, grads, slot, judge, advance)
        self._door.leave_from(index, None)
        if measurable(grads):
            packer = self._packer(index)
            norm = packer.pack(grads, slot, judge=judge, near=self._door.near)
            if norm is not None or not judge:
                self._door.leave_from(index, packer.flat)
                return True, 0.0 if norm is None else norm
        # The host looks at what is not finite, or overflows.
        return super().fetch(index, grads, slot, judge, advance)

    def _packer(self, index: int) -> Packer:
        packer = self._packers.get(index)
        if packer is None:
            slots = self._slots
            flat = self._settled(self._layout.size) if slots is None else slots(index)
            packer = Packer(self.xp, self._layout, self._stream, self._pinning, flat)
            self._packers[index] = packer
        return packer

    # ---- parameters ----------------------------------------------------------------------

    def _bring(self, shard: Any, target: int) -> None:
        if isinstance(shard, np.ndarray):
            super()._bring(shard, target)
            return
        runtime = self._cuda.runtime
        kind, stream = runtime.memcpyDeviceToDevice, self._stream.ptr
        runtime.memcpyAsync(target, int(shard.data.ptr), shard.nbytes, kind, stream)
