"""Folders of IDX files as MNIST's: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-...

An IDX file is two zero bytes, a byte for the type, one for the number d of dimensions, d sizes
(u32, big-endian), then the elements in C order, big-endian (LeCun, Cortes and Burges, The MNIST
Database). Files may be compressed with gzip. The originals could not be fetched where this was
written; tests read files written after the specification.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.data.checks import check_file, checked_labels, checked_samples
from psframe.data.dataset import Dataset, Parts

__all__ = ["is_idx", "load_idx"]

_NAME = re.compile(r"(.*?)(train|t10k|test)-(images|labels)[-.]idx\d-ubyte(\.gz)?")
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DIMENSIONS_MAX = 8


def is_idx(folder: Path) -> bool:
    """Tell whether a folder holds files named as these are."""
    return any(_NAME.fullmatch(file.name) for file in folder.iterdir())


def load_idx(folder: Path, name: str, *, labelled: bool = True) -> Parts:
    """Read a folder; unless `labelled`, without its labels, and all samples are of one class.

    Raises:
        ValueError: a file is missing, or not what it should be.
    """
    where = f"data {name!r}"
    files: dict[tuple[str, str], Path] = {}
    prefixes = set()
    for file in sorted(folder.iterdir()):
        match = _NAME.fullmatch(file.name)
        if match:
            prefixes.add(match[1])
            files["train" if match[2] == "train" else "test", match[3]] = file
    if len(prefixes) > 1:
        raise ValueError(
            f"{where}: holds several datasets ({', '.join(sorted(prefixes))}); put each into a "
            "folder of its own"
        )
    parts: dict[str, Dataset | None] = {"test": None}
    for part in ("train", "test"):
        images, labels = (files.get((part, kind)) for kind in ("images", "labels"))
        if part == "test" and images is None and (labels is None or not labelled):
            continue
        if images is None or (labels is None and labelled):
            missing = "images" if images is None else "labels"
            raise ValueError(f"{where}: has no {part}-{missing} file")
        parts[part] = _part(images, labels if labelled else None, name, where)
    train, test = parts["train"], parts["test"]
    assert train is not None
    if test is not None:
        if test.n_classes > train.n_classes:
            raise ValueError(
                f"{where}: label {test.n_classes - 1} of the test part is not in the training part"
            )
        test = Dataset(test.x, test.y, train.n_classes, name)
    return Parts(train, None, test)


def _part(images: Path, labels: Path | None, name: str, where: str) -> Dataset:
    if labels is None:
        x = read_idx(images, where)
        if len(x) == 0:
            raise ValueError(f"{where}: {images.name}: holds no samples")
        x = checked_samples(x, len(x), where, images.name)
        return Dataset(x, np.zeros(len(x), np.int64), 1, name)
    y = checked_labels(read_idx(labels, where), where, labels.name)
    x = checked_samples(read_idx(images, where), len(y), where, images.name, labels.name)
    return Dataset(x, y, int(y.max()) + 1, name)


def read_idx(path: Path, where: str) -> npt.NDArray[Any]:
    """Read one file; its size is checked against its header before anything is allocated.

    Raises:
        ValueError: it is no such file.
    """
    size = check_file(path, where)
    where = f"{where}: {path.name}"
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            head = stream.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES:
                raise ValueError(f"{where}: is no IDX file: it begins with {head!r}")
            dimensions = head[3]
            if not 1 <= dimensions <= _DIMENSIONS_MAX:
                raise ValueError(f"{where}: has {dimensions} dimensions, expected 1 to 8")
            sizes = stream.read(4 * dimensions)
            if len(sizes) < 4 * dimensions:
                raise ValueError(f"{where}: is truncated in its header")
            shape = struct.unpack(f">{dimensions}I", sizes)
            dtype = np.dtype(_TYPES[head[2]])
            n_bytes = math.prod(shape) * dtype.itemsize
            held = size - 4 - len(sizes)
            # gzip packs at best about 1 : 1032.
            if (n_bytes > held * 1100) if packed else (n_bytes != held):
                raise ValueError(f"{where}: claims {n_bytes} bytes of shape {shape}, has {held}")
            data = stream.read(n_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{where}: is truncated or damaged: {error}") from error
    if len(data) != n_bytes:
        raise ValueError(f"{where}: has not the {n_bytes} bytes that its header claims")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
