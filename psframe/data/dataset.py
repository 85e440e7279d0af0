"""Samples with labels; their split into training and test part; their scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Dataset", "Scaling", "prepare", "split"]


@dataclass(frozen=True)
class Dataset:
    """n samples with labels.

    Attributes:
        x: (n, *input_shape) float32.
        y: (n,) int64 labels in [0, n_classes).
        n_classes: number of classes k.
        name: for messages.
        scaled: whether x already lies in a range that a model likes; then `prepare` does not
            standardise it.
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    n_classes: int
    name: str
    scaled: bool = False

    def __len__(self) -> int:
        return len(self.y)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.x.shape[1:]

    def take(self, indices: npt.NDArray[Any]) -> Dataset:
        """Copy the samples at `indices` into a dataset of their own."""
        return replace(self, x=self.x[indices], y=self.y[indices])


@dataclass(frozen=True)
class Scaling:
    """The map x -> (x - mean) / deviation, by feature.

    Attributes:
        mean: (*input_shape) float32.
        deviation: (*input_shape) float32, 1 for a feature that is constant.
    """

    mean: npt.NDArray[np.float32]
    deviation: npt.NDArray[np.float32]

    @classmethod
    def of(cls, train: Dataset) -> Scaling:
        """Measure mean and standard deviation of each feature, on the training part alone."""
        mean = train.x.mean(axis=0, dtype=np.float64)
        deviation = train.x.std(axis=0, dtype=np.float64)
        # Rounding leaves a constant feature a deviation of about 1e-17 of its size.
        constant = deviation <= 1e-12 * np.abs(mean)
        deviation[constant] = 1.0
        return cls(mean.astype(np.float32), deviation.astype(np.float32))

    def apply(self, data: Dataset) -> Dataset:
        """Standardise a dataset with these figures; the result counts as scaled."""
        return replace(data, x=(data.x - self.mean) / self.deviation, scaled=True)


def split(data: Dataset, test_fraction: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split into training and test part, each class in the same proportion.

    The test part has ceil(n * test_fraction) samples; each class gives its share, rounded so that
    the shares add up, but always keeps a sample to train on. The same seed gives the same parts.

    Raises:
        ValueError: test_fraction is not in (0, 1), or a part would be empty.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"test_fraction: expected a number in (0, 1), got {test_fraction}")
    rng = np.random.default_rng(seed)
    counts = np.bincount(data.y, minlength=data.n_classes)
    taken = _shares(counts, math.ceil(len(data) * test_fraction - 1e-9), test_fraction)
    test_parts = [
        rng.permutation(np.flatnonzero(data.y == label))[: taken[label]]
        for label in range(data.n_classes)
    ]
    in_test = np.zeros(len(data), bool)
    in_test[np.concatenate(test_parts)] = True
    if not in_test.any() or in_test.all():
        raise ValueError(
            f"{data.name}: {len(data)} samples of {data.n_classes} classes are too few to hold out "
            f"a test part of {test_fraction:.0%} and keep each class in the training part"
        )
    return data.take(np.flatnonzero(~in_test)), data.take(np.flatnonzero(in_test))


def _shares(counts: npt.NDArray[Any], total: int, fraction: float) -> npt.NDArray[Any]:
    """Divide `total` among the classes by their counts: the largest remainders round up."""
    exact = counts * fraction
    shares = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(shares - exact, kind="stable")
    shares[by_remainder[: max(0, total - int(shares.sum()))]] += 1
    shares_max = np.maximum(counts - 1, 0)
    return shares.clip(max=shares_max)


def prepare(data: Dataset, test_fraction: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split, and standardise both parts by the training part unless the data is scaled."""
    train, test = split(data, test_fraction, seed)
    if data.scaled:
        return train, test
    scaling = Scaling.of(train)
    return scaling.apply(train), scaling.apply(test)
