"""What is done to samples before a model sees them; stored with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from psframe.data.dataset import Dataset

__all__ = ["Preprocessing"]

# Samples that are read at once to measure: data may be larger than memory.
_BLOCK = 1024
_NAMES = ("preprocessing.mean", "preprocessing.deviation")


@dataclass(frozen=True)
class Preprocessing:
    """The map x -> (x - mean) / deviation, to float32.

    What is wider than two bytes is mapped in float64 and rounded at the end: samples that differ
    by much less than they are large, such as times, would be equal in float32.

    Attributes:
        mean, deviation: float64, of a shape that broadcasts to one sample's: one number a feature
            of flat data, one a channel of images.
    """

    mean: npt.NDArray[np.float64]
    deviation: npt.NDArray[np.float64]

    @classmethod
    def scale(cls, factor: float) -> Preprocessing:
        """Make the one that divides by a factor."""
        return cls(np.array(0, np.float64), np.array(factor, np.float64))

    @classmethod
    def measure(cls, data: Dataset) -> Preprocessing:
        """Measure mean and standard deviation on a dataset, which is to be the training part.

        In float64 and in blocks, so that memory does not grow with the data: the deviation is
        of x - s for a first guess s of the mean, which keeps it exact where it is much smaller
        than the mean. What is constant gets the deviation 1.
        """
        shape = data.input_shape
        axes = (0,) if len(shape) == 1 else (0, *range(1 + (len(shape) == 3), len(shape) + 1))
        shift: Any = None
        total = square = np.float64(0)
        count = 0
        for begin in range(0, len(data), _BLOCK):
            x = data.raw(slice(begin, begin + _BLOCK)).astype(np.float64)
            if shift is None:
                shift = x.mean(axis=axes, keepdims=True)
            x -= shift
            total = total + x.sum(axis=axes, keepdims=True)
            square = square + (x * x).sum(axis=axes, keepdims=True)
            count += x.size // shift.size
        mean = total / count
        deviation = np.sqrt(np.maximum(square / count - mean * mean, 0.0))
        mean = mean + shift
        # Rounding leaves a constant feature a deviation of about 1e-17 of its size.
        deviation[deviation <= 1e-12 * np.abs(mean)] = 1.0
        return cls(mean[0], deviation[0])

    def apply(self, x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Map samples (n, ...) of any real dtype; gives fresh memory."""
        # float32 holds numbers of one or two bytes exactly, and takes half the time for images.
        dtype = np.float32 if x.dtype.itemsize <= 2 else np.float64
        result = x.astype(dtype)
        if self.mean.any():
            result -= self.mean.astype(dtype, copy=False)
        with np.errstate(over="ignore"):  # what is too large is seen in what comes of it
            result /= self.deviation.astype(dtype, copy=False)
            return result.astype(np.float32, copy=False)

    def tensors(self) -> dict[str, npt.NDArray[np.float64]]:
        """Give the arrays to be stored beside a model's weights."""
        return dict(zip(_NAMES, (self.mean, self.deviation), strict=True))

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Preprocessing:
        """Take back what `tensors` gave.

        Raises:
            ValueError: it is not there, or not finite, or a deviation is not positive.
        """
        missing = [name for name in _NAMES if name not in tensors]
        if missing:
            raise ValueError(f"expected tensors {', '.join(_NAMES)}, {missing[0]} is missing")
        mean, deviation = (np.asarray(tensors[name], np.float64) for name in _NAMES)
        if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation > 0).all()):
            raise ValueError("preprocessing: expected finite means and positive deviations")
        return cls(mean, deviation)
