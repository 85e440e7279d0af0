"""A few levels an element, rounded at random so that the mean is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psframe.codecs.compiling import Number, compile_kernel
from psframe.codecs.shard import FeedbackCodec, ShardDecoder, ShardEncoder, check_shard
from psframe.errors import MessageError
from psframe.layout import Array, Layout
from psframe.optim.checks import as_int

__all__ = ["BUCKET", "QSGD", "key_of"]

# Elements that share a norm, as in the paper's experiments; their levels fill whole words of 8
# bytes, whatever the number of bits.
BUCKET = 512
_LEVELS_MAX = 2**15 - 1  # 16 bits an element; with more, float16 is better
_MASK = 2**64 - 1


@dataclass(frozen=True)
class QSGD(FeedbackCodec):
    """Send each element as one of 2 levels + 1 multiples of a norm, rounded at random.

        sent_i = |x|_2 sign(x_i) l_i / levels,  of a bucket x of 512 elements
        l_i = floor(a) + 1 with probability a - floor(a), else floor(a),  a = levels |x_i| / |x|_2

    Alistarh et al., QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding, 2017.
    It is unbiased: E[sent] = x. Deviations: entries are packed, ceil(log2(2 levels + 1)) bits each,
    in place of Elias codes. And with error feedback, x being gradient + residual, what is sent is
    divided by 1 + w, w = min(d / levels^2, sqrt(d) / levels), the paper's bound of the variance in
    a bucket of d elements: the residual of an unbiased quantiser with w >= 1 grows without bound,
    that of the shrunk one does not (Beznosikov et al., On Biased Compression for Distributed
    Learning, 2020).

    Use it without error feedback where unbiased gradients matter, or where a residual is too much
    memory; 127 levels are one byte an element, and lose little.

    The random numbers are a function of the sender's seed, the number of the push, and the
    element: a hash, so that a probability is exact to 2^-31 (2^-24 in float32).

    Memory: with error feedback the residual, one element a parameter in each sender.

    Args:
        levels: 1 to 32767; 1, 3, 7, 127 and others below a power of 2 fill their bits best.
        error_feedback: whether the sender adds to each gradient what its earlier payloads lacked.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> QSGD(127, error_feedback=False).bits
    8
    """

    levels: int

    def __post_init__(self) -> None:
        super().__post_init__()
        as_int(self, "levels", least=1)
        if self.levels > _LEVELS_MAX:
            raise ValueError(f"QSGD: levels is {self.levels}, expected at most {_LEVELS_MAX}")

    @property
    def bits(self) -> int:
        """How many bits an element takes."""
        return (2 * self.levels).bit_length()

    def encoder(self, layout: Layout, begin: int, end: int, seed: Sequence[int]) -> ShardEncoder:
        return _Encoder(self, layout, begin, end, seed)

    def decoder(self, layout: Layout, begin: int, end: int) -> ShardDecoder:
        return _Decoder(self, layout, begin, end)

    def sections(self, layout: Layout, begin: int, end: int) -> tuple[int, int, int]:
        """Give a payload's buckets, the bytes of their norms, and all bytes."""
        check_shard(layout, begin, end)
        buckets, last = divmod(end - begin, BUCKET)
        words = buckets * self.bits * (BUCKET // 64) + -(-last * self.bits // 64)
        buckets += last > 0
        norms = -(-buckets * layout.dtype.itemsize // 8) * 8
        return buckets, norms, norms + 8 * words

    def constants(self, dtype: np.dtype[Any]) -> dict[str, Any]:
        """Give what the loops need to know of it and of a dtype."""
        return {
            "LEVELS": self.levels,
            "WIDTH": self.bits,
            "COUNT": dtype.type(self.levels),
            # Of 32 random bits, what fits the mantissa and an int32.
            "UNIT": dtype.type(2.0**-24 if dtype.itemsize == 4 else 2.0**-31),
            "UNUSED": np.uint32(8 if dtype.itemsize == 4 else 1),
            "LARGEST": float(np.finfo(dtype).max),
        }

    def _kernel(self, function: Any, dtype: np.dtype[Any], signature: str) -> Any:
        helpers = (_norm, _draw, _round, _pack) if function is _quantise else ()
        constants = tuple(self.constants(dtype).items())
        return compile_kernel(function, dtype, signature, constants, helpers)


class _Encoder(ShardEncoder):
    def __init__(
        self, codec: QSGD, layout: Layout, begin: int, end: int, seed: Sequence[int]
    ) -> None:
        self._buckets, self._norms, length = codec.sections(layout, begin, end)
        super().__init__(layout, begin, end, length, codec.error_feedback)
        self._key, self._stride = key_of(seed)
        self._pushes = 0
        self._quantise = codec._kernel(
            _quantise, layout.dtype, "none <- read bool write u64 write write:u8"
        )

    def encode(self, grad: Array, out: Array) -> int:
        length = super().encode(grad, out)
        self._pushes += 1
        return length

    def _write(self, grad: Array, residual: Array | None, out: Array) -> int:
        norms = out[: self._norms].view(self._dtype)
        norms[self._buckets :] = 0
        words = out[self._norms : self.bytes_max].view(np.uint64)
        has = residual is not None
        key = (self._key + self._pushes * self._stride) & _MASK
        self._quantise(grad, has, residual if has else self._nothing, key, norms, words)
        return self.bytes_max


class _Decoder(ShardDecoder):
    def __init__(self, codec: QSGD, layout: Layout, begin: int, end: int) -> None:
        self._buckets, self._norms, length = codec.sections(layout, begin, end)
        super().__init__(layout, begin, end, length)
        self._codec = codec
        self._restore = codec._kernel(_restore, layout.dtype, "bool <- read read:u8 write")

    def _read(self, payload: Array, out: Array) -> None:
        norms = payload[: self._norms].view(self._dtype)
        used = norms[: self._buckets]
        # NaN is what the encoder says of a bucket that is not finite.
        if np.isinf(used).any() or (used < 0).any():
            raise MessageError("gradient payload: a norm is infinite or below 0")
        if payload[self._buckets * self._dtype.itemsize : self._norms].any():
            raise MessageError("gradient payload: there are bytes behind the last norm")
        if not self._restore(norms, payload[self._norms :].view(np.uint64), out):
            raise MessageError(
                f"gradient payload: an entry is above {2 * self._codec.levels}, or there are bits "
                "behind the last one"
            )


def key_of(seed: Sequence[int]) -> tuple[int, int]:
    """Make a key, and what a push adds to it, from integers >= 0."""
    key, stride = np.random.SeedSequence(list(seed)).generate_state(2, np.uint64).tolist()
    return key, stride | 1


# Bound when a loop is compiled.
LEVELS = WIDTH = 1
COUNT = UNIT = LARGEST = 1.0
UNUSED = np.uint32(0)


def _norm(x: Array, y: Array) -> float:
    """Compute the 2-norm in float64, pairwise; NaN if x is not finite, never above LARGEST.

    It is not below the largest |x|, since a rounded sum of squares is not below its largest term,
    and the root of a rounded square is what was squared.
    """
    for i in range(x.size):
        y[i] = np.float64(x[i]) * np.float64(x[i])
    half = x.size // 2
    while half:
        low, high = y[:half], y[half:][:half]
        for i in range(low.size):
            low[i] += high[i]
        half //= 2
    total = y[0]
    if 1e-280 < total < np.inf:
        return float(min(np.sqrt(total), LARGEST))
    largest, total = 0.0, 0.0  # squares that were lost, or nothing but zeros
    for i in range(x.size):
        a = np.float64(abs(x[i]))
        if not a <= LARGEST:
            return np.nan
        largest = max(largest, a)
    if largest == 0.0:
        return 0.0
    for i in range(x.size):
        total += (x[i] / largest) ** 2
    return float(min(largest * np.sqrt(total), LARGEST))


def _draw(key: int, bucket: int, codes: Array) -> None:
    """Write a random number of 32 bits for each element: two rounds of mixing, each with a key.

    The keys are those of splitmix64, the mixing is Wellons' lowbias32.
    """
    z = np.uint64(key) + np.uint64(bucket) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    low, high = np.uint32(z), np.uint32(z >> np.uint64(32))
    for i in range(codes.size):
        h = np.uint32(np.uint32(np.uint32(i) * np.uint32(0x9E3779B9)) + low)
        h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(16))) * np.uint32(0x7FEB352D))
        h = np.uint32(h + high)
        h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(15))) * np.uint32(0x846CA68B))
        codes[i] = np.uint32(h ^ np.uint32(h >> np.uint32(16)))


