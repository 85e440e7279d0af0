"""Files of every format, written here after its specification; and files that are damaged.

The originals of MNIST and CIFAR-10 cannot be fetched where these tests run.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psframe.data import Dataset, Parts, Preprocessing, load
from psframe.data.formats.shards import ShardedArray
from psframe.data.unlabelled import load_samples
from psframe.errors import ArgumentError

N = 12
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 3)).astype(np.float32)
Y = np.arange(N) % 3


def one(data: Dataset | Parts) -> Dataset:
    assert isinstance(data, Dataset)
    return data


def parts(data: Dataset | Parts) -> Parts:
    assert isinstance(data, Parts)
    return data


def same(data: Dataset, x: Any, y: Any) -> None:
    found, labels = data.batch(slice(None))
    np.testing.assert_array_equal(found, np.asarray(x, np.float32))
    np.testing.assert_array_equal(labels, y)


# ---- npz ---------------------------------------------------------------------------------------


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_npz(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npz", x=X, y=Y.astype(np.uint8), other=np.zeros(2))
    data = one(load(path))
    same(data, X, Y)
    assert data.n_classes == 3


def test_npz_in_parts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.npz",
        x_train=X,
        y_train=Y,
        x_test=X[:5],
        y_test=Y[:5],
        x_val=X[5:],
        y_val=Y[5:],
    )
    data = parts(load(path))
    same(data.train, X, Y)
    assert data.test is not None
    assert data.validation is not None
    same(data.test, X[:5], Y[:5])
    same(data.validation, X[5:], Y[5:])
    wrong = write(tmp_path / "w.npz", x_train=X, y_train=Y, x_test=X, y_test=Y + 1)
    with pytest.raises(
        ValueError, match=r"label 3 is not among the 3 classes of the training part"
    ):
        load(wrong)


def test_npz_with_channels_last(tmp_path: Path) -> None:
    x = RNG.integers(0, 255, size=(N, 6, 5, 3), dtype=np.uint8)
    data = one(load(write(tmp_path / "d.npz", x=x, y=Y)))
    assert data.input_shape == (3, 6, 5)
    same(data, np.moveaxis(x, -1, 1), Y)


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
        ({"x": GOOD_X, "y": GOOD_Y * 10**12}, ["label 1000000000000 at row 1", "only 4 samples"]),
        ({"x": GOOD_X, "y": GOOD_Y.reshape(2, 2)}, ["'y' has shape (2, 2)"]),
        ({"x": GOOD_X[:0], "y": GOOD_Y[:0]}, ["'y' is empty"]),
        ({"x": GOOD_X[:, 0], "y": GOOD_Y}, ["'x' has shape (4,)"]),
        ({"x": GOOD_X[:, :0], "y": GOOD_Y}, ["at least one feature"]),
        ({"x": GOOD_X.astype(complex), "y": GOOD_Y}, ["'x' has dtype complex128"]),
        ({"x": GOOD_X.astype(str), "y": GOOD_Y}, ["'x' has dtype <U", "expected real numbers"]),
        ({"x": GOOD_X[:0], "y_train": GOOD_Y}, ["expected arrays 'x' and 'y'", "found x, y_train"]),
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
    folder = shards(tmp_path / "s")
    np.save(folder / "a-x.npy", np.array([Trap(), 1], object))
    with pytest.raises(ValueError, match=r"a-x\.npy"):
        load(folder)


def test_files_that_are_no_data(tmp_path: Path) -> None:
    array = tmp_path / "a.npy"
    np.save(array, GOOD_X)
    empty, text = tmp_path / "empty.npz", tmp_path / "text.npz"
    empty.write_bytes(b"")
    text.write_text("1,2,3\n")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nobody writes: reading it would wait for ever
    (tmp_path / "folder").mkdir()
    for path, words in [
        (pipe, "no regular file"),
        (array, "this is a .npy"),
        (empty, "truncated"),
        (text, "is not an .npz file"),
        (tmp_path / "folder", "without data that is known; looked for"),
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


def claiming(path: Path, shape: tuple[int, ...]) -> Path:
    """An npz file whose members claim a shape that they do not hold."""
    header = io.BytesIO()
    fields = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
        archive.writestr("y.npy", header.getvalue())
    return path


@pytest.mark.parametrize("shape", [(1 << 50, 2), (1 << 24, 2), (3, 2)])
def test_a_header_that_claims_more_than_there_is(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = claiming(tmp_path / "bomb.npz", shape)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"bomb\.npz.*claims the shape"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_the_name_is_nearly_digits() -> None:
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load("digit")


# ---- CSV ---------------------------------------------------------------------------------------


def csv(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_without_a_header(tmp_path: Path, delimiter: str, end: str) -> None:
    rows = [[*map(repr, map(float, x)), str(y)] for x, y in zip(X, Y, strict=True)]
    text = "".join(delimiter.join(row) + end for row in rows)
    data = one(load(csv(tmp_path / "d.csv", text)))
    same(data, X, Y)
    assert data.classes == ("0", "1", "2")


def test_csv_with_names_and_quotes(tmp_path: Path) -> None:
    text = '\ufeff"kind, of",a,"b"\n"cat ""big""",1,2\n\ndog,3,-4e1\ncat,5,6\n'
    data = one(load(csv(tmp_path / "d.csv", text), "kind, of"))
    assert data.classes == ("cat", 'cat "big"', "dog")
    same(data, [[1, 2], [3, -40], [5, 6]], [1, 2, 0])
    with pytest.raises(ValueError, match=r"no column 'kind of'.*did you mean 'kind, of'"):
        load(tmp_path / "d.csv", "kind of")


