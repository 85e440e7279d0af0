"""What holds for every codec: ownership, error feedback, and payloads that nobody has checked."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psframe import codecs
from psframe.codecs import QSGD, BFloat16, Float16, PowerSGD, Sign, TopK
from psframe.errors import MessageError
from psframe.layout import Layout

CODECS: dict[str, Any] = {
    "float16": Float16(),
    "bfloat16": BFloat16(),
    "top-k": TopK(0.1),
    "dgc": TopK(0.05, momentum=0.9, clip_norm=3.0, warmup=4),
    "sign": Sign(),
    "fixed sign": Sign(0.5),
    "qsgd": QSGD(7),
    "qsgd5": QSGD(5),
    "powersgd": PowerSGD(2),
}
CODECS |= {
    f"{name}, no feedback": dataclasses.replace(codec, error_feedback=False)
    for name, codec in CODECS.items()
    if name != "dgc"
}
DTYPES = (np.float32, np.float64)
by_codec = pytest.mark.parametrize("name", CODECS)
by_feedback = pytest.mark.parametrize(
    "name", [name for name, codec in CODECS.items() if codec.error_feedback]
)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)

SHAPES = {"a": (13, 40), "b": (7,), "c": (), "d": (3, 5, 2, 20), "e": (0, 4), "f": (9, 2)}


def layout_of(dtype: Any, **shapes: tuple[int, ...]) -> Layout:
    return Layout.of({name: np.zeros(s, dtype) for name, s in (shapes or SHAPES).items()})


# Whole, empty, one element, and ranges that cut tensors.
SIZE = layout_of(np.float32).size
SHARDS = [(0, SIZE), (16, 16), (SIZE, SIZE), (527, 528), (0, 512), (512, SIZE), (16, 1040)]


class Pair:
    """Both ends of a link for one shard."""

    def __init__(
        self, codec: Any, layout: Layout, begin: int = 0, end: int | None = None, seed: int = 5
    ) -> None:
        end = layout.size if end is None else end
        self.encoder = codec.encoder(layout, begin, end, [seed, 1])
        self.decoder = codec.decoder(layout, begin, end)
        self.size, self.dtype = end - begin, layout.dtype
        assert isinstance(self.encoder, codecs.Encoder)
        assert isinstance(self.decoder, codecs.Decoder)

    def encode(self, grad: Any) -> Any:
        grad = np.array(grad, self.dtype)
        grad.flags.writeable = False
        out = np.full(self.encoder.bytes_max + 8, 0xA5, np.uint8)
        length = self.encoder.encode(grad, out)
        assert 0 <= length <= self.encoder.bytes_max <= self.decoder.bytes_max
        assert (out[self.encoder.bytes_max :] == 0xA5).all()
        return out[:length].copy()

    def decode(self, payload: Any) -> Any:
        out = np.full(self.size, np.nan, self.dtype)
        self.decoder.decode(payload, out)
        return out

    def send(self, grad: Any) -> Any:
        return self.decode(self.encode(grad))


def gradients(size: int, dtype: Any, seed: int = 3) -> Any:
    rng = np.random.default_rng(seed)
    while True:
        yield (rng.standard_normal(size) * 0.7).astype(dtype)


# ---- what a codec is ----


@by_codec
def test_a_codec_is_the_same_on_every_rank(name):
    codec = CODECS[name]
    assert isinstance(codec, codecs.Codec)
    assert eval(repr(codec), vars(codecs).copy()) == codec
    assert hash(eval(repr(codec), vars(codecs).copy())) == hash(codec)
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec.error_feedback = False
    assert {type(c).__name__ for c in CODECS.values()} <= set(codecs.__all__)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Float16(error_feedback=1), TypeError, "error_feedback is 1"),
        (lambda: BFloat16(error_feedback=None), TypeError, "BFloat16: error_feedback"),
        (lambda: TopK(0.0), ValueError, "fraction is 0.0"),
        (lambda: TopK(1.1), ValueError, "fraction is 1.1"),
        (lambda: TopK("1"), TypeError, "fraction is '1'"),
        (lambda: TopK(0.1, momentum=1.0), ValueError, "momentum is 1.0"),
        (lambda: TopK(0.1, clip_norm=0), ValueError, "clip_norm is 0.0"),
        (lambda: TopK(0.1, warmup=-1), ValueError, "warmup is -1"),
        (lambda: TopK(0.1, warmup=1.5), TypeError, "warmup is 1.5"),
        (lambda: TopK(0.25, warmup=3), ValueError, "where a warm-up begins"),
        (lambda: TopK(0.1, momentum=0.9, error_feedback=False), ValueError, "without error"),
        (lambda: Sign(0.0), ValueError, "scale is 0.0"),
        (lambda: Sign(float("nan")), ValueError, "scale is nan"),
        (lambda: Sign(1e60).encoder(layout_of(np.float32), 0, 1, [0]), ValueError, "is inf in"),
        (lambda: Sign(1e-60).decoder(layout_of(np.float32), 0, 1), ValueError, "is 0.0 in"),
        (lambda: QSGD(0), ValueError, "levels is 0"),
        (lambda: QSGD(2**15), ValueError, "levels is 32768"),
        (lambda: QSGD(1.0), TypeError, "levels is 1.0"),
        (lambda: PowerSGD(0), ValueError, "rank is 0"),
    ],
)
def test_wrong_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()


@by_codec
def test_a_shard_outside_the_vector_is_refused(name):
    layout = layout_of(np.float32)
    for begin, end in ((-1, 4), (5, 4), (0, SIZE + 1)):
        with pytest.raises(ValueError, match="expected it within"):
            CODECS[name].encoder(layout, begin, end, [0])
        with pytest.raises(ValueError, match="expected it within"):
            CODECS[name].decoder(layout, begin, end)


@by_codec
def test_arrays_of_another_kind_are_refused_and_change_nothing(name):
    pair = Pair(CODECS[name], layout_of(np.float32))
    good = np.ones(SIZE, np.float32)
    out = np.zeros(pair.encoder.bytes_max + 1, np.uint8)
    wrong = [
        (good[:-1], out),
        (good.astype(np.float64), out),
        (np.ones(2 * SIZE, np.float32)[::2], out),
        (good, out[: pair.encoder.bytes_max - 1]),
        (good, out[1:]),
        (good, out.astype(np.int8)),
    ]
    for grad, target in wrong:
        with pytest.raises(ValueError, match="expected"):
            pair.encoder.encode(grad, target)
    payload = pair.encode(good)
    assert (payload == Pair(CODECS[name], layout_of(np.float32)).encode(good)).all()
    for p, target in ((payload.view(np.int8), good), (payload, good[:-1]), (payload, good[::2])):
        with pytest.raises(ValueError, match="expected"):
            pair.decoder.decode(p, target)


@by_codec
@by_dtype
@pytest.mark.parametrize(("begin", "end"), SHARDS)
def test_round_trip(name, dtype, begin, end):
    """Something like the gradient arrives, from wherever in memory, and always the same."""
    pair = Pair(CODECS[name], layout_of(dtype), begin, end)
    for grad, _ in zip(gradients(end - begin, dtype), range(6), strict=False):
        payload = pair.encode(grad)
        sent = pair.decode(payload)
        assert np.isfinite(sent).all()
        assert (payload.size > 0) == (end > begin)
        if end - begin > 20:
            assert np.dot(sent, grad) > 0
        crooked = np.zeros(payload.size + 1, np.uint8)[1:]
        crooked[:] = payload
        crooked.flags.writeable = False
        assert (pair.decode(crooked) == sent).all()


@by_codec
@by_dtype
def test_one_seed_gives_the_same_bytes(name, dtype):
    one, two = (Pair(CODECS[name], layout_of(dtype)) for _ in range(2))
    for grad, _ in zip(gradients(SIZE, dtype), range(5), strict=False):
        assert (one.encode(grad) == two.encode(grad)).all()


@by_codec
def test_zeros_arrive_as_something_small(name):
    codec = CODECS[name]
    pair = Pair(codec, layout_of(np.float32))
    for _ in range(3):
        sent = pair.send(np.zeros(SIZE))
        assert np.abs(sent).max() <= (0.5 if codec == Sign(0.5) or "fixed" in name else 0.0)


# ---- error feedback ----


@by_feedback
@by_dtype
@pytest.mark.parametrize(("begin", "end"), SHARDS)
def test_nothing_is_lost(name, dtype, begin, end):
    """The sum of what has arrived, and the residual, are the sum of all gradients."""
    codec = CODECS[name]
    pair = Pair(codec, layout_of(dtype), begin, end)
    arrived, pushed, velocity, most = (np.zeros(end - begin) for _ in range(4))
    for grad, _ in zip(gradients(end - begin, dtype), range(30), strict=False):
        sent = pair.send(grad)
        arrived += sent
        if name == "dgc":  # what it sums is the velocity, which is 0 where something was sent
            clipped = grad * min(1.0, 3.0 / max(1e-300, float(np.linalg.norm(grad))))
            velocity = 0.9 * velocity + clipped
            pushed += velocity
            velocity[sent != 0] = 0
        else:
            pushed += grad
        most = np.maximum(most, np.abs(pair.encoder.residual) + np.abs(sent))
    assert pair.encoder.residual.shape == (end - begin,)
    lost = np.abs(arrived + pair.encoder.residual - pushed)
    assert (lost <= 30 * 4 * np.finfo(dtype).eps * (most + 1)).all()


@by_codec
def test_without_error_feedback_there_is_no_residual(name):
    codec = CODECS[name]
    pair = Pair(codec, layout_of(np.float32))
    assert (pair.encoder.residual is None) == (not codec.error_feedback)


@by_codec
@by_dtype
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 522, SIZE - 1])
def test_what_is_not_finite_arrives_so_and_leaves_no_trace(name, dtype, value, place):
    pair, calm = (Pair(CODECS[name], layout_of(dtype)) for _ in range(2))
    draws = gradients(SIZE, dtype)
    for _ in range(2):
        grad = next(draws)
        assert (pair.encode(grad) == calm.encode(grad)).all()
    before = None if pair.encoder.residual is None else pair.encoder.residual.copy()
    bad = next(draws)
    bad[place] = value
    assert not np.isfinite(pair.send(bad)).all()
    if before is not None:
        assert (pair.encoder.residual == before).all()
    # Pushes are counted, for the warm-up and the random numbers: so the calm one skips one.
    if hasattr(calm.encoder, "_pushes"):
        calm.encoder._pushes += 1
    for _ in range(3):
        grad = next(draws)
        assert (pair.encode(grad) == calm.encode(grad)).all()


@by_feedback
@by_dtype
def test_a_sum_that_overflows_is_refused_and_leaves_no_trace(name, dtype):
    """Two halves of the largest number and a bit: finite gradients whose sum is not."""
    pair = Pair(CODECS[name], layout_of(dtype, w=(40,)))
    large = np.full(40, np.finfo(dtype).max * 0.75, dtype)
    if name == "dgc":
        large[0] = 1.0  # norms above the largest number are clipped
    refused = 0
    for _ in range(4):
        before = pair.encoder.residual.copy()
        sent = pair.send(large)
        if not np.isfinite(sent).all():
            refused += 1
            assert (pair.encoder.residual == before).all()
        assert np.isfinite(pair.encoder.residual).all()
    assert refused or name in (
        *("bfloat16", "sign", "qsgd", "qsgd5", "dgc"),  # lack too little for that
        "powersgd",  # lacks nothing of a vector
    )


@by_codec
@by_dtype
def test_the_largest_and_smallest_numbers_do_no_harm(name, dtype):
    info = np.finfo(dtype)
    for size in (info.max, info.max / 64, info.tiny, info.smallest_subnormal):
        pair = Pair(CODECS[name], layout_of(dtype))
        for grad, _ in zip(gradients(SIZE, dtype), range(4), strict=False):
            with np.errstate(under="ignore"):
                payload = pair.encode(np.clip(grad, -1, 1) * dtype(size))
            pair.decode(payload)
            if pair.encoder.residual is not None:
                assert np.isfinite(pair.encoder.residual).all()


# ---- payloads that nobody has checked ----

# Small ones, so that random bytes get as far as they can.
TARGETS = {
    (name, dtype.__name__, shard): Pair(codec, layout_of(dtype, a=(5, 8), b=(3,)), *shard)
    for name, codec in CODECS.items()
    for dtype in DTYPES
    for shard in ((0, 43), (16, 43), (2, 3), (4, 4))
}


def check_refused_or_decoded(pair: Pair, payload: Any) -> None:
    before = payload.copy()
    out = np.full(pair.size + 2, 7.0, pair.dtype)
    refusal = None
    try:
        pair.decoder.decode(payload, out[1:-1])
    except MessageError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith("gradient payload: ")
    else:
        again = np.full(pair.size, -3.0, pair.dtype)
        pair.decoder.decode(payload, again)
        assert again.tobytes() == out[1:-1].tobytes()
    assert payload.tobytes() == before.tobytes()
    assert out[0] == out[-1] == 7.0


@by_codec
def test_what_is_refused_costs_no_memory(name):
    layout = layout_of(np.float32, a=(1000, 100))
    pair = Pair(CODECS[name], layout)
    payload = pair.encode(next(gradients(100_000, np.float32)))
    payload[:64] = 0xFF
    out = np.zeros(100_000, np.float32)
    for wrong in (payload, payload[:-1], np.full(1 << 22, 0xFF, np.uint8)):
        tracemalloc.start()
        with contextlib.suppress(MessageError):
            pair.decoder.decode(wrong, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20_000


@given(st.sampled_from(sorted(TARGETS)), st.binary(max_size=400))
def test_random_bytes_are_refused_or_decoded(target, data):
    check_refused_or_decoded(TARGETS[target], np.frombuffer(data, np.uint8))


@given(
    st.sampled_from(sorted(TARGETS)),
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    st.integers(-9, 9),
)
def test_a_payload_that_was_changed_is_refused_or_decoded(target, seed, changes, longer):
    pair = TARGETS[target]
    grad = np.random.default_rng(seed).standard_normal(pair.size)
    payload = pair.encode(grad)
    for place, value in changes:
        if payload.size:
            payload[place % payload.size] = value
    if longer > 0:
        payload = np.append(payload, np.zeros(longer, np.uint8))
    elif longer < 0:
        payload = payload[:longer].copy()
    check_refused_or_decoded(pair, payload)


@by_codec
@by_dtype
def test_a_wrong_length_is_refused(name, dtype):
    pair = Pair(CODECS[name], layout_of(dtype))
    payload = pair.encode(np.ones(SIZE))
    for wrong in (payload[:-1], np.append(payload, np.uint8(0)), payload[:0]):
        with pytest.raises(MessageError, match="bytes"):
            pair.decode(np.ascontiguousarray(wrong))
    huge = np.zeros(1 << 22, np.uint8)
    huge[:] = 0xFF
    with pytest.raises(MessageError, match="4194304 bytes"):
        pair.decode(huge)


def changed(pair: Pair, place: int, value: Any) -> Any:
    """The payload of a gradient of ones with a value written to some place of it."""
    payload = pair.encode(np.ones(pair.size))
    data = np.frombuffer(np.asarray(value).tobytes(), np.uint8)
    payload[place : place + data.size] = data
    return payload


@by_dtype
def test_each_kind_of_nonsense_is_refused(dtype):
    size = np.dtype(dtype).itemsize
    layout = layout_of(dtype, a=(100,))
    plain = {"error_feedback": False}  # so that every payload is the same but for the change
    top = Pair(TopK(0.03, **plain), layout)
    first = 8 + 3 * size  # of the indices 0, 1, 2
    fixed, mean = Pair(Sign(0.5, **plain), layout), Pair(Sign(**plain), layout)
    qsgd = Pair(QSGD(5, **plain), layout)  # 4 bits for 11 levels
    two = Pair(QSGD(5, **plain), layout_of(dtype, a=(520,)))
    cases = [
        (top, 0, np.uint64(2), "got 2 elements"),
        (top, 0, np.uint64(4), "got 4 elements"),
        (top, 0, np.uint64(2**63), "elements, expected 3 to 3"),
        (top, first, np.uint32(1), "do not ascend"),
        (top, first, np.uint32(2**31), "do not ascend"),
        (top, first + 8, np.uint32(100), "beyond"),
        (top, first + 8, np.uint32(2**32 - 1), "beyond"),
        (fixed, 0, dtype(0.25), "scale 0 is 0.25, expected 0.5"),
        (mean, 0, dtype(np.inf), "scale 0 is inf"),
        (mean, 0, dtype(-1), "scale 0 is -1"),
        (mean, size + 12, np.uint8(0x1F), "behind the last sign"),
        (qsgd, 0, dtype(np.inf), "infinite or below 0"),
        (qsgd, 0, dtype(-1), "infinite or below 0"),
        (qsgd, 8, np.uint8(0xFF), "above 10"),
        (qsgd, 8 + 50, np.uint8(1), "behind the last one"),
        (two, 2 * size + 256, np.uint8(0xCC), "above 10"),
    ]
    for pair, place, value, text in cases:
        with pytest.raises(MessageError, match=text):
            pair.decode(changed(pair, place, value))
    warm = Pair(TopK(0.03, warmup=3), layout)
    payload = warm.encode(np.ones(100))
    assert payload[0] == 25
    payload[0] = 24
    with pytest.raises(MessageError, match="bytes of 24 elements"):
        warm.decode(payload)
    if size == 4:
        odd = Pair(QSGD(5), layout)
        with pytest.raises(MessageError, match="behind the last norm"):
            odd.decode(changed(odd, 4, np.uint8(1)))
