"""A folder of `.npy` files that are memory-mapped, for data larger than memory.

`index.json` says what there is:

    {"format": "psframe-shards", "version": 1, "classes": ["cat", ...],
     "parts": {"train": [{"x": "train-00000-x.npy", "y": "train-00000-y.npy", "n": 4096}, ...],
               "test": [...]}}

with x of (n, *input_shape), the same shape and dtype in all of them, and y (n,) int64.
`python -m psframe.data convert` writes such folders.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.data.checks import check_classes, check_file
from psframe.data.dataset import Dataset, Parts
from psframe.data.formats.npy import load_npy

__all__ = ["INDEX", "ShardedArray", "is_shards", "load_shards"]

INDEX = "index.json"
_FORMAT, _VERSION = "psframe-shards", 1
_INDEX_BYTES_MAX = 64 << 20


def is_shards(folder: Path) -> bool:
    """Tell whether a folder has an index."""
    return (folder / INDEX).exists()


class ShardedArray:
    """Samples in several memory-mapped files, one after the other.

    Args:
        shards: (n_i, *input_shape) arrays of one dtype.
    """

    def __init__(self, shards: list[npt.NDArray[Any]]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *shards[0].shape[1:])
        self.dtype: np.dtype[Any] = shards[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> npt.NDArray[Any]:
        """Copy the samples of a slice or of int64 indices, each file read in its order."""
        wanted = (
            np.arange(len(self))[indices] if isinstance(indices, slice) else np.asarray(indices)
        )
        result = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        cuts = np.searchsorted(ordered, [0, *self._ends])
        for shard, begin, end, first in zip(
            self._shards, cuts[:-1], cuts[1:], [0, *self._ends[:-1]], strict=True
        ):
            if begin < end:
                result[order[begin:end]] = shard[ordered[begin:end] - first]
        return result


def load_shards(folder: Path, name: str, *, labelled: bool = True) -> Parts:
    """Open a folder; samples are read when they are asked for.

    Unless `labelled`, labels are not read, and all samples are of one class.

    Raises:
        ValueError: the index, or a file that it names, is not what it should be.
    """
    where = f"data {name!r}"
    if check_file(folder / INDEX, where) > _INDEX_BYTES_MAX:
        raise ValueError(f"{where}: {INDEX} is larger than {_INDEX_BYTES_MAX} bytes")
    try:
        index = json.loads((folder / INDEX).read_bytes())
        if index["format"] != _FORMAT or index["version"] != _VERSION:
            raise ValueError(f"expected {_FORMAT} of version {_VERSION}")
        classes = _class_names(index["classes"])
        listed = {part: [_entry(e) for e in entries] for part, entries in index["parts"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {INDEX} is no index of shards: {error!r}") from error
    unknown = set(listed) - {"train", "validation", "test"}
    if unknown or not listed.get("train"):
        raise ValueError(f"{where}: {INDEX}: expected a part 'train', found {sorted(listed)}")
    if not labelled:
        classes = ("0",)
    parts = {
        part: _part(folder, entries, classes, name, where, labelled)
        for part, entries in listed.items()
        if entries
    }
    return Parts(parts["train"], parts.get("validation"), parts.get("test"))


def _class_names(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(c, (str, int)) for c in found):
        raise ValueError(f"expected a list of classes' names, got {reprlib.repr(found)}")
    names = tuple(map(str, found))
    check_classes(names)
    return names


def _entry(entry: Any) -> tuple[str, str, int]:
    x, y, n = entry["x"], entry["y"], entry["n"]
    for file in (x, y):
        if not isinstance(file, str) or file != Path(file).name:
            raise ValueError(f"expected names of files in this folder, got {file!r}")
    if type(n) is not int or n < 1:
        raise ValueError(f"expected a count of samples, got {n!r}")
    return x, y, n


def _part(
    folder: Path,
    entries: list[tuple[str, str, int]],
    classes: tuple[str, ...],
    name: str,
    where: str,
    labelled: bool,
) -> Dataset:
    shards: list[npt.NDArray[Any]] = []
    labels = []
    for x_file, y_file, n in entries:
        x = _open(folder / x_file, where)
        y = _open(folder / y_file, where) if labelled else np.zeros(n, np.int64)
        for file, array in ((x_file, x), (y_file, y)):
            if len(array) != n:
                raise ValueError(f"{where}: {file} has {len(array)} samples, expected {n}")
        if x.dtype.kind not in "iubf" or x.ndim < 2:
            raise ValueError(
                f"{where}: {x_file} has shape {x.shape} of {x.dtype}, expected numbers"
            )
        if 0 in x.shape[1:]:
            raise ValueError(
                f"{where}: {x_file} has shape {x.shape}, expected at least one feature"
            )
        if shards and (x.shape[1:], x.dtype) != (shards[0].shape[1:], shards[0].dtype):
            raise ValueError(f"{where}: {x_file} differs in shape or dtype from the first shard")
        if y.ndim != 1 or y.dtype.kind not in "iu":
            raise ValueError(f"{where}: {y_file} has shape {y.shape} of {y.dtype}, expected labels")
        if int(y.min()) < 0 or int(y.max()) >= len(classes):
            raise ValueError(
                f"{where}: {y_file} has labels from {y.min()} to {y.max()}, expected 0 to "
                f"{len(classes) - 1}"
            )
        shards.append(x)
        labels.append(np.asarray(y, np.int64))
    sharded = ShardedArray(shards)
    whole = sharded.dtype.kind != "f"
    y = np.concatenate(labels)
    return Dataset(sharded, y, len(classes), name, classes, checked=whole)


def _open(file: Path, where: str) -> npt.NDArray[Any]:
    array = load_npy(file, f"{where}: {file.name}", mapped=True)
    if array.ndim < 1:
        raise ValueError(f"{where}: {file.name}: expected an array")
    return array
