"""Samples to be predicted: data of every format, with labels or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.data.checks import check_file, checked_samples
from psframe.data.dataset import Dataset, Parts
from psframe.data.formats.csvfile import load_csv
from psframe.data.formats.npz import channels_first, read_members
from psframe.data.loading import format_of, load

__all__ = ["load_samples"]


def load_samples(source: str | Path, label: str | None, features: int) -> Dataset | Parts:
    """Read data whose labels, if there are any, do not matter.

    Args:
        source: as for `load`; an `.npz` needs no `y`, a table of `features` columns has no label
            column, and a `.npy` holds samples alone.
        label: the label column of a table that has one.
        features: numbers in a sample, as the model wants them.

    Raises:
        ValueError: as `load`.
    """
    path, name = Path(source), str(source)
    where = f"data {name!r}"
    if path.suffix.lower() == ".npy":
        return _unlabelled(_npy(path, where), name, where)
    kind = format_of(source)
    if kind == "csv":
        return load_csv(path, name, label, features)
    if kind == "npz":
        members = read_members(path, where)
        if "x" in members and "y" not in members:
            return _unlabelled(members["x"], name, where)
    return load(source, label)


def _unlabelled(x: npt.NDArray[Any], name: str, where: str) -> Dataset:
    if x.ndim < 1 or len(x) == 0:
        raise ValueError(f"{where}: holds no samples")
    x = channels_first(checked_samples(x, len(x), where))
    return Dataset(x, np.zeros(len(x), np.int64), 1, name)


def _npy(path: Path, where: str) -> npt.NDArray[Any]:
    check_file(path, where)
    try:
        array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, MemoryError) as error:
        raise ValueError(f"{where}: is truncated or no .npy file: {error}") from error
    return array
