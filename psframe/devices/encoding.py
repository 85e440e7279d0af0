"""A gradient that is coded on the GPU: what crosses the bus, and waits on the host, is its payload.

    the user's stream:  kernels that make the gradient, ready
    the side stream:    waits for ready; began; the gradient's runs into one, if they are several;
                        each shard's encoder; the payloads and their verdict to pinned memory; over
    the host:           over: they are there, and the verdict says what of the encoders' state stays

It is for workers whose gradients no server reads in the slot: there the dense gradient has to come
to the host in any case, and is coded by `psframe.coding.PushCoder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from psframe.codecs import Codec
from psframe.codecs.cuda import DeviceEncoder
from psframe.codecs.cuda.base import GRADIENT_BAD
from psframe.coding import Coded
from psframe.devices.base import CodedHere
from psframe.devices.outgoing import Fetcher, Outgoing
from psframe.devices.pinning import Pinned, Pinning
from psframe.layout import Array, Layout
from psframe.packing import GradientSlot

__all__ = ["DeviceCoder"]

_HEADER_BYTES = 8  # in front of the payloads: the verdict


class DeviceCoder(Fetcher):
    """Codes one worker's gradients for each server; see `psframe.coding.PushCoder`.

    Memory on the device: what the encoders keep, the payloads once and, unless each gradient lies
    in one run as those of `worker.gradients()` do, P for putting it together.

    Args:
        cupy, layout, stream, pinning: as for `Fetcher`.
        codec: which.
        encoders: of the shards.
        shards: [begin, end) of each.
    """

    def __init__(
        self,
        cupy: Any,
        layout: Layout,
        stream: Any,
        pinning: Pinning,
        *,
        codec: Codec,
        encoders: Sequence[DeviceEncoder],
        shards: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__(cupy, layout, stream, pinning)
        self.codec = codec
        self._encoders = encoders
        self._begins = [begin for begin, _ in shards]
        self._places, end = list[int](), _HEADER_BYTES
        for encoder in encoders:
            self._places.append(end)
            end += -(-encoder.bytes_max // 8) * 8
        with stream:
            self._payloads = cupy.empty(end, np.uint8)
        self._here: dict[int, Array] = {}  # by slot, where payloads arrive
        self._flat: Any = None
        # With times, unlike those that only order.
        self._began, self._over = cupy.cuda.Event(), cupy.cuda.Event()

    def encode(self, index: int, grads: Mapping[str, Any], slot: GradientSlot) -> CodedHere:
        """Code a gradient behind what the current stream has to do, and wait for the payloads.

        The arrays may be overwritten when this returns.

        Args:
            index, slot: of the gradient; of the slot's memory only what is on the host is used.
            grads: names to arrays, accepted and checked.
        """
        here = self._here.get(index)
        if here is None:
            here = self._here[index] = self._pinning.buffer(int(self._payloads.size), np.uint8)
        on_host = [name for name, grad in grads.items() if isinstance(grad, np.ndarray)]
        pinned = self._pinning.pin(slot.flat) if on_host else Pinned(slot.flat, None)
        outgoing = Outgoing(pinned, self._over)
        self._wait()
        with self._stream:
            self._began.record(self._stream)
            source = self._gather(self._runs(grads, slot, outgoing), on_host, pinned)
            lengths = self._code(source, here, plain=False)
            self._over.synchronize()
            finite = not int(here[:_HEADER_BYTES].view(np.int32)[0])
            if not finite:
                lengths = self._refuse(source, here, lengths)
        outgoing.keep.clear()
        for encoder in self._encoders:
            encoder.settle(finite)
        places = zip(self._places, lengths, strict=True)
        coded = [Coded(here[place : place + length]) for place, length in places]
        seconds = self._cupy.cuda.get_elapsed_time(self._began, self._over) / 1e3
        return CodedHere(coded, finite, float(seconds))

    def _gather(
        self, runs: list[tuple[int, int, int]], on_host: Sequence[str], pinned: Pinned
    ) -> int:
        """Queue the copies that make one run of a gradient; give its address."""
        layout, runtime = self._layout, self._cupy.cuda.runtime
        if len(runs) == 1 and runs[0][1:] == (0, layout.size):
            return runs[0][0]
        begin, item = self._whole(), layout.dtype.itemsize
        pieces = [(source, b, e, runtime.memcpyDeviceToDevice) for source, b, e in runs]
        for name in on_host:
            at = layout.names.index(name)
            b = layout.offsets[at]
            e = b + layout.sizes[at]
            pieces.append((pinned.address + b * item, b, e, runtime.memcpyHostToDevice))
        for source, b, e, kind in pieces:
            if b < e:
                target, n_bytes = begin + b * item, (e - b) * item
                runtime.memcpyAsync(target, source, n_bytes, kind, self._stream.ptr)
        return begin

    def _whole(self) -> int:
        """Give the address of room for a gradient."""
        if self._flat is None:
            self._flat = self._cupy.empty(self._layout.size, self._layout.dtype)
        return int(self._flat.data.ptr)

    def _code(self, source: int, here: Array, *, plain: bool) -> list[int]:
        """Queue the encoders, and the way of what they make to the host; give the lengths."""
        begin, stream = int(self._payloads.data.ptr), self._stream
        self._cupy.cuda.runtime.memsetAsync(begin, 0, _HEADER_BYTES, stream.ptr)
        item, lengths = self._layout.dtype.itemsize, []
        for first, encoder, place in zip(self._begins, self._encoders, self._places, strict=True):
            address = source + first * item
            lengths.append(encoder.encode(address, begin + place, begin, plain=plain))
        at = here.ctypes.data
        self._to_host(at, begin, _HEADER_BYTES)
        for place, length in zip(self._places, lengths, strict=True):
            if length:
                self._to_host(at + place, begin + place, length)
        self._over.record(stream)
        return lengths

    def _refuse(self, source: int, here: Array, lengths: list[int]) -> list[int]:
        """Have the payloads say that a gradient is not finite, as those of `PushCoder` do.

        Of several shards' none may be taken for a gradient, so that no residual is sent.
        """
        verdict = int(here[:_HEADER_BYTES].view(np.int32)[0])
        whole = len(self._encoders) == 1 and verdict & GRADIENT_BAD
        if not whole:
            source = self._whole()
            self._flat[...] = np.nan
        elif self._encoders[0].residual is None:
            return lengths  # it was coded as it is
        lengths = self._code(source, here, plain=True)
        self._over.synchronize()
        return lengths
