"""Sizes as people write them, medians with their spread, and rows as JSON or as a table."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Spread", "format_rows", "parse_count", "size_text"]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class Spread:
    """A few measurements of one thing.

    Attributes:
        median, least, most: of them, rounded to `digits` significant digits.
    """

    def __init__(self, values: Sequence[float], digits: int = 4) -> None:
        self.median, self.least, self.most = (
            float(f"{value:.{digits}g}")
            for value in (statistics.median(values), min(values), max(values))
        )

    def fields(self, name: str) -> dict[str, Any]:
        """Give the median under `name` and [least, most] under `name`_range."""
        return {name: self.median, f"{name}_range": [self.least, self.most]}


def parse_count(text: str, unit: str = "") -> int:
    """Read a count such as 64Ki, 16MiB (with unit "B") or 1000000.

    Raises:
        ValueError: it is none, or not at least 1.

    >>> parse_count("64KiB", "B"), parse_count("2M")
    (65536, 2000000)
    """
    found = re.fullmatch(rf"(\d+)\s*([kKMG]i?)?{f'(?:{unit})?' if unit else ''}", text.strip())
    prefix = (found[2] or "") if found else ""
    factor = _UNITS.get("k" if prefix == "K" else prefix)
    if found is None or factor is None or int(found[1]) < 1:
        raise ValueError(f"{text!r}: expected a count such as 1000, 64Ki{unit} or 16Mi{unit}")
    return int(found[1]) * factor


def size_text(n_bytes: int) -> str:
    """Write a number of bytes in the largest binary unit that divides it.

    >>> size_text(65536), size_text(1000)
    ('64 KiB', '1000 B')
    """
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes % factor == 0:
            return f"{n_bytes // factor} {unit}"
    return f"{n_bytes} B"


def format_rows(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], as_json: bool
) -> str:
    """Write rows as one JSON object a line, or as a table.

    Args:
        rows: names to values.
        columns: names of the table's columns, in order, to their formats; in a table `bytes` is
            written with a unit, and what a row lacks is left empty.
        as_json: one object a line instead, with all that the rows have.
    """
    if as_json:
        return "\n".join(json.dumps(row) for row in rows)
    lines = [list(columns)]
    for row in rows:
        cells = [
            size_text(row[name]) if name == "bytes" else _cell(row.get(name), form)
            for name, form in columns.items()
        ]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(format(item, form) for item in value)
    return format(value, form)
