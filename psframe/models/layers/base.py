"""What a layer is, and the memory that its passes use.

Symbols: n samples in a batch, d features, c channels, (h, w) pixels.

Between layers, features are (n, d) and images are (c, n, h, w): channels first of all, so that
a convolution is one matrix product whose result already has that form, and what concerns a
channel is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.errors import ArgumentError

__all__ = ["Context", "Layer", "image_shape"]

Shape = tuple[int, ...]


class Context:
    """The memory of one thread's passes through one model; nothing is allocated twice.

    Attributes:
        training: whether gradients will be asked for (dropout and batch normalisation differ).
        rng: the source of randomness of this batch, a NumPy Generator; None draws nothing.
    """

    def __init__(self) -> None:
        self.training = False
        self.rng: np.random.Generator | None = None
        self._saved: dict[tuple[int, str], Any] = {}
        self._memory: dict[tuple[int, str, Any], Any] = {}

    def array(self, layer: Any, role: str, shape: Shape, dtype: Any, xp: Any) -> Any:
        """Give an array with undefined values, the layer's own for this role until the next call.

        A smaller batch uses the beginning of the memory of a larger one. A model that has run on a
        GPU may run on the host, in the same thread: each has memory of its own.
        """
        key = id(layer), role, xp
        size = math.prod(shape)
        memory = self._memory.get(key)
        if memory is None or memory.size < size or memory.dtype != dtype:
            memory = self._memory[key] = xp.empty(size, dtype)
        return memory[:size].reshape(shape)

    def save(self, layer: Any, role: str, value: Any) -> Any:
        """Keep what the backward pass needs of the forward pass."""
        self._saved[id(layer), role] = value
        return value

    def saved(self, layer: Any, role: str) -> Any:
        """Give what `save` kept."""
        return self._saved[id(layer), role]


class Layer:
    """A part of a model that has no state but its sizes; parameters are handed to it.

    Attributes:
        kind: short name; the model's parameters are called kind + number + "." + name.
        averages: names of `init` that are no parameters but statistics, to their momentum; see
            `psframe.models.Model`.
    """

    kind = "layer"
    averages: Mapping[str, float] = {}

    def build(self, shape: Shape) -> Shape:
        """Learn the shape of one sample, (d,) or (c, h, w); give that of the result.

        Raises:
            ArgumentError: the layer cannot take such samples.
        """
        return shape

    def init(self, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
        """Draw fresh parameters, by their names in this layer."""
        return {}

    def forward(self, params: Mapping[str, Any], x: Any, context: Context, xp: Any) -> Any:
        """Compute the result of a batch. It may lie in `x`, whose values are no longer needed
        unless this layer has saved them."""
        raise NotImplementedError

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
        """Compute the gradients of the layer's parameters and of its input.

        Args:
            params: as for `forward`.
            g: the gradient with respect to the result; may be overwritten.
            grads: where the gradients of the parameters go, by their names in this layer.
            context: of the forward pass.
            xp: numpy or cupy.
            wanted: whether anybody wants the gradient of the input.

        Returns:
            The gradient with respect to the input; None if it is not wanted.
        """
        raise NotImplementedError


def image_shape(shape: Shape, what: str) -> tuple[int, int, int]:
    """Check that samples are images.

    Raises:
        ArgumentError: they are not.
    """
    if len(shape) != 3:
        raise ArgumentError(
            f"{what}: expected images of (channels, height, width), got samples of shape {shape}; "
            "use layers for flat data, or data with images"
        )
    channels, height, width = shape
    return channels, height, width
