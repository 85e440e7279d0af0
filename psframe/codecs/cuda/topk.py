"""The largest elements on a GPU; see `psframe.codecs.topk`.

The k-th largest magnitude is found digit by digit, from counts of the values of each digit, as
`Selection` does; then elements are counted in chunks, so that each chunk knows where in the payload
its own begin. All of that is integers: which elements are chosen depends on no order of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psframe.codecs.cuda.base import THREADS, DeviceEncoder, blocks_for, source
from psframe.codecs.selection import DIGIT_BITS, digits
from psframe.codecs.topk import TopK, payload_bytes
from psframe.layout import Layout

__all__ = ["TopKEncoder"]

_CHUNK = 4096  # elements that a block chooses from
# Blocks that count or sum: each adds up to COUNTS numbers to the others', so not more of them than
# run at once.
_BLOCKS = 1024

_BODIES = """\
/* The digits that are found so far, how many elements are wanted of those that begin so, and the
   counts of the next digit's values. */
typedef struct { u64 found; u64 wanted; u32 counts[COUNTS]; } Found;

KERNEL void squares(const T *grad, i64 size, double *sums) {
    __shared__ double y[THREADS];
    const i64 step = (i64)gridDim.x * blockDim.x;
    double total = 0.0;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step)
        total += widen(grad[i]) * widen(grad[i]);
    y[threadIdx.x] = total;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if (threadIdx.x < half) y[threadIdx.x] += y[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = y[0];
}

/* One thread. */
KERNEL void clip_scale(const double *sums, int count, double limit, T *scale) {
    double total = 0.0;
    for (int i = 0; i < count; ++i) total += sums[i];
    const double norm = sqrt(total);
    *scale = norm > limit && total - total == 0.0 ? narrow(limit / norm) : (T)1;
}

/* u = momentum u + scale g, v = v + u, or v = g; and count the highest digits of v. */
KERNEL void advance(const T *grad, const T *old_v, const T *old_u, T *new_v, T *new_u, int has,
                    int has_u, double momentum, const T *scale, int shift, Found *found,
                    int *verdict, i64 size) {
    __shared__ u32 counts[COUNTS];
    for (int i = threadIdx.x; i < COUNTS; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
        const T g = grad[i];
        T v = g;
        if (has) {
            T u = mul(*scale, g);
            if (has_u) {
                u = add(mul(narrow(momentum), old_u[i]), u);
                new_u[i] = u;
                judge(g, u, verdict);
            }
            v = add(old_v[i], u);
            new_v[i] = v;
        }
        judge(g, v, verdict);
        atomicAdd(counts + (magnitude(v) >> shift), 1u);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COUNTS; i += blockDim.x)
        if (counts[i]) atomicAdd(found->counts + i, counts[i]);
}

/* Count the values of the digit at `shift`, where those above are as found. */
KERNEL void count_digit(const T *x, int shift, Found *found, i64 size) {
    __shared__ u32 counts[COUNTS];
    for (int i = threadIdx.x; i < COUNTS; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    const i64 step = (i64)gridDim.x * blockDim.x;
    const B above = (B)found->found;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
        const B m = magnitude(x[i]) >> shift;
        if (m >> DIGIT_BITS == above) atomicAdd(counts + (m & (COUNTS - 1)), 1u);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COUNTS; i += blockDim.x)
        if (counts[i]) atomicAdd(found->counts + i, counts[i]);
}

/* One block: find the digit, and leave no counts behind. */
KERNEL void pick_digit(Found *found, int first, i64 keep) {
    __shared__ u32 counts[COUNTS];
    for (int i = threadIdx.x; i < COUNTS; i += blockDim.x) {
        counts[i] = found->counts[i];
        found->counts[i] = 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 wanted = first ? (u64)keep : found->wanted;
        int digit = COUNTS - 1;
        for (; counts[digit] < wanted; --digit) wanted -= counts[digit];
        found->found = first ? (u64)digit : found->found << DIGIT_BITS | (u64)digit;
        found->wanted = wanted;
    }
}

