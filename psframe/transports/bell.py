"""A way to sleep until a neighbour rings: a word in shared memory, and Linux's futex.

Who expects nothing soon sets its word, looks once more for messages, and sleeps at it. Who sends to
it looks at the word and, if it is set, wakes it. A ring that is missed costs no more than the bound
of the sleep: should the two look past each other, neither waits for ever.
"""

from __future__ import annotations

import ctypes
import platform

__all__ = ["BELL_LINE", "Bell", "can_ring"]

# The line of a segment's first page at which its maker sleeps.
BELL_LINE = 30
_NUMBERS = {"x86_64": 202, "AMD64": 202, "aarch64": 98}  # of the system call futex(2)
_NUMBER = _NUMBERS.get(platform.machine())
_WAIT, _WAKE = 0, 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def can_ring() -> bool:
    """Say whether this machine's futex is known."""
    return _NUMBER is not None


class Bell:
    """One process's word.

    Args:
        line: of shared memory, 4-byte aligned.

    Attributes:
        words: int32; the first is 1 while its process sleeps, or is about to.
    """

    def __init__(self, line: memoryview) -> None:
        self.words = line.cast("i")
        self._word = ctypes.c_int32.from_buffer(line)
        self._address = ctypes.byref(self._word)
        self._call = ctypes.CDLL(None).syscall  # lets other threads run meanwhile

    def set(self) -> None:
        """Say that this process is about to sleep; then it looks for messages once more."""
        self.words[0] = 1

    def clear(self) -> None:
        """Say that it is awake."""
        self.words[0] = 0

    def sleep(self, bound_s: float) -> None:
        """Sleep until somebody rings, or a signal comes, or the bound has passed."""
        seconds, part = divmod(bound_s, 1.0)
        bound = _Timespec(int(seconds), int(part * 1e9))
        self._call(_NUMBER, self._address, _WAIT, 1, ctypes.byref(bound), None, 0)
        self.words[0] = 0

    def wake(self) -> bool:
        """Ring if its process sleeps, or is about to; say whether it does."""
        if not self.words[0]:
            return False
        self.ring()
        return True

    def ring(self) -> None:
        """Wake the process that sleeps here."""
        self.words[0] = 0
        self._call(_NUMBER, self._address, _WAKE, 1, None, None, 0)
