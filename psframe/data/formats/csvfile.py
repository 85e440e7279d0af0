"""Tables as text: CSV as in RFC 4180, with commas, semicolons or tabs, and a label column."""

from __future__ import annotations

import csv
import re
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from psframe.data.checks import check_file, checked_samples, numbered
from psframe.data.dataset import Dataset

__all__ = ["load_csv", "pick_label"]

_DELIMITERS = ",;\t"
_DECIMAL_COMMA = re.compile(r"\s*[-+]?\d*,\d+([eE][-+]?\d+)?\s*")


def load_csv(path: Path, name: str, label: str | None, features: int | None = None) -> Dataset:
    """Read a table; the first line may be names of columns.

    Args:
        path: the file, UTF-8.
        name: for messages.
        label: name of the label column; the last one if None.
        features: given if labels do not matter: a table of so many columns has none then, the
            label column of a wider one is skipped, and all samples are of one class.

    Raises:
        ValueError: it is no such table; the message names the line and the column.
    """
    where = f"data {name!r}"
    check_file(path, where)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            rows = csv.reader(stream, delimiter=_delimiter(first), strict=True)
            return _read(rows, name, where, label, features)
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8 text: {error.reason}") from error


def pick_label(names: list[str], label: str | None, where: str) -> int:
    """Find the label column.

    Raises:
        ValueError: there is no such column.
    """
    if label is None:
        return len(names) - 1
    if label not in names:
        import difflib

        near = difflib.get_close_matches(label, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(map(repr, names[:20]))
        raise ValueError(f"{where}: has no column {label!r}; its columns are {listed}{hint}")
    return names.index(label)


class _Columns(NamedTuple):
    """The columns of a table; `at` is the label's, or their number if there is none."""

    names: list[str]
    at: int
    headed: bool

    @property
    def others(self) -> list[str]:
        return self.names[: self.at] + self.names[self.at + 1 :]


def _delimiter(first: str) -> str:
    """Find what stands between the columns; decimal commas are no columns."""
    cells = first.split(";")
    if len(cells) > 1 and all(map(_looks_like_a_number, cells[:-1])):
        return ";"
    return max(_DELIMITERS, key=first.count)


def _columns(row: list[str], where: str, label: str | None, features: int | None) -> _Columns:
    """Tell from the first row what the columns are, and whether it names them."""
    width = len(row)
    bare = width == features and label is None
    if width < 2 and not bare:
        raise ValueError(f"{where}: line 1: expected at least two columns, got {width}")
    numbers = row if bare else row[:-1]
    headed = label is not None or not all(map(_looks_like_a_number, numbers))
    names = row if headed else [str(i) for i in range(width)]
    return _Columns(names, width if bare else pick_label(names, label, where), headed)


def _read(rows, name: str, where: str, label: str | None, features: int | None) -> Dataset:  # type: ignore[no-untyped-def]
    # csv gives its reader no name that could be written as a type.
    columns: _Columns | None = None
    values, lines, labels = array("d"), array("q"), list[str]()
    try:
        for row in rows:
            if not row:
                continue
            if columns is None:
                columns = _columns(row, where, label, features)
                if columns.headed:
                    continue
            if len(row) != len(columns.names):
                raise ValueError(
                    f"{where}: line {rows.line_num}: has {len(row)} columns, expected "
                    f"{len(columns.names)}"
                )
            if columns.at < len(row):
                labels.append(row.pop(columns.at).strip())
            values.extend(_numbers(row, columns.others, f"{where}: line {rows.line_num}"))
            lines.append(rows.line_num)
    except csv.Error as error:
        raise ValueError(f"{where}: line {rows.line_num}: {error}") from error
    if columns is None or not lines:
        raise ValueError(f"{where}: holds no samples")
    x = np.frombuffer(values, np.float64).reshape(len(lines), -1)
    _check_finite(x, columns.others, lines, where)
    x = checked_samples(x, len(x), where)
    if features is not None:
        return Dataset(x, np.zeros(len(x), np.int64), 1, name)
    if "" in labels:
        raise ValueError(
            f"{where}: line {lines[labels.index('')]}, column {columns.names[columns.at]!r}: the "
            "label is missing"
        )
    y, classes = numbered(labels)
    return Dataset(x, y, len(classes), name, classes)


def _numbers(row: list[str], names: list[str], where: str) -> list[float]:
    try:
        if "_" in "".join(row):  # float() would take 1_000
            raise ValueError
        return [*map(float, row)]
    except ValueError:
        bad = next(i for i, cell in enumerate(row) if not _is_number(cell))
        comma = _DECIMAL_COMMA.fullmatch(row[bad])
        hint = "; write a decimal point, not a comma" if comma else ""
        raise ValueError(
            f"{where}, column {names[bad]!r}: expected a number, got {row[bad][:40]!r}{hint}"
        ) from None


def _check_finite(x: np.ndarray, names: list[str], lines: array, where: str) -> None:  # type: ignore[type-arg]
    if not np.isfinite(x).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise ValueError(
            f"{where}: line {lines[row]}, column {names[column]!r}: {x[row, column]} is no finite "
            "number"
        )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _looks_like_a_number(cell: str) -> bool:
    return _is_number(cell) or _DECIMAL_COMMA.fullmatch(cell) is not None
