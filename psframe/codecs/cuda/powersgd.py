"""Matrices as products of two thin ones on a GPU; see `psframe.codecs.powersgd`.

The products are thin, so that memory bounds them, not arithmetic: kernels of psframe's own read
each matrix twice and its residual once more, all matrices of the shard in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psframe.codecs.cuda.base import THREADS, DeviceEncoder, blocks_for, source
from psframe.codecs.cuda.powersgd_text import BODIES, CHUNK, FIELDS, SLAB, TILE
from psframe.codecs.powersgd import Piece, PowerSGD, pieces_of, unit_rows
from psframe.codecs.qsgd import key_of
from psframe.layout import Layout

__all__ = ["RANK_MAX", "PowerSGDEncoder"]

RANK_MAX = 256  # columns whose shares one block keeps
_MASK = 2**64 - 1


class PowerSGDEncoder(DeviceEncoder):
    """`PowerSGD`: the CPU's P and Q but for the rounding of their sums, and its first Q to the bit.

    Where a column has no direction it begins anew with other random numbers than the CPU's.
    """

    def __init__(
        self, xp: Any, codec: PowerSGD, layout: Layout, begin: int, end: int, seed: Sequence[int]
    ) -> None:
        pieces, dtype = pieces_of(codec, layout, begin, end), layout.dtype
        self._rank = codec.rank
        self._elements = pieces[-1].stop if pieces else 0
        constants = {"RANK": codec.rank, "FIELDS": FIELDS, "THREADS": THREADS, "CHUNK": CHUNK}
        constants |= {"SLAB": SLAB, "TILE": TILE}
        code = source(dtype, {**constants, "EPS": float(np.finfo(dtype).eps)}, BODIES)
        length, states = self._elements * dtype.itemsize, int(codec.error_feedback)
        super().__init__(xp, layout, begin, end, length, states, code)
        self._key, self._stride = key_of(seed)
        self._pushes = 0
        matrices = [piece for piece in pieces if piece.rows]
        self._count, self._pieces = len(matrices), len(pieces)
        self._place_matrices(xp, matrices)
        self._place_pieces(xp, pieces)
        rng = np.random.default_rng(list(seed))
        rows = [rng.standard_normal((codec.rank, piece.columns)) for piece in matrices]
        starts = [unit_rows(one, dtype).reshape(-1) for one in rows]
        self._starts = xp.asarray(np.concatenate([np.empty(0, dtype), *starts]))
        self._next = xp.empty(self._starts.size, dtype)

    def _place_matrices(self, xp: Any, matrices: list[Piece]) -> None:
        """Make the table of the matrices, and room for what is computed of them."""
        rank, dtype = self._rank, self._dtype
        table: list[int] = []
        start = row = tile = part = 0
        for piece in matrices:
            rows, columns = piece.rows, piece.columns
            table += [piece.begin, rows, columns, piece.at, start, row, tile, part]
            slabs = -(-rows // SLAB)
            start, row = start + rank * columns, row + rows
            tile, part = tile + slabs * -(-columns // TILE), part + slabs * rank * columns
        self._rows, self._tiles = row, tile
        self._matrices = xp.asarray(np.array(table, np.int64))
        self._raw, self._basis = xp.empty(row * rank, dtype), xp.empty(row * rank, np.float64)
        self._partial = xp.empty(part, dtype)
        self._bad = xp.empty(len(matrices), np.int32)

    def _place_pieces(self, xp: Any, pieces: list[Piece]) -> None:
        table: list[int] = []
        chunk = 0
        for piece in pieces:
            table += [piece.begin, piece.rows, piece.columns, piece.at, piece.end, chunk, 0, 0]
            chunk += -(-(piece.end - piece.begin) // CHUNK)
        self._chunks = chunk
        self._table = xp.asarray(np.array(table, np.int64))

    def settle(self, kept: bool) -> None:
        super().settle(kept)
        self._pushes += 1
        if kept:
            self._starts, self._next = self._next, self._starts

    def _queue(self, grad: int, out: int, verdict: int, feedback: bool) -> int:
        old, fresh = self._states() if feedback else [0, 0]
        has, size = np.int32(feedback), np.int64(self._size)
        bad, count = int(self._bad.data.ptr), np.int32(self._count)
        blocks = blocks_for(self._size)
        self._launch("add_all", blocks, grad, old, fresh, has, bad, count, verdict, size)
        x = fresh if feedback else grad
        if self._count:
            self._factorise(x, out, has, verdict)
        pieces = int(self._table.data.ptr), np.int32(self._pieces)
        self._launch("leave", self._chunks, x, fresh, has, out, *pieces)
        every = np.int64(self._elements)
        self._launch("spoil", blocks_for(self._elements), out, verdict, every)
        return self.bytes_max

    def _factorise(self, x: int, out: int, has: np.int32, verdict: int) -> None:
        """Queue P and Q of all matrices, and the directions of the next push."""
        arrays = self._starts, self._next, self._raw, self._basis, self._partial, self._matrices
        starts, following, raw, basis, partial, matrices = (int(a.data.ptr) for a in arrays)
        count, bad = np.int32(self._count), int(self._bad.data.ptr)
        lines = self._count * self._rank
        key = np.uint64((self._key + self._pushes * self._stride) & _MASK)
        self._launch("project", self._rows, x, starts, raw, matrices, count)
        self._launch("orthonormalise", self._count, raw, basis, out, matrices)
        self._launch("multiply_slabs", self._tiles, x, out, partial, matrices, count)
        self._launch("sum_slabs", lines, partial, out, bad, matrices)
        self._launch("begin_next", lines, out, bad, has, following, key, matrices, verdict)
