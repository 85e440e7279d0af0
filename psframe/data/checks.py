"""What every format checks of samples and labels; errors name the file, the row and the column."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["check_file", "checked_labels", "checked_samples", "numbered"]


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


def checked_labels(y: npt.NDArray[Any], where: str, name: str = "y") -> npt.NDArray[np.int64]:
    """Check labels that are class numbers.

    Raises:
        ValueError: they are not one integer a sample, from 0 on, with at least two classes.
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
        raise ValueError(f"{where}: {name!r} is empty, expected at least two samples")
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0:
        row = int(y.argmin())
        raise ValueError(
            f"{where}: {name!r} has label {lowest} at row {row}, expected labels from 0 on"
        )
    if highest >= len(y):
        row = int(y.argmax())
        raise ValueError(
            f"{where}: {name!r} has label {highest} at row {row}, but there are only {len(y)} "
            "samples; expected classes numbered 0, 1, 2, ..."
        )
    if lowest == highest:
        raise ValueError(f"{where}: {name!r} has only one class, {lowest}; expected at least two")
    return y.astype(np.int64)


def checked_samples(
    x: npt.NDArray[Any], n: int, where: str, name: str = "x", labels: str = "y"
) -> npt.NDArray[Any]:
    """Check samples in memory; integers stay as they are, floats become float32.

    Raises:
        ValueError: they are not `n` samples of finite real numbers.
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
    if x.dtype.kind != "f" and x.dtype.itemsize <= 2:
        return x
    with np.errstate(over="ignore"):
        samples = x.astype(np.float32)
    finite = np.isfinite(samples)
    if not finite.all():
        row, *column = (int(i) for i in np.argwhere(~finite)[0])
        place = f"row {row}, column {column[0] if len(column) == 1 else tuple(column)}"
        value = x[row][tuple(column)]
        why = "no finite number" if not np.isfinite(value) else "too large for float32"
        count = int(finite.size - finite.sum())
        more = f" ({count} such values)" if count > 1 else ""
        raise ValueError(f"{where}: {name!r} has {value} at {place}: {why}{more}")
    return samples


def numbered(values: list[str], where: str) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Number labels given as text: integers by their value, other text by the alphabet.

    Returns:
        (n,) int64, and the names of the classes.

    Raises:
        ValueError: there is only one class.
    """
    names = sorted(set(values))
    with contextlib.suppress(ValueError):  # text: the alphabet decides
        names.sort(key=int)
    if len(names) < 2:
        raise ValueError(f"{where}: there is only one class, {names[0]!r}; expected at least two")
    number = {name: i for i, name in enumerate(names)}
    return np.fromiter((number[v] for v in values), np.int64, len(values)), tuple(names)