def _round(x: Array, norm: float, sent: float, codes: Array) -> None:
    """Round x at random, by the numbers in `codes`, to what takes their place; keep what is lost.

    Args:
        x: the bucket; what it lacks afterwards.
        norm, sent: its norm, and what is sent in place of that.
        codes: random numbers; the entries afterwards.
    """
    divisor = norm if norm > 0 else UNIT
    for i in range(x.size):
        a = abs(x[i]) / divisor * COUNT
        level = np.int32(a)
        chance = a - Number(level)
        level = np.int32(level + (Number(np.int32(codes[i] >> UNUSED)) * UNIT < chance))
        step = sent * (Number(level) / COUNT)
        codes[i] = np.uint32(LEVELS + (level if x[i] >= 0 else -level))
        x[i] -= step if x[i] >= 0 else -step


def _pack(codes: Array, words: Array) -> None:
    """Write WIDTH bits of each code, the first to the lowest bits of the first word."""
    word, fill, at = np.uint64(0), 0, 0
    for i in range(codes.size):
        code = np.uint64(codes[i])
        word |= code << np.uint64(fill)
        fill += WIDTH
        if fill >= 64:
            words[at] = word
            at += 1
            fill -= 64
            word = code >> np.uint64(WIDTH - fill)
    if fill:
        words[at] = word


