"""Gradients into slots, judged as they are copied."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psframe.layout import Layout
from psframe.packing import GradientSlot, check_gradients

BLOCK = 4096  # what is summed at a time; sizes around it matter
FLOATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def layout_of(*shapes, dtype=np.float32):
    return Layout.of({f"t{i}": np.zeros(shape, dtype) for i, shape in enumerate(shapes)})


def named(layout, flat):
    """The flat values as separate arrays with the parameters' names."""
    return {name: view.copy() for name, view in layout.views(np.asarray(flat)).items()}


def pack(layout, grads):
    """What `pack` says, and the slot afterwards; with both of its ways if both can be taken."""
    slot = np.full(layout.size, np.nan, layout.dtype)
    said = GradientSlot(layout, slot).pack(grads)
    again = np.full(layout.size, np.nan, layout.dtype)
    plainly = GradientSlot(layout, again).pack_fitting(grads, judge=True)
    if plainly is not None:
        np.testing.assert_equal(plainly, said)
        np.testing.assert_array_equal(again, slot)
    return *said, slot


def exact_norm(flat):
    """The norm by integers: no rounding, no overflow, no underflow."""
    scaled = [int(math.ldexp(m, 53)) << (e + 1100) for m, e in map(math.frexp, map(float, flat))]
    # scaled = value * 2^1153; isqrt keeps 1153 bits behind the point and is rounded once.
    root = math.isqrt(sum(n * n for n in scaled))
    try:
        return math.ldexp(
            root >> max(0, root.bit_length() - 80), max(0, root.bit_length() - 80) - 1153
        )
    except OverflowError:
        return math.inf


# ---- the norm ------------------------------------------------------------------------------


@FLOATS
@pytest.mark.parametrize(
    "shapes",
    [
        [(1,)],
        [()],
        [(0,), (3, 0), (2,)],
        [(BLOCK,)],
        [(BLOCK - 1,), (1,), (1,)],
        [(BLOCK + 1,)],
        [(5,), (2 * BLOCK + 3,), (0,), (7, 11)],
        [(300, 100), (100,), (100, 10), (10,)],
        [(3, BLOCK)],
        [(16 * BLOCK + 5,), (3,)],
        [(40 * BLOCK - 1,)],
    ],
)
def test_slot_and_norm(shapes, dtype):
    layout = layout_of(*shapes, dtype=dtype)
    flat = np.random.default_rng(layout.size).normal(size=layout.size).astype(dtype)
    finite, norm, slot = pack(layout, named(layout, flat))
    np.testing.assert_array_equal(slot, flat)
    assert finite is True
    assert type(norm) is float
    assert norm == pytest.approx(exact_norm(flat), rel=1e-6 if dtype is np.float32 else 1e-13)


@FLOATS
def test_the_norm_does_not_depend_on_who_copied(dtype):
    """Copied in blocks, copied whole, cast, or written in place: the same bits."""
    layout = layout_of((100,), (2, BLOCK), (33, 500), dtype=dtype)
    flat = np.random.default_rng(0).normal(size=layout.size).astype(dtype)
    grads = named(layout, flat)
    norms = {pack(layout, grads)[1]}
    norms.add(pack(layout, {n: np.asfortranarray(g) for n, g in grads.items()})[1])
    norms.add(pack(layout, {n: g.astype(np.longdouble) for n, g in grads.items()})[1])
    slot = GradientSlot(layout, np.empty(layout.size, dtype))
    for name, array in slot.arrays.items():
        array[...] = grads[name]
    norms.add(slot.judge()[1])
    assert len(norms) == 1


@FLOATS
@pytest.mark.parametrize("n", [1, 10, BLOCK, 3 * BLOCK + 1])
def test_squares_may_overflow(n, dtype):
    """1e30 in float32 and 1e200 in float64 are finite, and so is their norm."""
    large = 1e30 if dtype is np.float32 else 1e200
    layout = layout_of((n,), (2,), dtype=dtype)
    flat = np.full(layout.size, large, dtype)
    flat[-1] = -large
    finite, norm, _ = pack(layout, named(layout, flat))
    assert finite
    assert norm == pytest.approx(large * math.sqrt(n + 2), rel=1e-6)


