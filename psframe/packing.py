"""Named arrays into a worker's flat gradient slots.

A gradient is checked, cast, copied, and judged finite in one pass, a piece at a time, so that
a server can follow. Its norm is summed over blocks of the whole flat vector, so that it depends on
neither the servers nor on who copied it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from psframe.layout import Array, Layout, check_gradient_dtype

__all__ = ["GradientSlot", "check_gradients"]

# Elements summed at a time: 16 KiB of float32 stay in the first cache, and BLAS does not start
# threads for so few (so that the sum's bits do not depend on their number).
_BLOCK = 4096
# Elements copied at most at a time, 256 KiB of float32: they stay in the second cache until they
# are summed and, on the other side, applied. (Larger copies into memory that another core has just
# read were ten times slower at times.)
_PIECE = 16 * _BLOCK
# Of a short gradient pieces are shorter, so that who follows is not far behind at the end.
_PIECES = 8
_NOT_JUDGED = (True, 0.0)


_Shape = tuple[int, ...]


def _quietly() -> np.errstate:
    """Squares that overflow are judged afterwards, and so is what a cast makes infinite."""
    return np.errstate(over="ignore", under="ignore", invalid="ignore")


def check_gradients(layout: Layout, grads: Mapping[str, Any], where: str) -> None:
    """Check names, dtypes and shapes of a gradient against the parameters.

    Args:
        layout: the parameters.
        grads: mapping of names to arrays.
        where: beginning of the error's text, such as "push from worker 3".

    Raises:
        ValueError: a name is missing or unknown, or a shape is wrong.
        TypeError: not a mapping of arrays, or a dtype is not floating-point.
    """
    if not isinstance(grads, Mapping):
        raise TypeError(
            f"{where}: expected a mapping of names to arrays, got {type(grads).__name__}"
        )
    if len(grads) != len(layout.names) or any(name not in grads for name in layout.names):
        missing = [name for name in layout.names if name not in grads]
        unknown = [name for name in grads if name not in layout.names]
        raise ValueError(
            f"{where}: the gradient must have the parameters' names;"
            f" missing: {missing or 'none'}, unknown: {unknown or 'none'}"
        )
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        grad = grads[name]
        dtype = getattr(grad, "dtype", None)
        if dtype is None or dtype != layout.dtype:  # to NumPy None equals float64
            check_gradient_dtype(name, dtype, where)
        if tuple(grad.shape) != shape:
            raise ValueError(
                f"{where}: gradient {name!r} has shape {tuple(grad.shape)}, expected {shape}"
            )


class GradientSlot:
    """One flat gradient slot of a worker, and the parameters' names in it.

    Args:
        layout: the parameters.
        flat: the slot's memory, P elements of the layout's dtype.

    Attributes:
        flat: the slot's memory.
        arrays: names to writable views of it.
    """

    def __init__(self, layout: Layout, flat: Array) -> None:
        self.arrays: dict[str, Array] = layout.views(flat)
        self.flat = flat
        self._places = list(zip(layout.names, layout.offsets, layout.sizes, strict=True))
        targets = self.arrays.values()
        self._targets = list(zip(layout.names, layout.shapes, targets, strict=True))
        self._dtype = layout.dtype
        self._few = flat.size <= _BLOCK
        blocks = -(-flat.size // (_BLOCK * _PIECES))
        self._piece = min(max(1, blocks) * _BLOCK, _PIECE)

    def fits(self, grads: object) -> bool:
        """Say whether a gradient is a dict of NumPy arrays that needs no cast and no second look.

        This is the hot path's check; `check_gradients` says of all others what is wrong, if
        anything.
        """
        targets, dtype = self._targets, self._dtype
        if type(grads) is not dict or len(grads) != len(targets):
            return False
        for name, shape, _ in targets:
            grad = grads.get(name)
            if type(grad) is not np.ndarray or grad.dtype is not dtype or grad.shape != shape:
                return False
        return True

    def pack_fitting(self, grads: object, judge: bool) -> tuple[bool, float] | None:
        """Copy a gradient that `fits`, in one go.

        Returns:
            As `pack`; None of any other gradient. The slot holds nothing of use then.
        """
        targets, dtype = self._targets, self._dtype
        if type(grads) is not dict or len(grads) != len(targets):
            return None
        for name, shape, target in targets:
            grad = grads.get(name)
            if type(grad) is not np.ndarray or grad.dtype is not dtype or grad.shape != shape:
                return None
            target[...] = grad
        if not judge:
            return _NOT_JUDGED
        flat = self.flat
        return self._verdict(float(np.vdot(flat, flat)) if self._few else _sum_of_blocks(flat))

    def write(self, grads: Mapping[str, Any], advance: Callable[[int], None]) -> None:
        """Copy a gradient that `fits`, without a look at what is copied.

        Args:
            grads: names to arrays on the host; only read.
            advance: called, some elements at a time, with how many are there from the start; not
                with all.
        """
        flat, length, told = self.flat, self._piece, 0
        for name, offset, size in self._places:
            source = grads[name]
            begin = 0
            if size > length and source.flags.c_contiguous:
                elements = source.reshape(-1)
                while size - begin > length:
                    end = begin + length
                    told = offset + end
                    flat[offset + begin : told] = elements[begin:end]
                    advance(told)
                    begin = end
                flat[offset + begin : offset + size] = elements[begin:]
            else:
                self.arrays[name][...] = source
            end = offset + size
            if end - told >= length and end < flat.size:
                told = end
                advance(end)

    def pack(
        self,
        grads: Mapping[str, Any],
        judge: bool = True,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[bool, float]:
        """Copy a checked gradient into the slot.

        Args:
            grads: names to arrays on the host; only read.
            judge: whether to look at what is copied.
            advance: called, some elements at a time, with how many are there from the start.

        Returns:
            As `judge`, of what the slot holds now (so after a cast); (True, 0.0) unlooked at.
        """
        with _quietly():
            summed = _Sum(self.flat, advance, self._piece, judge)
            self._pack_in_pieces(grads, summed)
            return self._verdict(summed.all()) if judge else _NOT_JUDGED

    def judge(self, advance: Callable[[int], None] | None = None) -> tuple[bool, float]:
        """Say whether all elements in the slot are finite, and their Euclidean norm.

        The norm of float32 elements below 1e-19 (float64: 1e-154) is rough, their squares being
        subnormal; it is never too large.

        Args:
            advance: as for `pack`.
        """
        flat = self.flat
        if advance is None and flat.size <= _PIECE:
            return self._verdict(_sum_of_blocks(flat))
        with _quietly():
            return self._verdict(_Sum(flat, advance, self._piece, True).all())

    def norm(self, runs: Sequence[tuple[int, int]]) -> float:
        """Compute the Euclidean norm of some runs [begin, end) of the slot, which is finite."""
        parts = (self.flat[begin:end].astype(np.float64) for begin, end in runs)
        with np.errstate(over="ignore"):
            return math.sqrt(sum(float(np.vdot(part, part)) for part in parts))

    def _pack_in_pieces(self, grads: Mapping[str, Any], summed: _Sum) -> None:
        flat, length = self.flat, self._piece
        for name, offset, size in self._places:
            source = grads[name]
            if (
                size > length
                and type(source) is np.ndarray
                and source.dtype == flat.dtype
                and source.flags.c_contiguous
            ):
                elements = source.reshape(-1)
                for begin in range(0, size, length):
                    piece = elements[begin : begin + length]
                    end = offset + begin + piece.size
                    flat[end - piece.size : end] = piece
                    summed.extend(end)
            else:
                self.arrays[name][...] = source
                summed.extend(offset + size)

    def _verdict(self, total: float) -> tuple[bool, float]:
        return (True, math.sqrt(total)) if total < math.inf else self._look_again()

    def _look_again(self) -> tuple[bool, float]:
        flat = self.flat
        if not bool(np.isfinite(flat).all()):
            return False, math.nan
        # Finite, but the squares overflow: elements above 1e19 in float32, 1e154 in float64.
        largest = float(np.abs(flat).max())
        with np.errstate(under="ignore"):
            parts = np.square(flat / flat.dtype.type(largest))
        return True, largest * math.sqrt(float(parts.sum()))


def _sum_of_blocks(flat: Array) -> float:
    """Sum the squares of few blocks; vdot does not warn where dot and matmul do."""
    if flat.size <= _BLOCK:
        return float(np.vdot(flat, flat))
    total = 0.0
    for begin in range(0, flat.size, _BLOCK):
        block = flat[begin : begin + _BLOCK]
        total += float(np.vdot(block, block))
    return total


class _Sum:
    """The sum of the squares of a flat vector, in blocks from its start, while it is written.

    Args:
        flat: the vector.
        advance: called with how many elements have been written and summed, some at a time.
        piece: how many at a time, a multiple of the block.
        judge: whether to sum at all.
    """

    def __init__(
        self, flat: Array, advance: Callable[[int], None] | None, piece: int, judge: bool
    ) -> None:
        self._flat = flat
        self._advance = advance
        self._piece = piece
        self._judge = judge
        self._done, self._total = 0, 0.0  # elements in the total: a multiple of _BLOCK

    def extend(self, end: int) -> None:
        """Take what has been written up to `end`, a piece at least at a time."""
        while end - self._done >= self._piece:
            self._take(self._done + self._piece)

    def all(self) -> float:
        """Take the rest and give the sum; infinite or NaN if it is not finite."""
        flat = self._flat
        self.extend(flat.size)
        return self._total + _sum_of_blocks(flat[self._done :])

    def _take(self, end: int) -> None:
        if not self._judge:
            pass
        elif end - self._done == _BLOCK:
            block = self._flat[self._done : end]
            self._total += float(np.vdot(block, block))
        else:
            blocks = self._flat[self._done : end].reshape(-1, _BLOCK)
            for square in np.matmul(blocks[:, None, :], blocks[:, :, None]).ravel().tolist():
                self._total += square
        self._done = end
        if self._advance is not None and end < self._flat.size:
            self._advance(end)
