"""A layer in which every unit sees every feature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.errors import ArgumentError
from psframe.models.base import he_normal
from psframe.models.layers.base import Context, Layer, Shape

__all__ = ["Dense"]


class Dense(Layer):
    """y = x w + b, with w (d, units), He-normal, and b (units,), zero.

    dw = x^T g, db = sum_i g_i, dx = g w^T.

    Args:
        units: features of the result, >= 1.

    Raises:
        ArgumentError: units is less than 1.
    """

    kind = "dense"

    def __init__(self, units: int) -> None:
        if units < 1:
            raise ArgumentError(f"Dense: units: expected 1 or more, got {units}")
        self.units = units
        self.features = 0

    def build(self, shape: Shape) -> Shape:
        if len(shape) != 1:
            raise ArgumentError(
                f"Dense: expected flat samples, got samples of shape {shape}; put a Flatten() or "
                "a GlobalAveragePool2D() before it"
            )
        self.features = shape[0]
        return (self.units,)

    def init(self, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
        weights = he_normal(rng, self.features, (self.features, self.units))
        return {"w": weights, "b": np.zeros(self.units, np.float32)}

    def forward(self, params: Mapping[str, Any], x: Any, context: Context, xp: Any) -> Any:
        context.save(self, "x", x)
        y = context.array(self, "y", (len(x), self.units), x.dtype, xp)
        xp.matmul(x, params["w"], out=y)
        y += params["b"]
        return y

    def backward(
        self,
        params: Mapping[str, Any],
        g: Any,
        grads: Mapping[str, Any],
        context: Context,
        xp: Any,
        *,
        wanted: bool,
    ) -> Any:
        x = context.saved(self, "x")
        xp.matmul(x.T, g, out=grads["w"])
        g.sum(axis=0, out=grads["b"])
        if not wanted:
            return None
        dx = context.array(self, "dx", x.shape, x.dtype, xp)
        return xp.matmul(g, params["w"].T, out=dx)