def test_csv_labels_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    data = one(load(csv(tmp_path / "d.csv", "1,10\n2,9\n3,10\n")))
    assert data.classes == ("9", "10")
    assert data.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no samples"),
        ("a,b,c\n", "holds no samples"),
        ("1\n2\n", "line 1: expected at least two columns, got 1"),
        ("1,2,0\n3,4\n", "line 2: has 2 columns, expected 3"),
        ("a,b,y\n1,2,0\n3,x,1\n", "line 3, column 'b': expected a number, got 'x'"),
        ("1,2,0\n3,,1\n", "line 2, column '1': expected a number, got ''"),
        ("1,2,0\n3,nan,1\n", "line 2, column '1': nan is no finite number"),
        ("1,2,0\n\n3,inf,1\n", "line 3, column '1': inf is no finite number"),
        ("1,2,\n3,4,1\n", "line 1, column '2': the label is missing"),
        ("1,2,0\n1_000,4,1\n", "line 2, column '0': expected a number, got '1_000'"),
        ("1;2,5;0\n3;4;1\n", "line 1, column '1': expected a number, got '2,5'; write a decimal"),
        ("1,5;2,5;0\n3;4;1\n", "line 1, column '0': expected a number, got '1,5'; write a decimal"),
        ("a;b;y\n1;2,5;0\n", "line 2, column 'b': expected a number, got '2,5'; write a decimal"),
        ('1,2,0\n3,"4,0\n', "line 2: unexpected end of data"),
        ("1,1e300,0\n3,4,1\n", "too large for float32"),
        ("1," + "9" * 200_000 + ",0\n", "line 1: field larger than field limit"),
    ],
)
def test_csv_that_is_no_table(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"data '.*d\.csv'") as caught:
        load(csv(tmp_path / "d.csv", text))
    assert words in str(caught.value)


def test_numbers_keep_their_precision(tmp_path: Path) -> None:
    times = [1_700_000_000 + 60 * i for i in range(N)]
    text = "".join(f"{time},{y}\n" for time, y in zip(times, Y, strict=True))
    x = np.array(times)[:, None]
    for path in (
        csv(tmp_path / "d.csv", text),
        write(tmp_path / "f8.npz", x=x.astype("f8"), y=Y),
        write(tmp_path / "big.npz", x=x.astype(">f8"), y=Y),
        write(tmp_path / "i8.npz", x=x, y=Y),
    ):
        assert one(load(path)).raw(slice(None))[:, 0].tolist() == times
    wide = one(load(write(tmp_path / "g.npz", x=x.astype(np.longdouble), y=Y)))
    assert wide.x.dtype == np.float64


