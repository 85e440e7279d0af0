"""One bit an element on a GPU; see `psframe.codecs.signs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psframe.codecs.cuda.base import DeviceEncoder, source
from psframe.codecs.shard import BLOCK
from psframe.codecs.signs import Sections, Sign
from psframe.layout import Layout

__all__ = ["SignEncoder"]

_BODIES = """\
/* The place of a part in `parts`: where it begins and ends, which is its first block of BLOCK
   elements, and where in the payload its signs begin. */
#define BEGIN 0
#define END 1
#define FIRST 2
#define SIGNS 3

DEVICE const i64 *part_of(const i64 *parts, int count, i64 block) {
    int low = 0;
    for (int high = count; high - low > 1;) {
        const int middle = (low + high) / 2;
        if (parts[4 * middle + FIRST] <= block) low = middle; else high = middle;
    }
    return parts + 4 * low;
}

/* Each block's share of its part's mean |x|, summed as in `_mean_magnitude`. */
KERNEL void magnitudes(const T *grad, const T *old, int has, const i64 *parts, int count,
                       double *sums, int *verdict) {
    __shared__ double y[BLOCK];
    const i64 *part = part_of(parts, count, blockIdx.x);
    const i64 begin = part[BEGIN] + (blockIdx.x - part[FIRST]) * BLOCK, end = part[END];
    const double share = 1.0 / (double)(end - part[BEGIN]);
    for (int i = threadIdx.x; i < BLOCK; i += blockDim.x) {
        y[i] = 0.0;
        if (begin + i < end) {
            const T g = grad[begin + i], x = has ? add(g, old[begin + i]) : g;
            y[i] = widen(from_bits(magnitude(x))) * share;
            judge(g, x, verdict);
        }
    }
    __syncthreads();
    for (int half = BLOCK / 2; half; half /= 2) {
        for (int i = threadIdx.x; i < half; i += blockDim.x) y[i] += y[i + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = y[0];
}

/* A block a part: its scale. Blocks' sums are added one after the other, as on the CPU. */
KERNEL void scale_parts(const i64 *parts, int count, i64 blocks, const double *sums, double fixed,
                        T *scales, int *verdict) {
    __shared__ double y[BLOCK];
    const i64 *part = parts + 4 * (i64)blockIdx.x;
    const i64 end = blockIdx.x + 1 < count ? part[4 + FIRST] : blocks;
    double total = 0.0;
    for (i64 begin = part[FIRST]; begin < end; begin += BLOCK) {
        for (int i = threadIdx.x; i < BLOCK; i += blockDim.x)
            y[i] = begin + i < end ? sums[begin + i] : 0.0;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int i = 0; i < BLOCK && begin + i < end; ++i) total += y[i];
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        const int good = total - total == 0.0;
        if (!good) atomicOr(verdict, 1);
        scales[blockIdx.x] = good ? narrow(fixed > 0.0 ? fixed : total) : from_bits(QUIET_NAN);
    }
}

/* The signs, element 0's in the lowest bit, and what they lack. */
KERNEL void sign_all(const T *grad, const T *old, T *fresh, int has, const i64 *parts, int count,
                     const T *scales, u8 *out) {
    __shared__ u8 signs[BLOCK];
    const i64 *part = part_of(parts, count, blockIdx.x);
    const i64 block = blockIdx.x - part[FIRST], end = part[END];
    const i64 begin = part[BEGIN] + block * BLOCK;
    const T scale = scales[(part - parts) / 4];
    for (int i = threadIdx.x; i < BLOCK; i += blockDim.x) {
        signs[i] = 0;
        if (begin + i < end) {
            const T g = grad[begin + i], x = has ? add(g, old[begin + i]) : g;
            signs[i] = (u8)not_below(x);
            if (has) fresh[begin + i] = sub(x, signs[i] ? scale : negated(scale));
        }
    }
    __syncthreads();
    out += part[SIGNS] + block * (BLOCK / 8);
    for (int byte = threadIdx.x; byte < BLOCK / 8 && begin + 8 * byte < end; byte += blockDim.x) {
        u32 value = 0;
        for (int bit = 0; bit < 8; ++bit) value |= (u32)signs[8 * byte + bit] << bit;
        out[byte] = (u8)value;
    }
}
"""


class SignEncoder(DeviceEncoder):
    """`Sign`: a kernel for the means, a small one for the scales, and one for the signs.

    The means need all of a part before the first sign, so gradient and residual are read twice.
    """

    def __init__(
        self, xp: Any, codec: Sign, layout: Layout, begin: int, end: int, seed: Sequence[int]
    ) -> None:
        codec.check_dtype(layout)
        sections = Sections(codec, layout, begin, end)
        code = source(layout.dtype, {"BLOCK": BLOCK}, _BODIES)
        super().__init__(xp, layout, begin, end, sections.bytes, int(codec.error_feedback), code)
        self._fixed = np.float64(0.0 if codec.scale is None else codec.scale)
        table, blocks = [], 0
        for part, (first, _) in zip(sections.parts, sections.places, strict=True):
            table += [part.begin, part.end, blocks, first]
            blocks += -(-(part.end - part.begin) // BLOCK)
        self._blocks, self._parts = blocks, len(sections.parts)
        self._table = xp.asarray(np.array(table, np.int64))
        self._sums = xp.empty(blocks, np.float64)

    def _queue(self, grad: int, out: int, verdict: int, feedback: bool) -> int:
        old, fresh = self._states() if feedback else [0, 0]
        has, count, sums = np.int32(feedback), np.int32(self._parts), int(self._sums.data.ptr)
        table = int(self._table.data.ptr)
        self._launch("magnitudes", self._blocks, grad, old, has, table, count, sums, verdict)
        every = np.int64(self._blocks)
        self._launch(
            "scale_parts", self._parts, table, count, every, sums, self._fixed, out, verdict
        )
        self._launch("sign_all", self._blocks, grad, old, fresh, has, table, count, out, out)
        return self.bytes_max
