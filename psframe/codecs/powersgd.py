"""Matrices as products of two thin ones, found by a step of power iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from psframe.codecs.compiling import compile_kernel
from psframe.codecs.shard import (
    BLOCK,
    FeedbackCodec,
    ShardDecoder,
    ShardEncoder,
    check_shard,
    is_finite,
    parts_of,
)
from psframe.layout import Array, Layout
from psframe.optim.checks import as_int

__all__ = ["Piece", "PowerSGD", "pieces_of", "unit_rows"]


@dataclass(frozen=True)
class PowerSGD(FeedbackCodec):
    """Send each matrix as a product of two of a few columns.

        P = orthonormal(M Q),  Q = M^T P,  sent = P Q^T,  M = g + residual

    Vogels et al., PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization,
    2019, algorithm 1: one step of power iteration a push, from the Q of the push before (warm
    start; at first normal numbers). A tensor is a matrix of its first axis by all others. Vectors,
    tensors that a shard's boundary cuts, and matrices n x m with rank (n + m) >= n m travel as they
    are. Deviations: P and Q are this sender's own, no mean over all workers; and a column without
    a direction (M is 0, or its rank is lower) is sent as 0 and begins anew.

    Use it for models whose parameters are large matrices; rank 1 to 4 is usual. It needs error
    feedback, without which what lies outside a few directions is lost. Of a model of one server no
    tensor is cut.

    Memory: the residual, one element a parameter in each sender, and Q.

    Args:
        rank: columns of P and Q, >= 1.
        error_feedback: whether the sender adds to each gradient what its earlier payloads lacked.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> PowerSGD(2)
    PowerSGD(error_feedback=True, rank=2)
    """

    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        as_int(self, "rank", least=1)

    def encoder(self, layout: Layout, begin: int, end: int, seed: Sequence[int]) -> ShardEncoder:
        return _Encoder(self, layout, begin, end, seed)

    def decoder(self, layout: Layout, begin: int, end: int) -> ShardDecoder:
        return _Decoder(self, layout, begin, end)


class Piece(NamedTuple):
    """A tensor, or part of one: [begin, end) of the shard, and where it is in a payload.

    rows and columns are those of the matrix, 0 if it travels as it is; [at, stop) are elements.
    """

    begin: int
    end: int
    rows: int
    columns: int
    at: int
    stop: int

    def factors(self, rank: int, elements: Array) -> tuple[Array, Array]:
        """Give P, (rows, rank), and Q transposed, (rank, columns), in a payload's elements."""
        middle = self.at + self.rows * rank
        return (
            elements[self.at : middle].reshape(self.rows, rank),
            elements[middle : self.stop].reshape(rank, self.columns),
        )


def pieces_of(codec: PowerSGD, layout: Layout, begin: int, end: int) -> list[Piece]:
    """List the pieces of a shard, and where each is in a payload."""
    check_shard(layout, begin, end)
    pieces: list[Piece] = []
    at = 0
    for first, last, shape in parts_of(layout, begin, end):
        size = last - first
        rows = shape[0] if shape is not None and len(shape) > 1 else size
        columns = size // rows
        thin = codec.rank * (rows + columns)
        if thin < size:
            pieces.append(Piece(first, last, rows, columns, at, at + thin))
        else:
            pieces.append(Piece(first, last, 0, 0, at, at + size))
        at = pieces[-1].stop
    return pieces


class _Encoder(ShardEncoder):
    def __init__(
        self, codec: PowerSGD, layout: Layout, begin: int, end: int, seed: Sequence[int]
    ) -> None:
        self._pieces, self._rank = pieces_of(codec, layout, begin, end), codec.rank
        elements = self._pieces[-1].stop if self._pieces else 0
        dtype = layout.dtype
        super().__init__(layout, begin, end, elements * dtype.itemsize, codec.error_feedback)
        self._rng = np.random.default_rng(list(seed))
        self._starts = [
            unit_rows(self._rng.standard_normal((codec.rank, piece.columns)), dtype)
            for piece in self._pieces
            if piece.rows
        ]
        self._subtract = compile_kernel(
            _subtract, dtype, "none <- read read int write", helpers=(_product,)
        )

    def _write(self, grad: Array, residual: Array | None, out: Array) -> int:
        elements = out[: self.bytes_max].view(self._dtype)
        if residual is None:
            x = grad
            if not is_finite(grad):
                elements.fill(np.nan)
                return self.bytes_max
        else:
            x = np.add(residual, grad, out=residual)
        starts = iter(range(len(self._starts)))
        for piece in self._pieces:
            part = x[piece.begin : piece.end]
            if not piece.rows:
                elements[piece.at : piece.stop] = part
                if residual is not None:
                    part.fill(0)
                continue
            p, q = piece.factors(self._rank, elements)
            self._factorise(part.reshape(piece.rows, piece.columns), next(starts), p, q)
            if residual is not None:
                self._subtract(p.reshape(-1), q.reshape(-1), self._rank, part)
        return self.bytes_max

    def _factorise(self, matrix: Array, index: int, p: Array, q: Array) -> None:
        """Write P and the transposed Q, and keep the latter's directions for the next push."""
        with np.errstate(all="ignore"):
            _orthonormal(matrix @ self._starts[index].T, p)
            np.matmul(p.T, matrix, out=q)
            if not np.isfinite(q).all():  # above the range of the dtype, of finite elements
                if self._residual is None:
                    q.fill(np.nan)
                else:  # stays in the residual
                    p.fill(0)
                    q.fill(0)
            self._starts[index] = self._next_start(q)

    def _next_start(self, q: Array) -> Array:
        """Scale the rows of Q; where there is none, begin anew."""
        norms = np.abs(q).max(axis=1)
        lost = ~(norms > 0)
        if not lost.any():
            return unit_rows(q.astype(np.float64), self._dtype)
        q = np.where(lost[:, None], self._rng.standard_normal(q.shape), q.astype(np.float64))
        return unit_rows(q, self._dtype)


