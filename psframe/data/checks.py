"""What every format checks of samples and labels; errors name the file, the row and the column."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "check_classes",
    "check_file",
    "check_trainable",
    "checked_labels",
    "checked_samples",
    "numbered",
]

# From here on a label must be less than the number of samples: each class costs a name.
_CLASSES_MAX = 1 << 16


def check_file(path: Path, where: str) -> int:
    """Give the size of a regular file in bytes, without opening it.

    Raises:
        ValueError: it is not there, or is no regular file (a pipe would keep every rank waiting).
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{where}: {path}: cannot be read: {reason}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{where}: {path}: is no regular file")
    return found.st_size


def check_classes(classes: Sequence[str]) -> None:
    """See that names of classes tell them apart, and can be written.

    Raises:
        ValueError: two are equal, or one is no text in Unicode.
    """
    seen: set[str] = set()
    for name in classes:
        if name in seen:
            raise ValueError(f"classes: {name!r} is the name of more than one")
        seen.add(name)
    try:
        "".join(classes).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"classes: a name is no text: {error.reason}") from error


def checked_labels(y: npt.NDArray[Any], where: str, name: str = "y") -> npt.NDArray[np.int64]:
    """Check labels that are class numbers; whether one can train on them, `check_trainable` tells.

    Raises:
        ValueError: they are not one integer a sample, from 0 on.
    """
    if y.ndim != 1:
        raise ValueError(
            f"{where}: {name!r} has shape {y.shape}, expected one label a sample, (n,)"
        )
    if y.dtype.kind not in "iub":
        raise ValueError(
            f"{where}: {name!r} has dtype {y.dtype}, expected integers from 0 on; "
            "convert it with .astype('int64')"
        )
    if len(y) == 0:
        raise ValueError(f"{where}: {name!r} is empty, expected at least one sample")
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0:
        row = int(y.argmin())
        raise ValueError(
            f"{where}: {name!r} has label {lowest} at row {row}, expected labels from 0 on"
        )
    if highest >= max(_CLASSES_MAX, len(y)):
        row = int(y.argmax())
        raise ValueError(
            f"{where}: {name!r} has label {highest} at row {row}, but there are only {len(y)} "
            "samples; expected classes numbered 0, 1, 2, ..."
        )
    return y.astype(np.int64)


def check_trainable(y: npt.NDArray[np.int64], classes: tuple[str, ...], name: str) -> None:
    """Check the labels of a training part.

    Args:
        y: (n,) labels in [0, k).
        classes: the names of the k classes.
        name: of the data.

    Raises:
        ValueError: they are of one class only, or numbered higher than there are samples.
    """
    if len(y) == 0:
        raise ValueError(f"data {name!r}: the training part holds no samples")
    row = int(y.argmax())
    numbers = classes == tuple(map(str, range(len(classes))))
    if numbers and y[row] >= len(y):
        raise ValueError(
            f"data {name!r}: label {int(y[row])} at row {row} of the training part, but there are "
            f"only {len(y)} samples; expected classes numbered 0, 1, 2, ..."
        )
    if int(y.min()) == int(y[row]):
        raise ValueError(
            f"data {name!r}: the training part has only one class, {classes[int(y[row])]!r}; "
            "expected at least two"
        )


def checked_samples(
    x: npt.NDArray[Any], n: int, where: str, name: str = "x", labels: str = "y"
) -> npt.NDArray[Any]:
    """Check samples in memory; they keep their precision, which preprocessing needs.

    A column of times, for one, differs in digits that float32 does not have.

    Raises:
        ValueError: they are not `n` samples of finite real numbers in the range of float32.
    """
    if x.dtype.kind not in "iubf":
        raise ValueError(f"{where}: {name!r} has dtype {x.dtype}, expected real numbers")
    if x.ndim < 2:
        raise ValueError(
            f"{where}: {name!r} has shape {x.shape}, expected (n, features) or (n, ...)"
        )
    if len(x) != n:
        raise ValueError(f"{where}: {name!r} has {len(x)} samples, but {labels!r} has {n} labels")
    if x[0].size == 0:
        raise ValueError(f"{where}: {name!r} has shape {x.shape}, expected at least one feature")
    if x.dtype.kind != "f":
        return x
    if x.dtype.itemsize > 8 or not x.dtype.isnative:
        x = x.astype(np.float64 if x.dtype.itemsize > 4 else np.float32)
    with np.errstate(over="ignore"):
        finite = np.isfinite(x.astype(np.float32, copy=False))
    if not finite.all():
        row, *column = (int(i) for i in np.argwhere(~finite)[0])
        place = f"row {row}, column {column[0] if len(column) == 1 else tuple(column)}"
        value = x[row][tuple(column)]
        why = "no finite number" if not np.isfinite(value) else "too large for float32"
        count = int(finite.size - finite.sum())
        more = f" ({count} such values)" if count > 1 else ""
        raise ValueError(f"{where}: {name!r} has {value} at {place}: {why}{more}")
    return x


def numbered(values: list[str]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Number labels given as text: integers by their value, other text by the alphabet.

    Returns:
        (n,) int64, and the names of the classes.
    """
    names = sorted(set(values))
    with contextlib.suppress(ValueError):  # text: the alphabet decides
        names.sort(key=int)
    number = {name: i for i, name in enumerate(names)}
    return np.fromiter((number[v] for v in values), np.int64, len(values)), tuple(names)
