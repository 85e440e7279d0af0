"""Folders of CIFAR-10's binary version: data_batch_1.bin to data_batch_5.bin and test_batch.bin.

A record is a byte for the label, 0 to 9, and 3072 for the pixels: 1024 red ones in row order, then
green, then blue (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009).
batches.meta.txt, if there, has a class name a line. The originals could not be fetched where
this was written; tests read files written after the specification.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from psframe.data.checks import check_file
from psframe.data.dataset import Dataset, Parts

__all__ = ["is_cifar", "load_cifar"]

_PIXELS = 3 * 32 * 32
_CLASSES = 10


def is_cifar(folder: Path) -> bool:
    """Tell whether a folder holds files named as these are."""
    return any(folder.glob("data_batch_*.bin"))


def load_cifar(folder: Path, name: str) -> Parts:
    """Read a folder; pixels stay bytes, (n, 3, 32, 32) uint8.

    Raises:
        ValueError: a file is truncated, or a label is out of range.
    """
    where = f"data {name!r}"
    classes = _class_names(folder, where)
    train = _part(sorted(folder.glob("data_batch_*.bin")), classes, name, where)
    test = folder / "test_batch.bin"
    return Parts(train, None, _part([test], classes, name, where) if test.exists() else None)


def _part(files: list[Path], classes: tuple[str, ...], name: str, where: str) -> Dataset:
    records = np.concatenate([_records(file, where) for file in files])
    y = records[:, 0].astype(np.int64)
    x = records[:, 1:].reshape(-1, 3, 32, 32)
    return Dataset(x, y, _CLASSES, name, classes)


def _records(file: Path, where: str) -> npt.NDArray[np.uint8]:
    size = check_file(file, where)
    if size == 0 or size % (1 + _PIXELS):
        raise ValueError(
            f"{where}: {file.name}: has {size} bytes, expected records of {1 + _PIXELS} bytes; is "
            "it truncated?"
        )
    try:
        records = np.fromfile(file, np.uint8).reshape(-1, 1 + _PIXELS)
    except OSError as error:
        raise ValueError(f"{where}: {file.name}: cannot be read: {error.strerror}") from error
    wrong = np.flatnonzero(records[:, 0] >= _CLASSES)
    if len(wrong):
        raise ValueError(
            f"{where}: {file.name}: record {int(wrong[0])} has label "
            f"{int(records[wrong[0], 0])}, expected 0 to {_CLASSES - 1}"
        )
    return records


def _class_names(folder: Path, where: str) -> tuple[str, ...]:
    file = folder / "batches.meta.txt"
    if not file.exists():
        return ()
    check_file(file, where)
    names = file.read_bytes()[: 1 << 16].decode("utf-8", "replace").split()
    return tuple(names) if len(names) == _CLASSES else ()
