"""NumPy's `.npz`: arrays x and y, or x_train and y_train, x_test and y_test, x_validation, ...

Nothing is unpickled, and nothing is allocated before a member is known to hold what its header
claims.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.data.checks import check_file, checked_labels, checked_samples
from psframe.data.dataset import Dataset, Parts
from psframe.data.formats.npy import read_header

__all__ = ["channels_first", "load_npz", "load_npz_samples", "unlabelled"]

_PARTS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
_SAMPLES = {"x"} | {f"x_{suffix}" for names in _PARTS.values() for suffix in names}
# A member larger than the first and packed to less than a part of the second is no data: it would
# fill the memory of every rank.
_UNPACKED_MIN, _RATIO_MAX = 64 << 20, 500
_MEMBERS = _SAMPLES | {name.replace("x", "y", 1) for name in _SAMPLES}


def load_npz(path: Path, name: str) -> Dataset | Parts:
    """Read an npz file.

    Raises:
        ValueError: it is no such file, or not such data.
    """
    where = f"data {name!r}"
    arrays = _read_members(path, where, _MEMBERS)
    if "x" in arrays and "y" in arrays:
        return _part(arrays, "x", "y", name, where)
    parts: dict[str, Dataset | None] = {}
    for part, suffixes in _PARTS.items():
        keys = [(f"x_{s}", f"y_{s}") for s in suffixes]
        found = next(((x, y) for x, y in keys if x in arrays and y in arrays), None)
        parts[part] = None if found is None else _part(arrays, *found, name, where)
    train = parts["train"]
    if train is None:
        found_names = ", ".join(arrays) or "nothing"
        raise ValueError(
            f"{where}: expected arrays 'x' and 'y', or 'x_train' and 'y_train', found {found_names}"
        )
    return Parts(*_same_classes([train, parts["validation"], parts["test"]], where))


def load_npz_samples(path: Path, name: str) -> Dataset | Parts:
    """Read an npz file without its labels; all samples are of one class then.

    Raises:
        ValueError: it is no such file, or holds no samples.
    """
    where = f"data {name!r}"
    arrays = _read_members(path, where, _SAMPLES)
    if "x" in arrays:
        return unlabelled(arrays["x"], name, where, "x")
    parts: dict[str, Dataset] = {}
    for part, suffixes in _PARTS.items():
        key = next((f"x_{s}" for s in suffixes if f"x_{s}" in arrays), None)
        if key is not None:
            parts[part] = unlabelled(arrays[key], name, where, key)
    if "train" not in parts:
        found_names = ", ".join(arrays) or "nothing"
        raise ValueError(f"{where}: expected an array 'x', or 'x_train', found {found_names}")
    return Parts(**parts)


def unlabelled(x: npt.NDArray[Any], name: str, where: str, member: str = "x") -> Dataset:
    """Make a dataset of samples alone, all of one class.

    Raises:
        ValueError: they are no samples.
    """
    if x.ndim < 1 or len(x) == 0:
        raise ValueError(f"{where}: {member!r} holds no samples")
    x = channels_first(checked_samples(x, len(x), where, member))
    return Dataset(x, np.zeros(len(x), np.int64), 1, name)


def _part(arrays: dict[str, npt.NDArray[Any]], x: str, y: str, name: str, where: str) -> Dataset:
    labels = checked_labels(arrays[y], where, y)
    samples = checked_samples(arrays[x], len(labels), where, x, y)
    return Dataset(channels_first(samples), labels, int(labels.max()) + 1, name)


def channels_first(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Turn images with channels last, as most libraries keep them, into (n, c, h, w)."""
    last = x.ndim == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4)
    return np.moveaxis(x, -1, 1) if last else x


def _same_classes(parts: list[Any], where: str) -> list[Any]:
    """Give all parts the training part's classes."""
    train = parts[0]
    for part in parts[1:]:
        if part is not None and part.n_classes > train.n_classes:
            label = part.n_classes - 1
            raise ValueError(
                f"{where}: label {label} is not among the {train.n_classes} classes of the "
                "training part"
            )
    return [None if p is None else _with_classes(p, train.n_classes) for p in parts]


def _with_classes(part: Dataset, count: int) -> Dataset:
    return Dataset(part.x, part.y, count, part.name)


def _read_members(path: Path, where: str, wanted: Set[str]) -> dict[str, npt.NDArray[Any]]:
    """Read the members that are wanted; others are only listed, as empty arrays.

    Raises:
        ValueError: it is no npz file, or a damaged one.
    """
    check_file(path, where)
    try:
        with path.open("rb") as stream:
            _check_magic(stream.read(6), where)
            stream.seek(0)
            with zipfile.ZipFile(stream) as members:
                return {
                    info.filename.removesuffix(".npy"): _member(members, info, where, wanted)
                    for info in members.infolist()
                }
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise ValueError(f"{where}: does not fit into memory: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        raise _damaged(where, error) from error
    except (ValueError, NotImplementedError, TypeError, SyntaxError) as error:
        if str(error).startswith(where):
            raise
        raise _damaged(where, error) from error


def _damaged(where: str, error: Exception) -> ValueError:
    return ValueError(f"{where}: is truncated or damaged: {str(error) or 'it ends early'}")


def _member(
    members: zipfile.ZipFile, info: zipfile.ZipInfo, where: str, wanted: Set[str]
) -> npt.NDArray[Any]:
    name = info.filename.removesuffix(".npy")
    if name not in wanted:
        return np.empty(0)
    if info.file_size > max(_UNPACKED_MIN, _RATIO_MAX * info.compress_size):
        raise ValueError(
            f"{where}: {name!r} has {info.compress_size:,} bytes that unpack to "
            f"{info.file_size:,}, more than {_RATIO_MAX} times as many; if that is right, save it "
            "with numpy.savez, not packed"
        )
    with members.open(info) as stream:
        shape, dtype = read_header(stream, f"{where}: {name!r}")
        held = info.file_size - stream.tell()
        if math.prod(shape) * dtype.itemsize != held:
            raise ValueError(
                f"{where}: is truncated or damaged: {name!r} claims the shape {shape} of {dtype} "
                f"and holds {held} bytes"
            )
    with members.open(info) as stream:
        array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        return array


def _check_magic(magic: bytes, where: str) -> None:
    if magic == b"\x93NUMPY":
        raise ValueError(f"{where}: expected an .npz file with 'x' and 'y', this is a .npy")
    if not magic.startswith(b"PK"):
        raise ValueError(f"{where}: is not an .npz file, or a truncated one")
