"""Write data as shards that are memory-mapped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from psframe.data.dataset import Dataset, Parts
from psframe.data.formats.shards import INDEX, is_shards
from psframe.errors import ArgumentError

__all__ = ["convert"]


def convert(
    data: Dataset | Parts, folder: Path, *, samples_per_shard: int = 8192, overwrite: bool = False
) -> int:
    """Write a folder of shards; samples are read and written a shard at a time.

    All is written into a folder beside it, which takes its name at the end: a disk that is full
    leaves nothing behind, and what was there stays.

    Args:
        data: as `load` gives it; without preprocessing.
        folder: which must not be there, or be one of shards with `overwrite`.
        samples_per_shard: >= 1.
        overwrite: replace shards that are there.

    Returns:
        The shards written.

    Raises:
        ArgumentError: the folder is there, or the disk refuses it.
    """
    if samples_per_shard < 1:
        raise ArgumentError(f"--samples-per-shard: expected 1 or more, got {samples_per_shard}")
    try:
        there = folder.exists()
    except OSError as error:  # such as a name that is too long
        raise ArgumentError(f"{folder}: cannot be written: {error.strerror}") from error
    if there and not (overwrite and folder.is_dir() and is_shards(folder)):
        remedy = "choose another" if overwrite else "choose another, or --overwrite shards"
        raise ArgumentError(f"{folder}: there is such a file or folder already; {remedy}")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    parts = data if isinstance(data, Parts) else Parts(data)
    try:
        try:
            temporary.mkdir(parents=True)
            count = _write(parts, temporary, samples_per_shard)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        except BaseException:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)
            raise
    except OSError as error:
        raise ArgumentError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return count


def _write(parts: Parts, folder: Path, samples_per_shard: int) -> int:
    listed: dict[str, list[dict[str, Any]]] = {}
    for name, part in zip(Parts._fields, parts, strict=True):
        if part is not None:
            listed[name] = _write_part(part, name, folder, samples_per_shard)
    index = {
        "format": "psframe-shards",
        "version": 1,
        "classes": list(parts.train.classes),
        "parts": listed,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return sum(map(len, listed.values()))


def _write_part(part: Dataset, name: str, folder: Path, size: int) -> list[dict[str, Any]]:
    entries = []
    labels = part.labels
    for number, begin in enumerate(range(0, len(part), size)):
        rows = slice(begin, begin + size)
        stem = f"{name}-{number:05}"
        for letter, array in (("x", part.raw(rows)), ("y", labels[rows])):
            np.save(
                folder / f"{stem}-{letter}.npy", np.ascontiguousarray(array), allow_pickle=False
            )
        count = len(labels[rows])
        entries.append({"x": f"{stem}-x.npy", "y": f"{stem}-y.npy", "n": count})
    return entries
