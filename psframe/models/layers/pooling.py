"""Layers that make images smaller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psframe.errors import ArgumentError
from psframe.models.layers.base import Context, Layer, Shape, image_shape
from psframe.models.layers.convolution import windows

__all__ = ["AveragePool2D", "GlobalAveragePool2D", "MaxPool2D"]


class _Pool2D(Layer):
    def __init__(self, size: int = 2, *, stride: int | None = None) -> None:
        self.size = size
        self.stride = size if stride is None else stride
        for name, value in (("size", size), ("stride", self.stride)):
            if value < 1:
                raise ArgumentError(
                    f"{type(self).__name__}: {name}: expected 1 or more, got {value}"
                )
        self._out: tuple[int, int] = (0, 0)

    def build(self, shape: Shape) -> Shape:
        channels, height, width = image_shape(shape, type(self).__name__)
        if min(height, width) < self.size:
            raise ArgumentError(
                f"{type(self).__name__}: a window of {self.size} x {self.size} does not fit into "
                f"images of {height} x {width}"
            )
        rows, columns = ((length - self.size) // self.stride + 1 for length in (height, width))
        self._out = rows, columns
        return (channels, rows, columns)

    def _result(self, x: Any, context: Context, xp: Any) -> Any:
        return context.array(self, "y", (*x.shape[:2], *self._out), x.dtype, xp)

    def _input_gradient(self, shape: Shape, g: Any, context: Context, xp: Any) -> Any:
        dx = context.array(self, "dx", shape, g.dtype, xp)
        dx[...] = 0
        return dx


class MaxPool2D(_Pool2D):
    """The largest value of each window; rows and columns that fill no window are left out.

    The gradient goes to that value, the first of equal ones.

    Args:
        size: rows and columns of a window.
        stride: from one window to the next; by default its size.

    Raises:
        ArgumentError: a number is less than 1.
    """

    kind = "maxpool"

    def forward(self, params: Mapping[str, Any], x: Any, context: Context, xp: Any) -> Any:
        y = self._result(x, context, xp)
        for number, window in enumerate(windows(x, self.size, self.stride, self._out)):
            if number:
                xp.maximum(y, window, out=y)
            else:
                y[...] = window
        context.save(self, "x", x)
        return context.save(self, "y", y)

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
        if not wanted:
            return None
        x, y = context.saved(self, "x"), context.saved(self, "y")
        dx = self._input_gradient(x.shape, g, context, xp)
        targets = windows(dx, self.size, self.stride, self._out)
        left = context.array(self, "left", y.shape, bool, xp)
        left[...] = True
        here = context.array(self, "here", y.shape, bool, xp)
        for window, target in zip(
            windows(x, self.size, self.stride, self._out), targets, strict=True
        ):
            xp.equal(window, y, out=here)
            here &= left
            left &= ~here
            target += g * here
        return dx


class AveragePool2D(_Pool2D):
    """The mean of each window; rows and columns that fill no window are left out.

    Args:
        size: rows and columns of a window.
        stride: from one window to the next; by default its size.

    Raises:
        ArgumentError: a number is less than 1.
    """

    kind = "avgpool"

    def forward(self, params: Mapping[str, Any], x: Any, context: Context, xp: Any) -> Any:
        y = self._result(x, context, xp)
        y[...] = 0
        for window in windows(x, self.size, self.stride, self._out):
            y += window
        y /= self.size**2
        context.save(self, "shape", x.shape)
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
        if not wanted:
            return None
        dx = self._input_gradient(context.saved(self, "shape"), g, context, xp)
        g /= self.size**2
        for target in windows(dx, self.size, self.stride, self._out):
            target += g
        return dx


class GlobalAveragePool2D(Layer):
    """The mean of each channel over the whole image: (c, n, h, w) to (n, c) (Lin et al. 2014)."""

    kind = "globalpool"

    def __init__(self) -> None:
        self._in: tuple[int, int, int] = (0, 0, 0)

    def build(self, shape: Shape) -> Shape:
        self._in = image_shape(shape, "GlobalAveragePool2D")
        return (self._in[0],)

    def forward(self, params: Mapping[str, Any], x: Any, context: Context, xp: Any) -> Any:
        return xp.ascontiguousarray(x.mean(axis=(2, 3)).T)

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
        if not wanted:
            return None
        channels, height, width = self._in
        dx = context.array(self, "dx", (channels, len(g), height, width), g.dtype, xp)
        dx[...] = (g.T / (height * width))[:, :, None, None]
        return dx
