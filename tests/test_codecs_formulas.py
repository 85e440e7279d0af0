"""Each codec against its paper, written down in plain NumPy and Python; bit by bit where it can."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from test_codecs import Pair, by_dtype, gradients, layout_of

from psframe.codecs import QSGD, BFloat16, Float16, PowerSGD, Sign, TopK
from psframe.codecs.selection import Selection

Vector = Any


def layout_of_size(size: int, dtype: Any) -> Any:
    return layout_of(dtype, w=(size,))


# ---- two bytes an element ----


def finite_codes(dtype_bits: int, widen: Any) -> tuple[Vector, Vector]:
    """The finite numbers >= 0 of a format, ascending, and their codes."""
    codes = np.arange(dtype_bits, dtype=np.uint16)
    return widen(codes).astype(np.float64), codes


FORMATS = {
    "float16": (Float16, *finite_codes(0x7C00, lambda c: c.view(np.float16))),
    "bfloat16": (
        BFloat16,
        *finite_codes(0x7F80, lambda c: (c.astype(np.uint32) << 16).view(np.float32)),
    ),
}
by_format = pytest.mark.parametrize("kind", FORMATS)


def nearest(x: Vector, numbers: Vector, codes: Vector) -> Vector:
    """The codes of the nearest numbers; of two as near the even code; never above the last."""
    high = np.clip(np.searchsorted(numbers, np.abs(x)), 1, numbers.size - 1)
    # Halves and doubles are exact in float64 for all that matters here, and so are differences.
    below, above = np.abs(x) - numbers[high - 1], numbers[high] - np.abs(x)
    up = (above < below) | ((above == below) & (codes[high] % 2 == 0))
    return np.where(up, codes[high], codes[high - 1]) | np.where(np.signbit(x), 0x8000, 0)


@by_format
@by_dtype
def test_halves_round_to_nearest_even(kind, dtype):
    make, numbers, codes = FORMATS[kind]
    rng = np.random.default_rng(1)
    middles = (numbers[1:] + numbers[:-1]) / 2
    magnitudes = rng.standard_normal(20_000) * 2.0 ** rng.integers(-140, 127, 20_000)
    with np.errstate(under="ignore", over="ignore"):
        x = np.concatenate([numbers, middles, magnitudes, [0.0, numbers[-1] * 1.001, 3e38]])
        x = x.astype(dtype)
        x = np.concatenate([x, np.nextafter(x, dtype(np.inf)), np.nextafter(x, dtype(0))])
    x = np.concatenate([x, -x])
    x = x[np.isfinite(x)]
    pair = Pair(make(error_feedback=False), layout_of_size(x.size, dtype))
    payload = pair.encode(x)
    want = nearest(x.astype(np.float64), numbers, codes)
    assert (payload.view(np.uint16) == want).all()


def test_a_double_is_rounded_once():
    """By way of float32 it would be a tie, and go to the even neighbour."""
    x = 1.0 + 2.0**-11 + 2.0**-40
    pair = Pair(Float16(error_feedback=False), layout_of_size(1, np.float64))
    assert pair.send([x])[0] == 1.0 + 2.0**-10


@by_format
@by_dtype
def test_every_code_is_widened_exactly(kind, dtype):
    make, numbers, codes = FORMATS[kind]
    pair = Pair(make(), layout_of_size(2**16, dtype))
    out = pair.decode(np.arange(2**16, dtype=np.uint16).view(np.uint8))
    finite = codes.size
    assert (out[:finite] == numbers).all()
    assert out[finite] == np.inf
    assert np.isnan(out[finite + 1 : 2**15]).all()
    assert (np.signbit(out) == (np.arange(2**16) >= 2**15)).all()
    assert np.array_equal(out[2**15 :], -out[: 2**15], equal_nan=True)


@by_format
@by_dtype
def test_halves_saturate_and_keep_what_is_not_finite(kind, dtype):
    make, numbers, _ = FORMATS[kind]
    largest = numbers[-1]
    x = np.array([3.4e38, -3.4e38, np.nan, np.inf, -np.inf, 1.0], dtype)
    for feedback in (False, True):
        pair = Pair(make(error_feedback=feedback), layout_of_size(6, dtype))
        sent = pair.send(x)
        assert np.array_equal(sent, [largest, -largest, np.nan, np.inf, -np.inf, 1], equal_nan=True)


def test_what_saturation_cuts_off_comes_later():
    pair = Pair(Float16(), layout_of_size(2, np.float32))
    assert pair.send([150_000.0, -70_000.0]).tolist() == [65504.0, -65504.0]
    assert pair.encoder.residual.tolist() == [150_000.0 - 65504, -70_000.0 + 65504]
    assert pair.send([0.0, 0.0]).tolist() == [65504.0, -4496.0]
    assert pair.send([0.0, 0.0]).tolist() == [18992.0, 0.0]
    assert pair.encoder.residual.tolist() == [0.0, 0.0]


# ---- the largest elements ----


def largest_indices(x: Vector, count: int) -> Vector:
    order = np.lexsort((np.arange(x.size), -np.abs(x.astype(np.float64))))
    return np.sort(order[:count])


def parse_top(payload: Vector, dtype: Any) -> tuple[Vector, Vector]:
    count = int(payload[:8].view(np.uint64)[0])
    values = payload[8 : 8 + count * np.dtype(dtype).itemsize].view(dtype)
    indices = payload[8 + values.nbytes :].view(np.uint32)
    assert indices.size == count
    return indices, values


INPUTS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "equal": lambda rng, n: np.ones(n),
    "zero": lambda rng, n: np.zeros(n),
    "few values": lambda rng, n: rng.integers(-3, 4, n),
    "ascending": lambda rng, n: np.sort(rng.standard_normal(n) ** 2),
    "descending": lambda rng, n: -np.sort(-(rng.standard_normal(n) ** 2)),
    "subnormal": lambda rng, n: rng.integers(0, 50, n) * 1e-44,
    # A sample with this stride sees only the large ones, or none of them.
    "periodic": lambda rng, n: np.where(np.arange(n) % (n // 16384 | 1) == 0, 1.0, 0.1),
    "hidden": lambda rng, n: np.where(np.arange(n) % (n // 16384 | 1) == 1, 1.0, 0.1),
}


@by_dtype
@pytest.mark.parametrize("kind", INPUTS)
def test_top_k_selects_exactly(kind, dtype):
    rng = np.random.default_rng(2)
    for size in (1, 2, 1023, 1025, 40_000, 100_000):
        x = INPUTS[kind](rng, size).astype(dtype)
        for count in {1, -(-size // 100), -(-size // 3), size}:
            selection = Selection(size, count, np.dtype(dtype))
            for less in {count, max(1, count // 2)}:
                chosen = selection.select(x, less)
                assert (chosen == largest_indices(x, less)).all(), (size, less)


def test_top_k_puts_what_is_not_finite_first():
    x = np.array([1e30, np.nan, 3.0, -np.inf, 4.0], np.float32)
    assert Selection(5, 2, x.dtype).select(x, 2).tolist() == [1, 3]


@by_dtype
def test_deep_gradient_compression_by_the_paper(dtype):
    """Momentum correction, clipping, factor masking and warm-up, in float64."""
    size, pushes = 2000, 12
    codec = TopK(0.01, momentum=0.9, clip_norm=20.0, warmup=4)
    pair = Pair(codec, layout_of_size(size, dtype))
    u, v = np.zeros(size), np.zeros(size)
    for step, grad in zip(range(pushes), gradients(size, dtype), strict=False):
        density = [0.25, 0.25 * 0.04**0.25, 0.25 * 0.04**0.5, 0.25 * 0.04**0.75]
        k = math.ceil(size * (density[step] if step < 4 else 0.01))
        u = 0.9 * u + min(1.0, 20.0 / np.linalg.norm(grad)) * grad
        v = v + u
        indices, values = parse_top(pair.encode(grad), dtype)
        assert indices.size == k == codec.count(size, step)
        assert (indices == largest_indices(v, k)).all()
        assert np.allclose(values, v[indices], rtol=1e-5)
        u[indices] = v[indices] = 0.0
        assert np.allclose(pair.encoder.residual, v, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(grad) > 20.0  # or nothing was clipped


@pytest.mark.parametrize(
    ("fraction", "size", "count"),
    [(0.07, 200, 15), (0.01, 10, 1), (0.011, 1000, 11), (1.0, 5, 5), (0.5, 5, 3), (1e-9, 0, 0)],
)
def test_top_k_counts(fraction, size, count):
    assert TopK(fraction).count(size, 0) == count


# ---- signs ----


@by_dtype
def test_scaled_signs_by_the_paper(dtype):
    layout = layout_of(dtype, a=(30, 7), b=(5,), c=(50,))
    begin, end = 16, 250  # cuts the first and the last tensor
    parts = [(0, 194), (194, 199), (199, 234)]
    pair = Pair(Sign(), layout, begin, end)
    residual = np.zeros(end - begin)
    for grad, _ in zip(gradients(end - begin, dtype), range(5), strict=False):
        p = grad + residual
        payload = pair.encode(grad)
        scales = payload[: 3 * grad.itemsize].view(dtype)
        at = 3 * grad.itemsize
        for (b, e), scale in zip(parts, scales, strict=True):
            assert scale == pytest.approx(np.abs(p[b:e]).mean(), rel=1e-5)
            bits = np.packbits(p[b:e] >= 0, bitorder="little")
            assert (payload[at : at + bits.size] == bits).all()
            at += bits.size
            sent = np.where(p[b:e] >= 0, scale, -scale)
            assert (pair.decode(payload)[b:e] == sent).all()
        assert at == payload.size
        residual = p - pair.decode(payload)
        assert np.allclose(pair.encoder.residual, residual, atol=1e-5)
        residual = pair.encoder.residual.astype(np.float64)


@by_dtype
def test_the_sign_of_zero_is_plus(dtype):
    pair = Pair(Sign(0.25, error_feedback=False), layout_of_size(9, dtype))
    sent = pair.send([0.0, -0.0, 1e-30, -1e-30, 5, -5, 0, 0, -1])
    assert sent.tolist() == [0.25, 0.25, 0.25, -0.25, 0.25, -0.25, 0.25, 0.25, -0.25]


# ---- quantisation ----


def parse_qsgd(payload: Vector, size: int, levels: int, dtype: Any) -> tuple[Vector, Vector]:
    """Norms of the buckets, and levels of the elements, by Python's integers."""
    buckets, bits = -(-size // 512), math.ceil(math.log2(2 * levels + 1))
    norms = payload[: buckets * np.dtype(dtype).itemsize].view(dtype)
    data = int.from_bytes(payload[-(-norms.nbytes // 8) * 8 :].tobytes(), "little")
    mask = (1 << bits) - 1
    found = np.array([(data >> i * bits & mask) - levels for i in range(size)])
    assert data >> size * bits == 0
    return norms, found


@by_dtype
@pytest.mark.parametrize(
    "levels", [1, 127, 32767, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 2000))]
)
def test_qsgd_by_the_paper(levels, dtype):
    size = 512 * 2 + 77
    pair = Pair(QSGD(levels, error_feedback=False), layout_of_size(size, dtype))
    for grad, _ in zip(gradients(size, dtype), range(2), strict=False):
        payload = pair.encode(grad)
        norms, found = parse_qsgd(payload, size, levels, dtype)
        exact = [np.linalg.norm(grad[b : b + 512].astype(np.float64)) for b in (0, 512, 1024)]
        assert np.allclose(norms, exact, rtol=1e-6)
        norm = np.repeat(norms, 512)[:size].astype(np.float64)
        a = levels * np.abs(grad.astype(np.float64)) / norm
        slack = 1e-6 * levels  # of float32's quotient
        assert (np.abs(found) >= np.floor(a - slack)).all()
        assert (np.abs(found) <= np.floor(a + slack) + 1).all()
        assert (found * grad >= 0).all()
        assert np.allclose(pair.decode(payload), norm * found / levels, rtol=1e-6)


@by_dtype
def test_qsgd_is_unbiased_and_has_the_variance_of_the_paper(dtype):
    """Of n draws the mean is within 5 standard deviations of its own: 1 in 2 million is not."""
    x = np.array([0.5, -0.25, 0.0, 1.0, -1e-3, 0.7, 0.1, -0.6], dtype)
    draws, levels = 20_000, 2
    pair = Pair(QSGD(levels, error_feedback=False), layout_of_size(8, dtype))
    sent = np.array([pair.send(x) for _ in range(draws)], np.float64)
    norm = np.linalg.norm(x.astype(np.float64))
    a = np.abs(x).astype(np.float64) * levels / norm
    chance = a - np.floor(a)
    variance = (norm / levels) ** 2 * chance * (1 - chance)
    error = np.abs(sent.mean(axis=0) - x)
    assert (error <= 5 * np.sqrt(variance / draws) + 4 * np.finfo(dtype).eps).all()
    # So are the variances, whose own variance is that of a Bernoulli variable's square.
    spread = np.abs(1 - 2 * chance) * np.sqrt(chance * (1 - chance)) * (norm / levels) ** 2
    found = np.square(sent - x).mean(axis=0)
    assert (np.abs(found - variance) <= 5 * spread / math.sqrt(draws) + 1e-6).all()
    # And what two elements, or two pushes, lose has nothing to do with each other.
    lost = (sent - x)[:, variance > 0] / np.sqrt(variance[variance > 0])
    for one, other in ((lost[:, :-1], lost[:, 1:]), (lost[:-1], lost[1:])):
        assert (np.abs((one * other).mean(axis=0)) <= 5 / math.sqrt(draws - 1)).all()


def test_qsgd_draws_otherwise_for_every_seed_push_and_bucket():
    layout = layout_of_size(1024, np.float32)
    codec = QSGD(1, error_feedback=False)
    x = np.full(1024, 0.5)
    found = []
    for seed in (1, 2):
        pair = Pair(codec, layout, seed=seed)
        for _ in range(3):
            sent = pair.send(x)
            found += [sent[:512] > 0, sent[512:] > 0]
    for i, one in enumerate(found):
        for other in found[:i]:
            # Of 512 elements 1 in 22.6 is not 0: were they the same, all of them would agree.
            assert (one & other).sum() < 12


@by_dtype
@pytest.mark.parametrize("levels", [1, 5, 127])
def test_the_residual_of_qsgd_stays_bounded(levels, dtype):
    """E|e|^2 <= 4 (1 - d) / d^2 max|g|^2 for a compressor with contraction d (Karimireddy 2019)."""
    size = 512
    pair = Pair(QSGD(levels), layout_of_size(size, dtype))
    w = min(size / levels**2, math.sqrt(size) / levels)
    d = 1 / (1 + w)
    most = 0.0
    for grad, _ in zip(gradients(size, dtype), range(600), strict=False):
        payload = pair.encode(grad)
        most = max(most, float(np.linalg.norm(grad)))
    norms, _ = parse_qsgd(payload, size, levels, dtype)
    assert np.linalg.norm(pair.encoder.residual) <= 2 * math.sqrt(1 - d) / d * most
    assert norms[0] > 0


# ---- low rank ----


def parse_power(payload: Vector, shape: tuple[int, int], rank: int, dtype: Any) -> Any:
    rows, columns = shape
    numbers = payload.view(dtype)
    p = numbers[: rows * rank].reshape(rows, rank).astype(np.float64)
    q = numbers[rows * rank : rank * (rows + columns)].reshape(rank, columns)
    return p, q.T.astype(np.float64)


def tolerance(dtype: Any) -> float:
    return 2e-5 if dtype is np.float32 else 1e-12


@by_dtype
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_powersgd_by_the_paper(rank, dtype):
    """P is orthonormal and spans M Q of the push before, Q is M^T P, and P Q^T arrives."""
    shape, close = (30, 44), tolerance(dtype)
    pair = Pair(PowerSGD(rank), layout_of(dtype, w=shape))
    residual, before = np.zeros(shape), None
    for grad, _ in zip(gradients(30 * 44, dtype), range(6), strict=False):
        m = residual + grad.reshape(shape)
        payload = pair.encode(grad)
        assert payload.nbytes == rank * (30 + 44) * np.dtype(dtype).itemsize
        p, q = parse_power(payload, shape, rank, dtype)
        assert np.allclose(p.T @ p, np.eye(rank), atol=close)
        assert np.allclose(q, m.T @ p, atol=100 * close)
        if before is not None:
            basis = np.linalg.qr(m @ before)[0]
            assert np.allclose(basis @ (basis.T @ p), p, atol=100 * close)
        assert np.allclose(pair.decode(payload).reshape(shape), p @ q.T, atol=10 * close)
        residual = pair.encoder.residual.astype(np.float64).reshape(shape)
        assert np.allclose(residual, m - p @ q.T, atol=100 * close)
        before = q


@by_dtype
def test_powersgd_finds_the_best_product(dtype):
    """Of one matrix again and again, it comes to what the singular values say."""
    rng = np.random.default_rng(4)
    u, v = (np.linalg.qr(rng.standard_normal((n, 6)))[0] for n in (20, 30))
    m = (u * [9, 5, 1, 0.5, 0.2, 0.1]) @ v.T
    pair = Pair(PowerSGD(2, error_feedback=False), layout_of(dtype, w=(20, 30)))
    for _ in range(12):
        sent = pair.send(m.reshape(-1))
    best = (u[:, :2] * [9, 5]) @ v[:, :2].T
    assert np.allclose(sent.reshape(20, 30), best, atol=2e-5 * 9)


@by_dtype
def test_powersgd_sends_what_has_its_rank_at_once(dtype):
    rng = np.random.default_rng(5)
    m = rng.standard_normal((20, 2)) @ rng.standard_normal((2, 30))
    for rank in (2, 4):
        pair = Pair(PowerSGD(rank), layout_of(dtype, w=(20, 30)))
        for _ in range(3):
            assert np.allclose(pair.send(m.reshape(-1)).reshape(20, 30), m, atol=2e-5)


@by_dtype
def test_powersgd_begins_anew_after_zeros(dtype):
    rng = np.random.default_rng(6)
    pair = Pair(PowerSGD(2), layout_of(dtype, w=(20, 30)))
    m = rng.standard_normal((20, 2)) @ rng.standard_normal((2, 30))
    for grad in (0 * m, 0 * m, m):
        assert np.allclose(pair.send(grad.reshape(-1)).reshape(20, 30), grad, atol=2e-5)
    # What is left is rounding, and where that leads may be just where a new gradient is not.
    arrived = sum(pair.send(grad.reshape(-1)) for grad in (0 * m, 0 * m, m, 0 * m, 0 * m))
    assert np.allclose(arrived.reshape(20, 30), m, atol=2e-5)


@by_dtype
def test_powersgd_sends_vectors_small_and_cut_tensors_as_they_are(dtype):
    layout = layout_of(dtype, a=(40, 50), b=(7,), c=(2, 2), d=(10, 3, 10), e=(40, 50))
    begin, end = 16, layout.size
    pair = Pair(PowerSGD(3), layout, begin, end)
    grad = next(gradients(end - begin, dtype))
    payload = pair.encode(grad)
    dense = 1984 + 7 + 4  # the rest of a, b and c: 3 (2 + 2) >= 4
    assert payload.size == (dense + 3 * (10 + 30) + 3 * (40 + 50)) * np.dtype(dtype).itemsize
    sent = pair.decode(payload)
    assert (sent[:dense] == grad[:dense]).all()
    assert (pair.encoder.residual[:dense] == 0).all()
    for first, shape in ((dense, (10, 30)), (dense + 300, (40, 50))):
        part = sent[first : first + math.prod(shape)].reshape(shape)
        assert np.linalg.matrix_rank(part, tol=1e-4) == 3
