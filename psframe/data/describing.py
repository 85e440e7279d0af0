"""What data holds, in figures: read once, in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from psframe.data.dataset import Dataset, Parts

__all__ = ["describe", "description_lines", "printable"]

_BLOCK = 1024
_CLASSES_MAX = 20  # that a text lists


def describe(data: Dataset | Parts, kind: str) -> dict[str, Any]:
    """Gather figures that fit JSON.

    Args:
        data: as `load` gives it.
        kind: its format.

    Returns:
        data, format, input_shape, dtype, classes, and for each part its samples, its samples by
        class, the least and the largest value, how many values are no finite numbers, and bytes.
    """
    parts = data if isinstance(data, Parts) else Parts(data)
    return {
        "data": parts.train.name,
        "format": kind,
        "input_shape": list(parts.train.input_shape),
        "dtype": str(parts.train.x.dtype),
        "classes": list(parts.train.classes),
        "parts": {
            name: _part(part)
            for name, part in zip(Parts._fields, parts, strict=True)
            if part is not None
        },
    }


def _part(part: Dataset) -> dict[str, Any]:
    low, high, bad = np.inf, -np.inf, 0
    for begin in range(0, len(part), _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        x = part.x[rows if part.rows is None else part.rows[rows]]
        finite = x[np.isfinite(x)] if x.dtype.kind == "f" else x
        bad += x.size - finite.size
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    size = part.x.dtype.itemsize * int(np.prod(part.x.shape[1:])) * len(part)
    counts = np.bincount(part.labels, minlength=part.n_classes)
    return {
        "samples": len(part),
        "by_class": counts.tolist(),
        "least": None if np.isinf(low) else low,
        "largest": None if np.isinf(high) else high,
        "not_finite": int(bad),
        "bytes": size,
    }


def printable(text: str) -> str:
    """Write what a terminal would obey, such as colours and new lines, as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def description_lines(found: dict[str, Any]) -> Iterator[str]:
    """Put the figures into lines of text."""
    shape = " x ".join(map(str, found["input_shape"]))
    yield f"{printable(found['data'])}: {found['format']}, samples of {shape} {found['dtype']}"
    yield f"classes     {len(found['classes'])}"
    for name, part in found["parts"].items():
        known = part["least"] is not None
        values = f"values {part['least']:g} to {part['largest']:g}" if known else "no finite value"
        bad = f", {part['not_finite']:,} NOT FINITE" if part["not_finite"] else ""
        mib = part["bytes"] / (1 << 20)
        yield f"{name:<11} {part['samples']:,} samples, {values}{bad}, {mib:,.1f} MiB"
        counts = part["by_class"]
        classes = map(printable, found["classes"])
        pairs = [f"{c}: {n:,}" for c, n in zip(classes, counts, strict=True)]
        more = [f"... and {len(pairs) - _CLASSES_MAX} more"] if len(pairs) > _CLASSES_MAX else []
        yield "            by class  " + "  ".join(pairs[:_CLASSES_MAX] + more)
