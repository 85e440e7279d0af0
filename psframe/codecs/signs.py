"""One bit an element: its sign, and one magnitude for all elements of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from psframe.codecs.compiling import compile_kernel
from psframe.codecs.shard import (
    BLOCK,
    FeedbackCodec,
    Part,
    ShardDecoder,
    ShardEncoder,
    check_shard,
    parts_of,
)
from psframe.errors import MessageError
from psframe.layout import Array, Layout
from psframe.optim.checks import as_float

__all__ = ["Sections", "Sign"]


@dataclass(frozen=True)
class Sign(FeedbackCodec):
    """Send the sign of each element, and one magnitude for a tensor.

        p = g + residual
        sent = scale sign(p),  scale = mean |p| over the tensor, or a fixed number
        residual = p - sent

    Karimireddy et al., Error Feedback Fixes SignSGD and other Gradient Compression Schemes, 2019
    (algorithm 1 with the scaled sign, by layer). sign(0) is +1, and so is that of -0. Of a tensor
    that a shard's boundary cuts, each part has its own mean.

    Use it where the network is slow: float32 gradients shrink 32 times. Without error feedback
    signs may lead the wrong way. A fixed scale is Bernstein et al.'s signSGD, 2018; with error
    feedback it must be larger than what |g| is in the mean, or the residual grows for ever.

    Memory: the residual, one element a parameter in each sender.

    Args:
        scale: > 0, the magnitude of all elements; None for each tensor's mean.
        error_feedback: whether the sender adds to each gradient what its earlier payloads lacked.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> Sign()
    Sign(error_feedback=True, scale=None)
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None:
            as_float(self, "scale", least=0.0, above=True)

    def encoder(self, layout: Layout, begin: int, end: int, seed: Sequence[int]) -> ShardEncoder:
        self.check_dtype(layout)
        return _Encoder(self, layout, begin, end)

    def decoder(self, layout: Layout, begin: int, end: int) -> ShardDecoder:
        self.check_dtype(layout)
        return _Decoder(self, layout, begin, end)

    def check_dtype(self, layout: Layout) -> None:
        """Raise ValueError if the scale is nothing of use in the parameters' dtype."""
        with np.errstate(over="ignore", under="ignore"):
            given = 1.0 if self.scale is None else float(layout.dtype.type(self.scale))
        if not 0.0 < given < np.inf:
            raise ValueError(
                f"Sign: scale is {self.scale!r}, which is {given} in {layout.dtype}; "
                "choose one of ordinary size"
            )