class _Decoder(ShardDecoder):
    def __init__(self, codec: PowerSGD, layout: Layout, begin: int, end: int) -> None:
        self._pieces, self._rank = pieces_of(codec, layout, begin, end), codec.rank
        elements = self._pieces[-1].stop if self._pieces else 0
        super().__init__(layout, begin, end, elements * layout.dtype.itemsize)
        self._multiply = compile_kernel(
            _multiply, layout.dtype, "none <- read read int write", helpers=(_product,)
        )

    def _read(self, payload: Array, out: Array) -> None:
        elements = payload.view(self._dtype)
        for piece in self._pieces:
            part = out[piece.begin : piece.end]
            if piece.rows:
                p, q = piece.factors(self._rank, elements)
                self._multiply(p.reshape(-1), q.reshape(-1), self._rank, part)
            else:
                part[:] = elements[piece.at : piece.stop]


def unit_rows(rows: Array, dtype: np.dtype[Any]) -> Array:
    """Scale each row, none of which is 0, so that its product with any finite one is finite."""
    rows = rows / np.abs(rows).max(axis=1, keepdims=True)
    norms = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    scaled: Array = rows / (2.0 * math.sqrt(rows.shape[1]) * norms)
    return scaled.astype(dtype)


def _orthonormal(columns: Array, out: Array) -> None:
    """Write an orthonormal basis of the columns: Gram-Schmidt in float64, twice for each.

    A column that the ones before it span, to the dtype's rounding, becomes 0.
    """
    rows = np.ascontiguousarray(columns.T, np.float64)
    largest = np.abs(rows).max()
    if largest > 0:
        rows /= largest
    eps = np.finfo(out.dtype).eps
    for j, row in enumerate(rows):
        before = math.sqrt(np.dot(row, row))
        for _ in range(2):
            row -= (rows[:j] @ row) @ rows[:j]
        after = math.sqrt(np.dot(row, row))
        if after > eps * before:
            row /= after
        else:
            row.fill(0)
    out[...] = rows.T


def _product(p: Array, q: Array, rank: int, i: int, begin: int, y: Array) -> None:
    """Write a stretch of row i of P Q, the columns from `begin` on."""
    columns = q.size // rank
    for j in range(y.size):
        y[j] = 0
    f, r = p[i * rank :][:rank], 0
    while r + 4 <= rank:  # four at a time, as each pass reads and writes y
        a, b = q[r * columns + begin :][: y.size], q[(r + 1) * columns + begin :][: y.size]
        c, d = q[(r + 2) * columns + begin :][: y.size], q[(r + 3) * columns + begin :][: y.size]
        for j in range(y.size):
            y[j] += (f[r] * a[j] + f[r + 1] * b[j]) + (f[r + 2] * c[j] + f[r + 3] * d[j])
        r += 4
    while r < rank:
        a = q[r * columns + begin :][: y.size]
        for j in range(y.size):
            y[j] += f[r] * a[j]
        r += 1


def _multiply(p: Array, q: Array, rank: int, out: Array) -> None:
    """Write P Q; q is (rank, columns), p (rows, rank), out (rows, columns), all flat."""
    columns = q.size // rank
    for i in range(p.size // rank):
        for begin in range(0, columns, BLOCK):
            length = min(BLOCK, columns - begin)
            _product(p, q, rank, i, begin, out[i * columns + begin :][:length])


def _subtract(p: Array, q: Array, rank: int, x: Array) -> None:
    """Subtract P Q, in the very bits that `_multiply` gives, from x."""
    y = np.empty(BLOCK, x.dtype)
    columns = q.size // rank
    for i in range(p.size // rank):
        for begin in range(0, columns, BLOCK):
            length = min(BLOCK, columns - begin)
            _product(p, q, rank, i, begin, y[:length])
            row = x[i * columns + begin :][:length]
            for j in range(length):
                row[j] -= y[j]
