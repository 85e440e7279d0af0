"""Samples with labels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from psframe.data.augmentation import Augmentation
from psframe.data.checks import check_classes
from psframe.data.preprocessing import Preprocessing
from psframe.errors import ArgumentError

__all__ = ["Dataset", "Parts", "Samples"]

Indices = npt.NDArray[Any] | slice


class Samples(Protocol):
    """What holds the samples: a NumPy array, or something like it that reads files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, *input_shape)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """A real dtype."""

    def __getitem__(self, indices: Any, /) -> npt.NDArray[Any]:
        """Give the samples of a slice or of int64 indices."""


@dataclass(frozen=True)
class Dataset:
    """n samples with labels, and what is done to them before a model sees them.

    Attributes:
        x: (m, *input_shape) of any real dtype, in memory or read when asked for. Images are (h, w)
            or (c, h, w).
        y: (m,) int64 labels in [0, n_classes).
        n_classes: number of classes k.
        name: for messages.
        classes: their names, k different ones; "0", "1", ... by default.
        rows: which of the m samples are in the dataset, in order; None for all.
        preprocessing: applied to each batch; None only makes it float32.
        augmentation: applied to each batch with a random generator; None for none.
        checked: whether all of x is known to be finite.
    """

    x: Samples
    y: npt.NDArray[np.int64]
    n_classes: int
    name: str
    classes: tuple[str, ...] = ()
    rows: npt.NDArray[np.int64] | None = field(default=None, repr=False)
    preprocessing: Preprocessing | None = None
    augmentation: Augmentation | None = None
    checked: bool = True

    def __post_init__(self) -> None:
        if not self.classes:
            object.__setattr__(self, "classes", tuple(str(i) for i in range(self.n_classes)))
            return
        if len(self.classes) != self.n_classes:
            raise ValueError(
                f"data {self.name!r}: has {self.n_classes} classes, but {len(self.classes)} names "
                "for them"
            )
        try:
            check_classes(self.classes)
        except ValueError as error:
            raise ValueError(f"data {self.name!r}: {error}") from error

    def __len__(self) -> int:
        return len(self.y) if self.rows is None else len(self.rows)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """(n,) labels, in the dataset's order."""
        return self.y if self.rows is None else self.y[self.rows]

    def subset(self, indices: npt.NDArray[Any]) -> Dataset:
        """Make the dataset of the samples at `indices` of this one; no sample is copied."""
        return replace(self, rows=np.asarray(indices) if self.rows is None else self.rows[indices])

    def raw(self, indices: Indices) -> npt.NDArray[Any]:
        """Give samples as they are stored; perhaps a view, not to be written.

        Raises:
            ArgumentError: one is not finite in float32 (found only now where not all of x is known
                to be).
        """
        if self.rows is not None:
            indices = self.rows[indices]
        x = self.x[indices]
        if not self.checked and x.dtype.kind == "f":
            with np.errstate(over="ignore"):
                finite = np.isfinite(x.astype(np.float32, copy=False))
            if not finite.all():
                place = tuple(int(i) for i in np.argwhere(~finite)[0])
                at, value = np.arange(len(self.y))[indices][place[0]], x[place]
                why = "too large for float32" if np.isfinite(value) else "no finite number"
                raise ArgumentError(
                    f"data {self.name!r}: 'x' has {value} in sample {at}, at {place[1:]}: {why}"
                )
        return x

    def batch(
        self, indices: Indices, rng: np.random.Generator | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Give samples and labels as a model takes them; threads may call it at the same time.

        Args:
            indices: into this dataset, int64 or a slice.
            rng: for the augmentation; without one there is none.

        Returns:
            (n, *input_shape) float32, contiguous, and (n,) int64; the caller's own.

        Raises:
            ArgumentError: as `raw`.
        """
        raw = self.raw(indices)
        if self.preprocessing is None:
            x = raw.astype(np.float32, order="C")
        else:
            x = np.ascontiguousarray(self.preprocessing.apply(raw))
        if rng is not None and self.augmentation is not None:
            x = self.augmentation.apply(x, rng)
        # Not self.labels[indices]: that would gather all labels for each batch.
        return x, np.array(self.y[indices if self.rows is None else self.rows[indices]])


class Parts(NamedTuple):
    """Data in parts; a part that there is not is None."""

    train: Dataset
    validation: Dataset | None = None
    test: Dataset | None = None
