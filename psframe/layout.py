"""Where each named tensor lies in the one flat vector of P parameters, and who serves what.

The tensors stand in the flat vector in the order of the mapping that they came in, row-major,
without gaps. A shard is a half-open range [begin, end) of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Layout", "check_gradient_dtype"]

Array = npt.NDArray[Any]

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
# Shards begin at multiples of this many elements, so that no two servers write one cache line.
_SHARD_ALIGN = 16


@dataclass(frozen=True)
class Layout:
    """Maps names to places in the flat vector.

    Attributes:
        names: the tensors' names, in order.
        shapes: their shapes.
        offsets: index of each tensor's first element in the flat vector.
        sizes: their element counts.
        size: P, the element count of the flat vector.
        dtype: float32 or float64, one for all.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    size: int
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Layout:
        """Lay out a mapping of names to arrays.

        Args:
            params: mapping of names to float32 or float64 arrays, all of one dtype.

        Raises:
            TypeError: not a mapping, a name is not a string, a dtype is not float32 or float64.
            ValueError: nothing in it, no elements, or the dtypes are mixed.
        """
        if not isinstance(params, Mapping):
            raise TypeError(
                f"params: expected a mapping of names to arrays, got {type(params).__name__}"
            )
        if not params:
            raise ValueError("params: expected at least one named array, got an empty mapping")
        shapes: list[tuple[int, ...]] = []
        dtypes: dict[np.dtype[Any], str] = {}
        for name, value in params.items():
            if not isinstance(name, str):
                raise TypeError(f"params: expected names that are strings, got {name!r}")
            dtype = getattr(value, "dtype", None)
            if dtype is None or dtype not in _DTYPES:  # numpy.dtype("f8") == None
                got = "no dtype" if dtype is None else str(dtype)
                raise TypeError(
                    f"params: {name!r} has {got}, expected a float32 or float64 array; "
                    "convert it with .astype(numpy.float32)"
                )
            dtypes.setdefault(np.dtype(dtype), name)
            shapes.append(tuple(int(n) for n in value.shape))
        if len(dtypes) > 1:
            found = ", ".join(f"{name!r} is {dtype}" for dtype, name in dtypes.items())
            raise ValueError(f"params: expected one dtype for all arrays, but {found}")
        sizes = tuple(math.prod(shape) for shape in shapes)
        offsets = tuple(itertools.accumulate(sizes, initial=0))[:-1]
        if sum(sizes) == 0:
            raise ValueError("params: expected at least one element, all arrays are empty")
        return cls(tuple(params), tuple(shapes), offsets, sizes, sum(sizes), next(iter(dtypes)))

    def shards(self, servers: int) -> list[tuple[int, int]]:
        """Split the flat vector into `servers` ranges [begin, end) of nearly equal size.

        A vector with fewer aligned pieces than servers leaves the last servers empty ranges.
        """
        pieces = -(-self.size // _SHARD_ALIGN)
        bounds = [min(self.size, (pieces * s // servers) * _SHARD_ALIGN) for s in range(servers)]
        bounds.append(self.size)
        return [(bounds[s], bounds[s + 1]) for s in range(servers)]

    def views(self, flat: Any) -> dict[str, Any]:
        """Name the tensors inside a flat array of P elements; nothing is copied."""
        return {
            name: flat[offset : offset + size].reshape(shape)
            for name, offset, size, shape in zip(
                self.names, self.offsets, self.sizes, self.shapes, strict=True
            )
        }

    def flatten(self, params: Mapping[str, Any]) -> Array:
        """Copy named host arrays into a new flat vector of P elements."""
        flat = np.empty(self.size, self.dtype)
        for name, view in self.views(flat).items():
            view[...] = params[name]
        return flat

    def describe(self) -> str:
        """Write names, shapes and dtype as text, equal for equal layouts."""
        return f"{self.dtype}:" + ",".join(
            f"{n!r}{s}" for n, s in zip(self.names, self.shapes, strict=True)
        )


def check_gradient_dtype(name: str, dtype: Any, where: str) -> None:
    """Raise TypeError unless `dtype` is a real floating-point type (it is cast if need be)."""
    if dtype is None or np.dtype(dtype).kind != "f":
        raise TypeError(
            f"{where}: gradient {name!r} has dtype {dtype}, expected float32 or float64; "
            "convert it first"
        )
