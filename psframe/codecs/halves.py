"""Two bytes an element: float16 and bfloat16, rounded and widened by arithmetic on the bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from psframe.codecs.compiling import Bits, Number, compile_kernel
from psframe.codecs.shard import BLOCK, FeedbackCodec, ShardDecoder, ShardEncoder
from psframe.layout import Array, Layout

__all__ = ["BFloat16", "Float16"]


class _Format(NamedTuple):
    """A format of two bytes: a sign, `exponent` bits and `mantissa` bits, as IEEE 754 has them."""

    exponent: int
    mantissa: int

    def constants(self, dtype: np.dtype[Any]) -> tuple[tuple[str, Any], ...]:
        """Give what the loops below need to know of it and of the wider dtype."""
        wide = _Format(8, 23) if dtype.itemsize == 4 else _Format(11, 52)
        bits: Any = np.uint32 if dtype.itemsize == 4 else np.uint64
        infinite = ((1 << self.exponent) - 1) << self.mantissa
        shift = wide.mantissa - self.mantissa
        rebias = (wide._bias - self._bias) << wide.mantissa
        # Added to a number below the least normal one, it leaves the sum no bits but those that
        # the subnormals have, rounded to nearest even by the addition itself.
        magic = 2.0 ** (1 - self._bias - self.mantissa + wide.mantissa)
        words = {
            "SHIFT": shift,
            "HALF": (1 << (shift - 1)) - 1,
            "KEPT": ((1 << 8 * dtype.itemsize) - 1) ^ ((1 << shift) - 1),
            "REBIAS": rebias,
            "REBIAS_NARROW": rebias >> shift,
            "TOP": ((infinite - 1) << shift) + rebias,
            "NORMAL": (1 << wide.mantissa) + rebias,
            # With the exponents of the wider format a subnormal code needs no `STEP`.
            "NORMAL_NARROW": 1 << self.mantissa if rebias else 0,
            "INFINITE": infinite,
            "NAN": infinite | 1 << (self.mantissa - 1),
            "WIDE_INFINITE": ((1 << wide.exponent) - 1) << wide.mantissa,
            "WIDE_SIGN": 1 << (8 * dtype.itemsize - 1),
            "SIGN_SHIFT": 8 * dtype.itemsize - 16,
            "MAGIC_BITS": int(np.array(magic, dtype).view(bits)),
        }
        numbers = {
            "MAGIC": magic,
            "LEAST": 2.0 ** (1 - self._bias),
            # (Not where it is not needed, as a product that is subnormal takes 100 times as long.)
            "STEP": 2.0 ** (1 - self._bias - self.mantissa) if rebias else 1.0,
        }
        return (
            *((name, bits(value)) for name, value in words.items()),
            *((name, dtype.type(value)) for name, value in numbers.items()),
        )

    @property
    def _bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1


@dataclass(frozen=True)
class _Half(FeedbackCodec):
    """What both formats have in common."""

    _format: ClassVar[_Format]

    def encoder(self, layout: Layout, begin: int, end: int, seed: Sequence[int]) -> ShardEncoder:
        return _Encoder(self, layout, begin, end)

    def decoder(self, layout: Layout, begin: int, end: int) -> ShardDecoder:
        return _Decoder(self, layout, begin, end)


@dataclass(frozen=True)
class Float16(_Half):
    """Send each element as an IEEE 754 half-precision number: 11 significant bits, to 65504.

    Rounded to nearest, ties to even. A finite element beyond the range becomes +-65504, and with
    error feedback the rest of it is in the residual; NaN and infinities stay what they are. (Mixed
    precision training loses what is below 6e-8: Micikevicius et al. 2018. Error feedback does not.)

    Use it when half the bytes are enough and gradients are of ordinary size: 8 times as exact as
    BFloat16.

    Memory: the residual, one element a parameter in each sender.

    Args:
        error_feedback: whether the sender adds to each gradient what its earlier payloads lacked.

    Raises:
        TypeError: it is neither True nor False.

    >>> Float16()
    Float16(error_feedback=True)
    """

    _format: ClassVar[_Format] = _Format(5, 10)


@dataclass(frozen=True)
class BFloat16(_Half):
    """Send each element as the upper half of a float32: 8 significant bits, all of its range.

    Rounded to nearest, ties to even; a finite element never becomes infinite, but the largest
    finite number, 3.39e38. NaN and infinities stay what they are.

    Use it when half the bytes are enough and the size of gradients is unknown, or may change by
    orders of magnitude.

    Memory: the residual, one element a parameter in each sender.

    Args:
        error_feedback: whether the sender adds to each gradient what its earlier payloads lacked.

    Raises:
        TypeError: it is neither True nor False.

    >>> BFloat16(error_feedback=False)
    BFloat16(error_feedback=False)
    """

    _format: ClassVar[_Format] = _Format(8, 7)


class _Encoder(ShardEncoder):
    def __init__(self, codec: _Half, layout: Layout, begin: int, end: int) -> None:
        super().__init__(layout, begin, end, 2 * (end - begin), codec.error_feedback)
        self._narrow = compile_kernel(
            _narrow,
            layout.dtype,
            "none <- read bool write write:u2",
            codec._format.constants(layout.dtype),
        )

    def _write(self, grad: Array, residual: Array | None, out: Array) -> int:
        words = out[: self.bytes_max].view(np.uint16)
        has = residual is not None
        self._narrow(grad, has, residual if has else self._nothing, words)
        return self.bytes_max


class _Decoder(ShardDecoder):
    def __init__(self, codec: _Half, layout: Layout, begin: int, end: int) -> None:
        super().__init__(layout, begin, end, 2 * (end - begin))
        self._widen = compile_kernel(
            _widen, layout.dtype, "none <- read:u2 write", codec._format.constants(layout.dtype)
        )

    def _read(self, payload: Array, out: Array) -> None:
        self._widen(payload.view(np.uint16), out)


# Bound when a loop is compiled; see `_Format.constants`.
SHIFT = HALF = KEPT = REBIAS = REBIAS_NARROW = TOP = NORMAL = NORMAL_NARROW = Bits(1)
INFINITE = NAN = WIDE_INFINITE = WIDE_SIGN = SIGN_SHIFT = MAGIC_BITS = Bits(1)
MAGIC = LEAST = STEP = 1.0


def _narrow(grad: Array, has_residual: bool, residual: Array, out: Array) -> None:
    """Round to two bytes, a block at a time.

    Every result is wrapped in `Bits`, as numba widens to 64 bits, and half as many fit a vector.
    """
    x, near, below = (
        np.empty(BLOCK, grad.dtype),
        np.empty(BLOCK, grad.dtype),
        np.empty(BLOCK, grad.dtype),
    )
    x_bits, near_bits, below_bits = x.view(Bits), near.view(Bits), below.view(Bits)
    for begin in range(0, grad.size, BLOCK):
        g, o, r = grad[begin:][:BLOCK], out[begin:][:BLOCK], residual[begin:][:BLOCK]
        if has_residual:
            for i in range(g.size):
                x[i] = g[i] + r[i]
        else:
            for i in range(g.size):
                x[i] = g[i]
        for i in range(g.size):
            below[i] = abs(x[i]) + MAGIC
        for i in range(g.size):
            a = Bits(x_bits[i] & Bits(~WIDE_SIGN))
            top = a if a < TOP else TOP
            rounded = Bits(Bits(top + HALF) + Bits(Bits(top >> SHIFT) & Bits(1)))
            near_bits[i] = Bits(rounded & KEPT)
            normal = Bits(Bits(rounded >> SHIFT) - REBIAS_NARROW)
            code = normal if a >= NORMAL else Bits(below_bits[i] - MAGIC_BITS)
            code = code if a < WIDE_INFINITE else (INFINITE if a == WIDE_INFINITE else NAN)
            sign = Bits(Bits(x_bits[i] & WIDE_SIGN) >> SIGN_SHIFT)
            o[i] = np.uint16(Bits(code | sign))
        if has_residual:
            for i in range(g.size):
                a = abs(x[i])
                lacks = a - (near[i] if a >= LEAST else below[i] - MAGIC)
                r[i] = -lacks if x[i] < 0 else lacks


def _widen(codes: Array, out: Array) -> None:
    """Write what the codes stand for; exact."""
    near, below = np.empty(BLOCK, out.dtype), np.empty(BLOCK, out.dtype)
    near_bits = near.view(Bits)
    for begin in range(0, out.size, BLOCK):
        c, o = codes[begin:][:BLOCK], out[begin:][:BLOCK]
        for i in range(c.size):
            code = Bits(c[i] & np.uint16(0x7FFF))
            wide = Bits(Bits(code << SHIFT) + REBIAS)
            near_bits[i] = wide if code < INFINITE else Bits(wide | WIDE_INFINITE)
            below[i] = Number(np.int32(code)) * STEP
        for i in range(c.size):
            a = near[i] if Bits(c[i] & np.uint16(0x7FFF)) >= NORMAL_NARROW else below[i]
            o[i] = -a if c[i] & np.uint16(0x8000) else a
