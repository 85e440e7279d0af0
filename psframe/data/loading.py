"""Read data, whatever format it is in. Nothing is ever unpickled."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from psframe.data.dataset import Dataset, Parts
from psframe.data.formats.cifar import is_cifar, load_cifar
from psframe.data.formats.csvfile import load_csv
from psframe.data.formats.idx import is_idx, load_idx
from psframe.data.formats.npz import load_npz
from psframe.data.formats.parquet import load_parquet
from psframe.data.formats.shards import is_shards, load_shards
from psframe.data.preprocessing import Preprocessing

__all__ = ["format_of", "load"]

_DIGITS = Path(__file__).with_name("digits.npz")
_DIGITS_MAX = 16  # a pixel of the digits counts the ink in a 4x4 block
_TABLES = (".csv", ".tsv", ".txt")
_FOLDERS = (
    "train-images-idx3-ubyte (MNIST), data_batch_1.bin (CIFAR-10) or index.json (shards of .npy)"
)


def load(source: str | Path, label: str | None = None) -> Dataset | Parts:
    """Read data.

    Args:
        source: "digits" (1797 scans of 8x8), a file (`.npz`, `.csv`, `.tsv`, `.parquet`), or a
            folder (IDX files as MNIST's, CIFAR-10's binary files, shards of `.npy`).
        label: the label column of a table; else its last.

    Returns:
        A dataset; or Parts if the data is an `.npz` in parts, or a folder, even one that brings a
        training part alone.

    Raises:
        ValueError: there is no such file, or it is not such data; the message names the file,
            the problem and, where there is one, the place.
    """
    name = str(source)
    kind = format_of(source)
    if label is not None and kind not in ("csv", "parquet"):
        raise ValueError(f"data {name!r}: a label column belongs to CSV or Parquet, this is {kind}")
    path = Path(source)
    if kind == "digits":
        data = load_npz(_DIGITS, "digits")
        assert isinstance(data, Dataset)
        scale = Preprocessing.scale(_DIGITS_MAX)
        return Dataset(data.x, data.y, data.n_classes, "digits", preprocessing=scale)
    if kind == "csv":
        return load_csv(path, name, label)
    if kind == "parquet":
        return load_parquet(path, name, label)
    readers: dict[str, Callable[[Path, str], Dataset | Parts]] = {
        "npz": load_npz,
        "idx": load_idx,
        "cifar": load_cifar,
        "shards": load_shards,
    }
    return readers[kind](path, name)


def format_of(source: str | Path) -> str:
    """Tell the format: digits, npz, csv, parquet, idx, cifar or shards.

    Raises:
        ValueError: there is no such file, or it is none that can be read.
    """
    if str(source) == "digits":
        return "digits"
    path, where = Path(source), f"data {str(source)!r}"
    try:
        if not path.exists():
            near = difflib.get_close_matches(str(source), ["digits"], n=1)
            hint = "; did you mean 'digits'?" if near else ""
            raise ValueError(f"{where}: no such file{hint}")
        if path.is_dir():
            return _folder_format(path, where)
        if not path.is_file():
            # A pipe would keep every rank waiting for whoever writes.
            raise ValueError(f"{where}: expected a file with data, this is no regular file")
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror or error}") from error
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return "csv"
    return "parquet" if suffix in (".parquet", ".pq") else "npz"


def _folder_format(folder: Path, where: str) -> str:
    if is_shards(folder):
        return "shards"
    if is_cifar(folder):
        return "cifar"
    if is_idx(folder):
        return "idx"
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
    raise ValueError(
        f"{where}: this is a directory without data that is known; looked for {_FOLDERS}, found "
        f"{found}"
    )
