"""A few levels an element on a GPU; see `psframe.codecs.qsgd`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psframe.codecs.cuda.base import DeviceEncoder, source
from psframe.codecs.qsgd import BUCKET, QSGD, key_of
from psframe.layout import Layout

__all__ = ["QSGDEncoder"]

_BODIES = """\
/* Of squares that were lost, or of what is not finite. */
DEVICE T rare_norm(const T *x) {
    double largest = 0.0, total = 0.0;
    for (int i = 0; i < BUCKET; ++i) {
        const double a = widen(from_bits(magnitude(x[i])));
        if (!is_finite(x[i])) return from_bits(QUIET_NAN);
        if (a > largest) largest = a;
    }
    for (int i = 0; i < BUCKET; ++i) {
        const double part = widen(x[i]) / largest;
        total += part * part;
    }
    const double norm = largest * sqrt(total);
    return narrow(norm < LARGEST ? norm : LARGEST);
}

DEVICE T norm_of(double total, const T *x) {
    if (!(total > 1e-280 && total - total == 0.0)) return rare_norm(x);
    const double norm = sqrt(total);
    return narrow(norm < LARGEST ? norm : LARGEST);
}

/* What is sent in place of the norm of so many elements. */
DEVICE T sent_of(T norm, int count) {
    const double all = (double)count / ((double)LEVELS * LEVELS), root = sqrt((double)count);
    const double excess = all < root / LEVELS ? all : root / LEVELS;
    return narrow(widen(norm) / (1.0 + excess));
}

DEVICE u64 mixed(u64 z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

DEVICE u32 drawn(u64 z, u32 i) {
    u32 h = i * 0x9e3779b9u + (u32)z;
    h = (h ^ h >> 16) * 0x7feb352du + (u32)(z >> 32);
    h = (h ^ h >> 15) * 0x846ca68bu;
    return h ^ h >> 16;
}

/* A block a bucket. As `_quantise` in psframe.codecs.qsgd: the same sums in the same order. */
KERNEL void quantise(const T *grad, const T *old, T *fresh, int has, u64 key, T *norms,
                     u64 *words, int *verdict, i64 size) {
    __shared__ T x[BUCKET];
    __shared__ double y[BUCKET];
    __shared__ u32 codes[BUCKET];
    __shared__ T both[2];
    __shared__ int some;
    const i64 bucket = blockIdx.x, begin = bucket * BUCKET;
    const int count = size - begin < BUCKET ? (int)(size - begin) : BUCKET;
    if (threadIdx.x == 0) some = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < BUCKET; i += blockDim.x) {
        T v = 0;
        if (i < count) {
            const T g = grad[begin + i];
            v = has ? add(g, old[begin + i]) : g;
            judge(g, v, verdict);
        }
        if (magnitude(v)) some = 1;
        x[i] = v;
        y[i] = widen(v) * widen(v);
    }
    __syncthreads();
    for (int half = BUCKET / 2; half; half /= 2) {
        for (int i = threadIdx.x; i < half; i += blockDim.x) y[i] += y[i + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        both[0] = some ? norm_of(y[0], x) : (T)0;
        both[1] = has ? sent_of(both[0], count) : both[0];
        norms[bucket] = both[1];
        /* Words of 8 bytes follow the norms. */
        if (sizeof(T) == 4 && bucket == gridDim.x - 1 && bucket % 2 == 0) norms[bucket + 1] = 0;
    }
    __syncthreads();
    const T norm = both[0], sent = both[1], unit = (T)UNIT, divisor = bits(norm) ? norm : unit;
    const u64 z = mixed(key + (u64)bucket * 0x9e3779b97f4a7c15ull);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        if (!is_finite(norm)) {
            codes[i] = LEVELS;
            continue;
        }
        const T a = mul(divide(from_bits(magnitude(x[i])), divisor), (T)LEVELS);
        const T random = mul((T)(int)(drawn(z, i) >> UNUSED), unit);
        int level = (int)a;
        level += bits(random) < bits(sub(a, (T)level));  /* neither is below 0 */
        const T step = mul(sent, divide((T)level, (T)LEVELS));
        const int positive = not_below(x[i]);
        codes[i] = LEVELS + (positive ? level : -level);
        if (has) fresh[begin + i] = sub(x[i], positive ? step : negated(step));
    }
    __syncthreads();
    words += bucket * (WIDTH * (BUCKET / 64));
    for (int word = threadIdx.x; 64 * word < count * WIDTH; word += blockDim.x) {
        u64 value = 0;
        for (int i = 64 * word / WIDTH; i < count && i * WIDTH < 64 * (word + 1); ++i) {
            const int at = i * WIDTH - 64 * word;
            value |= at < 0 ? (u64)codes[i] >> -at : (u64)codes[i] << at;
        }
        words[word] = value;
    }
}
"""
_MASK = 2**64 - 1


class QSGDEncoder(DeviceEncoder):
    """`QSGD`: one kernel, which reads and writes each element once."""

    def __init__(
        self, xp: Any, codec: QSGD, layout: Layout, begin: int, end: int, seed: Sequence[int]
    ) -> None:
        self._buckets, self._norms, length = codec.sections(layout, begin, end)
        constants = {"BUCKET": BUCKET, **codec.constants(layout.dtype)}
        del constants["COUNT"]  # which is that of levels, as a T
        code = source(layout.dtype, constants, _BODIES)
        super().__init__(xp, layout, begin, end, length, int(codec.error_feedback), code)
        self._key, self._stride = key_of(seed)
        self._pushes = 0

    def settle(self, kept: bool) -> None:
        super().settle(kept)
        self._pushes += 1

    def _queue(self, grad: int, out: int, verdict: int, feedback: bool) -> int:
        states = self._states() if feedback else [0, 0]
        key = np.uint64((self._key + self._pushes * self._stride) & _MASK)
        numbers = np.int32(feedback), key, out, out + self._norms, verdict, np.int64(self._size)
        self._launch("quantise", self._buckets, grad, *states, *numbers)
        return self.bytes_max
