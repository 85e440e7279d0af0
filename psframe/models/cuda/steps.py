"""How each layer runs on kernels: its forward and its backward step.

The plain expressions beside which these stand are the layers' own (`psframe.models.layers`). A
ReLU that follows a dense layer, a convolution or a batch normalisation is part of that step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from psframe.models.cuda.kernels import PARTS_MAX, Geometry
from psframe.models.cuda.run import Run
from psframe.models.layers import (
    BatchNorm,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    Layer,
    MaxPool2D,
    ReLU,
)

__all__ = ["Step", "plan"]

Params = Mapping[str, Any]

# Of a convolution's weight gradient: with more values than this its product alone fills a GPU, and
# in parts shorter than this each is over before it has begun.
_SMALL_PRODUCT = 1 << 18
_PART_MIN = 256


class Step:
    """One layer on kernels; arguments as those of `Layer`, with a `Run` in place of context and xp.

    Args:
        layer: the layer.
        number: its place among the model's, by which its parameters are found.

    Attributes:
        stored: whether it takes and gives values of the storage type; else of float32.
        rectify: whether the ReLU after the layer is part of the step.
        cast: names of the parameters that it wants as the storage type.
    """

    stored = True
    cast: tuple[str, ...] = ()

    def __init__(self, layer: Any, number: int) -> None:
        self.layer = layer
        self.number = number
        self.rectify = False

    def forward(self, run: Run, params: Params, x: Any) -> Any:
        """Compute the result of a batch."""
        raise NotImplementedError

    def backward(self, run: Run, params: Params, g: Any, grads: Params, wanted: bool) -> Any:
        """Compute the gradients of the parameters, and of the input if that is wanted."""
        raise NotImplementedError


class _Plain(Step):
    """A layer without kernels, by its plain expression, in float32."""

    stored = False

    def forward(self, run: Run, params: Params, x: Any) -> Any:
        return self.layer.forward(params, x, run.memory, run.xp)

    def backward(self, run: Run, params: Params, g: Any, grads: Params, wanted: bool) -> Any:
        g = self.layer.backward(params, g, grads, run.memory, run.xp, wanted=wanted)
        if run.kernels.scaled:
            for name, grad in grads.items():
                if name not in self.layer.averages:
                    run.kernels.check(grad)
                    grad *= run.kernels.state[1:2]
        return g


class _Dense(Step):
    cast = ("w",)
    last = False  # its bias is added where the loss is computed, and its result is float32

    def forward(self, run: Run, params: Params, x: Any) -> Any:
        run.save(self, "x", x)
        shape = len(x), self.layer.units
        if self.last:
            run.bias = params["b"]
            return run.gemm(x, run.weight(self, "w"), run.float32(self, "y", shape))
        y = run.gemm(x, run.weight(self, "w"), run.stored(self, "y", shape))
        run.kernels.bias_columns(y, params["b"], rectify=self.rectify)
        return run.save(self, "y", y)

    def backward(self, run: Run, params: Params, g: Any, grads: Params, wanted: bool) -> Any:
        h = run.saved(self, "y") if self.rectify else None
        run.kernels.bias_columns_gradient(g, h, grads["b"])
        x = run.saved(self, "x")
        run.gemm(x, g, grads["w"], ta=True, unscale=True)
        if not wanted:
            return None
        return run.gemm(g, run.weight(self, "w"), run.stored(self, "dx", x.shape), tb=True)


class _Conv2D(Step):
    cast = ("w",)
    first = False  # it is given the samples as they are: float32 (n, c, h, w)

    def forward(self, run: Run, params: Params, x: Any) -> Any:
        layer = self.layer
        channels = layer._in[0]
        n = len(x) if self.first else x.shape[1]
        geometry = self._geometry(n)
        m = n * math.prod(geometry[-2:])
        columns = run.stored(self, "columns", (channels * layer.size**2, m))
        run.kernels.to_columns(x, columns, geometry, samples=self.first)
        run.save(self, "columns", columns)
        y = run.stored(self, "y", (layer.channels, m))
        run.gemm(self._weight(run), columns, y)
        if layer.bias:
            run.kernels.bias_rows(y, params["b"], rectify=self.rectify)
        elif self.rectify:
            run.kernels.relu(y, y)
        run.save(self, "y", y)
        return run.shaped(y, (layer.channels, n, *geometry[-2:]))

    def backward(self, run: Run, params: Params, g: Any, grads: Params, wanted: bool) -> Any:
        layer = self.layer
        n = g.shape[1]
        columns, y = run.saved(self, "columns"), run.saved(self, "y")
        g = run.shaped(g, y.shape)
        h = y if self.rectify else None
        if layer.bias:
            run.kernels.bias_rows_gradient(g, h, grads["b"])
        elif h is not None:
            run.kernels.relu_gradient(g, h)
        self._weight_gradient(run, g, columns, grads["w"])
        if not wanted:
            return None
        # The columns are done with: the same memory holds their gradient.
        run.gemm(self._weight(run), g, columns, ta=True)
        channels, height, width = layer._in
        dx = run.stored(self, "dx", (channels, n, height, width))
        run.kernels.from_columns(columns, dx, self._geometry(n))
        return dx

    def _weight_gradient(self, run: Run, g: Any, columns: Any, dw: Any) -> None:
        rows, (inner, m) = len(g), columns.shape
        parts = 1 if rows * inner > _SMALL_PRODUCT else _parts(m)
        if parts == 1:
            run.gemm(g, columns, run.shaped(dw, (rows, inner)), tb=True, unscale=True)
            return
        partial = run.float32(self, "dw", (parts, rows, inner))
        run.gemm.in_parts(g, columns, partial)
        run.kernels.sum_parts(partial, dw)

    def _weight(self, run: Run) -> Any:
        return run.shaped(run.weight(self, "w"), (self.layer.channels, -1))

    def _geometry(self, n: int) -> Geometry:
        layer = self.layer
        return (n, *layer._in[1:], layer.size, layer.stride, layer.padding, *layer._out)


class _BatchNorm(Step):
    def forward(self, run: Run, params: Params, x: Any) -> Any:
        layer, kernels = self.layer, run.kernels
        images = x.ndim == 4
        mean, variance = params["mean"], params["variance"]
        if run.memory.training:
            mean = run.float32(self, "mean", mean.shape)
            variance = run.float32(self, "variance", variance.shape)
            kernels.bn_moments(x, layer._features, mean, variance, images=images)
        statistics = (mean, variance, params["gamma"], params["beta"])
        run.save(self, "x", x)
        run.save(self, "statistics", statistics)
        y = run.stored(self, "y", x.shape)
        eps = np.float32(layer.eps)
        kernels.bn_apply(x, y, statistics, eps, images=images, rectify=self.rectify)
        return y

    def backward(self, run: Run, params: Params, g: Any, grads: Params, wanted: bool) -> Any:
        x, statistics = run.saved(self, "x"), run.saved(self, "statistics")
        known = params["mean"], params["variance"]
        places = tuple(grads[name] for name in ("gamma", "beta", "mean", "variance"))
        given: dict[str, Any] = {"images": x.ndim == 4, "rectify": self.rectify}
        eps = np.float32(self.layer.eps)
        total = run.kernels.bn_gradient(g, x, statistics, known, places, eps, **given)
        if not wanted:
            return None
        dx = run.stored(self, "dx", x.shape)
        run.kernels.bn_input_gradient(g, x, dx, statistics, total, eps, **given)
        return dx


class _ReLU(Step):
    def forward(self, run: Run, params: Params, x: Any) -> Any:
        return run.save(self, "y", run.kernels.relu(x, run.stored(self, "y", x.shape)))

    def backward(self, run: Run, params: Params, g: Any, grads: Params, wanted: bool) -> Any:
        return run.kernels.relu_gradient(g, run.saved(self, "y"))


class _MaxPool2D(Step):
    def forward(self, run: Run, params: Params, x: Any) -> Any:
        layer = self.layer
        shape = (*x.shape[:2], *layer._out)
        y, where = run.stored(self, "y", shape), run.array(self, "where", shape, np.uint8)
        run.kernels.max_pool(x, y, where, (layer.size, layer.stride))
        run.save(self, "x", x)
        run.save(self, "where", where)
        return y

    def backward(self, run: Run, params: Params, g: Any, grads: Params, wanted: bool) -> Any:
        layer = self.layer
        dx = run.stored(self, "dx", run.saved(self, "x").shape)
        where = run.saved(self, "where")
        run.kernels.max_pool_gradient(g, where, dx, (layer.size, layer.stride))
        return dx


class _Flatten(Step):
    first = False  # it is given the samples as they are: float32 (n, c, h, w), flat to it

    def forward(self, run: Run, params: Params, x: Any) -> Any:
        if len(self.layer._in) == 1 or self.first:
            return x
        channels, n = x.shape[:2]
        area = math.prod(x.shape[2:])
        y = run.stored(self, "y", (n, channels * area))
        run.kernels.swap_axes(x, y, (channels, n, area))
        return y

    def backward(self, run: Run, params: Params, g: Any, grads: Params, wanted: bool) -> Any:
        if len(self.layer._in) == 1 or self.first:
            return g
        channels, height, width = self.layer._in
        dx = run.stored(self, "dx", (channels, len(g), height, width))
        run.kernels.swap_axes(g, dx, (len(g), channels, height * width))
        return dx


class _Dropout(Step):
    def forward(self, run: Run, params: Params, x: Any) -> Any:
        mask, rate = None, self.layer.rate
        rng = run.memory.rng
        if run.memory.training and rng is not None and rate:
            # Drawn on the host, from the batch's own generator, as the layer does.
            mask = run.upload(self, rng.random(x.shape, np.float32) >= rate)
        run.save(self, "mask", mask)
        if mask is None:
            return x
        return run.kernels.dropout(x, mask, run.stored(self, "y", x.shape), self._scale)

    def backward(self, run: Run, params: Params, g: Any, grads: Params, wanted: bool) -> Any:
        mask = run.saved(self, "mask")
        return g if mask is None else run.kernels.dropout(g, mask, g, self._scale)

    @property
    def _scale(self) -> Any:
        return np.float32(1) / np.float32(1 - self.layer.rate)


_STEPS: dict[type[Layer], type[Step]] = {
    BatchNorm: _BatchNorm,
    Conv2D: _Conv2D,
    Dense: _Dense,
    Dropout: _Dropout,
    Flatten: _Flatten,
    MaxPool2D: _MaxPool2D,
    ReLU: _ReLU,
}
_WINDOW_MAX = 16  # of a pooling's window: the number of a place in it is one byte


def plan(layers: list[Layer]) -> list[Step]:
    """Give the steps of a model; a layer of a class of one's own is run by its own expression."""
    steps: list[Step] = []
    for number, layer in enumerate(layers):
        before = steps[-1] if steps else None
        rectifies = isinstance(before, (_Dense, _Conv2D, _BatchNorm)) and not before.rectify
        if type(layer) is ReLU and before is not None and rectifies:
            before.rectify = True
            continue
        kind = _STEPS.get(type(layer), _Plain)
        if isinstance(layer, MaxPool2D) and layer.size > _WINDOW_MAX:
            kind = _Plain
        steps.append(kind(layer, number))
    if isinstance(steps[0], (_Conv2D, _Flatten)):
        steps[0].first = True
    if isinstance(steps[-1], _Dense) and not steps[-1].rectify:
        steps[-1].last = True
    return steps


def _parts(m: int) -> int:
    """Cut a long sum into equal parts of a multiple of 8 values, which tensor cores want."""
    for parts in range(PARTS_MAX, 1, -1):
        if m % (parts * 8) == 0 and m // parts >= _PART_MIN:
            return parts
    return 1
