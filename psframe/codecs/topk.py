"""The largest elements only, with what deep gradient compression adds to that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psframe.codecs.compiling import compile_kernel
from psframe.codecs.selection import Selection
from psframe.codecs.shard import FeedbackCodec, ShardDecoder, ShardEncoder, check_shard
from psframe.errors import MessageError
from psframe.layout import Array, Layout
from psframe.optim.checks import as_float, as_int
from psframe.packing import GradientSlot

__all__ = ["TopK", "payload_bytes"]

_COUNT_BYTES = 8
_WARMUP_FRACTION = 0.25  # of the first push, as in the paper
_INDEX_MAX = 2**32


@dataclass(frozen=True)
class TopK(FeedbackCodec):
    """Send the elements of largest magnitude only, as indices and values.

        k = max(1, ceil(fraction size)) of the shard
        u = momentum u + min(1, clip_norm / |g|) g,  v = v + u
        sent = the k largest |v|;  where sent, v = 0 and u = 0

    Lin et al., Deep Gradient Compression, 2018: momentum correction, local gradient clipping,
    momentum factor masking, and warm-up: of the first `warmup` pushes the fraction falls
    exponentially from 1/4. Without momentum and clipping, top-k with error feedback (Stich et al.,
    Sparsified SGD with Memory, 2018). Of equal magnitudes those at the lowest indices are sent; v
    is the residual. Deviations: the norm is that of the shard's part of the gradient, and
    `clip_norm` is applied as it is (the paper divides it by the root of the number of workers).

    Use it where the network is slow and models are large: a hundredth or a thousandth of the
    elements is often enough. With momentum the optimizer's own must be 0. Without error feedback,
    what is always small is never learnt, and training may diverge.

    Memory: the residual, one element a parameter in each sender; one more with momentum; and
    candidates, 16 bytes an element sent (float64: 24).

    Args:
        fraction: of the elements to send, in (0, 1].
        momentum: in [0, 1); needs error feedback.
        clip_norm: > 0, the largest norm of a gradient; None for no limit.
        warmup: how many pushes send more; needs a fraction < 1/4.
        error_feedback: whether the sender adds to each gradient what its earlier payloads lacked.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> TopK(0.01, momentum=0.9, warmup=100).count(100, push=0)
    25
    """

    fraction: float
    momentum: float = 0.0
    clip_norm: float | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        as_float(self, "fraction", least=0.0, above=True)
        if self.fraction > 1.0:
            raise ValueError(f"TopK: fraction is {self.fraction!r}, expected a number <= 1")
        as_float(self, "momentum", least=0.0, below=1.0)
        if self.clip_norm is not None:
            as_float(self, "clip_norm", least=0.0, above=True)
        as_int(self, "warmup", least=0)
        if self.momentum and not self.error_feedback:
            raise ValueError(
                f"TopK: momentum is {self.momentum!r} without error feedback, which it corrects; "
                "leave out one of momentum= and error_feedback=False"
            )
        if self.warmup and self.fraction >= _WARMUP_FRACTION:
            raise ValueError(
                f"TopK: warmup is {self.warmup}, but fraction {self.fraction!r} is not below "
                f"{_WARMUP_FRACTION}, where a warm-up begins; leave out warmup="
            )

    def count(self, size: int, push: int) -> int:
        """Count the elements that push number `push`, 0 for the first, sends of `size` ones."""
        fraction = self.fraction
        if push < self.warmup:
            fraction = _WARMUP_FRACTION * (fraction / _WARMUP_FRACTION) ** (push / self.warmup)
        return min(size, max(1, math.ceil(fraction * size)))

    def encoder(self, layout: Layout, begin: int, end: int, seed: Sequence[int]) -> ShardEncoder:
        return _Encoder(self, layout, begin, end)

    def decoder(self, layout: Layout, begin: int, end: int) -> ShardDecoder:
        return _Decoder(self, layout, begin, end)


def _check_size(layout: Layout, begin: int, end: int) -> int:
    check_shard(layout, begin, end)
    if end - begin > _INDEX_MAX:
        raise ValueError(
            f"TopK: the shard [{begin}, {end}) has {end - begin} elements, expected at most "
            f"{_INDEX_MAX}; use more servers"
        )
    return end - begin


def payload_bytes(count: int, dtype: np.dtype[Any]) -> int:
    """Give the length of a payload of so many elements."""
    return _COUNT_BYTES + count * (4 + dtype.itemsize) if count else 0


class _Encoder(ShardEncoder):
    def __init__(self, codec: TopK, layout: Layout, begin: int, end: int) -> None:
        size, dtype = _check_size(layout, begin, end), layout.dtype
        most = codec.count(size, 0)
        super().__init__(layout, begin, end, payload_bytes(most, dtype), codec.error_feedback)
        self._codec = codec
        self._pushes = 0
        self._velocity = np.zeros(size, dtype) if codec.momentum else self._nothing
        self._selection = Selection(size, most, dtype) if size else None
        scalars = "bool number number"
        self._stays = compile_kernel(_stays_finite, dtype, f"bool <- read read read {scalars}")
        self._add = compile_kernel(_add, dtype, f"none <- read write write {scalars}")
        self._take = compile_kernel(_take, dtype, "none <- read read:u4 number write")
        self._clear = compile_kernel(_clear, dtype, "none <- read:u4 write")
        self._scale = 1.0  # of the gradient that is being encoded with error feedback
        self._flat = Layout(("shard",), ((size,),), (0,), (size,), size, dtype)

    def encode(self, grad: Array, out: Array) -> int:
        length = super().encode(grad, out)
        self._pushes += 1
        return length

    def _stays_finite(self, grad: Array, residual: Array) -> bool:
        self._scale = self._clip_scale(grad)
        velocity = self._velocity
        has_velocity, momentum = bool(velocity.size), self._codec.momentum
        return bool(self._stays(grad, velocity, residual, has_velocity, momentum, self._scale))

    def _write(self, grad: Array, residual: Array | None, out: Array) -> int:
        assert self._selection is not None, "an empty shard has no payload"
        count = self._codec.count(self._size, self._pushes)
        velocity = self._velocity
        has_velocity, momentum = bool(velocity.size), self._codec.momentum
        if residual is not None:
            self._add(grad, velocity, residual, has_velocity, momentum, self._scale)
            source, scale = residual, 1.0
        else:
            source, scale = grad, self._clip_scale(grad)  # which changes no order
        chosen = self._selection.select(source, count)
        head, values, indices = _sections(out, count, self._dtype)
        head[0] = count
        indices[:] = chosen
        self._take(source, chosen, scale, values)
        if residual is not None:
            self._clear(chosen, residual)
            if has_velocity:
                self._clear(chosen, velocity)
        return payload_bytes(count, self._dtype)

    def _clip_scale(self, grad: Array) -> float:
        """Give the factor of the gradient; 1 if that is not finite, as its norm is NaN."""
        clip_norm = self._codec.clip_norm
        if clip_norm is None:
            return 1.0
        norm = GradientSlot(self._flat, grad).judge()[1]
        return clip_norm / norm if norm > clip_norm else 1.0


class _Decoder(ShardDecoder):
    def __init__(self, codec: TopK, layout: Layout, begin: int, end: int) -> None:
        size, dtype = _check_size(layout, begin, end), layout.dtype
        # After the warm-up the fewest are sent, before it the most.
        self._least, self._most = codec.count(size, codec.warmup), codec.count(size, 0)
        longest, shortest = (payload_bytes(n, dtype) for n in (self._most, self._least))
        super().__init__(layout, begin, end, longest, shortest)
        self._scatter = compile_kernel(_scatter, dtype, "bool <- read:u4 read write")

    def _read(self, payload: Array, out: Array) -> None:
        count = int(payload[:_COUNT_BYTES].view(np.uint64)[0])
        if not self._least <= count <= self._most:
            raise MessageError(
                f"gradient payload: got {count} elements, expected {self._least} to {self._most}"
            )
        if payload.size != payload_bytes(count, self._dtype):
            raise MessageError(
                f"gradient payload: got {payload.size} bytes of {count} elements, "
                f"expected {payload_bytes(count, self._dtype)}"
            )
        _, values, indices = _sections(payload, count, self._dtype)
        if not self._scatter(indices, values, out):
            raise MessageError(
                "gradient payload: the indices do not ascend, or go beyond the shard's "
                f"{self._size} elements"
            )


def _sections(payload: Array, count: int, dtype: np.dtype[Any]) -> tuple[Array, Array, Array]:
    """Divide a payload into count, values and indices: so each begins where it is aligned."""
    middle = _COUNT_BYTES + count * dtype.itemsize
    return (
        payload[:_COUNT_BYTES].view(np.uint64),
        payload[_COUNT_BYTES:middle].view(dtype),
        payload[middle : middle + 4 * count].view(np.uint32),
    )


def _stays_finite(
    grad: Array,
    velocity: Array,
    residual: Array,
    has_velocity: bool,
    momentum: float,
    scale: float,
) -> bool:
    """Say whether `_add` would leave finite numbers."""
    bad = False
    if has_velocity:
        for i in range(grad.size):
            u = momentum * velocity[i] + scale * grad[i]
            v = residual[i] + u
            z = (v - v) + (u - u)
            bad = bad | (z != z)
    else:
        for i in range(grad.size):
            v = residual[i] + scale * grad[i]
            z = v - v
            bad = bad | (z != z)
    return not bad


def _add(
    grad: Array,
    velocity: Array,
    residual: Array,
    has_velocity: bool,
    momentum: float,
    scale: float,
) -> None:
    """u = momentum u + scale g, v = v + u; without momentum v = v + scale g."""
    if has_velocity:
        for i in range(grad.size):
            u = momentum * velocity[i] + scale * grad[i]
            velocity[i] = u
            residual[i] += u
    else:
        for i in range(grad.size):
            residual[i] += scale * grad[i]


def _take(source: Array, chosen: Array, scale: float, values: Array) -> None:
    for j in range(chosen.size):
        values[j] = source[chosen[j]] * scale


def _clear(chosen: Array, x: Array) -> None:
    for j in range(chosen.size):
        x[chosen[j]] = 0


def _scatter(indices: Array, values: Array, out: Array) -> bool:
    """Write the values among zeros; false, and nothing written, if the indices are wrong."""
    last, wrong = np.int64(-1), False
    for j in range(indices.size):
        i = np.int64(indices[j])
        wrong = wrong | (i <= last)
        last = i
    if wrong or last >= out.size:
        return False
    out[:] = 0
    for j in range(indices.size):
        out[indices[j]] = values[j]
    return True
