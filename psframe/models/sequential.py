"""A classifier made of layers, one after the other."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.errors import ArgumentError
from psframe.models.base import array_module, classification_sums, cross_entropy, softmax
from psframe.models.cuda import Net
from psframe.models.layers import Context, Dense, Layer

__all__ = ["Sequential"]

# Samples that are evaluated at once: a convolution's columns are nine times its input.
_EVALUATED_AT_ONCE = 128


class Sequential:
    """Layers in a row, with softmax and cross-entropy at the end; a `psframe.models.Model`.

    Parameters are called after their layer's kind, its number among those of the kind, and their
    name in it: conv1.w, bn1.gamma, dense2.b. Threads may share a model: each has memory of its
    own for its passes, which is reused, so that it does not grow after the first step.

    Args:
        input_shape: of one sample: (d,), (h, w) for one channel, or (c, h, w).
        layers: the last gives as many features as there are classes. A layer is one model's.

    Attributes:
        precision: in which arithmetic it computes on a GPU, where the parameters are float32:
            "float32"; "tf32", with matrix products in TF32; "bfloat16" or "float16", with stored
            activations and factors of products in these, and all sums, statistics, parameters
            and gradients in float32. On the host there is only float32, or what the parameters are.

    Raises:
        ArgumentError: a layer cannot take what the one before it gives; no layers.

    Example:
        >>> from psframe.models.layers import Dense, Flatten, ReLU
        >>> model = Sequential((8, 8), [Flatten(), Dense(32), ReLU(), Dense(10)])
        >>> {name: p.shape for name, p in model.init(np.random.default_rng(0)).items()}
        {'dense1.w': (64, 32), 'dense1.b': (32,), 'dense2.w': (32, 10), 'dense2.b': (10,)}
    """

    def __init__(self, input_shape: Sequence[int], layers: Sequence[Layer]) -> None:
        if not layers:
            raise ArgumentError("Sequential: expected at least one layer, got none")
        self.input_shape = tuple(input_shape)
        self.layers = list(layers)
        shape = (1, *self.input_shape) if len(self.input_shape) == 2 else self.input_shape
        self._images = len(shape) == 3
        shape_in = shape
        counts: Counter[str] = Counter()
        self._prefixes = []
        for layer in self.layers:
            shape = layer.build(shape)
            counts[layer.kind] += 1
            self._prefixes.append(f"{layer.kind}{counts[layer.kind]}.")
        if len(shape) != 1:
            raise ArgumentError(
                f"Sequential: the last layer gives {shape} a sample, expected (classes,); end with "
                "Flatten() or GlobalAveragePool2D() and Dense(classes)"
            )
        self.n_classes = shape[0]
        self.averages = {
            prefix + name: momentum
            for prefix, layer in zip(self._prefixes, self.layers, strict=True)
            for name, momentum in layer.averages.items()
        }
        self._names = [
            [(prefix + name, name) for name in layer.init(np.random.default_rng(0))]
            for prefix, layer in zip(self._prefixes, self.layers, strict=True)
        ]
        # No gradient is wanted before the first layer that has parameters.
        self._first = next((i for i, names in enumerate(self._names) if names), len(self.layers))
        self._local = threading.local()
        self.precision = "float32"
        self._net = Net(self.layers, self._names, shape_in)

    def init(self, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
        """Draw fresh parameters of all layers, float32."""
        return {
            prefix + name: array
            for prefix, layer in zip(self._prefixes, self.layers, strict=True)
            for name, array in layer.init(rng).items()
        }

    def loss_and_gradients(
        self,
        params: Mapping[str, Any],
        x: Any,
        y: Any,
        out: Mapping[str, Any] | None = None,
        rng: np.random.Generator | None = None,
    ) -> tuple[Any, Mapping[str, Any]]:
        """Compute the mean cross-entropy over a batch and its gradients.

        For names in `averages` the "gradient" is what this batch observed.
        """
        if self._net.takes(params, self.precision):
            return self._net.loss_and_gradients(params, x, y, out, rng, self.precision)
        context = self._context(training=True)
        context.rng = rng
        parts = self._parts(params)
        logits = self._forward(parts, x, context)
        if not isinstance(self.layers[-1], Dense):
            logits = logits.copy()  # the layer may have saved them, and they are overwritten
        xp = array_module(logits)
        losses, g = cross_entropy(logits, y)
        g[xp.arange(len(y)), y] -= 1
        g /= len(y)
        grads = {name: xp.empty_like(p) for name, p in params.items()} if out is None else out
        places = self._parts(grads)
        for number in range(len(self.layers) - 1, -1, -1):
            if number < self._first:
                break
            layer, wanted = self.layers[number], number > self._first
            g = layer.backward(parts[number], g, places[number], context, xp, wanted=wanted)
        return float(losses.mean()), grads

    def logits(self, params: Mapping[str, Any], x: Any) -> Any:
        """Compute the (n, k) logits of samples, as in evaluation."""
        if len(x) and self._net.takes(params, self.precision):
            return self._net.logits(params, x, self.precision)
        parts = self._parts(params)
        context = self._context(training=False)
        if len(x) == 0:
            return array_module(x).empty((0, self.n_classes), _dtype(parts, x))
        blocks = range(0, len(x), _EVALUATED_AT_ONCE)
        results = [
            self._forward(parts, x[i : i + _EVALUATED_AT_ONCE], context).copy() for i in blocks
        ]
        return results[0] if len(results) == 1 else array_module(x).concatenate(results)

    def probabilities(self, params: Mapping[str, Any], x: Any) -> Any:
        """Compute the (n, k) probability of each class."""
        return softmax(self.logits(params, x))

    def evaluate(self, params: Mapping[str, Any], x: Any, y: Any) -> dict[str, float]:
        """Sum loss, correct predictions and samples over a batch."""
        if self._net.takes(params, self.precision):
            return self._net.evaluate(params, x, y, self.precision)
        return classification_sums(self.logits(params, x), y)

    def predict(self, params: Mapping[str, Any], x: Any) -> Any:
        """Compute the (n,) most likely labels."""
        return self.logits(params, x).argmax(axis=1)

    def _context(self, *, training: bool) -> Context:
        """Give this thread's memory for a pass of that kind."""
        name = "training" if training else "evaluation"
        context = getattr(self._local, name, None)
        if context is None:
            context = Context()
            context.training = training
            setattr(self._local, name, context)
        return context

    def _parts(self, arrays: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Sort arrays by layer, under their names there."""
        return [{name: arrays[full] for full, name in names} for names in self._names]

    def _forward(self, parts: Sequence[Mapping[str, Any]], x: Any, context: Context) -> Any:
        xp = array_module(x)
        value = x.astype(_dtype(parts, x), copy=False)
        if self._images:
            value = value.reshape(len(x), -1, *self.input_shape[-2:]).transpose(1, 0, 2, 3)
        for layer, part in zip(self.layers, parts, strict=True):
            value = layer.forward(part, value, context, xp)
        return value


def _dtype(parts: Sequence[Mapping[str, Any]], x: Any) -> Any:
    """Give the dtype of the parameters; of the samples if there are none."""
    return next((p.dtype for part in parts for p in part.values()), x.dtype)