class Sections:
    """Where in a payload the scales are, and the signs of each part, from a new byte on."""

    def __init__(self, codec: Sign, layout: Layout, begin: int, end: int) -> None:
        check_shard(layout, begin, end)
        self.parts = parts_of(layout, begin, end)
        if codec.scale is not None and self.parts:
            self.parts = [Part(0, end - begin, None)]
        self.scales = len(self.parts) * layout.dtype.itemsize
        self.places: list[tuple[int, int]] = []
        at = self.scales
        for part in self.parts:
            first, at = at, at + -(-(part.end - part.begin) // 8)
            self.places.append((first, at))
        self.bytes = at


class _Encoder(ShardEncoder):
    def __init__(self, codec: Sign, layout: Layout, begin: int, end: int) -> None:
        self._sections = Sections(codec, layout, begin, end)
        super().__init__(layout, begin, end, self._sections.bytes, codec.error_feedback)
        self._scale = codec.scale
        dtype = layout.dtype
        self._means = np.zeros(0)  # of what is being encoded with error feedback
        self._mean = compile_kernel(_mean_magnitude, dtype, "float <- read bool read")
        self._pack = compile_kernel(_pack, dtype, "none <- read bool write number write:u1")

    def _stays_finite(self, grad: Array, residual: Array) -> bool:
        if self._scale is not None:
            return super()._stays_finite(grad, residual)
        self._means = self._means_of(grad, residual)
        return bool(np.isfinite(self._means).all())

    def _write(self, grad: Array, residual: Array | None, out: Array) -> int:
        sections = self._sections
        scales = out[: sections.scales].view(self._dtype)
        if residual is None:  # NaN says that a tensor is not finite
            means = self._means_of(grad, None)
            scales[:] = means if self._scale is None else self._scale
            scales[~np.isfinite(means)] = np.nan
        else:
            scales[:] = self._means if self._scale is None else self._scale
        for i, (begin, end, _) in enumerate(sections.parts):
            r = self._nothing if residual is None else residual[begin:end]
            first, last = sections.places[i]
            self._pack(grad[begin:end], residual is not None, r, scales[i], out[first:last])
        return self.bytes_max

    def _means_of(self, grad: Array, residual: Array | None) -> Array:
        """Average |gradient + residual| of each part; not finite where an element is not."""
        means = np.empty(len(self._sections.parts))
        for i, (begin, end, _) in enumerate(self._sections.parts):
            r = self._nothing if residual is None else residual[begin:end]
            means[i] = self._mean(grad[begin:end], residual is not None, r)
        return means


class _Decoder(ShardDecoder):
    def __init__(self, codec: Sign, layout: Layout, begin: int, end: int) -> None:
        self._sections = Sections(codec, layout, begin, end)
        super().__init__(layout, begin, end, self._sections.bytes)
        self._scale = None if codec.scale is None else layout.dtype.type(codec.scale)
        self._unpack = compile_kernel(_unpack, layout.dtype, "none <- read:u1 number write")

    def _read(self, payload: Array, out: Array) -> None:
        sections = self._sections
        scales = payload[: sections.scales].view(self._dtype)
        for i, (begin, end, _) in enumerate(sections.parts):
            scale = scales[i]
            wrong = not 0 <= scale < np.inf if self._scale is None else scale != self._scale
            if wrong and not np.isnan(scale):
                expected = ">= 0 and finite" if self._scale is None else f"{self._scale}"
                raise MessageError(f"gradient payload: scale {i} is {scale}, expected {expected}")
            first, last = sections.places[i]
            used = (end - begin) % 8
            if used and payload[last - 1] >> used:
                raise MessageError(
                    f"gradient payload: byte {last - 1} has bits behind the last sign"
                )
            self._unpack(payload[first:last], scale, out[begin:end])


def _mean_magnitude(grad: Array, has_residual: bool, residual: Array) -> float:
    """Average |x| in float64, pairwise in each block; not finite if some x is not."""
    y = np.empty(BLOCK, np.float64)
    share = 1.0 / grad.size
    total = 0.0
    for begin in range(0, grad.size, BLOCK):
        g, r = grad[begin:][:BLOCK], residual[begin:][:BLOCK]
        if has_residual:
            for i in range(g.size):
                y[i] = abs(g[i] + r[i]) * share
        else:
            for i in range(g.size):
                y[i] = abs(g[i]) * share
        for i in range(g.size, BLOCK):
            y[i] = 0.0
        half = BLOCK // 2
        while half:
            low, high = y[:half], y[half:][:half]
            for i in range(low.size):
                low[i] += high[i]
            half //= 2
        total += y[0]
    return total


def _pack(grad: Array, has_residual: bool, residual: Array, scale: float, out: Array) -> None:
    """Write the signs, that of element 0 to the lowest bit, and what they lack."""
    x = np.empty(BLOCK, grad.dtype)
    for begin in range(0, grad.size, BLOCK):
        g, r, o = grad[begin:][:BLOCK], residual[begin:][:BLOCK], out[begin // 8 :][: BLOCK // 8]
        if has_residual:
            for i in range(g.size):
                x[i] = g[i] + r[i]
                r[i] = x[i] - (scale if x[i] >= 0 else -scale)
        else:
            for i in range(g.size):
                x[i] = g[i]
        for i in range(g.size, BLOCK):
            x[i] = -1
        for i in range(o.size):
            byte = np.uint8(0)
            for bit in range(8):
                byte |= np.uint8(x[8 * i + bit] >= 0) << np.uint8(bit)
            o[i] = byte


def _unpack(signs: Array, scale: float, out: Array) -> None:
    """Write the magnitude with each sign."""
    whole = out.size // 8
    for i in range(whole):
        o = out[8 * i :][:8]
        byte = signs[i]
        for bit in range(8):
            o[bit] = scale if byte & np.uint8(1 << bit) else -scale
    for i in range(8 * whole, out.size):
        out[i] = scale if signs[whole] & np.uint8(1 << (i - 8 * whole)) else -scale