def _quantise(
    grad: Array, has_residual: bool, residual: Array, key: int, norms: Array, words: Array
) -> None:
    x, y = np.zeros(BUCKET, grad.dtype), np.empty(BUCKET, np.float64)
    codes = np.empty(BUCKET, np.uint32)
    for bucket in range(-(-grad.size // BUCKET)):
        g, r = grad[bucket * BUCKET :][:BUCKET], residual[bucket * BUCKET :][:BUCKET]
        if has_residual:
            for i in range(g.size):
                x[i] = g[i] + r[i]
        else:
            for i in range(g.size):
                x[i] = g[i]
        x[g.size :] = 0
        norm = Number(_norm(x, y))
        sent = norm
        if has_residual:
            excess = min(g.size / LEVELS**2, np.sqrt(g.size) / LEVELS)
            sent = Number(norm / (1.0 + excess))
        norms[bucket] = sent
        _draw(key, bucket, codes)
        if norm == norm:
            _round(x, norm, sent, codes)
        else:
            codes[:] = LEVELS
        _pack(codes[: g.size], words[bucket * WIDTH * (BUCKET // 64) :])
        if has_residual:
            for i in range(g.size):
                r[i] = x[i]


def _restore(norms: Array, words: Array, out: Array) -> bool:
    """Write what the entries stand for; false if one is none, or something is behind the last."""
    wrong = False
    for bucket in range(-(-out.size // BUCKET)):
        o = out[bucket * BUCKET :][:BUCKET]
        mine = words[bucket * WIDTH * (BUCKET // 64) :]
        norm = norms[bucket]
        word, left, at = np.uint64(0), 0, 0
        for i in range(o.size):
            code = word
            if left < WIDTH:
                word = mine[at]
                at += 1
                code |= word << np.uint64(left)
                word >>= np.uint64(WIDTH - left)
                left += 64
            else:
                word >>= np.uint64(WIDTH)
            left -= WIDTH
            level = np.int32(code & np.uint64((1 << WIDTH) - 1))
            wrong = wrong | (level > 2 * LEVELS)
            o[i] = norm * (Number(level - np.int32(LEVELS)) / COUNT)
        wrong = wrong | (word != 0)
    return not wrong
