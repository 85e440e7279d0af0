"""NumPy's `.npy`: nothing is unpickled, nor allocated before the file holds what its header claims.

What NumPy itself says of a damaged file is not passed on: it advises to allow pickles.
"""

from __future__ import annotations

import math
import tokenize
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from psframe.data.checks import check_file

__all__ = ["load_npy", "read_header"]

_MAGIC = b"\x93NUMPY"
# What NumPy's reader of headers raises: it is Python's own, for literals and, of old, for tokens.
_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, RecursionError, tokenize.TokenError)


def load_npy(path: Path, where: str, *, mapped: bool = False) -> npt.NDArray[Any]:
    """Read an array of numbers, or map it into memory.

    Raises:
        ValueError: it is no such file; the message begins with `where`.
    """
    size = check_file(path, where)
    try:
        with path.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
            if magic.startswith(b"PK"):
                raise ValueError(f"{where}: is an .npz file, not a .npy; name it .npz")
            if magic != _MAGIC:
                raise ValueError(f"{where}: is truncated or no .npy file")
            stream.seek(0)
            shape, dtype = read_header(stream, where)
            claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
        if claimed > held:
            raise ValueError(
                f"{where}: is truncated or damaged: it claims the shape {shape} of {dtype} and "
                f"holds {held} bytes"
            )
        mapped = mapped and claimed > 0  # what is empty cannot be
        array: npt.NDArray[Any] = np.load(path, "r" if mapped else None, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise ValueError(f"{where}: does not fit into memory: {error}") from error
    return array


def read_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read a shape and a dtype, up to where the numbers begin.

    Raises:
        ValueError: it is no header, or that of Python objects; the message begins with `where`.
    """
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"it is of the unknown version {version}")
    except _HEADER_ERRORS as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:200]
        raise ValueError(f"{where}: has a damaged header: {reason}") from error
    if dtype.hasobject:
        raise ValueError(
            f"{where}: holds an array of Python objects, which is never unpickled; save numbers"
        )
    if any(n < 0 for n in shape):
        raise ValueError(f"{where}: has a damaged header: its shape is {shape}")
    if dtype.shape:  # NumPy reads such an element as several, and never writes one
        raise ValueError(f"{where}: has a damaged header: its dtype is {dtype}")
    return shape, dtype
