"""Parquet files, with pyarrow (the extra `parquet`): numbers or lists of them, and a label."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.data.checks import check_file, checked_samples, numbered
from psframe.data.dataset import Dataset
from psframe.data.formats.csvfile import pick_label

__all__ = ["load_parquet"]


def load_parquet(path: Path, name: str, label: str | None, features: int | None = None) -> Dataset:
    """Read a file; features are all columns but the label's, lists of equal length side by side.

    Args:
        path, name, label, features: as for CSV.

    Raises:
        ValueError: pyarrow is not installed, or it is no such table.
    """
    where = f"data {name!r}"
    check_file(path, where)
    try:
        return _load(path, name, label, features, where)
    except UnicodeDecodeError as error:  # a name or a label; pyarrow does not look at them before
        raise ValueError(f"{where}: holds text that is not UTF-8: {error}") from error


def _load(path: Path, name: str, label: str | None, features: int | None, where: str) -> Dataset:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(
            f"{where}: reading Parquet needs pyarrow: pip install 'psframe[parquet]'"
        ) from error
    try:
        for named, count in Counter(pq.read_schema(path).names).items():
            if count > 1:
                raise ValueError(
                    f"{where}: has {count} columns named {named!r}; rename all but one"
                )
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["it ends early"])[0]
        raise ValueError(f"{where}: is not a Parquet file, or a damaged one: {reason}") from error
    names = list(table.column_names)
    bare = label is None and table.num_rows > 0 and _width(table) == features
    if (len(names) < 2 and not bare) or table.num_rows == 0:
        raise ValueError(
            f"{where}: has {len(names)} columns and {table.num_rows} rows, expected two or more "
            "columns, and rows"
        )
    at = len(names) if bare else pick_label(names, label, where)
    columns = [_column(table.column(i), n, where) for i, n in enumerate(names) if i != at]
    x = checked_samples(np.concatenate(columns, axis=1), table.num_rows, where)
    if features is not None:
        return Dataset(x, np.zeros(len(x), np.int64), 1, name)
    labels = table.column(at)
    if labels.null_count:
        raise ValueError(f"{where}: column {names[at]!r} has {labels.null_count} missing labels")
    y, classes = numbered([str(v).strip() for v in labels.to_pylist()])
    return Dataset(x, y, len(classes), name, classes)


def _width(table: Any) -> int:
    """Count the numbers in a row."""
    first = (column[0].as_py() for column in table.columns)
    return sum(len(value) if isinstance(value, list) else 1 for value in first)


def _column(column: Any, name: str, where: str) -> npt.NDArray[Any]:
    """Turn a column into (n, width) numbers."""
    import pyarrow as pa

    if column.null_count:
        row = next(i for i, v in enumerate(column) if not v.is_valid)
        raise ValueError(f"{where}: column {name!r}: row {row} is missing")
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        rows = column.to_pylist()
        widths = {len(row) for row in rows}
        if len(widths) != 1:
            raise ValueError(f"{where}: column {name!r} has lists of different lengths")
        try:
            return np.array(rows, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: column {name!r}: expected lists of numbers") from error
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"{where}: column {name!r} is {kind}, expected numbers or lists of them")
    values: npt.NDArray[Any] = np.asarray(column.to_numpy(), np.float64)[:, None]
    return values