/* A block a chunk: how many of its elements are above what was found, and how many are that. */
KERNEL void count_chunk(const T *x, const Found *found, u32 *chunks, i64 size) {
    __shared__ u32 above, equal;
    if (threadIdx.x == 0) above = equal = 0;
    __syncthreads();
    const B least = (B)found->found;
    const i64 begin = (i64)blockIdx.x * CHUNK, end = begin + CHUNK < size ? begin + CHUNK : size;
    u32 more = 0, same = 0;
    for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const B m = magnitude(x[i]);
        more += m > least;
        same += m == least;
    }
    if (more) atomicAdd(&above, more);
    if (same) atomicAdd(&equal, same);
    __syncthreads();
    if (threadIdx.x == 0) {
        chunks[2 * blockIdx.x] = above;
        chunks[2 * blockIdx.x + 1] = equal;
    }
}

/* One block: in place of each chunk's counts, those of all before it. */
KERNEL void sum_chunks(u32 *chunks, i64 count) {
    __shared__ u32 part[2 * COUNTS];
    u32 above = 0, equal = 0;
    for (i64 begin = 0; begin < count; begin += COUNTS) {
        const int length = count - begin < COUNTS ? (int)(count - begin) : COUNTS;
        for (int i = threadIdx.x; i < 2 * length; i += blockDim.x) part[i] = chunks[2 * begin + i];
        __syncthreads();
        if (threadIdx.x == 0)
            for (int i = 0; i < length; ++i) {
                const u32 more = part[2 * i], same = part[2 * i + 1];
                part[2 * i] = above;
                part[2 * i + 1] = equal;
                above += more;
                equal += same;
            }
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * length; i += blockDim.x) chunks[2 * begin + i] = part[i];
        __syncthreads();
    }
}

/* A block a chunk: write what is chosen, ascending, and clear it where it is kept. */
KERNEL void take(T *x, T *velocity, int has, const T *scale, const Found *found,
                 const u32 *chunks, i64 keep, u64 *head, T *values, u32 *indices, i64 size) {
    __shared__ T part[CHUNK];
    __shared__ u32 above[THREADS];
    __shared__ u32 equal[THREADS];
    const i64 begin = (i64)blockIdx.x * CHUNK;
    const int length = size - begin < CHUNK ? (int)(size - begin) : CHUNK;
    const int run = CHUNK / blockDim.x, mine = threadIdx.x * run;
    const B least = (B)found->found;
    const u64 wanted = found->wanted;
    if (blockIdx.x == 0 && threadIdx.x == 0) *head = (u64)keep;
    for (int i = threadIdx.x; i < length; i += blockDim.x) part[i] = x[begin + i];
    __syncthreads();
    u32 more = 0, same = 0;
    for (int i = mine; i < mine + run && i < length; ++i) {
        more += magnitude(part[i]) > least;
        same += magnitude(part[i]) == least;
    }
    above[threadIdx.x] = more;
    equal[threadIdx.x] = same;
    __syncthreads();
    for (int gap = 1; gap < blockDim.x; gap *= 2) {
        const u32 a = threadIdx.x >= gap ? above[threadIdx.x - gap] : 0;
        const u32 b = threadIdx.x >= gap ? equal[threadIdx.x - gap] : 0;
        __syncthreads();
        above[threadIdx.x] += a;
        equal[threadIdx.x] += b;
        __syncthreads();
    }
    u64 place = (u64)chunks[2 * blockIdx.x] + above[threadIdx.x] - more;
    u64 ties = (u64)chunks[2 * blockIdx.x + 1] + equal[threadIdx.x] - same;
    for (int i = mine; i < mine + run && i < length; ++i) {
        const B m = magnitude(part[i]);
        if (m > least || (m == least && ties < wanted)) {
            const u64 at = place + (ties < wanted ? ties : wanted);
            values[at] = mul(part[i], has ? (T)1 : *scale);
            indices[at] = (u32)(begin + i);
            if (has) x[begin + i] = 0;
            if (velocity) velocity[begin + i] = 0;
        }
        place += m > least;
        ties += m == least;
    }
}
"""


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
        constants = {"CHUNK": _CHUNK, "DIGIT_BITS": DIGIT_BITS, "COUNTS": 1 << DIGIT_BITS}
        constants["THREADS"] = THREADS
        code = source(dtype, constants, _BODIES)
        states = bool(codec.error_feedback) + bool(codec.momentum)
        most = payload_bytes(codec.count(size, 0), dtype) if size else 0
        super().__init__(xp, layout, begin, end, most, states, code)
        self._chunks = -(-size // _CHUNK)
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
