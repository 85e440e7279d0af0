"""The layout: where each tensor lies in the flat vector, and who serves what."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psframe.layout import Layout

SHAPES = st.lists(
    st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=8
).filter(lambda shapes: any(math.prod(shape) for shape in shapes))


def layout_of(shapes: list[tuple[int, ...]], dtype: str = "f4") -> Layout:
    return Layout.of({f"t{i}": np.zeros(shape, dtype) for i, shape in enumerate(shapes)})


def test_a_small_one_by_hand() -> None:
    layout = Layout.of({"w": np.zeros((2, 3)), "b": np.zeros(()), "a": np.zeros(4)})
    assert layout.names == ("w", "b", "a")  # as they came, not sorted
    assert layout.shapes == ((2, 3), (), (4,))
    assert layout.offsets == (0, 6, 7)
    assert layout.sizes == (6, 1, 4)
    assert (layout.size, layout.dtype) == (11, np.dtype(np.float64))
    views = layout.views(np.arange(11.0))
    assert views["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert views["b"].shape == ()
    assert views["b"] == 6
    assert views["a"].tolist() == [7, 8, 9, 10]


@given(SHAPES, st.sampled_from(["f4", "f8"]))
def test_views_cover_the_vector_once_and_flatten_brings_them_back(
    shapes: list[tuple[int, ...]], dtype: str
) -> None:
    layout = layout_of(shapes, dtype)
    flat = np.arange(layout.size, dtype=dtype)
    views = layout.views(flat)
    joined = np.concatenate([view.reshape(-1) for view in views.values()])
    assert joined.tobytes() == flat.tobytes()
    assert all(np.shares_memory(view, flat) for view in views.values() if view.size)
    again = layout.flatten(views)
    assert again.tobytes() == flat.tobytes()
    assert not np.shares_memory(again, flat)


@given(SHAPES, st.integers(1, 9))
def test_shards_cover_the_vector_in_order_and_begin_aligned(
    shapes: list[tuple[int, ...]], servers: int
) -> None:
    layout = layout_of(shapes)
    shards = layout.shards(servers)
    assert len(shards) == servers
    assert shards[0][0] == 0
    assert shards[-1][1] == layout.size
    for (_, end), (begin, _) in itertools.pairwise(shards):
        assert end == begin
        assert begin % 16 == 0 or begin == layout.size
    assert all(begin <= end for begin, end in shards)


def test_shards_differ_by_one_aligned_piece_at_most() -> None:
    sizes = [end - begin for begin, end in layout_of([(16 * 100,)]).shards(7)]
    assert sum(sizes) == 1600
    assert max(sizes) - min(sizes) <= 16


def test_more_servers_than_pieces_leave_some_without_a_part() -> None:
    sizes = [end - begin for begin, end in layout_of([(20,)]).shards(4)]
    assert sum(sizes) == 20
    assert 0 in sizes


def test_flatten_reads_any_stride() -> None:
    source = np.arange(6, dtype=np.float32).reshape(3, 2).T
    layout = Layout.of({"w": source})
    assert layout.views(layout.flatten({"w": source}))["w"].tolist() == source.tolist()


def test_descriptions_are_equal_for_equal_layouts_only() -> None:
    one = {"w": np.zeros((2, 3)), "b": np.zeros(3)}
    same = {"w": np.ones((2, 3)), "b": np.ones(3)}
    others = [
        {"w": np.zeros((3, 2)), "b": np.zeros(3)},
        {"b": np.zeros(3), "w": np.zeros((2, 3))},
        {"w": np.zeros((2, 3)), "c": np.zeros(3)},
        {"w": np.zeros((2, 3), "f4"), "b": np.zeros(3, "f4")},
        {"w": np.zeros(6), "b": np.zeros(3)},
    ]
    assert Layout.of(one).describe() == Layout.of(same).describe()
    described = {Layout.of(params).describe() for params in [one, *others]}
    assert len(described) == 1 + len(others)


@pytest.mark.parametrize(
    ("params", "error", "says"),
    [
        ([np.zeros(3)], TypeError, "expected a mapping of names to arrays, got list"),
        ({}, ValueError, "at least one named array, got an empty mapping"),
        ({"w": np.zeros((0, 3))}, ValueError, "at least one element"),
        ({1: np.zeros(3)}, TypeError, "names that are strings, got 1"),
        ({"w": np.zeros(3, int)}, TypeError, "'w' has int64, expected a float32 or float64"),
        ({"w": np.zeros(3, "f2")}, TypeError, "'w' has float16"),
        ({"w": np.zeros(3, complex)}, TypeError, "'w' has complex128"),
        ({"w": [1.0, 2.0]}, TypeError, "'w' has no dtype"),
        ({"w": np.zeros(3), "b": np.zeros(3, "f4")}, ValueError, "one dtype .*'w' is float64"),
    ],
)
def test_what_cannot_be_laid_out(params: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Layout.of(params)  # type: ignore[arg-type]