# ---- samples to be predicted -------------------------------------------------------------------


@pytest.mark.parametrize(
    "y", [np.array([1, 1]), np.array([7, 900]), np.array(["a", "b"]), np.array([0.5, np.nan]), None]
)
def test_labels_of_what_is_predicted_do_not_matter(tmp_path: Path, y: Any) -> None:
    labels = {} if y is None else {"y": y, "other": np.zeros(1)}
    path = write(tmp_path / "d.npz", x=X[:2], **labels)
    np.testing.assert_array_equal(one(load_samples(path, None, 3)).raw(slice(None)), X[:2])
    suffixed = {f"{name}_test": array for name, array in labels.items()}
    path = write(tmp_path / "p.npz", x_train=X, x_test=X[:1], **suffixed)
    found = parts(load_samples(path, None, 3))
    assert found.test is not None
    assert (len(found.train), len(found.test), found.validation) == (N, 1, None)


def test_labels_of_what_is_predicted_are_not_even_unpacked(tmp_path: Path) -> None:
    """Nor are samples unpacked twice."""
    path = write(tmp_path / "d.npz", x=X, y=np.array([Trap(), 1], object))
    opened: list[str] = []

    class Watched(zipfile.ZipFile):
        def open(self, name: Any, *args: Any, **how: Any) -> Any:
            opened.append(name.filename)
            return super().open(name, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZipFile", Watched)
        load_samples(path, None, 3)
    assert opened == ["x.npy", "x.npy"], "the header, and the array"


def test_samples_that_are_none(tmp_path: Path) -> None:
    for arrays, words in [
        ({"y": Y}, "expected an array 'x', or 'x_train', found y"),
        ({"x_test": X}, "expected an array 'x', or 'x_train', found x_test"),
        ({"x": X[:0]}, "'x' holds no samples"),
        ({"x": X[0, 0]}, "'x' holds no samples"),
        ({"x_train": NAN_X}, "'x_train' has nan at row 2"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_samples(write(tmp_path / "d.npz", **arrays), None, 3)
    with pytest.raises(ValueError, match="belongs to CSV or Parquet, this is npz"):
        load_samples(write(tmp_path / "d.npz", x=X, y=Y), "y", 3)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("1,2\n3,4\n", None),
        ("1,2,cat\n3,4,cat\n", None),
        ("1,2,\n3,4,\n", None),
        ("a,y,b\n1,,2\n3,dog,4\n", "y"),
    ],
)
def test_a_label_column_of_what_is_predicted_is_skipped(
    tmp_path: Path, text: str, label: str | None
) -> None:
    data = one(load_samples(csv(tmp_path / "d.csv", text), label, 2))
    np.testing.assert_array_equal(data.raw(slice(None)), [[1, 2], [3, 4]])


def test_a_table_of_one_feature_is_predicted(tmp_path: Path) -> None:
    data = one(load_samples(csv(tmp_path / "d.csv", "1\n3\n"), None, 1))
    np.testing.assert_array_equal(data.raw(slice(None)), [[1], [3]])


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"a": [1.0, 3.0], "b": [2, 4]}, None),
        ({"ab": [[1.0, 2.0], [3.0, 4.0]]}, None),
        ({"a": [1.0, 3.0], "b": [2, 4], "y": ["cat", None]}, None),
        ({"a": [1.0, 3.0], "y": [7, 7], "b": [2, 4]}, "y"),
    ],
)
def test_parquet_without_labels_that_matter(
    tmp_path: Path, columns: dict[str, Any], label: str | None
) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    data = one(load_samples(tmp_path / "d.parquet", label, 2))
    np.testing.assert_array_equal(data.raw(slice(None)), [[1, 2], [3, 4]])


