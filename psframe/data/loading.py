"""Read datasets: the built-in digits, and `.npz` files. Nothing is ever unpickled."""

from __future__ import annotations

import difflib
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.data.dataset import Dataset

__all__ = ["load"]

_DIGITS = Path(__file__).with_name("digits.npz")
_DIGITS_MAX = 16  # a pixel of the digits counts the ink in a 4x4 block


def load(source: str | Path) -> Dataset:
    """Read a dataset.

    Args:
        source: "digits" (1797 scans of 8x8, scaled to [0, 1]), or the path of an `.npz` file with
            `x`, numbers of shape (n, ...), and `y`, n integer labels from 0 on.

    Raises:
        ValueError: there is no such file, or it is not such data; the message names the file,
            the problem and, where there is one, the place.
    """
    if str(source) == "digits":
        data = _read(_DIGITS, "digits")
        return Dataset(data.x / np.float32(_DIGITS_MAX), data.y, data.n_classes, "digits", True)
    path = Path(source)
    if not path.exists():
        near = difflib.get_close_matches(str(source), ["digits"], n=1)
        hint = "; did you mean 'digits'?" if near else ""
        raise ValueError(f"data {str(source)!r}: no such file{hint}")
    return _read(path, str(source))


def _read(path: Path, name: str) -> Dataset:
    where = f"data {name!r}"
    arrays = _arrays(path, where)
    for key in ("x", "y"):
        if key not in arrays:
            found = ", ".join(arrays) or "nothing"
            raise ValueError(f"{where}: expected arrays 'x' and 'y', found {found}")
    y = _labels(arrays["y"], where)
    x = _samples(arrays["x"], len(y), where)
    return Dataset(x, y, int(y.max()) + 1, name)


def _arrays(path: Path, where: str) -> dict[str, npt.NDArray[Any]]:
    """Read `x` and `y` of an npz file; other members are only listed."""
    if path.is_dir():
        raise ValueError(f"{where}: expected an .npz file, this is a directory")
    if not path.is_file():
        # A pipe would keep every rank waiting for whoever writes.
        raise ValueError(f"{where}: expected an .npz file, this is no regular file")
    try:
        with path.open("rb") as stream:
            _check_magic(stream.read(6), where)
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as members:
                names = list(members.files)
                return {n: members[n] if n in ("x", "y") else np.empty(0) for n in names}
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{where}: is truncated or damaged: {str(error) or 'it ends early'}"
        ) from error
    except MemoryError as error:
        raise ValueError(f"{where}: does not fit into memory: {error}") from error
    except ValueError as error:
        if str(error).startswith(where):
            raise
        if "Object arrays" in str(error):
            text = "holds an array of Python objects, which is never unpickled; save numbers"
            raise ValueError(f"{where}: {text}") from error
        raise ValueError(
            f"{where}: is truncated or damaged: {str(error) or 'it ends early'}"
        ) from error


def _check_magic(magic: bytes, where: str) -> None:
    if magic == b"\x93NUMPY":
        raise ValueError(f"{where}: expected an .npz file with 'x' and 'y', this is a .npy")
    if not magic.startswith(b"PK"):
        raise ValueError(f"{where}: is not an .npz file, or a truncated one")


def _labels(y: npt.NDArray[Any], where: str) -> npt.NDArray[np.int64]:
    if y.ndim != 1:
        raise ValueError(f"{where}: 'y' has shape {y.shape}, expected one label a sample, (n,)")
    if y.dtype.kind not in "iub":
        raise ValueError(
            f"{where}: 'y' has dtype {y.dtype}, expected integers from 0 on; "
            "convert it with .astype('int64')"
        )
    if len(y) == 0:
        raise ValueError(f"{where}: 'y' is empty, expected at least two samples")
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0:
        row = int(y.argmin())
        raise ValueError(f"{where}: 'y' has label {lowest} at row {row}, expected labels from 0 on")
    if highest >= len(y):
        row = int(y.argmax())
        raise ValueError(
            f"{where}: 'y' has label {highest} at row {row}, but there are only {len(y)} samples; "
            "expected classes numbered 0, 1, 2, ..."
        )
    if lowest == highest:
        raise ValueError(f"{where}: 'y' has only one class, {lowest}; expected at least two")
    return y.astype(np.int64)


def _samples(x: npt.NDArray[Any], n: int, where: str) -> npt.NDArray[np.float32]:
    if x.dtype.kind not in "iubf":
        raise ValueError(f"{where}: 'x' has dtype {x.dtype}, expected real numbers")
    if x.ndim < 2:
        raise ValueError(f"{where}: 'x' has shape {x.shape}, expected (n, features) or (n, ...)")
    if len(x) != n:
        raise ValueError(f"{where}: 'x' has {len(x)} samples, but 'y' has {n} labels")
    if x[0].size == 0:
        raise ValueError(f"{where}: 'x' has shape {x.shape}, expected at least one feature")
    with np.errstate(over="ignore"):
        samples = x.astype(np.float32)
    finite = np.isfinite(samples)
    if not finite.all():
        row, *column = (int(i) for i in np.argwhere(~finite)[0])
        place = f"row {row}, column {column[0] if len(column) == 1 else tuple(column)}"
        value = x[row][tuple(column)]
        why = "no finite number" if not np.isfinite(value) else "too large for float32"
        count = int(finite.size - finite.sum())
        more = f" ({count} such values)" if count > 1 else ""
        raise ValueError(f"{where}: 'x' has {value} at {place}: {why}{more}")
    return samples
