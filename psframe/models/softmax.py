"""Softmax regression: the linear classifier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from psframe.models.mlp import MLP

__all__ = ["Softmax"]


class Softmax(MLP):
    """Softmax regression p = softmax(x w1 + b1): a perceptron without hidden layers.

    Its loss is convex, so it starts from zeros: no draw would be better.

    Args:
        input_shape: shape of one sample; flattened to d features.
        n_classes: k.
    """

    def __init__(self, input_shape: Sequence[int], n_classes: int) -> None:
        super().__init__(input_shape, n_classes, hidden=())

    def init(self, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
        """Return zero weights and biases; `rng` is not used."""
        return {name: np.zeros_like(p) for name, p in super().init(rng).items()}
