"""Two bytes an element on a GPU; see `psframe.codecs.halves`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psframe.codecs.cuda.base import DeviceEncoder, blocks_for, source
from psframe.codecs.halves import BFloat16, Float16
from psframe.layout import Layout

__all__ = ["HalfEncoder"]

_BODIES = """\
/* As `_narrow` in psframe.codecs.halves: what is below the least normal number is rounded by the
   sum with MAGIC, what is above by arithmetic on the bits. */
KERNEL void narrow_all(const T *grad, const T *old, T *fresh, int has, u16 *out, int *verdict,
                       i64 size) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) {
        const T g = grad[i], x = has ? add(g, old[i]) : g, magic = from_bits(MAGIC_BITS);
        const B a = magnitude(x), top = a < TOP ? a : TOP;
        const B rounded = top + HALF + ((top >> SHIFT) & 1);
        const T below = add(from_bits(a), magic);
        B code = a >= NORMAL ? (rounded >> SHIFT) - REBIAS_NARROW : bits(below) - MAGIC_BITS;
        code = a < INF ? code : a == INF ? INFINITE : NOT_A_NUMBER;
        out[i] = (u16)(code | (bits(x) & SIGN) >> SIGN_SHIFT);
        judge(g, x, verdict);
        if (has) {
            const T near = a >= LEAST ? from_bits(rounded & KEPT) : sub(below, magic);
            const T lacks = sub(from_bits(a), near);
            fresh[i] = a && bits(x) & SIGN ? negated(lacks) : lacks;
        }
    }
}
"""
_USED = ("SHIFT", "HALF", "KEPT", "REBIAS_NARROW", "TOP", "NORMAL", "INFINITE")


class HalfEncoder(DeviceEncoder):
    """`Float16` and `BFloat16`: one kernel, which reads and writes each element once."""

    def __init__(
        self,
        xp: Any,
        codec: Float16 | BFloat16,
        layout: Layout,
        begin: int,
        end: int,
        seed: Sequence[int],
    ) -> None:
        known: dict[str, Any] = dict(codec._format.constants(layout.dtype))
        bits = type(known["SHIFT"])
        constants = {name: known[name] for name in (*_USED, "SIGN_SHIFT", "MAGIC_BITS")}
        constants["NOT_A_NUMBER"] = known["NAN"]
        constants["LEAST"] = np.array(known["LEAST"], layout.dtype).view(bits)[()]
        code = source(layout.dtype, constants, _BODIES)
        states = int(codec.error_feedback)
        super().__init__(xp, layout, begin, end, 2 * (end - begin), states, code)

    def _queue(self, grad: int, out: int, verdict: int, feedback: bool) -> int:
        states = self._states() if feedback else [0, 0]
        blocks = blocks_for(self._size)
        numbers = np.int32(feedback), out, verdict, np.int64(self._size)
        self._launch("narrow_all", blocks, grad, *states, *numbers)
        return self.bytes_max