def test_labels_of_one_class_can_be_evaluated(tmp_path: Path) -> None:
    """It is training that needs two; see the tests of `prepare`."""
    data = one(load(write(tmp_path / "d.npz", x=X[:1], y=np.array([2]))))
    assert (data.labels.tolist(), data.classes) == ([2], ("0", "1", "2"))
    data = one(load(csv(tmp_path / "d.csv", "1,2,cat\n3,4,cat\n")))
    assert (data.labels.tolist(), data.classes) == ([0, 0], ("cat",))
    train = {"x_train": X, "y_train": Y}
    path = write(tmp_path / "p.npz", **train, x_test=X[:2], y_test=np.array([2, 2]))
    held_out = parts(load(path)).test
    assert held_out is not None
    assert (held_out.labels.tolist(), held_out.n_classes) == ([2, 2], 3)


def test_csv_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b"1,2,\xff\n")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load(tmp_path / "d.csv")


def test_a_label_column_belongs_to_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="belongs to CSV or Parquet, this is npz"):
        load(write(tmp_path / "d.npz", x=X, y=Y), "y")


# ---- IDX ---------------------------------------------------------------------------------------

IMAGES = RNG.integers(0, 256, size=(N, 6, 5), dtype=np.uint8)


def idx(array: Any, code: int = 0x08) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    big = array.astype(array.dtype.newbyteorder(">"))
    return struct.pack(">HBB", 0, code, array.ndim) + sizes + big.tobytes()


def mnist(folder: Path, *, packed: bool = False, prefix: str = "", test: str = "t10k") -> Path:
    folder.mkdir()
    for part, n in (("train", N), (test, 5)):
        for kind, d, array in (("images", 3, IMAGES[:n]), ("labels", 1, Y[:n].astype(np.uint8))):
            name = f"{prefix}{part}-{kind}-idx{d}-ubyte"
            data = idx(array)
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("prefix", "test"), [("", "t10k"), ("emnist-balanced-", "test")])
def test_idx(tmp_path: Path, packed: bool, prefix: str, test: str) -> None:
    data = parts(load(mnist(tmp_path / "m", packed=packed, prefix=prefix, test=test)))
    same(data.train, IMAGES, Y)
    assert data.train.x.dtype == np.uint8
    assert data.test is not None
    same(data.test, IMAGES[:5], Y[:5])


