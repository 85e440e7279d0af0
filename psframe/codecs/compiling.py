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

__all__ = ["Bits", "Number", "Signed", "compile_kernel"]

_log = logging.getLogger("psframe")

# In a compiled loop: the type of its elements, and the integers that are as wide.
Number: Any = np.float32
Bits: Any = np.uint32
Signed: Any = np.int32


@functools.cache
def compile_kernel(
    function: Callable[..., Any],
    dtype: np.dtype[Any],
    signature: str,
    constants: tuple[tuple[str, Any], ...] = (),
    helpers: tuple[Callable[..., Any], ...] = (),
) -> Callable[..., Any]:
    """Compile a loop for one dtype, or load it from numba's cache on disk.

    Args:
        function: a function of a module; of other functions it may call only the helpers.
        dtype: float32 or float64.
        signature: "result <- argument argument ...", each one of bool, int, float, u64, none;
            number (of `dtype`); read or write, an array of `dtype` that is only read or written,
            too; read:u1, say, one of another dtype. All arrays are contiguous.
        constants: global names of the function, and the values that they have in it. `Number`,
            `Bits` and `Signed` are always bound, in the helpers, too.
        helpers: functions that it calls by their names, each one perhaps those before it.

    Returns:
        The compiled loop. It releases the GIL, and checks neither bounds nor overlaps.
    """
    import numba

    result, _, arguments = signature.partition(" <- ")
    kinds = [_numba_type(text, dtype) for text in arguments.split()]
    bits, signed = (np.uint32, np.int32) if dtype.itemsize == 4 else (np.uint64, np.int64)
    names = {"Number": dtype.type, "Bits": bits, "Signed": signed, **dict(constants)}
    options: Any = {"nogil": True, "error_model": "numpy", "fastmath": False}
    # numba's cache on disk knows a loop by its name and code, not by the globals it is bound to.
    code = [(one.__code__.co_code, one.__code__.co_consts) for one in helpers]
    text = repr((dtype.str, sorted((name, repr(v)) for name, v in names.items()), code))
    for helper in helpers:
        names[helper.__name__] = numba.njit(**options)(_bind(helper, names, text))
    bound = _bind(function, names, text)
    kind = _numba_type(result, dtype)(*kinds)
    try:
        compiled = numba.njit(kind, cache=True, **options)(bound)
    except (RuntimeError, OSError) as error:  # no folder to write to, or no room in it
        _log.info("codecs are compiled anew in every process: %s", error)
        compiled = numba.njit(kind, **options)(bound)
    return compiled  # type: ignore[no-any-return]


def _bind(function: Callable[..., Any], names: dict[str, Any], text: str) -> Any:
    """Copy a function with some of its global names bound otherwise, and a name that says so."""
    bound = types.FunctionType(function.__code__, {**function.__globals__, **names})
    bound.__qualname__ = f"{function.__name__}_{zlib.crc32(text.encode()):08x}"
    bound.__module__ = function.__module__
    return bound


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
