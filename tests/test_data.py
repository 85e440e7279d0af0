"""Datasets: batches, splits, preprocessing and augmentation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from psframe.data import Augmentation, Dataset, Parts, Preprocessing, load, prepare, split
from psframe.errors import ArgumentError


def dataset(counts: list[int], features: int = 3) -> Dataset:
    """Make a dataset with so many samples of each class, each sample different."""
    y = np.repeat(np.arange(len(counts)), counts)
    x = np.arange(len(y) * features, dtype=np.float32).reshape(len(y), features)
    return Dataset(x, y, len(counts), "made")


def images(n: int, *shape: int, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, size=(n, *shape), dtype=np.uint8)
    return Dataset(x, np.arange(n) % 2, 2, "images")


def digits() -> Dataset:
    data = load("digits")
    assert isinstance(data, Dataset)
    return data


def everything(data: Dataset) -> Any:
    return data.batch(slice(None))[0]


def test_digits() -> None:
    data = digits()
    assert (data.n_classes, data.input_shape, len(data)) == (10, (8, 8), 1797)
    x, y = data.batch(slice(None))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((1797, 8, 8), np.float32, (1797,), np.int64)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert np.bincount(y).min() > 150
    assert data.classes == tuple("0123456789")


def test_a_batch_is_the_callers_own() -> None:
    data = dataset([3, 3])
    indices = np.array([4, 0, 4])
    x, y = data.batch(indices)
    np.testing.assert_array_equal(x, np.asarray(data.x[indices]))
    assert y.tolist() == [1, 0, 1]
    assert x.flags.c_contiguous
    x[...] = -1
    y[...] = -1
    assert data.batch(slice(0, 1))[0].min() == 0
    assert data.labels.min() == 0


def test_a_batch_costs_its_own_labels_only() -> None:
    """However many samples a split has: not all of its labels are gathered for each batch."""
    gathered: list[int] = []

    class Watched:
        def __getitem__(self, indices: Any) -> Any:
            found = (np.arange(1000) % 2)[indices]
            gathered.append(len(found))
            return found

    whole = Dataset(np.zeros((1000, 2)), Watched(), 2, "watched")  # type: ignore[arg-type]
    part = whole.subset(np.arange(999, -1, -1))
    for data, labels in ((part, [1, 0, 0]), (whole, [0, 1, 1])):
        gathered.clear()
        assert data.batch(np.array([0, 5, 7]))[1].tolist() == labels
        assert gathered == [3]


def test_subsets_of_subsets() -> None:
    data = dataset([4, 4]).subset(np.array([7, 5, 3, 1]))
    inner = data.subset(np.array([2, 0]))
    assert (len(data), len(inner)) == (4, 2)
    assert inner.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(everything(inner)[:, 0], [9, 21])
    np.testing.assert_array_equal(inner.batch(np.array([1]))[0][:, 0], [21])


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("a", "b", "c"), "has 2 classes, but 3 names for them"),
        (("a", "a"), "'a' is the name of more than one"),
        (("a", "\ud800"), "a name is no text"),
    ],
)
def test_names_of_classes_tell_them_apart(classes: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=f"data 'made': .*{words}"):
        Dataset(np.zeros((2, 1)), np.arange(2), 2, "made", classes)


def test_what_was_not_checked_is_found_when_it_is_read() -> None:
    x = np.ones((6, 2), np.float32)
    x[4, 1] = np.nan
    data = Dataset(x, np.arange(6) % 2, 2, "late", checked=False).subset(np.array([1, 2, 4]))
    data.batch(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"'late': 'x' has nan in sample 4, at \(1,\)"):
        data.batch(np.array([1, 2]))


# ---- splits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_split_parts_the_samples_in_proportion(seed: int) -> None:
    data = dataset([50, 33, 7, 10])
    train, test = split(data, 0.2, seed)
    assert (len(train), len(test)) == (80, 20)
    rows = np.concatenate([everything(train)[:, 0], everything(test)[:, 0]])
    np.testing.assert_array_equal(np.sort(rows), everything(data)[:, 0])
    shares = np.bincount(test.labels, minlength=4) - np.array([10, 6.6, 1.4, 2])
    assert np.abs(shares).max() < 1
    again = split(data, 0.2, seed)
    np.testing.assert_array_equal(everything(again[1]), everything(test))


def test_split_depends_on_the_seed() -> None:
    data = dataset([50, 50])
    assert (everything(split(data, seed=0)[1]) != everything(split(data, seed=1)[1])).any()


def test_split_of_digits_holds_out_360() -> None:
    train, test = split(digits())
    assert (len(train), len(test)) == (1437, 360)


def test_split_keeps_each_class_in_the_training_part() -> None:
    train, _ = split(dataset([30, 1, 2]), 0.5)
    assert set(train.labels) == {0, 1, 2}


@pytest.mark.parametrize(
    ("counts", "fraction", "shares"),
    [
        ([1, 1, 1, 20], 0.3, [0, 0, 0, 7]),  # ceil(23 * 0.3) = 7: what the others cannot give
        ([2, 2, 2, 6], 0.9, [1, 1, 1, 5]),  # 11 would be due, but each keeps one
        ([2, 2, 50, 50], 0.5, [1, 1, 25, 25]),
        ([1, 0, 1, 8, 8], 0.5, [0, 0, 0, 5, 4]),
    ],
)
def test_what_small_classes_cannot_give_the_others_do(
    counts: list[int], fraction: float, shares: list[int]
) -> None:
    train, test = split(dataset(counts), fraction)
    assert np.bincount(test.labels, minlength=len(counts)).tolist() == shares
    assert set(train.labels) == {label for label, count in enumerate(counts) if count}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_split_refuses_a_fraction_that_is_none(fraction: float) -> None:
    with pytest.raises(ValueError, match="test fraction"):
        split(dataset([5, 5]), fraction)


def test_split_refuses_what_is_too_small() -> None:
    with pytest.raises(ValueError, match=r"made: 2 samples of 2 classes are too few"):
        split(dataset([1, 1]), 0.5)


def test_three_parts_share_no_sample() -> None:
    parts = prepare(dataset([60, 40]), 0.2, 3, validation_fraction=0.1)
    assert parts.validation is not None
    assert parts.test is not None
    rows = [part.rows for part in parts if part is not None]
    assert [len(r) for r in rows] == [70, 10, 20]
    assert len(np.unique(np.concatenate(rows))) == 100
    without = prepare(dataset([60, 40]), 0.2, 3)
    np.testing.assert_array_equal(parts.test.rows, without.test.rows)  # type: ignore[union-attr]


def test_the_validation_part_is_another_draw_than_the_test_part() -> None:
    """With the same seed, what is drawn for one would tell what is drawn for the other."""
    brought = prepare(
        Parts(dataset([60, 40]), None, dataset([2, 2])), 0.2, 3, validation_fraction=0.2
    )
    assert brought.validation is not None
    rows = {seed: set(split(dataset([60, 40]), 0.2, seed)[1].rows) for seed in range(100)}  # type: ignore[arg-type]
    found = set(brought.validation.rows)  # type: ignore[arg-type]
    assert found not in rows.values()
    other = prepare(
        Parts(dataset([60, 40]), None, dataset([2, 2])), 0.2, 4, validation_fraction=0.2
    )
    assert other.validation is not None
    assert found != set(other.validation.rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("y", "words"),
    [
        ([1, 1, 1, 1], "has only one class, '1'"),
        ([0, 900, 0, 1], "label 900 at row 1 of the training part, but there are only 4 samples"),
        ([], "the training part holds no samples"),
    ],
)
def test_the_training_part_is_one_that_can_be_trained_on(y: list[int], words: str) -> None:
    labels = np.array(y, np.int64)
    train = Dataset(np.ones((len(y), 2)), labels, 901, "made")
    for parts in (train, Parts(train, None, dataset([1, 1], 2))):
        with pytest.raises(ValueError, match=rf"data 'made': .*{words}"):
            prepare(parts)


def test_later_parts_may_be_of_one_class() -> None:
    one = Dataset(np.ones((1, 3)), np.array([1]), 2, "made")
    parts = prepare(Parts(dataset([3, 3]), one, one))
    assert parts.test is not None
    assert parts.test.labels.tolist() == [1]


def test_a_test_part_of_its_own_is_kept() -> None:
    train, test = split(dataset([60, 40]), 0.3)
    parts = prepare(Parts(train, None, test), validation_fraction=0.2)
    assert parts.test is not None
    assert parts.validation is not None
    np.testing.assert_array_equal(parts.test.rows, test.rows)
    assert (len(parts.train), len(parts.validation)) == (56, 14)
    other = Dataset(np.zeros((4, 9)), np.arange(4) % 2, 2, "other")
    with pytest.raises(ValueError, match=r"the test part has samples of shape \(9,\), expected"):
        prepare(Parts(train, None, other))


# ---- preprocessing -----------------------------------------------------------------------------


def test_preprocessing_is_measured_on_the_training_part_alone() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3000, 3)) * [1, 50, 0] + [5, -7000, 3.3]).astype(np.float32)
    data = Dataset(x, np.arange(3000) % 2, 2, "made")
    plain_train, plain_test = split(data, 0.25, 3)
    parts = prepare(data, 0.25, 3)
    train = everything(parts.train)
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(train.std(axis=0), [1, 1, 0], atol=1e-3)
    raw, other = x[plain_train.rows].astype(float), x[plain_test.rows].astype(float)
    expected = (other[:, :2] - raw[:, :2].mean(axis=0)) / raw[:, :2].std(axis=0)
    assert parts.test is not None
    np.testing.assert_allclose(everything(parts.test)[:, :2], expected, rtol=1e-3, atol=1e-3)
    assert parts.train.preprocessing is not None
    assert parts.train.preprocessing.deviation[2] == 1


@pytest.mark.parametrize("kind", ["f8", "i8"])
def test_what_differs_by_little_stays_different(kind: str) -> None:
    """160 times, a minute apart: float32 knows three of them."""
    times = 1_700_000_000 + 60 * np.arange(160)
    data = Dataset(times.astype(kind)[:, None], np.arange(160) % 2, 2, "times")
    parts = prepare(data, 0.25)
    assert parts.test is not None
    x = np.concatenate([everything(parts.train), everything(parts.test)])[:, 0]
    assert x.dtype == np.float32
    assert len(np.unique(x)) == 160
    raw = times[np.asarray(parts.train.rows)]
    assert everything(parts.train).mean() == pytest.approx(0, abs=1e-6)
    expected = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(everything(parts.train)[:, 0], expected, rtol=1e-5, atol=1e-6)
    preprocessing = parts.train.preprocessing
    assert preprocessing is not None
    stored = preprocessing.tensors()
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float64)}
    again = Preprocessing.load(stored).apply(parts.train.raw(slice(None)))
    np.testing.assert_array_equal(again, everything(parts.train))


@pytest.mark.parametrize(
    ("shape", "measured"), [((4,), (4,)), ((5, 4), (1, 1)), ((3, 5, 4), (3, 1, 1))]
)
def test_images_are_standardised_by_channel(
    shape: tuple[int, ...], measured: tuple[int, ...]
) -> None:
    data = images(2500, *shape)
    found = Preprocessing.measure(data)
    assert found.mean.shape == found.deviation.shape == measured
    axes = (
        tuple(i for i, n in enumerate((0, *measured)) if i == 0 or n == 1)
        if len(shape) > 1
        else (0,)
    )
    x = np.asarray(data.x[slice(None)], np.float64)
    np.testing.assert_allclose(found.mean.ravel(), x.mean(axis=axes).ravel(), rtol=1e-6)
    np.testing.assert_allclose(found.deviation.ravel(), x.std(axis=axes).ravel(), rtol=1e-6)


def test_digits_keep_their_scale() -> None:
    parts = prepare(digits())
    assert parts.test is not None
    assert max(everything(parts.train).max(), everything(parts.test).max()) == 1.0


def test_preprocessing_is_what_was_stored() -> None:
    for found in (Preprocessing.measure(images(50, 3, 4, 4)), Preprocessing.scale(16)):
        again = Preprocessing.load(found.tensors())
        np.testing.assert_array_equal(again.mean, found.mean)
        np.testing.assert_array_equal(again.deviation, found.deviation)
    with pytest.raises(ValueError, match=r"preprocessing\.mean is missing"):
        Preprocessing.load({})
    bad = {**found.tensors(), "preprocessing.deviation": np.zeros(())}
    with pytest.raises(ValueError, match="positive deviations"):
        Preprocessing.load(bad)


# ---- augmentation ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)])
def test_augmentation_shifts_and_mirrors(shape: tuple[int, ...]) -> None:
    """Each result is one of the shifted or mirrored images, and all of those occur."""
    change = Augmentation(shift=1, flip=True)
    image = np.random.default_rng(1).random((1, *shape), np.float32) + 1
    found = change.apply(np.repeat(image, 400, axis=0), np.random.default_rng(0))
    edges = [(0, 0)] * (len(shape) - 2) + [(1, 1), (1, 1)]
    possible = set()
    for source in (image[0], image[0][..., ::-1]):
        padded = np.pad(source, edges)
        for dy in range(3):
            for dx in range(3):
                possible.add(padded[..., dy : dy + 6, dx : dx + 5].tobytes())
    assert {one.tobytes() for one in found} == possible


def test_augmentation_is_a_function_of_the_generator() -> None:
    data = replace(images(8, 5, 5), augmentation=Augmentation(2, True))
    plain = data.batch(slice(None))[0]
    a, b = (data.batch(slice(None), np.random.default_rng(3))[0] for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert (a != plain).any()
    assert (a != data.batch(slice(None), np.random.default_rng(4))[0]).any()


def test_only_the_training_part_is_augmented() -> None:
    parts = prepare(images(40, 5, 5), augmentation=Augmentation(1), validation_fraction=0.2)
    assert [part.augmentation for part in parts if part is not None] == [
        Augmentation(1),
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("flip", Augmentation(0, True)),
        ("shift=2", Augmentation(2)),
        (" shift=3, flip ", Augmentation(3, True)),
        ("shift=0", None),
    ],
)
def test_augmentation_is_read(text: str, expected: Augmentation | None) -> None:
    assert Augmentation.parse(text) == expected


@pytest.mark.parametrize("text", ["shift", "shift=-1", "shift=x", "flop", "flip=1", "rotate=3"])
def test_augmentation_that_there_is_not(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"--augment: expected shift=PIXELS or flip"):
        Augmentation.parse(text)


def test_augmentation_needs_images_that_are_large_enough() -> None:
    with pytest.raises(ArgumentError, match=r"expected images"):
        prepare(dataset([20, 20]), augmentation=Augmentation(1))
    with pytest.raises(ArgumentError, match=r"shift=5 moves images of 5 x 5 out of sight"):
        prepare(images(40, 5, 5), augmentation=Augmentation(5))
