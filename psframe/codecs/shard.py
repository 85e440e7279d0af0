"""What the encoders and decoders of all codecs share: the shard, the checks, error feedback."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from psframe.codecs.compiling import compile_kernel
from psframe.errors import MessageError
from psframe.layout import Array, Layout

__all__ = [
    "BLOCK",
    "FeedbackCodec",
    "Part",
    "ShardDecoder",
    "ShardEncoder",
    "check_shard",
    "is_finite",
    "parts_of",
]

# Elements that a loop takes at a time: 8 KiB of float64 and what is computed of them stay in the
# first cache.
BLOCK = 1024
_ALIGNMENT = 8  # of a payload in memory, in bytes


class Part(NamedTuple):
    """What of one tensor lies in a shard: [begin, end) there; its shape if that is all of it."""

    begin: int
    end: int
    shape: tuple[int, ...] | None


def check_shard(layout: Layout, begin: int, end: int) -> None:
    """Raise ValueError unless [begin, end) is a range of the flat vector."""
    if not 0 <= begin <= end <= layout.size:
        raise ValueError(
            f"codec: got the shard [{begin}, {end}), expected it within [0, {layout.size})"
        )


def parts_of(layout: Layout, begin: int, end: int) -> list[Part]:
    """List the tensors, or parts of them, that a shard consists of; those without elements not."""
    parts = []
    for shape, offset, size in zip(layout.shapes, layout.offsets, layout.sizes, strict=True):
        b, e = max(offset, begin), min(offset + size, end)
        if b < e:
            parts.append(Part(b - begin, e - begin, shape if e - b == size else None))
    return parts


@dataclass(frozen=True, kw_only=True)
class FeedbackCodec:
    """What all codecs take.

    Args:
        error_feedback: whether the sender adds to each gradient what its earlier payloads lacked.

    Raises:
        TypeError: it is neither True nor False.
    """

    error_feedback: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.error_feedback, bool):
            raise TypeError(
                f"{type(self).__name__}: error_feedback is {self.error_feedback!r}, "
                "expected True or False"
            )


class ShardEncoder(ABC):
    """Keeps the residual of one sender, and keeps it finite.

    Args:
        layout, begin, end: the parameters, and the shard.
        bytes_max: the longest payload.
        error_feedback: whether to keep a residual.
    """

    def __init__(
        self, layout: Layout, begin: int, end: int, bytes_max: int, error_feedback: bool
    ) -> None:
        check_shard(layout, begin, end)
        self.bytes_max = bytes_max
        self._size, self._dtype = end - begin, layout.dtype
        self._residual = np.zeros(self._size, self._dtype) if error_feedback else None
        self._nothing = np.empty(0, self._dtype)  # in place of a residual

    @property
    def residual(self) -> Array | None:
        return self._residual

    def encode(self, grad: Array, out: Array) -> int:
        _check_dense("grad", grad, self._size, self._dtype)
        _check_bytes("out", out)
        if out.size < self.bytes_max or out.ctypes.data % _ALIGNMENT:
            raise ValueError(
                f"out: got {out.size} bytes at {out.ctypes.data:#x}, expected at least "
                f"{self.bytes_max} at a multiple of {_ALIGNMENT}"
            )
        if not self._size:
            return 0
        residual = self._residual
        if residual is None or self._stays_finite(grad, residual):
            return self._write(grad, residual, out)
        if is_finite(grad):  # what has become infinite is its sum with the residual
            grad = np.full_like(grad, np.nan)
        return self._write(grad, None, out)

    def _stays_finite(self, grad: Array, residual: Array) -> bool:
        """Say whether what is to be encoded with error feedback is finite."""
        kernel = compile_kernel(_sum_is_finite, self._dtype, "bool <- read read")
        return bool(kernel(grad, residual))

    @abstractmethod
    def _write(self, grad: Array, residual: Array | None, out: Array) -> int:
        """Encode gradient + residual, and put what the payload lacks into the residual.

        Without a residual the gradient may hold NaN and infinities; what it decodes to then does,
        too.
        """


class ShardDecoder(ABC):
    """Checks what every payload must be.

    Args:
        layout, begin, end: the parameters, and the shard.
        bytes_max: the longest payload.
        bytes_min: the shortest one; None if all are equally long.
    """

    def __init__(
        self, layout: Layout, begin: int, end: int, bytes_max: int, bytes_min: int | None = None
    ) -> None:
        check_shard(layout, begin, end)
        self.bytes_max = bytes_max
        self._bytes_min = bytes_max if bytes_min is None else bytes_min
        self._size, self._dtype = end - begin, layout.dtype

    def decode(self, payload: Array, out: Array) -> None:
        _check_bytes("payload", payload)
        _check_dense("out", out, self._size, self._dtype)
        if not self._bytes_min <= payload.size <= self.bytes_max:
            expected = f"{self._bytes_min} to " * (self._bytes_min < self.bytes_max)
            raise MessageError(
                f"gradient payload: got {payload.size} bytes, expected {expected}{self.bytes_max}"
            )
        if payload.ctypes.data % _ALIGNMENT:
            payload = _aligned(payload)
        if self._size:
            self._read(payload, out)

    @abstractmethod
    def _read(self, payload: Array, out: Array) -> None:
        """Decode a payload of an allowed length."""


def is_finite(grad: Array) -> bool:
    """Say whether all of a contiguous vector is finite."""
    return bool(compile_kernel(_all_is_finite, grad.dtype, "bool <- read")(grad))


def _aligned(payload: Array) -> Array:
    copy = np.empty(-(-payload.size // 8), np.uint64).view(np.uint8)[: payload.size]
    copy[:] = payload
    return copy


def _check_dense(name: str, array: Array, size: int, dtype: np.dtype[Any]) -> None:
    if array.shape != (size,) or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(
            f"{name}: got shape {array.shape} of {array.dtype}, "
            f"expected a contiguous array of shape ({size},) of {dtype}"
        )


def _check_bytes(name: str, array: Array) -> None:
    if array.ndim != 1 or array.dtype != np.uint8 or not array.flags.c_contiguous:
        raise ValueError(
            f"{name}: got {array.ndim} dimensions of {array.dtype}, "
            "expected a contiguous vector of uint8"
        )


def _sum_is_finite(grad: Array, residual: Array) -> bool:
    bad = False
    for i in range(grad.size):
        x = grad[i] + residual[i]
        z = x - x
        bad = bad | (z != z)
    return not bad


def _all_is_finite(grad: Array) -> bool:
    bad = False
    for i in range(grad.size):
        z = grad[i] - grad[i]
        bad = bad | (z != z)
    return not bad
