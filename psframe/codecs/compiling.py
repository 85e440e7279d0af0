"""Compiles the loops of the codecs with numba, each when it is first needed for a dtype.

As for the update rules there is no fastmath (see `optim.cpu`), and a loop is kept on disk. Loops
take slices of equal length and run over their indices from 0, which is what LLVM vectorises.
"""

from __future__ import annotations

import functools
import logging
import types
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Bits", "Signed", "compile_kernel"]

_log = logging.getLogger("psframe")

# In a compiled loop: the integers as wide as its elements.
Bits: Any = np.uint32
Signed: Any = np.int32


@functools.cache
def compile_kernel(
    function: Callable[..., Any],
    dtype: np.dtype[Any],
    signature: str,
    constants: tuple[tuple[str, Any], ...] = (),
) -> Callable[..., Any]:
    """Compile a loop for one dtype, or load it from numba's cache on disk.

    Args:
        function: a function of a module; it may call nothing but NumPy and numba's built-ins.
        dtype: float32 or float64.
        signature: "result <- argument argument ...", each one of bool, int, float, u64, none;
            number (of `dtype`); read or write, an array of `dtype` that is only read or written,
            too; read:u1, say, one of another dtype. All arrays are contiguous.
        constants: global names of the function, and the values that they have in it. `Bits` and
            `Signed` are always bound.

    Returns:
        The compiled loop. It releases the GIL, and checks neither bounds nor overlaps.
    """
    import numba

    result, _, arguments = signature.partition(" <- ")
    kinds = [_numba_type(text, dtype) for text in arguments.split()]
    bits, signed = (np.uint32, np.int32) if dtype.itemsize == 4 else (np.uint64, np.int64)
    names = {"Bits": bits, "Signed": signed, **dict(constants)}
    # numba's cache on disk knows a loop by its name and code, not by the globals it is bound to.
    mark = zlib.crc32(repr((dtype.str, sorted((k, repr(v)) for k, v in names.items()))).encode())
    bound = types.FunctionType(function.__code__, {**function.__globals__, **names})
    bound.__qualname__ = f"{function.__name__}_{mark:08x}"
    bound.__module__ = function.__module__
    options: Any = {"nogil": True, "error_model": "numpy", "fastmath": False}
    kind = _numba_type(result, dtype)(*kinds)
    try:
        compiled = numba.njit(kind, cache=True, **options)(bound)
    except (RuntimeError, OSError) as error:  # no folder to write to, or no room in it
        _log.info("codecs are compiled anew in every process: %s", error)
        compiled = numba.njit(kind, **options)(bound)
    return compiled  # type: ignore[no-any-return]


def _numba_type(text: str, dtype: np.dtype[Any]) -> Any:
    from numba import from_dtype, types

    name, _, other = text.partition(":")
    if name in ("read", "write"):
        element = from_dtype(np.dtype(other) if other else dtype)
        return types.Array(element, 1, "C", readonly=name == "read")
    scalars = {
        "bool": types.boolean,
        "int": types.intp,
        "float": types.float64,
        "u64": types.uint64,
        "none": types.void,
        "number": from_dtype(dtype),
    }
    return scalars[name]
