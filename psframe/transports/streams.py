"""How far a gradient has been written into its slot, in memory that worker and server share.

The words of a slot lie in a cache line of their own. The worker clears them before it announces
the push, stores how far it is after each piece, and the verdict before the last store. On x86
plain stores of aligned words are seen in their order (Intel SDM vol. 3, 9.2), and the kernel that
follows loads them atomically; on a machine with a weaker order gradients are not streamed.
"""

from __future__ import annotations

import platform

import numpy as np

from psframe.errors import MessageError
from psframe.layout import Array

__all__ = ["STORES_IN_ORDER", "STREAM_BYTES", "Progress"]

STREAM_BYTES = 64
STORES_IN_ORDER = platform.machine() in ("x86_64", "AMD64", "i686")


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
