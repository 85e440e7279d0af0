"""A worker on one GPU, through CuPy.

Its copies run on a stream of its own, beside what the user computes, and events order the two:
nothing is read before it has been written, and nothing is written that is still being read. What
"the current stream" is below, is the calling thread's at the time of the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from psframe.codecs import Codec
from psframe.codecs.cuda import encoder_for
from psframe.devices.base import Advance, Close
from psframe.devices.behind import Behind, Job
from psframe.devices.encoding import DeviceCoder
from psframe.devices.intake import Accepted, Intake
from psframe.devices.outgoing import Fetcher, Outgoing
from psframe.devices.pinning import Pinning
from psframe.layout import Array, Layout
from psframe.packing import GradientSlot

__all__ = ["CudaDevice", "measurable"]


class CudaDevice:
    """One GPU; see `psframe.devices.base.Device`.

    Parameters are copied into one of two sets of device arrays in turn, because a prefetched
    pull arrives while the earlier parameters are still computed on.

    Memory on the device: 2 P, and 2 P more once `gradients()` is used.

    Args:
        ordinal: the GPU's number among the visible ones.
        layout: the parameters.
    """

    def __init__(self, ordinal: int, layout: Layout) -> None:
        import cupy

        self.name = f"cuda:{ordinal}"
        self.xp: ModuleType = cupy
        self._cuda: Any = cupy.cuda
        self._layout = layout
        cupy.cuda.Device(ordinal).use()
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._pinning = Pinning(cupy)
        self._intake = Intake(cupy, ordinal, self._stream)
        self._fetchers: dict[int, Fetcher] = {}
        self._jobs: dict[int, Job] = {}
        self._behind = Behind(cupy.cuda.Device(ordinal).use)
        self._flats = [self._empty(), self._empty()]
        self._sets = [layout.views(flat) for flat in self._flats]
        self._turn = 0
        # By set, when the last work that may read it had been queued: that which allocated it,
        # too, since its memory may have been something else's on that stream.
        self._unused = [self._event(), self._event()]
        for event in self._unused:
            event.record(self._cuda.get_current_stream())
        self._arrived = self._event()

    def _empty(self) -> Any:
        return self.xp.empty(self._layout.size, self._layout.dtype)

    def _event(self) -> Any:
        return self._cuda.Event(disable_timing=True)

    # ---- gradients -----------------------------------------------------------------------

    def accept(self, grads: Any, where: str) -> Any:
        """Take arrays of NumPy, CuPy, and of whatever has DLPack or the CUDA array interface."""
        return self._intake.accept(grads, where)

    def staging(self, index: int, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """Give views of one flat device buffer, which leave in one run."""
        return self._layout.views(self._empty())

    def fetch(
        self,
        index: int,
        grads: Mapping[str, Any],
        slot: GradientSlot,
        judge: bool,
        advance: Advance | None,
    ) -> tuple[bool, float]:
        """Copy the gradients to the host, behind the current stream's work.

        They may be overwritten when this returns: the copies have been waited for.
        """
        measures = judge and measurable(grads)
        outgoing = self._start(index, grads, slot, judge=measures, pieces=advance is not None)
        norm = outgoing.follow(advance)
        if not judge:
            return True, 0.0
        # What is not finite, or overflows, or came from the host, the host looks at.
        return slot.judge() if norm is None else (True, norm)

    def fetch_behind(
        self,
        index: int,
        grads: Mapping[str, Any],
        slot: GradientSlot,
        judge: Callable[[tuple[bool, float] | None], tuple[bool, float]] | None,
        advance: Advance,
        close: Close,
    ) -> bool:
        """Queue the copies, and have a thread follow them.

        The current stream waits for them, so that what it does next may overwrite the gradients.
        Another library's arrays are not brought so: its streams would not wait.
        """
        if isinstance(grads, Accepted) and grads.foreign:
            return False
        measures = judge is not None and measurable(grads)
        outgoing = self._start(index, grads, slot, judge=measures, pieces=True)
        self._cuda.get_current_stream().wait_event(outgoing.done)

        def follow() -> None:
            finite, norm = False, 0.0
            try:
                found = outgoing.follow(advance)
                finite = True
                if judge is not None:
                    finite, norm = judge(None if found is None else (True, found))
            finally:  # if it did not arrive: it is refused, and nobody waits for it
                close(finite, norm)

        self._jobs[index] = self._behind.start(follow)
        return True

    def settle(self, index: int) -> None:
        """Wait until a gradient that leaves behind the worker has left its slot's events."""
        job = self._jobs.pop(index, None)
        if job is not None:
            job.wait()

    def _start(
        self,
        index: int,
        grads: Mapping[str, Any],
        slot: GradientSlot,
        *,
        judge: bool,
        pieces: bool,
    ) -> Outgoing:
        self.settle(index)
        fetcher = self._fetchers.get(index)
        if fetcher is None:
            fetcher = Fetcher(self.xp, self._layout, self._stream, self._pinning)
            self._fetchers[index] = fetcher
        return fetcher.start(grads, slot, judge=judge, pieces=pieces)

    def coder(
        self, codec: Codec, shards: Sequence[tuple[int, int]], seeds: Sequence[Sequence[int]]
    ) -> DeviceCoder | None:
        """Make the encoders of the shards on the side stream, which alone uses them."""
        encoders = []
        with self._stream:
            for (begin, end), seed in zip(shards, seeds, strict=True):
                encoder = encoder_for(self.xp, codec, self._layout, begin, end, seed)
                if encoder is None:
                    return None
                encoders.append(encoder)
        return DeviceCoder(
            self.xp,
            self._layout,
            self._stream,
            self._pinning,
            codec=codec,
            encoders=encoders,
            shards=shards,
        )

    # ---- parameters ----------------------------------------------------------------------

    def params(self, shards: Sequence[Array]) -> dict[str, Any]:
        """Queue the copies of the shards, one after the other, into the next set.

        They wait for what may still read that set, not for what reads the other one; and the
        current stream waits for them.
        """
        turn, current = self._turn, self._cuda.get_current_stream()
        self._turn = 1 - turn
        self._unused[1 - turn].record(current)  # the parameters in it are the present ones no more
        self._stream.wait_event(self._unused[turn])
        target = int(self._flats[turn].data.ptr)
        for shard in shards:
            if shard.size:
                self._bring(shard, target)
                target += shard.nbytes
        self._arrived.record(self._stream)
        current.wait_event(self._arrived)
        return dict(self._sets[turn])

    def _bring(self, shard: Array, target: int) -> None:
        """Queue the copy of a shard to an address on the device."""
        runtime, pinned = self._cuda.runtime, self._pinning.pin(shard)
        pinned.fill()
        kind, stream = runtime.memcpyHostToDevice, self._stream.ptr
        runtime.memcpyAsync(target, pinned.address, shard.nbytes, kind, stream)

    def copied(self, *, waits: bool) -> bool:
        """Ask the event behind the last copies."""
        if waits:
            self._arrived.synchronize()
            return True
        return bool(self._arrived.done)

    # ---- the end -------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for all copies, then unregister what was registered.

        Raises:
            Exception: what went wrong behind the worker, and nobody has heard of yet.
        """
        self._behind.close()
        with contextlib.ExitStack() as stack:
            stack.callback(self._pinning.close)
            self._stream.synchronize()
            for index in tuple(self._jobs):
                self.settle(index)


def measurable(grads: Mapping[str, Any]) -> bool:
    """Whether all of a gradient is on the device, so that its norm can be computed there."""
    return not any(isinstance(grad, np.ndarray) for grad in grads.values())