@pytest.mark.parametrize(
    ("code", "dtype"), [(0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")]
)
def test_idx_of_other_types(tmp_path: Path, code: int, dtype: str) -> None:
    folder = mnist(tmp_path / "m")
    values = (IMAGES % 100).astype(dtype)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(values, code))
    same(parts(load(folder)).train, values, Y)


def test_idx_that_is_not(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "m")
    file = folder / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    for data, words in [
        (b"", "is no IDX file"),
        (b"\0\0\x08", "is no IDX file"),
        (b"\0\0\x07\x03" + whole[4:], "is no IDX file"),
        (b"\0\1\x08\x03" + whole[4:], "is no IDX file"),
        (b"\0\0\x08\xff" + whole[4:], "has 255 dimensions"),
        (whole[:9], "truncated in its header"),
        (whole[:-1], "claims 360 bytes"),
        (whole + b"\0", "claims 360 bytes"),
        (struct.pack(">HBBIII", 0, 8, 3, 2**31, 2**31, 9), "claims"),
        (idx(IMAGES[:4]), "has 4 samples, but 'train-labels-idx1-ubyte' has 12"),
    ]:
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte") as caught:
            load(folder)
        assert words in str(caught.value)
    file.unlink()
    with pytest.raises(ValueError, match="has no train-images file"):
        load(folder)
    mnist_like = mnist(tmp_path / "n", prefix="a-")
    (mnist_like / "b-train-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several datasets \(a-, b-\)"):
        load(mnist_like)


def test_gzip_that_unpacks_to_more_or_less(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "m", packed=True)
    file = folder / "train-images-idx3-ubyte.gz"
    whole = idx(IMAGES)
    for data in (whole + b"\0" * (1 << 20), whole[:-1]):
        file.write_bytes(gzip.compress(data))
        with pytest.raises(ValueError, match="has not the 360 bytes"):
            load(folder)
    huge = struct.pack(">HBBIII", 0, 8, 3, 1 << 20, 1 << 10, 1 << 10)
    file.write_bytes(gzip.compress(huge))
    with pytest.raises(ValueError, match=f"claims {1 << 40} bytes"):
        load(folder)
    file.write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load(folder)


def test_folders_to_be_predicted_need_no_labels(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "m")
    for file in folder.glob("*-labels-*"):
        file.unlink()
    found = parts(load_samples(folder, None, 30))
    assert found.test is not None
    np.testing.assert_array_equal(found.train.raw(slice(None)), IMAGES)
    np.testing.assert_array_equal(found.test.raw(slice(None)), IMAGES[:5])
    (folder / "train-images-idx3-ubyte").write_bytes(idx(IMAGES[:0]))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: holds no samples"):
        load_samples(folder, None, 30)
    with pytest.raises(ValueError, match="has no train-labels file"):
        load(folder)
    folder = shards(tmp_path / "s")
    for file in folder.glob("*-y.npy"):
        file.unlink()
    np.testing.assert_array_equal(parts(load_samples(folder, None, 3)).train.raw(slice(None)), X)
    with pytest.raises(ValueError, match=r"a-y\.npy: cannot be read"):
        load(folder)


# ---- CIFAR-10 ----------------------------------------------------------------------------------

PIXELS = RNG.integers(0, 256, size=(N, 3, 32, 32), dtype=np.uint8)


def cifar(folder: Path) -> Path:
    folder.mkdir()
    labels = (Y * 3).astype(np.uint8)
    records = [
        bytes([label]) + pixels.tobytes() for label, pixels in zip(labels, PIXELS, strict=True)
    ]
    (folder / "data_batch_1.bin").write_bytes(b"".join(records[:7]))
    (folder / "data_batch_2.bin").write_bytes(b"".join(records[7:]))
    (folder / "test_batch.bin").write_bytes(b"".join(records[:4]))
    (folder / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n\n")
    return folder


def test_cifar(tmp_path: Path) -> None:
    data = parts(load(cifar(tmp_path / "c")))
    same(data.train, PIXELS, Y * 3)
    assert (data.train.n_classes, data.train.classes[3]) == (10, "class3")
    assert data.train.x.dtype == np.uint8
    assert data.test is not None
    same(data.test, PIXELS[:4], Y[:4] * 3)


def test_cifar_that_is_not(tmp_path: Path) -> None:
    folder = cifar(tmp_path / "c")
    file = folder / "data_batch_2.bin"
    whole = file.read_bytes()
    for data, words in [
        (b"", "data_batch_2.bin: has 0 bytes"),
        (whole[:-1], "is it truncated?"),
        (whole[:3073] + b"\x0b" + whole[3074:], "record 1 has label 11, expected 0 to 9"),
    ]:
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"data '.*c'") as caught:
            load(folder)
        assert words in str(caught.value)


# ---- Parquet -----------------------------------------------------------------------------------


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    columns = {"a": X[:, 0].astype(float), "kind": [f"k{y}" for y in Y], "rest": X[:, 1:].tolist()}
    pq.write_table(pa.table(columns), path)
    data = one(load(path, "kind"))
    same(data, X, Y)
    assert data.classes == ("k0", "k1", "k2")
    for table, words in [
        ({"a": [1.0, None], "y": [0, 1]}, "column 'a': row 1 is missing"),
        ({"a": ["x", "z"], "y": [0, 1]}, "column 'a' is string, expected numbers"),
        ({"a": [[1.0], [1.0, 2.0]], "y": [0, 1]}, "lists of different lengths"),
        ({"a": [1.0, float("nan")], "y": [0, 1]}, "nan at row 1, column 0"),
        ({"a": [1.0, 2.0], "y": [0, None]}, "1 missing labels"),
        ({"y": [0, 1]}, "expected two or more columns"),
    ]:
        pq.write_table(pa.table(table), path)
        with pytest.raises(ValueError, match=r"d\.parquet") as caught:
            load(path)
        assert words in str(caught.value)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="not a Parquet file, or a damaged one"):
        load(path)


