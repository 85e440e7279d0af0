"""What the encoders of all codecs on a GPU share: their C, their states, what is not finite.

The bits are those of the CPU's loops, subnormals included. CuPy compiles everything with
`-ftz=true`, so that sums, products, quotients and comparisons of float32 in C would take subnormals
for 0. The functions below do not: they are instructions without that mode, and comparisons of bits.

The bodies of kernels are C as well as CUDA C, so that a C compiler can run them thread by thread.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from psframe.codecs.shard import check_shard
from psframe.layout import Layout

__all__ = ["GRADIENT_BAD", "MACHINE", "THREADS", "DeviceEncoder", "blocks_for", "source"]

THREADS = 256  # in a block; a power of two
# Of grids whose threads take several elements each: what the largest cards run at once, and more.
_BLOCKS_MAX = 4096
# Of a verdict: what was to be coded is not finite; nor is the gradient itself.
GRADIENT_BAD = 2
_OPTIONS = ("--fmad=false",)

# What CUDA has and C has not.
MACHINE = {
    "f": """\
#define KERNEL extern "C" __global__
#define DEVICE __device__ __forceinline__
typedef float T;
typedef unsigned int B;
DEVICE B bits(T x) { return __float_as_uint(x); }
DEVICE T from_bits(B x) { return __uint_as_float(x); }
DEVICE T add(T a, T b) { T c; asm("add.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b)); return c; }
DEVICE T sub(T a, T b) { T c; asm("sub.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b)); return c; }
DEVICE T mul(T a, T b) { T c; asm("mul.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b)); return c; }
DEVICE T divide(T a, T b)
{ T c; asm("div.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b)); return c; }
DEVICE double widen(T x) { double y; asm("cvt.f64.f32 %0, %1;" : "=d"(y) : "f"(x)); return y; }
DEVICE T narrow(double x) { T y; asm("cvt.rn.f32.f64 %0, %1;" : "=f"(y) : "d"(x)); return y; }
""",
    "d": """\
#define KERNEL extern "C" __global__
#define DEVICE __device__ __forceinline__
typedef double T;
typedef unsigned long long B;
DEVICE B bits(T x) { return (B)__double_as_longlong(x); }
DEVICE T from_bits(B x) { return __longlong_as_double((long long)x); }
DEVICE T add(T a, T b) { return a + b; }
DEVICE T sub(T a, T b) { return a - b; }
DEVICE T mul(T a, T b) { return a * b; }
DEVICE T divide(T a, T b) { return a / b; }
DEVICE double widen(T x) { return x; }
DEVICE T narrow(double x) { return x; }
""",
}

_BASE = """\
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define SIGN ((B)1 << (8 * sizeof(T) - 1))
#define INF ((B)(sizeof(T) == 4 ? 0x7f800000ull : 0x7ff0000000000000ull))
#define QUIET_NAN ((B)(sizeof(T) == 4 ? 0x7fc00000ull : 0x7ff8000000000000ull))

DEVICE B magnitude(T x) { return bits(x) & ~SIGN; }
DEVICE int is_finite(T x) { return magnitude(x) < INF; }
/* x >= 0: so is -0, and NaN is not. */
DEVICE int not_below(T x) { return bits(x) <= INF || bits(x) == SIGN; }
DEVICE T negated(T x) { return from_bits(bits(x) ^ SIGN); }

/* Note that x, which is to be coded, is not finite, and whether that is the gradient's fault. */
DEVICE void judge(T g, T x, int *verdict) {
    if (!is_finite(x)) atomicOr(verdict, is_finite(g) ? 1 : 3);
}

"""


def source(dtype: np.dtype[Any], constants: Mapping[str, Any], bodies: str) -> str:
    """Write the kernels of a codec for float32 or float64."""
    lines = [f"#define {name} {_literal(value)}\n" for name, value in constants.items()]
    return MACHINE[dtype.char] + _BASE + "".join(lines) + "\n" + bodies


def _literal(value: Any) -> str:
    if isinstance(value, (int, np.signedinteger)):
        return str(int(value))
    if isinstance(value, np.unsignedinteger):
        return f"{int(value)}u" + "ll" * (value.itemsize == 8)
    return float(value).hex()  # C has the same notation; a double


def blocks_for(size: int) -> int:
    """Choose how many blocks go over `size` elements, each thread from one to a few."""
    return max(1, min(_BLOCKS_MAX, -(-size // THREADS)))


@functools.cache
def _functions(xp: Any, code: str) -> _Functions:
    return _Functions(xp, code)


class _Functions(dict[str, Callable[..., None]]):
    """The kernels of a source by name; NVRTC compiles them once, at the first use."""

    def __init__(self, xp: Any, code: str) -> None:
        super().__init__()
        self._module = xp.RawModule(code=code, options=_OPTIONS)

    def __missing__(self, name: str) -> Callable[..., None]:
        function: Callable[..., None] = self._module.get_function(name)
        self[name] = function
        return function


class DeviceEncoder(ABC):
    """The state of one sender for one shard on a GPU, as `psframe.codecs.Encoder` on the CPU.

    All work is queued on the current stream. What a gradient leaves behind is written beside what
    it has found, so that each element is read and written once: whether it is kept is said by
    `settle`, when the verdict has been read. So each state takes two arrays.

    Args:
        xp: cupy, whose current device it is to be on.
        layout, begin, end: the parameters, and the shard.
        bytes_max: the longest payload.
        states: how many arrays of the shard it keeps from push to push.
        code: of its kernels.

    Attributes:
        bytes_max: as given.
    """

    def __init__(
        self, xp: Any, layout: Layout, begin: int, end: int, bytes_max: int, states: int, code: str
    ) -> None:
        check_shard(layout, begin, end)
        self.bytes_max = bytes_max
        self._size, self._dtype = end - begin, layout.dtype
        self._kernels = _functions(xp, code)
        self._old, self._new = (
            [xp.zeros(self._size, self._dtype) for _ in range(states)] for _ in range(2)
        )

    @property
    def residual(self) -> Any:
        """What payloads have lacked so far; None without error feedback. Only to be read."""
        return self._old[0] if self._old else None

    def encode(self, grad: int, out: int, verdict: int, *, plain: bool = False) -> int:
        """Queue the coding of one gradient.

        Args:
            grad: address of the shard's part of the gradient, of the layout's dtype; only read.
            out: address of `bytes_max` bytes, a multiple of 8.
            verdict: address of an int32, 0 at first; 1 is set in it if what is to be coded is not
                finite, and `GRADIENT_BAD` if the gradient is not.
            plain: whether to code the gradient without the state, which is to stay as it is.

        Returns:
            How many bytes the payload has.
        """
        if not self._size:
            return 0
        return self._queue(grad, out, verdict, bool(self._old) and not plain)

    def settle(self, kept: bool) -> None:
        """Go on to the next push, with what this one has left behind or without."""
        if kept:
            self._old, self._new = self._new, self._old

    @abstractmethod
    def _queue(self, grad: int, out: int, verdict: int, feedback: bool) -> int:
        """Queue the coding of a shard that has elements."""

    def _launch(self, name: str, blocks: int, *arguments: Any) -> None:
        self._kernels[name]((blocks,), (THREADS,), arguments)

    def _states(self) -> list[int]:
        """Give the addresses of the old states and the new ones, or 0 for what is not kept."""
        return [int(array.data.ptr) for array in (*self._old, *self._new)]
