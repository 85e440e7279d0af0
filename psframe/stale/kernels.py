"""The loops of the corrections, compiled with numba as the update rules are (`psframe.optim.cpu`).

Every operand has the arrays' dtype, so that a float32 result is that of the same NumPy operations;
but distances are summed in float64, in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from psframe.layout import Array
from psframe.optim.cpu import _compile, bind_formula
from psframe.stale import formulas

__all__ = ["compile_adaptive", "compile_distance", "compile_fixed"]

_LANES = 256  # sums at a time, which need no fastmath to be computed in vectors: 2 KiB


def formula(*args: Any) -> Any:
    """Stand for the formula in the loops below; `bind_formula` puts it in."""
    raise AssertionError("a loop runs only with a formula put in")


def _fixed(grad: Array, params: Array, read: Array, out: Array, h: Array) -> None:
    """Write the corrected gradient to `out`; h holds lam."""
    lam = h[0]
    for i in range(out.size):
        out[i] = formula(grad[i], params[i], read[i], lam)


def _adaptive(
    grad: Array, params: Array, read: Array, out: Array, h: Array, old: Array, new: Array
) -> None:
    """Write the corrected gradient to `out` and the mean square to `new`.

    h holds lam, decay, 1 - decay and eps.
    """
    lam, decay, rest, eps = h[0], h[1], h[2], h[3]
    for i in range(out.size):
        out[i], new[i] = formula(grad[i], params[i], read[i], old[i], lam, decay, rest, eps)


def _distance(a: Array, b: Array) -> float:
    """Give the sum of the squares of a - b."""
    sums = np.zeros(_LANES)
    whole = a.size - a.size % _LANES
    for begin in range(0, whole, _LANES):
        p, q = a[begin : begin + _LANES], b[begin : begin + _LANES]
        for k in range(_LANES):
            d = np.float64(p[k]) - np.float64(q[k])
            sums[k] += d * d
    total = 0.0
    for k in range(_LANES):
        total += sums[k]
    for i in range(whole, a.size):
        d = np.float64(a[i]) - np.float64(b[i])
        total += d * d
    return total


def _types(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """Give numba's types of an array that is read and of one that is written."""
    import numba

    number = numba.from_dtype(dtype)
    read = numba.types.Array(number, 1, "C", readonly=True)
    return read, numba.types.Array(number, 1, "C")


@functools.cache
def compile_fixed(dtype: np.dtype[Any]) -> Callable[..., None]:
    """Compile `_fixed`, or load it from numba's cache: (grad, params, read, out, scalars)."""
    import numba

    read, write = _types(dtype)
    signature = numba.types.void(read, read, read, write, read)
    bound = bind_formula(_fixed, formulas.fixed, globals())
    return _compile(bound, signature)  # type: ignore[no-any-return]


@functools.cache
def compile_adaptive(dtype: np.dtype[Any]) -> Callable[..., None]:
    """Compile `_adaptive` likewise: (grad, params, read, out, scalars, old, new)."""
    import numba

    read, write = _types(dtype)
    signature = numba.types.void(read, read, read, write, read, read, write)
    bound = bind_formula(_adaptive, formulas.adaptive, globals())
    return _compile(bound, signature)  # type: ignore[no-any-return]


@functools.cache
def compile_distance(dtype: np.dtype[Any]) -> Callable[[Array, Array], float]:
    """Compile `_distance` likewise: (a, b), equally long, which none of these loops checks."""
    import numba

    read, _ = _types(dtype)
    return _compile(_distance, numba.types.float64(read, read))  # type: ignore[no-any-return]