def test_parquet_with_a_column_twice(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    column = pa.array([1.0, 2.0])
    pq.write_table(pa.table([column] * 3, names=["a", "a", "y"]), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet': has 2 columns named 'a'; rename") as caught:
        load(tmp_path / "d.parquet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["name", "label", "list"])
def test_parquet_with_text_that_is_not_utf8(tmp_path: Path, where: str) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path, x = tmp_path / "d.parquet", [1.0, 2.0]
    offsets = pa.py_buffer(np.array([0, 1, 2], np.int32))
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\x93a")])
    if where == "list":
        x = pa.ListArray.from_arrays(pa.array([0, 1, 2]), text)
    pq.write_table(pa.table({"name": x, "y": text if where == "label" else [0, 1]}), path)
    if where == "name":
        path.write_bytes(path.read_bytes().replace(b"name", b"\x93ame"))
    with pytest.raises(ValueError, match=r"d\.parquet': holds text that is not UTF-8"):
        load(path)


def test_parquet_without_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"a": [1.0]}).select([]), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet': has 0 columns"):
        load(tmp_path / "d.parquet")


@pytest.mark.parametrize("labels", [[1, 2, 1], [100, 200, 100], [-3, 10, 9], [2, 1, 2]])
def test_a_table_is_the_same_as_parquet_and_as_csv(tmp_path: Path, labels: list[int]) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    x = [0.5, 1.5, 2.5]
    pq.write_table(pa.table({"a": x, "y": labels}), tmp_path / "d.parquet")
    text = "".join(f"{a},{y}\n" for a, y in zip(x, labels, strict=True))
    found, expected = one(load(tmp_path / "d.parquet")), one(load(csv(tmp_path / "d.csv", text)))
    assert found.classes == expected.classes
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.raw(slice(None)), expected.raw(slice(None)))
    assert found.x.dtype == expected.x.dtype


# ---- shards ------------------------------------------------------------------------------------


def shards(folder: Path, x: Any = X, **index: Any) -> Path:
    folder.mkdir()
    entries = []
    for name, rows in (("a", slice(0, 5)), ("b", slice(5, N))):
        np.save(folder / f"{name}-x.npy", x[rows])
        np.save(folder / f"{name}-y.npy", Y[rows])
        entries.append({"x": f"{name}-x.npy", "y": f"{name}-y.npy", "n": len(Y[rows])})
    whole = {"format": "psframe-shards", "version": 1, "classes": ["p", "q", "r"]}
    (folder / "index.json").write_text(json.dumps({**whole, "parts": {"train": entries}, **index}))
    return folder


def test_shards_are_mapped(tmp_path: Path) -> None:
    data = parts(load(shards(tmp_path / "s"))).train
    assert isinstance(data.x, ShardedArray)
    same(data, X, Y)
    assert data.classes == ("p", "q", "r")
    mixed = np.array([11, 0, 4, 5, 5, 9, 4])
    x, y = data.batch(mixed)
    np.testing.assert_array_equal(x, X[mixed])
    np.testing.assert_array_equal(y, Y[mixed])
    assert len(data.batch(np.array([], np.int64))[0]) == 0
    np.testing.assert_array_equal(data.batch(slice(3, 8))[0], X[3:8])


