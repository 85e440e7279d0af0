"""The largest elements on a GPU; see `psframe.codecs.topk`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psframe.codecs.cuda.base import THREADS, DeviceEncoder, blocks_for, source
from psframe.codecs.cuda.topk_text import BODIES, CHUNK
from psframe.codecs.selection import DIGIT_BITS, digits
from psframe.codecs.topk import TopK, payload_bytes
from psframe.layout import Layout

__all__ = ["TopKEncoder"]

# Blocks that count or sum: each adds up to COUNTS numbers to the others', so not more of them than
# run at once.
_BLOCKS = 1024


class TopKEncoder(DeviceEncoder):
    """`TopK`: what is sent is found in three passes over float32 (six over float64), and taken.

    With `clip_norm` the norm is summed in float64, where the CPU sums blocks in float32: it, and so
    what is sent, agrees with the CPU's to about 1e-6.
    """

    def __init__(
        self, xp: Any, codec: TopK, layout: Layout, begin: int, end: int, seed: Sequence[int]
    ) -> None:
        size, dtype = end - begin, layout.dtype
        self._codec, self._pushes = codec, 0
        self._digits = digits(8 * dtype.itemsize - 1)
        constants = {"CHUNK": CHUNK, "DIGIT_BITS": DIGIT_BITS, "COUNTS": 1 << DIGIT_BITS}
        constants["THREADS"] = THREADS
        code = source(dtype, constants, BODIES)
        states = bool(codec.error_feedback) + bool(codec.momentum)
        most = payload_bytes(codec.count(size, 0), dtype) if size else 0
        super().__init__(xp, layout, begin, end, most, states, code)
        self._chunks = -(-size // CHUNK)
        self._found = xp.zeros(2 + (1 << DIGIT_BITS) // 2, np.uint64)
        self._counts = xp.empty(2 * self._chunks, np.uint32)
        self._scale = xp.asarray(np.ones(1, dtype))
        self._sums = xp.empty(_BLOCKS, np.float64)

    @staticmethod
    def codes(codec: TopK, layout: Layout, begin: int, end: int) -> bool:
        """Say whether it can: counts are of 32 bits, and squares of float64 may overflow."""
        overflows = codec.clip_norm is not None and layout.dtype.itemsize == 8
        return end - begin < 2**32 and not overflows

    def settle(self, kept: bool) -> None:
        super().settle(kept)
        self._pushes += 1

    def _queue(self, grad: int, out: int, verdict: int, feedback: bool) -> int:
        keep = self._codec.count(self._size, self._pushes)
        if self._codec.clip_norm is not None:
            self._clip(grad, self._codec.clip_norm)
        source, velocity = self._advance(grad, verdict, feedback)
        self._select(source, keep)
        found, scale = int(self._found.data.ptr), int(self._scale.data.ptr)
        middle = out + 8 + keep * self._dtype.itemsize
        where = np.int64(keep), out, out + 8, middle, np.int64(self._size)
        kept = np.int32(feedback), scale, found, int(self._counts.data.ptr)
        self._launch("take", self._chunks, source, velocity, *kept, *where)
        return payload_bytes(keep, self._dtype)

    def _clip(self, grad: int, limit: float) -> None:
        sums, blocks = int(self._sums.data.ptr), min(_BLOCKS, blocks_for(self._size))
        self._launch("squares", blocks, grad, np.int64(self._size), sums)
        scale = int(self._scale.data.ptr)
        self._kernels["clip_scale"]((1,), (1,), (sums, np.int32(blocks), np.float64(limit), scale))

    def _advance(self, grad: int, verdict: int, feedback: bool) -> tuple[int, int]:
        """Queue what makes the residual, and the first counts; give its address, and u's."""
        states = [0, 0, 0, 0]
        has_velocity = feedback and bool(self._codec.momentum)
        if feedback:
            known = self._states()
            half = len(known) // 2
            states[:half], states[2 : 2 + half] = known[:half], known[half:]
        flags = np.int32(feedback), np.int32(has_velocity), np.float64(self._codec.momentum)
        places = int(self._scale.data.ptr), np.int32(self._digits[0]), int(self._found.data.ptr)
        size = np.int64(self._size)
        blocks = min(_BLOCKS, blocks_for(self._size))
        self._launch("advance", blocks, grad, *states, *flags, *places, verdict, size)
        return (states[2], states[3]) if feedback else (grad, 0)

    def _select(self, source: int, keep: int) -> None:
        """Queue the search for the k-th magnitude, and the counts of what is chosen."""
        found, counts = int(self._found.data.ptr), int(self._counts.data.ptr)
        size, blocks = np.int64(self._size), min(_BLOCKS, blocks_for(self._size))
        for k, shift in enumerate(self._digits):
            if k:
                self._launch("count_digit", blocks, source, np.int32(shift), found, size)
            self._launch("pick_digit", 1, found, np.int32(k == 0), np.int64(keep))
        self._launch("count_chunk", self._chunks, source, found, counts, size)
        self._launch("sum_chunks", 1, counts, np.int64(self._chunks))