@FLOATS
def test_squares_of_some_blocks_may_overflow(dtype):
    largest = float(np.finfo(dtype).max)
    layout = layout_of((3 * BLOCK,), dtype=dtype)
    flat = np.ones(layout.size, dtype)
    flat[2 * BLOCK] = largest
    assert pack(layout, named(layout, flat))[:2] == (True, pytest.approx(largest, rel=1e-6))


def test_a_norm_beyond_float64_is_infinite_and_the_gradient_is_not():
    layout = layout_of((4,), dtype=np.float64)
    assert pack(layout, {"t0": np.full(4, 1.7e308)})[:2] == (True, math.inf)


@FLOATS
def test_tiny_elements(dtype):
    info = np.finfo(dtype)
    layout = layout_of((4,), dtype=dtype)
    for tiny in (info.smallest_subnormal, info.tiny, dtype(0.0)):
        finite, norm, slot = pack(layout, {"t0": np.full(4, tiny, dtype)})
        assert finite
        assert 0.0 <= norm <= 2 * float(tiny)
        assert (slot == tiny).all()  # not flushed to zero
    small = math.sqrt(float(info.tiny)) * 1e3  # the squares are still normal numbers
    assert pack(layout, {"t0": np.full(4, small, dtype)})[1] == pytest.approx(2 * small, rel=1e-6)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=20),
    st.sampled_from([np.float32, np.float64]),
)
def test_any_finite_gradient_is_finite_and_has_its_norm(values, dtype):
    flat = np.array(values, dtype)
    layout = layout_of((len(values),), dtype=dtype)
    finite, norm, slot = pack(layout, {"t0": flat})
    assert finite
    np.testing.assert_array_equal(slot, flat)
    # Below the square root of the smallest normal number squares lose digits.
    rough = math.sqrt(float(np.finfo(dtype).tiny) * len(values))
    assert norm == pytest.approx(exact_norm(flat), rel=1e-5, abs=rough)


# ---- what is not finite ------------------------------------------------------------------------


@FLOATS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 4, -1])
def test_one_bad_element_anywhere_is_found(where, bad, dtype):
    layout = layout_of((BLOCK + 5,), (2, BLOCK), (3,), dtype=dtype)
    flat = np.ones(layout.size, dtype)
    flat[where] = bad
    finite, norm, _ = pack(layout, named(layout, flat))
    assert finite is False
    assert math.isnan(norm)
    assert GradientSlot(layout, flat).judge()[0] is False


def test_infinities_beside_large_elements_are_found():
    layout = layout_of((3,))
    assert pack(layout, {"t0": np.array([1e30, np.inf, 1], np.float32)})[0] is False
    assert pack(layout, {"t0": np.array([np.inf, -np.inf, 1e30], np.float32)})[0] is False


def test_a_cast_that_overflows_is_not_finite():
    layout = layout_of((2,), (BLOCK + 1,))
    grads = {"t0": np.array([1e39, 1.0]), "t1": np.zeros(BLOCK + 1)}
    finite, _, slot = pack(layout, grads)
    assert finite is False
    assert slot[0] == np.inf
    grads["t0"][0] = -3.4e38
    assert pack(layout, grads)[:2] == (True, pytest.approx(3.4e38, rel=1e-6))


def test_casts_round():
    layout = layout_of((3,), dtype=np.float64)
    half = np.array([1.0, 65504.0, 6e-8], np.float16)
    assert (pack(layout, {"t0": half})[2] == half.astype(np.float64)).all()
    layout = layout_of((2,))
    assert (pack(layout, {"t0": np.array([0.1, 1e-50])})[2] == np.float32([0.1, 0.0])).all()


def test_strides_and_byte_orders():
    layout = layout_of((4, 6))
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    wide = np.zeros((8, 12), np.float32)
    wide[::2, ::2] = a
    for grad in (
        np.asfortranarray(a),
        wide[::2, ::2],
        a[::-1, ::-1][::-1, ::-1],
        a.astype(">f4"),
        np.broadcast_to(a[:1], (4, 6)),
    ):
        check_gradients(layout, {"t0": grad}, "here")
        finite, norm, slot = pack(layout, {"t0": grad})
        assert finite
        np.testing.assert_array_equal(slot.reshape(4, 6), grad)
        assert norm == pytest.approx(math.sqrt(float(np.square(grad).sum())), rel=1e-6)


