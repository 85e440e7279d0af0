"""Tables as text: CSV as in RFC 4180, with commas, semicolons or tabs, and a label column."""

from __future__ import annotations

import csv
from array import array
from pathlib import Path

import numpy as np

from psframe.data.checks import check_file, checked_samples, numbered
from psframe.data.dataset import Dataset

__all__ = ["load_csv", "pick_label"]

_DELIMITERS = ",;\t"


def load_csv(path: Path, name: str, label: str | None, features: int | None = None) -> Dataset:
    """Read a table; the first line may be names of columns.

    Args:
        path: the file, UTF-8.
        name: for messages.
        label: name of the label column; the last one if None.
        features: a table of so many columns has no labels; all samples are of one class then.

    Raises:
        ValueError: it is no such table; the message names the line and the column.
    """
    where = f"data {name!r}"
    check_file(path, where)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            delimiter = max(_DELIMITERS, key=first.count)
            rows = csv.reader(stream, delimiter=delimiter, strict=True)
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
        raise ValueError(
            f"{where}: has no column {label!r}; its columns are {', '.join(names[:20])}{hint}"
        )
    return names.index(label)


def _read(rows, name: str, where: str, label: str | None, features: int | None) -> Dataset:  # type: ignore[no-untyped-def]
    # csv gives its reader no name that could be written as a type.
    names: list[str] = []
    at = width = 0
    values, lines, labels = array("d"), array("q"), list[str]()
    try:
        for row in rows:
            if not row:
                continue
            if not width:
                width = len(row)
                if width < 2:
                    raise ValueError(f"{where}: line 1: expected at least two columns, got {width}")
                bare = width == features and label is None
                numbers = row if bare else row[:-1]
                headed = label is not None or not all(_is_number(cell) for cell in numbers)
                names = row if headed else [str(i) for i in range(width)]
                at = width if bare else pick_label(names, label, where)
                if headed:
                    continue
            if len(row) != width:
                raise ValueError(
                    f"{where}: line {rows.line_num}: has {len(row)} columns, expected {width}"
                )
            labels.append("" if at == width else row.pop(at))
            try:
                values.extend(map(float, row))
            except ValueError:
                others = names[:at] + names[at + 1 :]
                bad = next(i for i, cell in enumerate(row) if not _is_number(cell))
                raise ValueError(
                    f"{where}: line {rows.line_num}, column {others[bad]!r}: expected a number, "
                    f"got {row[bad][:40]!r}"
                ) from None
            lines.append(rows.line_num)
    except csv.Error as error:
        raise ValueError(f"{where}: line {rows.line_num}: {error}") from error
    if not labels:
        raise ValueError(f"{where}: holds no samples")
    x = np.frombuffer(values, np.float64).reshape(len(labels), -1)
    _check_finite(x, names[:at] + names[at + 1 :], lines, where)
    if at == width:
        return Dataset(checked_samples(x, len(x), where), np.zeros(len(x), np.int64), 1, name)
    empty = next((i for i, text in enumerate(labels) if not text.strip()), None)
    if empty is not None:
        raise ValueError(
            f"{where}: line {lines[empty]}, column {names[at]!r}: the label is missing"
        )
    y, classes = numbered([text.strip() for text in labels], where)
    return Dataset(checked_samples(x, len(y), where), y, len(classes), name, classes)


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
    return True