def test_shards_with_nan_are_found_when_they_are_read(tmp_path: Path) -> None:
    x = X.copy()
    x[7, 2] = np.nan
    data = parts(load(shards(tmp_path / "s", x))).train
    data.batch(slice(0, 5))
    with pytest.raises(ValueError, match=r"nan in sample 7, at \(2,\)"):
        data.batch(np.array([1, 7]))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"format": "other"}, "expected psframe-shards of version 1"),
        ({"version": 2}, "expected psframe-shards of version 1"),
        ({"parts": {}}, "expected a part 'train'"),
        ({"parts": {"train": [], "extra": []}}, "expected a part 'train'"),
        (
            {"parts": {"train": [{"x": "../a-x.npy", "y": "a-y.npy", "n": 5}]}},
            "files in this folder",
        ),
        ({"parts": {"train": [{"x": "a-x.npy", "y": "a-y.npy", "n": 6}]}}, "5 samples, expected 6"),
        ({"parts": {"train": [{"x": "a-x.npy", "y": "a-y.npy", "n": True}]}}, "expected"),
        ({"parts": {"train": [{"x": "a-x.npy"}]}}, "is no index of shards"),
        ({"classes": "pqr"}, "expected a list of classes' names, got 'pqr'"),
        ({"classes": ["p", "q", None]}, "expected a list of classes' names"),
        ({"classes": ["p", "q", "p"]}, "'p' is the name of more than one"),
        ({"classes": ["p", "q", "\ud800"]}, "a name is no text"),
        ({"parts": [1]}, "is no index of shards"),
        ({"parts": {"train": [{"x": "no.npy", "y": "a-y.npy", "n": 5}]}}, "no.npy: cannot be read"),
        ({"classes": ["one"]}, "labels from 0 to 2, expected 0 to 0"),
    ],
)
def test_an_index_that_makes_no_sense(tmp_path: Path, index: dict[str, Any], words: str) -> None:
    folder = shards(tmp_path / "s", **index)
    with pytest.raises(ValueError, match=r"data '.*s'") as caught:
        load(folder)
    assert words in str(caught.value)


def test_shards_that_are_cut_or_differ(tmp_path: Path) -> None:
    folder = shards(tmp_path / "s")
    (folder / "index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no index of shards"):
        load(folder)
    folder = shards(tmp_path / "t")
    whole = (folder / "b-x.npy").read_bytes()
    (folder / "b-x.npy").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"b-x\.npy: is truncated"):
        load(folder)
    np.save(folder / "b-x.npy", X[5:, :2])
    with pytest.raises(ValueError, match=r"b-x\.npy differs in shape or dtype"):
        load(folder)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (X[:, :0], "a-x.npy has shape (5, 0), expected at least one feature"),
        (X[:, 0], "a-x.npy has shape (5,)"),
    ],
)
def test_shards_without_features(tmp_path: Path, x: Any, words: str) -> None:
    folder = shards(tmp_path / "s", x)
    with pytest.raises(ValueError, match=r"data '.*s'") as caught:
        load(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "no finite number"), (1e300, "too large for float32")]
)
def test_values_of_shards_that_float32_does_not_hold(
    tmp_path: Path, value: float, words: str
) -> None:
    x = X.astype(np.float64)
    x[7, 2] = value
    train = parts(load(shards(tmp_path / "s", x))).train
    same(train.subset(np.arange(7)), X[:7], Y[:7])
    said = re.escape(f"'x' has {value} in sample 7, at (2,): {words}")
    with pytest.raises(ArgumentError, match=said):
        train.batch(slice(4, 9))
    with pytest.raises(ArgumentError, match=words):
        Preprocessing.measure(train)


# ---- npy ---------------------------------------------------------------------------------------