# ---- checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grads", "error", "says"),
    [
        ({"a": np.zeros(2)}, ValueError, r"missing: \['b'\], unknown: none"),
        ({"a": np.zeros(2), "c": np.zeros(3)}, ValueError, r"missing: \['b'\], unknown: \['c'\]"),
        (
            {"a": np.zeros(2), "b": np.zeros(3), "c": 0},
            ValueError,
            r"missing: none, unknown: \['c'\]",
        ),
        ({}, ValueError, r"missing: \['a', 'b'\]"),
        (
            {"a": np.zeros(2), "b": np.zeros((3, 1))},
            ValueError,
            r"'b' has shape \(3, 1\), expected",
        ),
        ({"a": np.zeros(2), "b": np.float64(1)}, ValueError, r"'b' has shape \(\)"),
        ({"a": np.zeros(2), "b": np.zeros(3, int)}, TypeError, "'b' has dtype int64"),
        ({"a": np.zeros(2), "b": np.zeros(3, bool)}, TypeError, "'b' has dtype bool"),
        ({"a": np.zeros(2), "b": np.zeros(3, complex)}, TypeError, "'b' has dtype complex128"),
        ({"a": np.zeros(2), "b": [0.0, 0.0, 0.0]}, TypeError, "'b' has dtype None"),
        ([np.zeros(2), np.zeros(3)], TypeError, "expected a mapping of names to arrays, got list"),
    ],
)
def test_bad_gradients(grads, error, says):
    layout = Layout.of({"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)})
    assert GradientSlot(layout, np.zeros(5, np.float32)).pack_fitting(grads, judge=True) is None
    with pytest.raises(error, match=f"^push from worker 3: .*{says}"):
        check_gradients(layout, grads, "push from worker 3")


def test_plain_is_only_what_needs_no_second_look():
    a, b = np.zeros(2, np.float32), np.zeros(3, np.float32)
    slot = GradientSlot(Layout.of({"a": a, "b": b}), np.ones(5, np.float32))
    assert slot.pack_fitting({"a": a, "b": b}, judge=True) == (True, 0.0)
    assert slot.pack_fitting({"b": b, "a": a}, judge=True) == (True, 0.0)
    assert slot.pack_fitting({"a": a, "b": b.astype(np.float64)}, judge=True) is None
    assert slot.pack_fitting({"a": a, "b": b.astype(">f4")}, judge=True) is None
    assert slot.pack_fitting({"a": a, "b": b.view(np.ma.MaskedArray)}, judge=True) is None
    assert slot.pack_fitting({"a": a, "b": b, "c": b}, judge=True) is None
    assert slot.pack_fitting({"a": a}, judge=True) is None
    assert slot.pack_fitting(None, judge=True) is None


# ---- a piece at a time -----------------------------------------------------------------------


@pytest.mark.parametrize("judge", [True, False])
@pytest.mark.parametrize("shapes", [[(100,)], [(BLOCK * 9 + 7,)], [(5, 7), (BLOCK * 50,), (3,)]])
def test_what_is_said_to_be_there_is_there(shapes, judge):
    layout = layout_of(*shapes)
    slot = np.full(layout.size, np.nan, np.float32)
    flat = np.random.default_rng(1).normal(size=layout.size).astype(np.float32)
    ends = []

    def advance(end):
        ends.append(end)
        np.testing.assert_array_equal(slot[:end], flat[:end])

    said = GradientSlot(layout, slot).pack(named(layout, flat), judge, advance)
    np.testing.assert_array_equal(slot, flat)
    assert ends == sorted(set(ends))
    assert all(end < layout.size for end in ends), "the last part is told with the verdict"
    assert len(ends) >= (4 if layout.size > 8 * BLOCK else 0)
    assert said == (GradientSlot(layout, slot).judge() if judge else (True, 0.0))
    assert GradientSlot(layout, slot).judge(ends.append) == GradientSlot(layout, slot).judge()


def test_what_does_not_fit_is_written_nowhere_before_it_is_found_out():
    layout = layout_of((4,), (BLOCK * 20,))
    slot = GradientSlot(layout, np.zeros(layout.size, np.float32))
    good = {"t0": np.ones(4, np.float32), "t1": np.ones(BLOCK * 20, np.float32)}
    assert slot.fits(good)
    assert not slot.fits({**good, "t1": np.ones(BLOCK * 20)})
    assert not slot.fits({**good, "t0": np.ones((4, 1), np.float32)})
    assert not slot.fits({"t0": good["t0"]})
    assert not slot.fits([good])
