"""Leaving features out at random while training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from psframe.errors import ArgumentError
from psframe.models.layers.base import Context, Layer

__all__ = ["Dropout"]


class Dropout(Layer):
    """While training, set each value to 0 with probability `rate`, and scale the others.

    y = x mask / (1 - rate), so that nothing changes on average and evaluation leaves x as it is
    (Srivastava et al., Dropout, 2014; scaled while training, as is usual now). The mask is drawn
    on the host from the batch's own generator, so that it does not depend on the device or the
    worker. Without a generator nothing is left out.

    Args:
        rate: in [0, 1).

    Raises:
        ArgumentError: it is outside.
    """

    kind = "dropout"

    def __init__(self, rate: float = 0.5) -> None:
        if not 0.0 <= rate < 1.0:
            raise ArgumentError(f"Dropout: rate: expected a number in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, params: Mapping[str, Any], x: Any, context: Context, xp: Any) -> Any:
        mask = None
        if context.training and context.rng is not None and self.rate:
            drawn = context.rng.random(x.shape, np.float32) >= self.rate
            mask = xp.asarray(drawn.astype(x.dtype) / x.dtype.type(1 - self.rate))
        context.save(self, "mask", mask)
        if mask is None:
            return x
        y = context.array(self, "y", x.shape, x.dtype, xp)
        return xp.multiply(x, mask, out=y)

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
        mask = context.saved(self, "mask")
        if mask is not None:
            g *= mask
        return g
