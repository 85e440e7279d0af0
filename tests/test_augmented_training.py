"""Augmentation in a training: what the model is given is changed, and a function of the block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from psframe import optim
from psframe.data import Augmentation, Dataset, Parts, prepare
from psframe.models import Softmax
from psframe.trainer import Trainer

N, SIDE = 48, 6


class Watching(Softmax):
    """Notes the images of each batch, in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__((SIDE, SIDE), 2)
        self.trained: list[bytes] = []
        self.evaluated: list[bytes] = []

    def loss_and_gradients(
        self, params: Mapping[str, Any], x: Any, y: Any, **more: Any
    ) -> tuple[float, Mapping[str, Any]]:
        self.trained += [image.tobytes() for image in x]
        return super().loss_and_gradients(params, x, y, **more)

    def evaluate(self, params: Mapping[str, Any], x: Any, y: Any) -> dict[str, float]:
        self.evaluated += [image.tobytes() for image in x]
        return super().evaluate(params, x, y)


def parts(augmentation: Augmentation | None) -> Parts:
    rng = np.random.default_rng(0)
    x = rng.integers(1, 256, size=(N, SIDE, SIDE), dtype=np.uint8)
    return prepare(Dataset(x, np.arange(N) % 2, 2, "images"), 0.25, augmentation=augmentation)


def images(part: Dataset | None) -> set[bytes]:
    assert part is not None
    return {image.tobytes() for image in part.batch(slice(None))[0]}


def fitted(augmentation: Augmentation | None, **how: Any) -> Watching:
    model = Watching()
    settings = {"batch_size": 8, "epochs": 2, "optimizer": optim.SGD(0.01), "seed": 5}
    Trainer(model, **{**settings, **how}).fit(parts(augmentation))
    return model


@pytest.mark.parametrize("prefetch", [False, True])
def test_training_images_are_changed_and_no_others(prefetch: bool) -> None:
    data = parts(None)
    model = fitted(Augmentation(shift=1, flip=True), prefetch=prefetch, workers=2)
    plain = images(data.train)
    changed = [image for image in model.trained if image not in plain]
    assert len(model.trained) == 2 * len(data.train)
    # One of nine shifts and two mirrorings changes nothing: 17 in 18 images are changed.
    assert len(changed) > len(model.trained) / 2
    assert len(set(changed)) > len(plain), "the second epoch changes them anew"
    assert set(model.evaluated) == images(data.test)


def test_without_augmentation_nothing_is_changed() -> None:
    assert set(fitted(None).trained) == images(parts(None).train)


def test_what_is_drawn_belongs_to_the_block_and_not_to_the_worker() -> None:
    change = Augmentation(shift=2)
    one = sorted(fitted(change, workers=1, prefetch=False).trained)
    assert sorted(fitted(change, workers=3, prefetch=True).trained) == one
    assert sorted(fitted(change, workers=1, seed=6).trained) != one
