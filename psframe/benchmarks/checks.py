"""Payloads whose every element is known, and the check that an answer is whole and right.

Elements come in pairs. In a gradient the first of a pair is 1 and the second a *code* that tells
worker and step parity apart. SGD with a learning rate of 1 from 0 then gives parameters whose
first elements are exactly -version, whoever pushed, and whose second elements are all equal: minus
the sum of the codes of all that was pushed, which is known at the end. A snapshot of another
version, a torn one, or a gradient read from another slot fails one of the two. All are small
integers, exact in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from psframe.layout import Array

__all__ = [
    "PAIRS_ALL",
    "PAIRS_A_PAGE",
    "SUM_MAX",
    "code",
    "codes_sum",
    "compile_check",
    "compile_fill",
    "payload",
]

# Integers up to here are exact in float32.
SUM_MAX = 2**24
_CODES = 8
# Distance of the elements looked at: all, or two in each page of 4 KiB.
PAIRS_ALL, PAIRS_A_PAGE = 2, 1024


def code(worker: int, parity: int) -> int:
    """Give the code of a worker's even (0) or odd (1) steps, 1 to 8."""
    return 1 + (2 * worker + parity) % _CODES


def payload(size: int, worker: int, parity: int) -> Array:
    """Make a gradient of `size` elements, an even number."""
    array = np.ones(size, np.float32)
    array[1::2] = code(worker, parity)
    return array


def codes_sum(workers: int, steps: int) -> int:
    """Sum the codes of all pushes, after an even number of steps of every worker."""
    assert steps % 2 == 0, "both parities the same number of times"
    return sum(code(w, p) for w in range(workers) for p in (0, 1)) * steps // 2


@functools.cache
def compile_check() -> Callable[[Array, float, int], float]:
    """Compile check(array, first, stride) -> what the second elements are, NaN if it is wrong.

    It is wrong if the first element of a pair is not `first`, or the second elements differ. It
    looks at the pairs at 0, stride, 2 stride, ... and at the last pair; if `stride` is PAIRS_ALL
    it reads the whole array, as fast as the memory gives it.
    """
    import numba

    def check(array: Array, first: float, stride: int) -> float:
        last = array.size - 2
        second = array[1]
        if array[0] != first:
            return np.nan
        if stride == PAIRS_ALL:
            pairs = array.view(np.uint64)
            differs = pairs[0] ^ pairs[0]
            for i in range(pairs.size):
                differs |= pairs[i] ^ pairs[0]
            return np.nan if differs else float(second)
        for i in range(stride, last, stride):
            if array[i] != first or array[i + 1] != second:
                return np.nan
        if array[last] != first or array[last + 1] != second:
            return np.nan
        return float(second)

    compiled: Callable[[Array, float, int], float] = numba.njit(nogil=True)(check)
    return compiled


@functools.cache
def compile_fill() -> Callable[[Array, float], None]:
    """Compile fill(array, code), which writes a gradient such as `payload` makes."""
    import numba

    def fill(array: Array, code: float) -> None:
        for i in range(0, array.size, 2):
            array[i] = 1
            array[i + 1] = code

    compiled: Callable[[Array, float], None] = numba.njit(nogil=True)(fill)
    return compiled
