"""A gradient on its way from the GPU to the host.

    the user's stream:  kernels that make the gradient, ready
    the side stream:    waits for ready; squares; piece, event; ...; piece, event; done
    the host:           event: so much is there; ...; done: it is finite, and its norm

Arrays that follow one another in memory, as those of `worker.gradients()` do, leave as one run.
Each element is copied once, into the slot itself where that is registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from psframe.devices.base import Advance
from psframe.devices.norms import BLOCKS_MAX, THREADS, blocks_for, norm_of, squares_kernel
from psframe.devices.pinning import Pinned, Pinning
from psframe.layout import Layout
from psframe.packing import GradientSlot

__all__ = ["Fetcher", "Outgoing", "Packer"]

# Not shorter, since each copy has a cost of its own, nor more of them than a server needs to be
# close behind. By arithmetic, 10 to 160 us each at 26 GB/s; not measured.
_PIECE_BYTES_MIN, _PIECE_BYTES_MAX = 256 << 10, 4 << 20
_PIECES = 32
_ORDERED = {"disable_timing": True}


class Outgoing:
    """Copies that have been queued, and the events that tell how far they are.

    Attributes:
        marks: events, each with how many elements from the start are there once it is over.
        done: the event after everything.
        keep: what must not be freed before.
    """

    def __init__(self, target: Pinned, done: Any) -> None:
        self.target = target
        self.done = done
        self.marks: list[tuple[Any, int]] = []
        self.keep: list[Any] = []
        self.partial: Any = None  # pinned memory, where the blocks' sums arrive
        self._told = 0

    def follow(self, advance: Advance | None) -> float | None:
        """Wait until everything is there, and tell how far it is meanwhile.

        Returns:
            The norm; None if nobody asked for it, or what there is is not finite.
        """
        for event, end in self.marks:
            event.synchronize()
            self._take(end)
            if advance is not None and end < self.target.array.size:
                advance(end)
        self.done.synchronize()
        self._take(self.target.array.size)
        self.keep.clear()
        return None if self.partial is None else norm_of(self.partial)

    def _take(self, end: int) -> None:
        self.target.empty(self._told, end)
        self._told = end


class Fetcher:
    """Queues the copies of one gradient slot.

    Args:
        cupy: the module.
        layout: the parameters.
        stream: the side stream.
        pinning: makes the slot, and small things, reachable.
    """

    def __init__(self, cupy: Any, layout: Layout, stream: Any, pinning: Pinning) -> None:
        self._cupy = cupy
        self._layout = layout
        self._stream = stream
        self._pinning = pinning
        self._ready = cupy.cuda.Event(**_ORDERED)
        self._done = cupy.cuda.Event(**_ORDERED)
        self._events: list[Any] = []  # one a piece, used again by the next gradient
        self._table = pinning.buffer(2 * len(layout.names), np.int64)
        self._sums = pinning.buffer(BLOCKS_MAX, np.float64)
        with stream:  # so that it is this stream's to use again, should it be freed
            self._device_table = cupy.empty(2 * len(layout.names), np.int64)
            self._device_sums = cupy.empty(BLOCKS_MAX, np.float64)

    def start(
        self, grads: Mapping[str, Any], slot: GradientSlot, *, judge: bool, pieces: bool
    ) -> Outgoing:
        """Queue the copies of a gradient, behind what the current stream has to do.

        What is on the host is copied at once.

        Args:
            grads: names to arrays, checked.
            slot: where to; nothing else is written into it meanwhile.
            judge: whether to sum the squares.
            pieces: whether somebody follows.
        """
        outgoing = Outgoing(self._pinning.pin(slot.flat), self._done)
        self._wait()
        with self._stream:
            runs = self._runs(grads, slot, outgoing)
            if judge and runs:
                self._sum(runs, outgoing)
            self._copy(runs, outgoing, pieces)
            self._done.record(self._stream)
        return outgoing

    def _wait(self) -> None:
        """Have the side stream wait for what the current one has to do."""
        self._ready.record(self._cupy.cuda.get_current_stream())
        self._stream.wait_event(self._ready)

    def _runs(
        self, grads: Mapping[str, Any], slot: GradientSlot, outgoing: Outgoing
    ) -> list[tuple[int, int, int]]:
        """Give runs of elements on the device: (address, begin, end) in the slot, in order."""
        layout, runs = self._layout, list[tuple[int, int, int]]()
        item = layout.dtype.itemsize
        for name, offset, size in zip(layout.names, layout.offsets, layout.sizes, strict=True):
            grad = grads[name]
            if isinstance(grad, np.ndarray):
                with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                    slot.arrays[name][...] = grad
                if outgoing.target.bounce is not None:
                    outgoing.target.bounce[offset : offset + size] = slot.flat[
                        offset : offset + size
                    ]
                continue
            whole = self._apart(self._cupy.ascontiguousarray(grad, layout.dtype), offset)
            outgoing.keep += (grad, whole)
            address, end = int(whole.data.ptr), offset + size
            if runs and runs[-1][2] == offset:
                first, begin, _ = runs[-1]
                if first + (offset - begin) * item == address:
                    runs[-1] = first, begin, end
                    continue
            if size:
                runs.append((address, offset, end))
        return runs

    def _apart(self, array: Any, offset: int) -> Any:
        """Give what may be read for elements from `offset` on while others are copied: `array`."""
        return array

    def _sum(self, runs: list[tuple[int, int, int]], outgoing: Outgoing) -> None:
        """Queue the sum of the squares, and its way to the host."""
        table, partial = self._table, self._device_sums
        for k, (address, begin, end) in enumerate(runs):
            table[2 * k : 2 * k + 2] = address, end - begin
        self._to_device(self._device_table, table, 2 * len(runs))
        blocks = blocks_for(sum(end - begin for _, begin, end in runs))
        kernel = squares_kernel(self._layout.dtype)
        kernel((blocks,), (THREADS,), (self._device_table, np.int32(len(runs)), partial))
        outgoing.partial = self._sums[:blocks]
        self._to_host(self._sums.ctypes.data, int(partial.data.ptr), blocks * 8)

    def _copy(self, runs: list[tuple[int, int, int]], outgoing: Outgoing, pieces: bool) -> None:
        """Queue the copies, with an event behind each piece if somebody follows."""
        layout, address = self._layout, outgoing.target.address
        item = layout.dtype.itemsize
        length = layout.size
        if pieces:
            n_bytes = -(-layout.size * item // _PIECES)
            length = min(max(n_bytes, _PIECE_BYTES_MIN), _PIECE_BYTES_MAX) // item
        told = 0
        for source, begin, end in runs:
            for b in range(begin, end, length):
                e = min(b + length, end)
                self._to_host(address + b * item, source + (b - begin) * item, (e - b) * item)
                if pieces and e - told >= length and e < layout.size:
                    outgoing.marks.append((self._event(len(outgoing.marks)), e))
                    told = e

    def _event(self, number: int) -> Any:
        if number == len(self._events):
            self._events.append(self._cupy.cuda.Event(**_ORDERED))
        event = self._events[number]
        event.record(self._stream)
        return event

    def _to_host(self, target: int, source: int, n_bytes: int) -> None:
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(target, source, n_bytes, runtime.memcpyDeviceToHost, self._stream.ptr)

    def _to_device(self, target: Any, source: Any, count: int) -> None:
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(
            int(target.data.ptr),
            source.ctypes.data,
            count * source.itemsize,
            runtime.memcpyHostToDevice,
            self._stream.ptr,
        )


class Packer(Fetcher):
    """Brings the gradients of one slot together on the device, in a buffer that others read.

    Args:
        cupy, layout, stream, pinning: as for `Fetcher`.
        flat: the buffer, of P elements.

    Attributes:
        flat: as given.
    """

    def __init__(self, cupy: Any, layout: Layout, stream: Any, pinning: Pinning, flat: Any) -> None:
        super().__init__(cupy, layout, stream, pinning)
        self.flat = flat
        self._begin = int(flat.data.ptr)

    def pack(
        self,
        grads: Mapping[str, Any],
        slot: GradientSlot,
        *,
        judge: bool,
        near: Sequence[tuple[int, int]],
    ) -> float | None:
        """Pack gradients, all of them on the device, and wait until they are in the buffer.

        Args:
            grads: names to arrays, checked; they may be of the buffer itself.
            slot: where the runs of `near` go, too.
            judge: whether to sum the squares.
            near: runs [begin, end) of elements.

        Returns:
            As `Outgoing.follow`.
        """
        target = self._pinning.pin(slot.flat) if near else Pinned(slot.flat, None)
        outgoing, item = Outgoing(target, self._done), self._layout.dtype.itemsize
        self._wait()
        with self._stream:
            runs = self._runs(grads, slot, outgoing)
            if judge and runs:
                self._sum(runs, outgoing)
            self._gather(runs)
            self._copy([(self._begin + b * item, b, e) for b, e in near], outgoing, pieces=False)
            self._done.record(self._stream)
        return outgoing.follow(None)

    def _apart(self, array: Any, offset: int) -> Any:
        """Copy what is elsewhere in the buffer: it may be written before it is read."""
        place = int(array.data.ptr) - self._begin
        elsewhere = place != offset * self._layout.dtype.itemsize
        return array.copy() if elsewhere and 0 <= place < self.flat.nbytes else array

    def _gather(self, runs: list[tuple[int, int, int]]) -> None:
        runtime, item = self._cupy.cuda.runtime, self._layout.dtype.itemsize
        kind = runtime.memcpyDeviceToDevice
        for source, begin, end in runs:
            target = self._begin + begin * item
            if source != target:
                runtime.memcpyAsync(target, source, (end - begin) * item, kind, self._stream.ptr)
