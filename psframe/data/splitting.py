"""Which samples train, validate and test; and the preprocessing that the training part decides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.data.augmentation import Augmentation
from psframe.data.checks import check_trainable
from psframe.data.dataset import Dataset, Parts
from psframe.data.preprocessing import Preprocessing

__all__ = ["prepare", "split"]


def split(
    data: Dataset, fraction: float = 0.2, seed: int = 0, *, part: str = "test"
) -> tuple[Dataset, Dataset]:
    """Split into the rest and a part that is held out, each class in the same proportion.

    The part has ceil(n * fraction) samples; each class gives its share, rounded so that the
    shares add up, but always keeps a sample to train on. What small classes cannot give, the others
    give in their place; the part is smaller only where each class is down to its last sample. The
    same seed gives the same parts.

    Raises:
        ValueError: the fraction is not in (0, 1), or a part would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"{part} fraction: expected a number in (0, 1), got {fraction}")
    rng = np.random.default_rng(seed)
    y = data.labels
    counts = np.bincount(y, minlength=data.n_classes)
    taken = _shares(counts, math.ceil(len(data) * fraction - 1e-9), fraction)
    held_out = [
        rng.permutation(np.flatnonzero(y == label))[: taken[label]]
        for label in np.flatnonzero(counts)
    ]
    inside = np.zeros(len(data), bool)
    inside[np.concatenate(held_out)] = True
    if not inside.any() or inside.all():
        raise ValueError(
            f"{data.name}: {len(data)} samples of {data.n_classes} classes are too few to hold out "
            f"a {part} part of {fraction:.0%} and keep each class in the training part"
        )
    return data.subset(np.flatnonzero(~inside)), data.subset(np.flatnonzero(inside))


def _shares(counts: npt.NDArray[Any], total: int, fraction: float) -> npt.NDArray[Any]:
    """Divide `total` among the classes by their counts: the largest remainders round up.

    Each class keeps a sample, whatever its share; its place is taken by the next one.
    """
    exact = counts * fraction
    shares_max = np.maximum(counts - 1, 0)
    shares: npt.NDArray[Any] = np.minimum(np.floor(exact).astype(np.int64), shares_max)
    while (missing := total - int(shares.sum())) > 0:
        open_to_more = np.flatnonzero(shares < shares_max)
        if len(open_to_more) == 0:
            break
        by_remainder = np.argsort((shares - exact)[open_to_more], kind="stable")
        shares[open_to_more[by_remainder[:missing]]] += 1
    return shares


def prepare(
    data: Dataset | Parts,
    test_fraction: float = 0.2,
    seed: int = 0,
    *,
    validation_fraction: float = 0.0,
    augmentation: Augmentation | None = None,
) -> Parts:
    """Split what has no parts yet, and standardise all parts by the training part.

    Data with preprocessing of its own (the digits) keeps it. A part that the data brings is kept;
    validation is split off the training part if a fraction is asked for.

    Raises:
        ValueError: as `split`; or the parts' samples differ in shape, or the training part has only
            one class, or labels beyond the number of its samples.
        ArgumentError: the augmentation does not suit the samples.
    """
    train, validation, test = data if isinstance(data, Parts) else Parts(data)
    check_trainable(train.labels, train.classes, train.name)
    brought = test is not None
    if test is None:
        train, test = split(train, test_fraction, seed)
    if validation is None and validation_fraction:
        # A fraction of all samples, if the test part is one too; and another draw than that.
        whole = len(train) if brought else len(train) + len(test)
        fraction = validation_fraction * whole / len(train)
        if fraction >= 1.0:
            raise ValueError(
                f"{train.name}: with a validation fraction of {validation_fraction} nothing is left"
                f" of {whole} samples to train on; take a smaller one"
            )
        train, validation = split(train, fraction, seed + 1_000_003, part="validation")
    for name, part in (("validation", validation), ("test", test)):
        if part is not None and part.input_shape != train.input_shape:
            raise ValueError(
                f"{train.name}: the {name} part has samples of shape {part.input_shape}, expected "
                f"{train.input_shape} as in the training part"
            )
    if augmentation is not None:
        augmentation.check(train.input_shape, train.name)
    preprocessing = train.preprocessing or Preprocessing.measure(train)
    return Parts(
        replace(train, preprocessing=preprocessing, augmentation=augmentation),
        None if validation is None else replace(validation, preprocessing=preprocessing),
        replace(test, preprocessing=preprocessing),
    )
