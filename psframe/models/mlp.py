"""A multi-layer perceptron: dense layers with ReLU between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.models.base import (
    array_module,
    classification_sums,
    cross_entropy,
    he_normal,
    softmax,
)
from psframe.models.cuda import Net
from psframe.models.layers import Dense, Layer, ReLU

__all__ = ["MLP"]


class MLP:
    """Dense layers h_l = relu(h_{l-1} w_l + b_l); the last has no ReLU, its output are logits.

    Parameters are named w1, b1, w2, b2, ... from the input on; w_l is (fan_in, fan_out).

    Args:
        input_shape: shape of one sample; flattened to d features.
        n_classes: k.
        hidden: units of each hidden layer; none makes it softmax regression.

    Attributes:
        precision: in which arithmetic it computes on a GPU, as `Sequential`'s.

    Example:
        >>> model = MLP((8, 8), 10, hidden=(128,))
        >>> {name: p.shape for name, p in model.init(np.random.default_rng(0)).items()}
        {'w1': (64, 128), 'b1': (128,), 'w2': (128, 10), 'b2': (10,)}
    """

    def __init__(
        self, input_shape: Sequence[int], n_classes: int, hidden: Sequence[int] = (256, 128)
    ) -> None:
        self.widths = (math.prod(input_shape), *hidden, n_classes)
        self.n_layers = len(self.widths) - 1
        self.precision = "float32"
        self._net = self._on_kernels()

    def init(self, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
        """Draw He-normal weights, and zero biases."""
        params: dict[str, npt.NDArray[np.float32]] = {}
        for layer, shape in enumerate(zip(self.widths, self.widths[1:], strict=False), start=1):
            params[f"w{layer}"] = he_normal(rng, shape[0], shape)
            params[f"b{layer}"] = np.zeros(shape[1], np.float32)
        return params

    def loss_and_gradients(
        self,
        params: Mapping[str, Any],
        x: Any,
        y: Any,
        out: Mapping[str, Any] | None = None,
        rng: np.random.Generator | None = None,
    ) -> tuple[Any, Mapping[str, Any]]:
        """Compute the mean cross-entropy over a batch and its gradients; nothing is drawn.

        With g_l the gradient at layer l's output before its ReLU: g_L = (p - onehot(y)) / n,
        dw_l = h_{l-1}^T g_l, db_l = sum_i g_l, g_{l-1} = (g_l w_l^T) * [h_{l-1} > 0].
        """
        if self._net.takes(params, self.precision):
            return self._net.loss_and_gradients(params, x, y, out, None, self.precision)
        inputs, logits = self._forward(params, x)
        xp = array_module(logits)
        losses, g = cross_entropy(logits, y)
        g[xp.arange(len(y)), y] -= 1
        g /= len(y)
        grads = {name: xp.empty_like(p) for name, p in params.items()} if out is None else out
        for layer in range(self.n_layers, 0, -1):
            h = inputs[layer - 1]
            xp.matmul(h.T, g, out=grads[f"w{layer}"])
            g.sum(axis=0, out=grads[f"b{layer}"])
            if layer > 1:
                g = g @ params[f"w{layer}"].T
                g *= h > 0
        return float(losses.mean()), grads

    def evaluate(self, params: Mapping[str, Any], x: Any, y: Any) -> dict[str, float]:
        """Sum loss, correct predictions and samples over a batch."""
        if self._net.takes(params, self.precision):
            return self._net.evaluate(params, x, y, self.precision)
        return classification_sums(self._forward(params, x)[1], y)

    def probabilities(self, params: Mapping[str, Any], x: Any) -> Any:
        """Compute the (n, k) probability of each class."""
        return softmax(self._logits(params, x))

    def predict(self, params: Mapping[str, Any], x: Any) -> Any:
        """Compute the (n,) most likely labels."""
        return self._logits(params, x).argmax(axis=1)

    def _logits(self, params: Mapping[str, Any], x: Any) -> Any:
        if len(x) and self._net.takes(params, self.precision):
            return self._net.logits(params, x, self.precision)
        return self._forward(params, x)[1]

    def _forward(self, params: Mapping[str, Any], x: Any) -> tuple[list[Any], Any]:
        """Compute each layer's input, and the (n, k) logits."""
        xp = array_module(params["w1"])
        h = x.reshape(len(x), self.widths[0])
        inputs = []
        for layer in range(1, self.n_layers + 1):
            inputs.append(h)
            z = h @ params[f"w{layer}"]
            z += params[f"b{layer}"]
            h = z if layer == self.n_layers else xp.maximum(z, 0, out=z)
        return inputs, h

    def _on_kernels(self) -> Net:
        """Describe the same network as layers, for a GPU's kernels."""
        layers: list[Layer] = []
        names: list[list[tuple[str, str]]] = []
        for number, units in enumerate(self.widths[1:], start=1):
            layers.append(Dense(units))
            names.append([(f"w{number}", "w"), (f"b{number}", "b")])
            if number < self.n_layers:
                layers.append(ReLU())
                names.append([])
        return Net(layers, names, (self.widths[0],))
