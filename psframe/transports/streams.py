"""How far a gradient has been written into its slot, in memory that worker and server share.

The words of a slot lie in a cache line of their own. The worker clears them before it announces
the push, stores how far it is after each piece, and the verdict before the last store. On x86
plain stores of aligned words are seen in their order (Intel SDM vol. 3, 9.2), and the kernel that
follows loads them atomically; on a machine with a weaker order gradients are not streamed.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from psframe.errors import MessageError
from psframe.events import Arrived
from psframe.layout import Array
from psframe.store import STEP
from psframe.transports.shared_memory import Segment

__all__ = ["STORES_IN_ORDER", "STREAM_BYTES", "BadStream", "Progress", "Streams"]

STREAM_BYTES = 64
STORES_IN_ORDER = platform.machine() in ("x86_64", "AMD64", "i686")
# Who adds nothing for so long, several pieces' time, has paused.
_PAUSE_S = 200e-6


class Progress:
    """The words of one slot.

    Args:
        memory: STREAM_BYTES of shared memory, 8-byte aligned.
        size: elements of the slot.

    Attributes:
        words: the same memory; the first int64 is the number of elements that are there.
        open_here: on the server, whether it follows a gradient in this slot.
    """

    from_any_thread = True  # it is memory, no more

    def __init__(self, memory: memoryview, size: int) -> None:
        self.words: Array = np.frombuffer(memory, np.int64)
        self._counts = memory.cast("q")
        self._norm = memory[16:24].cast("d")
        self._size = size
        self.open_here = False

    # ---- the worker ----------------------------------------------------------------------

    def open(self) -> None:
        """Say that nothing of the next gradient is there; before its push is announced."""
        self._counts[0] = self._counts[1] = 0

    def advance(self, end: int) -> None:
        """Say that the elements [0, end) are there, not yet all."""
        self._counts[0] = end

    def close(self, finite: bool, norm: float) -> None:
        """Say that all is there, and what it is: as in `Push`."""
        self._counts[1] = finite
        self._norm[0] = norm
        self._counts[0] = self._size

    # ---- the server ----------------------------------------------------------------------

    def read(self, seen: int) -> int:
        """Give how many elements are there.

        Args:
            seen: how many there were before.

        Raises:
            MessageError: fewer than before, or more than there can be.
        """
        end: int = self._counts[0]
        if not seen <= end <= self._size:
            raise MessageError(
                f"a gradient in shared memory has {end} elements, expected {seen} to {self._size}"
            )
        return end

    @property
    def good(self) -> bool:
        """Whether the verdict is there and says that the gradient is finite."""
        return self._counts[1] == 1 and self._norm[0] >= 0.0

    def verdict(self) -> tuple[bool, float]:
        """Take (finite, norm) of a gradient that is all there; it is followed no longer.

        Raises:
            MessageError: they are none.
        """
        finite, norm = self._counts[1], self._norm[0]
        if finite not in (0, 1) or (finite and not norm >= 0.0):
            raise MessageError(f"a gradient in shared memory is said to be {finite, norm}")
        self.open_here = False
        return finite == 1, norm


class BadStream(MessageError):
    """What a worker says of its gradient makes no sense.

    Attributes:
        worker: which.
    """

    def __init__(self, worker: int, why: MessageError) -> None:
        super().__init__(str(why))
        self.worker = worker


@dataclass(slots=True)
class _Stream:
    """A gradient that is being written, and how much of it has been seen."""

    progress: Progress
    since: float  # when something was added last
    seen: int = 0


class Streams:
    """The gradients that a server's workers are writing into memory that they share with it.

    Args:
        size: elements of a slot.
        servers: S.
        segments: by rank, the memory that is shared; that of worker w is S + w's.

    Attributes:
        writing: by worker and slot, those that are being written, oldest first; to be looked at.
    """

    def __init__(self, size: int, servers: int, segments: Mapping[int, Segment]) -> None:
        self.writing: dict[tuple[int, int], _Stream] = {}
        self._size = size
        self._servers = servers
        self._segments = segments
        self._progress: dict[tuple[int, int], Progress] = {}

    def progress(self, worker: int, slot: int) -> Progress | None:
        """Where the worker says how far it is, if it shares memory with this server."""
        progress = self._progress.get((worker, slot))
        if progress is None:
            segment = self._segments.get(self._servers + worker)
            if segment is not None:
                progress = Progress(segment.words(slot), self._size)
                self._progress[worker, slot] = progress
        return progress

    def begin(self, worker: int, slot: int) -> None:
        """Note that a gradient is being written."""
        progress = self.progress(worker, slot)
        assert progress is not None, "only who shares memory may stream"
        progress.open_here = True
        where = worker, slot
        self.writing.pop(where, None)  # the youngest stands last
        self.writing[where] = _Stream(progress, time.monotonic())

    def end(self, worker: int, slot: int) -> None:
        """Note that one has been followed to its end."""
        del self.writing[worker, slot]

    def forget(self, worker: int) -> None:
        """Follow nothing of a worker any more; its memory may be another's when it begins anew."""
        for streams in (self.writing, self._progress):
            for where in [where for where in streams if where[0] == worker]:
                del streams[where]

    def follow(self) -> Arrived | None:
        """Give what has been added to the oldest that is being written; None if nothing has.

        A younger one is told of only if the older has paused: the machine applies one at a time,
        and what is whole first is applied first, in place of what it has begun.

        Raises:
            BadStream: a worker's words make no sense.
        """
        now = time.monotonic()
        for (worker, slot), stream in tuple(self.writing.items()):
            progress = stream.progress
            if not progress.open_here:  # the machine has followed it to its end
                self.end(worker, slot)
                continue
            try:
                there = progress.read(stream.seen)
                if there == stream.seen:
                    if now - stream.since < _PAUSE_S:
                        return None
                    continue
                end = min(there, stream.seen + STEP)
                whole = end == self._size
                finite, norm = progress.verdict() if whole else (True, 0.0)
            except MessageError as error:
                raise BadStream(worker, error) from error
            stream.seen, stream.since = end, now
            if whole:
                self.end(worker, slot)
            return Arrived(worker, slot, end, whole, finite, norm)
        return None
