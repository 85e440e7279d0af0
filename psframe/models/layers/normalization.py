"""Batch normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.errors import ArgumentError
from psframe.models.layers.base import Context, Layer, Shape

__all__ = ["BatchNorm"]


class BatchNorm(Layer):
    """Standardise each feature, or channel, over the batch; then scale and shift it.

        xhat = (x - mean) / sqrt(variance + eps),    y = gamma xhat + beta

    over the m values of a feature in the batch (of a channel: its pixels too). With G = gamma g:
    dgamma = sum g xhat, dbeta = sum g, dx = (G - mean(G) - xhat mean(G xhat)) / sqrt(...).
    Ioffe and Szegedy, Batch Normalization, 2015, algorithm 1.

    Evaluation uses running averages of mean and (unbiased, m / (m - 1)) variance. They are among
    the parameters, as `mean` and `variance`, but are not trained: what a batch observed is pushed
    in place of a gradient, and the server averages it in with `momentum` (see
    `psframe.optim.Average`), so that there is one average over all workers. A batch with m = 1
    shows no variance: it pushes the averages that it was given. Flat features need batches of two
    samples or more: one sample is its own mean, so that xhat and all gradients before it are 0.

    Args:
        momentum: weight of the past in the running averages, in [0, 1).
        eps: > 0.

    Raises:
        ArgumentError: a number is out of range.
    """

    kind = "bn"

    def __init__(self, *, momentum: float = 0.9, eps: float = 1e-5) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ArgumentError(f"BatchNorm: momentum: expected a number in [0, 1), got {momentum}")
        if not eps > 0.0:
            raise ArgumentError(f"BatchNorm: eps: expected more than 0, got {eps}")
        self.eps = eps
        self.averages = {"mean": momentum, "variance": momentum}
        self._features = 0
        self._image = False

    def build(self, shape: Shape) -> Shape:
        self._features, self._image = shape[0], len(shape) == 3
        return shape

    def init(self, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
        ones, zeros = np.ones(self._features, np.float32), np.zeros(self._features, np.float32)
        return {"gamma": ones, "beta": zeros, "mean": zeros.copy(), "variance": ones.copy()}

    def forward(self, params: Mapping[str, Any], x: Any, context: Context, xp: Any) -> Any:
        y = context.array(self, "y", x.shape, x.dtype, xp)
        gamma, beta = self._spread(params["gamma"]), self._spread(params["beta"])
        if not context.training:
            scale = gamma / xp.sqrt(self._spread(params["variance"]) + x.dtype.type(self.eps))
            xp.subtract(x, self._spread(params["mean"]), out=y)
            y *= scale
            y += beta
            return y
        mean = x.mean(axis=self._axes)
        xhat = context.array(self, "xhat", x.shape, x.dtype, xp)
        xp.subtract(x, self._spread(mean), out=xhat)
        xp.multiply(xhat, xhat, out=y)
        variance = y.mean(axis=self._axes)
        inverse = 1 / xp.sqrt(variance + x.dtype.type(self.eps))
        xhat *= self._spread(inverse)
        xp.multiply(xhat, gamma, out=y)
        y += beta
        context.save(self, "observed", (mean, variance))
        context.save(self, "inverse", inverse)
        context.save(self, "xhat", xhat)
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
        xhat, inverse = context.saved(self, "xhat"), context.saved(self, "inverse")
        mean, variance = context.saved(self, "observed")
        m = xhat.size // self._features
        if m > 1:
            grads["mean"][...] = mean
            grads["variance"][...] = variance * (m / (m - 1))
        else:
            grads["mean"][...] = params["mean"]
            grads["variance"][...] = params["variance"]
        product = context.array(self, "product", xhat.shape, xhat.dtype, xp)
        xp.multiply(g, xhat, out=product)
        dgamma, dbeta = product.sum(axis=self._axes), g.sum(axis=self._axes)
        grads["gamma"][...] = dgamma
        grads["beta"][...] = dbeta
        if not wanted:
            return None
        xp.multiply(xhat, self._spread(dgamma / m), out=product)
        product += self._spread(dbeta / m)
        dx = context.array(self, "dx", xhat.shape, xhat.dtype, xp)
        xp.subtract(g, product, out=dx)
        dx *= self._spread(params["gamma"] * inverse)
        return dx

    @property
    def _axes(self) -> tuple[int, ...]:
        return (1, 2, 3) if self._image else (0,)

    def _spread(self, values: Any) -> Any:
        return values.reshape(-1, 1, 1, 1) if self._image else values
