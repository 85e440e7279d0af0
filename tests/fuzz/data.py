"""Fuzz what is read of data files: npz, npy, csv, IDX, CIFAR, shards of npy, Parquet.

    python -m pip install atheris
    PYTHONPATH=. python tests/fuzz/data.py -max_total_time=60

Only a ValueError that names the data may come out, or samples that are finite, with labels in
range; and what is allocated is in proportion to the file (the fuzzer ends at 1 GiB).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["psframe.data", "zipfile", "csv", "numpy.lib"]):
    import numpy as np

    from psframe.data import Dataset, Parts, load
    from psframe.data.unlabelled import load_samples

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    pa = None

FEATURES = 3
X = np.arange(12, dtype=np.float32).reshape(4, FEATURES)
Y = np.array([0, 1, 0, 1])
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
INDEX = {
    "format": "psframe-shards",
    "version": 1,
    "classes": ["a", "b"],
    "parts": {"train": [{"x": "x.npy", "y": "y.npy", "n": 4}]},
}


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def idx(array: Any) -> bytes:
    array = np.asarray(array, np.uint8)
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def parquet(**columns: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


# By the first byte of an input: the file that the rest of it is written to, what else there must be
# beside it, and examples.
KINDS: list[tuple[str, dict[str, bytes], list[bytes]]] = [
    ("d.npz", {}, [npz(x=X, y=Y), npz(x_train=X, y_train=Y, x_test=X, y_test=Y)]),
    ("d.npy", {}, [npy(X), npy(np.zeros((2, 4, 4, 3), np.uint8))]),
    ("d.csv", {}, [b"a,b,c,label\n1,2,3,x\n4,5,6,y\n", b'1;2;3;"0"\n4;5;6;1\n']),
    (f"idx/{IMAGES}", {f"idx/{LABELS}": idx(Y)}, [idx(np.zeros((4, 2, 2)))]),
    (f"idx/{LABELS}", {f"idx/{IMAGES}": idx(np.zeros((4, 2, 2)))}, [idx(Y)]),
    (
        f"idx/{IMAGES}.gz",
        {f"idx/{LABELS}": idx(Y)},
        [gzip.compress(idx(np.zeros((4, 2, 2))), 0, mtime=0)],
    ),
    ("cifar/data_batch_1.bin", {}, [bytes(3073), bytes([3]) + bytes(3072) + bytes([1]) * 3073]),
    (
        "cifar/batches.meta.txt",
        {"cifar/data_batch_1.bin": bytes(3073)},
        [b"cat\ndog\nc\nd\ne\nf\ng\nh\ni\nj\n"],
    ),
    (
        "shards/index.json",
        {"shards/x.npy": npy(X), "shards/y.npy": npy(Y)},
        [json.dumps(INDEX).encode()],
    ),
    (
        "shards/x.npy",
        {"shards/index.json": json.dumps(INDEX).encode(), "shards/y.npy": npy(Y)},
        [npy(X), npy(X.astype(np.int16))],
    ),
    (
        "shards/y.npy",
        {"shards/index.json": json.dumps(INDEX).encode(), "shards/x.npy": npy(X)},
        [npy(Y), npy(Y.astype(np.uint8))],
    ),
]
if pa is not None:
    KINDS.append(("d.parquet", {}, [parquet(a=[1.0, 2.0], b=[[1, 2], [3, 4]], label=["x", "y"])]))


def check(data: Dataset | Parts) -> None:
    """Samples are finite, and labels in range."""
    if isinstance(data, Parts):
        for part in (data.train, data.validation, data.test):
            if part is not None:
                check(part)
        return
    x, y = data.batch(slice(None))
    assert x.dtype == np.float32
    assert np.isfinite(x).all()
    assert len(x) == len(y) == len(data) > 0
    assert 0 <= y.min() <= y.max() < data.n_classes == len(data.classes)


def refused(read: Callable[[], Dataset | Parts]) -> bool:
    """Read data; True if they are none, and the error says of which file."""
    try:
        check(read())
    except ValueError as error:
        if not str(error).startswith("data "):
            raise
        return True
    return False


class Files:
    """A folder for each kind, with all that there must be but the file that is replaced."""

    def __init__(self, folder: Path) -> None:
        self.paths = []
        for number, (name, others, _) in enumerate(KINDS):
            for other, data in others.items():
                write(folder / str(number) / other, data)
            self.paths.append(folder / str(number) / name)

    def fuzz(self, kind: int, data: bytes) -> bool:
        """Put it into the file; True if what comes of it is refused."""
        path = self.paths[kind]
        write(path, data)
        source = path.parent if "/" in KINDS[kind][0] else path
        labelled = refused(lambda: load(source))
        return refused(lambda: load_samples(source, None, FEATURES)) and labelled


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def examples() -> Iterator[tuple[int, bytes]]:
    for number, (_, _, wholes) in enumerate(KINDS):
        yield from ((number, whole) for whole in wholes)


def fuzz(folder: Path, seeds: Path) -> None:
    files = Files(folder)
    for number, (kind, example) in enumerate(examples()):
        assert not files.fuzz(kind, example), f"{KINDS[kind][0]} is refused as it is"
        (seeds / str(number)).write_bytes(bytes([kind]) + example)

    def one(data: bytes) -> None:
        if data:
            files.fuzz(data[0] % len(KINDS), data[1:])

    options = ["-max_len=8192", "-rss_limit_mb=1024"]
    atheris.Setup([sys.argv[0], str(seeds), *options, *sys.argv[1:]], one)
    atheris.Fuzz()


def main() -> None:
    """Fuzz in a child: the fuzzer leaves its process without a word to those that wait in it."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        tempfile.TemporaryDirectory() as seeds,
    ):
        child = os.fork()
        if child == 0:
            fuzz(Path(folder), Path(seeds))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status)


if __name__ == "__main__":
    main()
