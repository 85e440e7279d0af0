"""Samples to be predicted: data of every format, with labels or without."""

from __future__ import annotations

from pathlib import Path

from psframe.data.dataset import Dataset, Parts
from psframe.data.formats.csvfile import load_csv
from psframe.data.formats.idx import load_idx
from psframe.data.formats.npy import load_npy
from psframe.data.formats.npz import load_npz_samples, unlabelled
from psframe.data.formats.parquet import load_parquet
from psframe.data.formats.shards import load_shards
from psframe.data.loading import format_of, load

__all__ = ["load_samples"]


def load_samples(source: str | Path, label: str | None, features: int) -> Dataset | Parts:
    """Read data whose labels, if there are any, do not matter; where they can be skipped, they are.

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
        return unlabelled(load_npy(path, where), name, where)
    kind = format_of(source)
    if kind == "csv":
        return load_csv(path, name, label, features)
    if kind == "parquet":
        return load_parquet(path, name, label, features)
    if label is None:
        if kind == "npz":
            return load_npz_samples(path, name)
        if kind == "idx":
            return load_idx(path, name, labelled=False)
        if kind == "shards":
            return load_shards(path, name, labelled=False)
    return load(source, label)
