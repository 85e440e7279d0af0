"""Datasets: what is read, what is refused and how that is said, splits and scaling."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe.data import Dataset, Scaling, load, prepare, split


def write(path: Path, **arrays: Any) -> Path:
    """Write an npz file."""
    np.savez(path, **arrays)
    return path


def dataset(counts: list[int], features: int = 3) -> Dataset:
    """Make a dataset with so many samples of each class, each sample different."""
    y = np.repeat(np.arange(len(counts)), counts)
    x = np.arange(len(y) * features, dtype=np.float32).reshape(len(y), features)
    return Dataset(x, y, len(counts), "made")


def test_digits() -> None:
    data = load("digits")
    assert (data.x.shape, data.x.dtype) == ((1797, 8, 8), np.float32)
    assert (data.y.shape, data.y.dtype) == ((1797,), np.int64)
    assert (data.n_classes, data.input_shape, len(data)) == (10, (8, 8), 1797)
    assert (float(data.x.min()), float(data.x.max())) == (0.0, 1.0)
    assert np.bincount(data.y).min() > 150


def test_npz(tmp_path: Path) -> None:
    x = np.arange(12).reshape(4, 3)
    path = write(tmp_path / "d.npz", x=x, y=np.array([0, 1, 2, 1], np.uint8), other=np.zeros(2))
    data = load(path)
    np.testing.assert_array_equal(data.x, x)
    assert data.x.dtype == np.float32
    assert data.y.tolist() == [0, 1, 2, 1]
    assert (data.n_classes, data.scaled) == (3, False)


GOOD_X, GOOD_Y = np.ones((4, 2)), np.array([0, 1, 0, 1])
NAN_X = GOOD_X.copy()
NAN_X[2, 1] = np.nan
IMAGE_X = np.ones((4, 2, 3))
IMAGE_X[1, 0, 2] = -np.inf


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": GOOD_X}, ["expected arrays 'x' and 'y'", "found x"]),
        ({}, ["found nothing"]),
        ({"x": GOOD_X, "y": GOOD_Y[:3]}, ["'x' has 4 samples, but 'y' has 3 labels"]),
        ({"x": NAN_X, "y": GOOD_Y}, ["'x' has nan at row 2, column 1: no finite number"]),
        ({"x": IMAGE_X, "y": GOOD_Y}, ["-inf at row 1, column (0, 2)"]),
        ({"x": GOOD_X * 1e300, "y": GOOD_Y}, ["row 0, column 0: too large for float32", "8 such"]),
        ({"x": GOOD_X, "y": GOOD_Y + 0.5}, ["'y' has dtype float64, expected integers"]),
        ({"x": GOOD_X, "y": GOOD_Y - 1}, ["label -1 at row 0"]),
        ({"x": GOOD_X, "y": GOOD_Y * 900}, ["label 900 at row 1", "only 4 samples"]),
        ({"x": GOOD_X, "y": GOOD_Y * 0}, ["only one class, 0"]),
        ({"x": GOOD_X, "y": GOOD_Y.reshape(2, 2)}, ["'y' has shape (2, 2)"]),
        ({"x": GOOD_X[:0], "y": GOOD_Y[:0]}, ["'y' is empty"]),
        ({"x": GOOD_X[:, 0], "y": GOOD_Y}, ["'x' has shape (4,)"]),
        ({"x": GOOD_X[:, :0], "y": GOOD_Y}, ["at least one feature"]),
        ({"x": GOOD_X.astype(complex), "y": GOOD_Y}, ["'x' has dtype complex128"]),
        ({"x": GOOD_X.astype(str), "y": GOOD_Y}, ["'x' has dtype <U", "expected real numbers"]),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], words: list[str]) -> None:
    path = write(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=r"bad\.npz") as caught:
        load(path)
    for word in words:
        assert word in str(caught.value)


class Trap:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.npz", x=np.array([Trap(), 1], object), y=GOOD_Y)
    with pytest.raises(ValueError, match=r"bad.npz.*Python objects, which is never unpickled"):
        load(path)
    plain = tmp_path / "bad.pkl"
    plain.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"bad.pkl.*is not an .npz file"):
        load(plain)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    array = tmp_path / "a.npy"
    np.save(array, GOOD_X)
    empty, text = tmp_path / "empty.npz", tmp_path / "text.npz"
    empty.write_bytes(b"")
    text.write_text("1,2,3\n")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nobody writes: reading it would wait for ever
    for path, words in [
        (pipe, "no regular file"),
        (array, "this is a .npy"),
        (empty, "truncated"),
        (text, "is not an .npz file"),
        (tmp_path, "this is a directory"),
        (tmp_path / "none.npz", "no such file"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            load(path)
        assert path.name in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.npz", x=GOOD_X, y=GOOD_Y).read_bytes()
    path = tmp_path / "cut.npz"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.npz"):
            load(path)


def test_a_damaged_member_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=np.arange(400.0).reshape(200, 2), y=np.arange(200) % 2)
    data = bytearray(path.read_bytes())
    data[100] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"d.npz.*damaged"):
        load(path)


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    header = io.BytesIO()
    fields = {"descr": "<f8", "fortran_order": False, "shape": (1 << 50, 2)}
    np.lib.format.write_array_header_1_0(header, fields)
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
        archive.writestr("y.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"bomb\.npz"):
        load(path)


def test_the_name_is_nearly_digits() -> None:
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load("digit")


@pytest.mark.parametrize("seed", range(5))
def test_split_parts_the_samples_in_proportion(seed: int) -> None:
    data = dataset([50, 33, 7, 10])
    train, test = split(data, 0.2, seed)
    assert (len(train), len(test)) == (80, 20)
    rows = np.concatenate([train.x[:, 0], test.x[:, 0]])
    np.testing.assert_array_equal(np.sort(rows), data.x[:, 0])
    shares = np.bincount(test.y, minlength=4) - np.array([10, 6.6, 1.4, 2])
    assert np.abs(shares).max() < 1
    again = split(data, 0.2, seed)
    np.testing.assert_array_equal(again[1].x, test.x)


def test_split_depends_on_the_seed() -> None:
    data = dataset([50, 50])
    assert (split(data, seed=0)[1].x != split(data, seed=1)[1].x).any()


def test_split_of_digits_holds_out_360() -> None:
    train, test = split(load("digits"))
    assert (len(train), len(test)) == (1437, 360)


def test_split_keeps_each_class_in_the_training_part() -> None:
    train, _ = split(dataset([30, 1, 2]), 0.5)
    assert set(train.y) == {0, 1, 2}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_split_refuses_a_fraction_that_is_none(fraction: float) -> None:
    with pytest.raises(ValueError, match="test_fraction"):
        split(dataset([5, 5]), fraction)


def test_split_refuses_what_is_too_small() -> None:
    with pytest.raises(ValueError, match=r"made: 2 samples of 2 classes are too few"):
        split(dataset([1, 1]), 0.5)


def test_scaling_is_measured_on_the_training_part_alone() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200, 3)) * [1, 50, 0] + [5, -7, 3.3]).astype(np.float32)
    data = Dataset(x, np.arange(200) % 2, 2, "made")
    plain_train, plain_test = split(data, 0.25, 3)
    train, test = prepare(data, 0.25, 3)
    np.testing.assert_allclose(train.x.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(train.x.std(axis=0), [1, 1, 0], atol=1e-4)
    mean, deviation = plain_train.x.mean(axis=0), plain_train.x.std(axis=0)
    expected = (plain_test.x[:, :2] - mean[:2]) / deviation[:2]
    np.testing.assert_allclose(test.x[:, :2], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(Scaling.of(plain_train).deviation[2], 1)
    assert train.scaled
    assert train.x.dtype == np.float32


def test_digits_keep_their_scale() -> None:
    train, test = prepare(load("digits"))
    assert max(train.x.max(), test.x.max()) == 1.0
    assert min(train.x.min(), test.x.min()) == 0.0
