"""Several datasets as one; nothing is copied but labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.data.dataset import Dataset

__all__ = ["join"]


class _Joined:
    """The samples of several datasets, one after the other.

    Args:
        parts: of one shape.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *parts[0].input_shape)
        self.dtype: np.dtype[Any] = np.result_type(*(part.x.dtype for part in parts))

    def __getitem__(self, indices: Any) -> npt.NDArray[Any]:
        """Copy the samples of a slice or of int64 indices."""
        if isinstance(indices, slice):
            indices = np.arange(self.shape[0])[indices]
        result = np.empty((len(indices), *self.shape[1:]), self.dtype)
        which = np.searchsorted(self._ends, indices, side="right")
        for i in np.unique(which):
            mine = which == i
            begin = self._ends[i] - len(self._parts[i])
            result[mine] = self._parts[i].raw(indices[mine] - begin)
        return result


def join(parts: Sequence[Dataset]) -> Dataset:
    """Join datasets, one after the other; all else is as in the first of them.

    Args:
        parts: at least one, with samples of one shape, and the same classes.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts:
        assert part.input_shape == first.input_shape, "samples of one shape"
        assert part.classes == first.classes, "the same classes"
    y = np.concatenate([part.labels for part in parts])
    return replace(first, x=_Joined(parts), y=y, rows=None, checked=True)  # `raw` checks each
