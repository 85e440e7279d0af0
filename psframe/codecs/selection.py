"""Finds the k elements of largest magnitude in one pass over memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from psframe.codecs.compiling import Signed, compile_kernel
from psframe.codecs.shard import BLOCK
from psframe.layout import Array

__all__ = ["DIGIT_BITS", "Selection", "digits"]

# Elements of a sample, and how many standard deviations more of it are taken than are wanted: too
# few are found once in 30,000 times if the elements are in no order; then all is done again.
_SAMPLE = 16384
_DEVIATIONS = 4.0
DIGIT_BITS = 11  # 2048 counts of 8 bytes stay in the first cache


class Selection:
    """Selects exactly; of equal magnitudes those at the lowest indices. NaN is above infinity.

    What is above a threshold guessed from a sample is gathered. Should that be twice as much as is
    wanted, the smaller half is dropped, and what is not larger than the rest is gathered no more:
    so the time is in proportion to the vector's length in any order of its elements.

    Args:
        size: elements of the vectors, at most 2^32.
        most: how many may be wanted, at most `size`.
        dtype: float32 or float64.
    """

    def __init__(self, size: int, most: int, dtype: np.dtype[Any]) -> None:
        room = min(2 * most, size) + BLOCK
        self._magnitudes = np.empty(room, np.int32 if dtype.itemsize == 4 else np.int64)
        self._indices = np.empty(room, np.uint32)
        self._state = np.zeros(2, np.int64)
        whole = self._magnitudes.dtype.str[1:]
        self._gather = compile_kernel(
            _gather, dtype, f"none <- read int write:{whole} write:u4 write:i8"
        )
        shifts = digits(8 * dtype.itemsize - 1)
        self._keep_largest = compile_kernel(
            _keep_largest,
            dtype,
            f"int <- write:{whole} write:u4 int int",
            (("FIRST_SHIFT", shifts[0]), ("COUNTS", 1 << DIGIT_BITS)),
        )

    def select(self, x: Array, keep: int) -> Array:
        """Give the indices of the `keep` largest |x|, ascending.

        Args:
            x: contiguous; only read.
            keep: 1 to `most`.

        Returns:
            uint32, in this object's own memory: it is overwritten by the next call.
        """
        if self._above(x, keep, self._guess(x, keep)) < keep:
            self._above(x, keep, -1)
        return self._indices[:keep]

    def _above(self, x: Array, keep: int, threshold: int) -> int:
        """Select those above a threshold; give how many there are, at most `keep`."""
        state = self._state
        state[:] = 0
        while state[0] < x.size:
            self._gather(x, threshold, self._magnitudes, self._indices, state)
            count = int(state[1])
            if count > keep:
                threshold = self._keep_largest(self._magnitudes, self._indices, count, keep)
                state[1] = keep
        return int(state[1])

    def _guess(self, x: Array, keep: int) -> int:
        """Guess, from a sample, a threshold with a few more elements above it than are wanted."""
        stride = x.size // _SAMPLE | 1
        sample = np.abs(x[::stride])
        share = keep / x.size * sample.size
        rank = math.ceil(share + _DEVIATIONS * math.sqrt(share))
        if stride == 1 or rank >= sample.size:
            return -1
        bits = sample.view(self._magnitudes.dtype)
        return int(np.partition(bits, -rank)[-rank]) - 1


def digits(bits: int) -> list[int]:
    """Give the shifts of the digits of an integer of so many bits, the highest first."""
    return list(range(0, bits, DIGIT_BITS))[::-1]


# Bound when a loop is compiled.
FIRST_SHIFT, COUNTS = 22, 1 << DIGIT_BITS


def _gather(x: Array, threshold: int, magnitudes: Array, indices: Array, state: Array) -> None:
    """Gather candidates from element state[0] on, until there is no room for those of a block.

    state[1] counts them. The bits of |x|, read as an integer, are in the order of |x|.
    """
    y = np.empty(BLOCK, x.dtype)
    bits = y.view(Signed)
    least = Signed(threshold)
    begin, count = state[0], state[1]
    while begin < x.size and count + BLOCK <= magnitudes.size:
        block = x[begin:][:BLOCK]
        for i in range(block.size):
            y[i] = abs(block[i])
        tail, places = magnitudes[count:][:BLOCK], indices[count:][:BLOCK]
        found = np.uint64(0)  # unsigned: an index that may be negative costs a comparison
        for i in range(block.size):  # no branch: at a tenth of the elements it is often wrong
            tail[found] = bits[i]
            places[found] = begin + i
            found += np.uint64(bits[i] > least)
        count += np.int64(found)
        begin += block.size
    state[0], state[1] = begin, count


def _keep_largest(magnitudes: Array, indices: Array, count: int, keep: int) -> int:
    """Keep the `keep` largest of `count` candidates, in their order, and give the smallest kept.

    The latter is found digit by digit, from the counts of the values of each digit.
    """
    counts = np.empty(COUNTS, np.int64)
    found, wanted, shift, width = Signed(0), keep, FIRST_SHIFT, 0
    while shift >= 0:
        counts[:] = 0
        above = Signed(shift + DIGIT_BITS)
        for i in range(count):
            m = magnitudes[i]
            if width == 0 or (m >> above) == found:
                counts[(m >> Signed(shift)) & Signed(COUNTS - 1)] += 1
        digit = COUNTS - 1
        while counts[digit] < wanted:
            wanted -= counts[digit]
            digit -= 1
        found = Signed((found << Signed(DIGIT_BITS)) | Signed(digit))
        shift -= DIGIT_BITS
        width += 1
    kept = 0
    for i in range(count):
        m = magnitudes[i]
        equal = m == found
        magnitudes[kept] = m
        indices[kept] = indices[i]
        kept += (m > found) | (equal & (wanted > 0))
        wanted -= equal
    return int(found)
