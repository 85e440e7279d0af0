"""Layers without parameters that work on each value by itself, and the way to flat features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from psframe.models.layers.base import Context, Layer, Shape

__all__ = ["Flatten", "ReLU", "Tanh"]


class ReLU(Layer):
    """max(x, 0), in place; its derivative at 0 is taken to be 0."""

    kind = "relu"

    def forward(self, params: Mapping[str, Any], x: Any, context: Context, xp: Any) -> Any:
        y = context.array(self, "y", x.shape, x.dtype, xp)
        return context.save(self, "y", xp.maximum(x, 0, out=y))

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
        y = context.saved(self, "y")
        positive = context.array(self, "positive", y.shape, bool, xp)
        g *= xp.greater(y, 0, out=positive)
        return g


class Tanh(Layer):
    """tanh(x); its derivative is 1 - tanh(x)^2."""

    kind = "tanh"

    def forward(self, params: Mapping[str, Any], x: Any, context: Context, xp: Any) -> Any:
        y = context.array(self, "y", x.shape, x.dtype, xp)
        return context.save(self, "y", xp.tanh(x, out=y))

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
        y = context.saved(self, "y")
        g *= 1 - y * y
        return g


class Flatten(Layer):
    """Images (c, n, h, w) to features (n, c h w); flat samples stay as they are."""

    kind = "flatten"

    def __init__(self) -> None:
        self._in: Shape = ()

    def build(self, shape: Shape) -> Shape:
        self._in = shape
        return (math.prod(shape),)

    def forward(self, params: Mapping[str, Any], x: Any, context: Context, xp: Any) -> Any:
        if len(self._in) == 1:
            return x
        channels, n, height, width = x.shape
        y = context.array(self, "y", (n, channels, height, width), x.dtype, xp)
        y[...] = x.transpose(1, 0, 2, 3)
        return y.reshape(n, -1)

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
        if len(self._in) == 1 or not wanted:
            return g if wanted else None
        channels, height, width = self._in
        dx = context.array(self, "dx", (channels, len(g), height, width), g.dtype, xp)
        dx[...] = g.reshape(len(g), channels, height, width).transpose(1, 0, 2, 3)
        return dx