def broken_npy(kind: str) -> bytes:
    def saved(array: Any) -> bytes:
        stream = io.BytesIO()
        np.save(stream, array)
        return stream.getvalue()

    def headed(header: str) -> bytes:
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()

    packed = io.BytesIO()
    np.savez(packed, x=X)
    return {
        "zip": packed.getvalue(),
        "pickle": pickle.dumps(Trap()),
        "objects": saved(np.array([Trap()], object)),
        "cut": saved(X)[:-4],
        "cut header": saved(X)[:40],
        "empty": b"",
        "long header": headed("{" + " " * 20_000),
        "no header": headed("x" * 30),
        "negative": headed("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 3)}"),
        "huge": headed("{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 50, 3)}"),
        "claiming": headed(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 50}, 3)}}"),
        "several": headed("{'descr': '<5f', 'fortran_order': False, 'shape': (1, 3)}") + bytes(60),
        "open": headed("{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3"),
        "version": b"\x93NUMPY\x09\x00" + bytes(50),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("zip", "is an .npz file, not a .npy; name it .npz"),
        ("pickle", "is truncated or no .npy file"),
        ("objects", "holds an array of Python objects, which is never unpickled; save numbers"),
        ("cut", "claims the shape (12, 3) of float32 and holds 140 bytes"),
        ("cut header", "has a damaged header"),
        ("empty", "is truncated or no .npy file"),
        ("long header", "has a damaged header"),
        ("no header", "has a damaged header"),
        ("negative", "has a damaged header: its shape is (-2, 3)"),
        ("huge", "has a damaged header"),
        ("claiming", "claims the shape"),
        ("several", "has a damaged header: its dtype is ('<f4', (5,))"),
        ("open", "has a damaged header"),
        ("version", "unknown version (9, 0)"),
    ],
)
def test_npy_that_is_none(tmp_path: Path, kind: str, words: str) -> None:
    """As samples to be predicted, and as a shard; NumPy's advice to unpickle is not passed on."""
    (tmp_path / "d.npy").write_bytes(broken_npy(kind))
    with pytest.raises(ValueError, match=r"data '.*d\.npy': ") as caught:
        load_samples(tmp_path / "d.npy", None, 3)
    folder = shards(tmp_path / "s")
    (folder / "a-x.npy").write_bytes(broken_npy(kind))
    with pytest.raises(ValueError, match=r"data '.*s': a-x\.npy: ") as in_shards:
        load(folder)
    for message in (str(caught.value), str(in_shards.value)):
        assert words in message
        assert "allow_pickle" not in message
        assert "\n" not in message


def test_npz_with_a_long_header(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", broken_npy("long header"))
    with pytest.raises(ValueError, match=r"'x': has a damaged header") as caught:
        load(tmp_path / "d.npz")
    assert "allow_pickle" not in str(caught.value)


def test_an_npz_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    """65 MiB of zeros in 65 KiB: all is written and refused without being held at once."""
    path, block = tmp_path / "d.npz", bytes(1 << 20)
    header = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": (65, 1 << 20)}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x.npy", "w") as stream:
            stream.write(header.getvalue())
            for _ in range(65):
                stream.write(block)
        archive.writestr("y.npy", b"")
    tracemalloc.start()
    try:
        for read in (load, lambda p: load_samples(p, None, 1 << 20)):
            with pytest.raises(ValueError, match=r"'x' has .* bytes that unpack to 68,157,5") as e:
                read(path)
            assert "numpy.savez" in str(e.value)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_small_npz_may_be_packed_as_well_as_it_can_be(tmp_path: Path) -> None:
    x = np.zeros((1000, 1000))
    x[7] = 1
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=x, y=np.arange(1000) % 2)
    assert path.stat().st_size * 500 < x.nbytes
    same(one(load(path)), x, np.arange(1000) % 2)


# ---- whatever comes ----------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 500))
@pytest.mark.parametrize("kind", ["npz", "idx", "cifar", "shards", "csv"])
def test_mutations_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, at: int, byte: int, cut: int
) -> None:
    """Never anything but data or a ValueError, and never much memory."""
    base = tmp_path_factory.mktemp("m")
    if kind == "npz":
        source = target = write(base / "d.npz", x=X, y=Y)
    elif kind == "csv":
        source = target = csv(base / "d.csv", "a,b,y\n1,2,0\n3,4,1\n" * 3)
    else:
        make = {"idx": mnist, "cifar": cifar, "shards": shards}[kind]
        source = make(base / kind)
        name = {
            "idx": "train-labels-idx1-ubyte",
            "cifar": "data_batch_1.bin",
            "shards": "index.json",
        }
        target = source / name[kind]
    data = bytearray(target.read_bytes())
    data[at % len(data)] = byte
    target.write_bytes(data[: max(len(data) - cut, 0)] if cut > 250 else data)
    said = str(source)
    tracemalloc.start()
    try:
        load(source)
    except ValueError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert str(source) in said
    assert peak < 8 << 20
