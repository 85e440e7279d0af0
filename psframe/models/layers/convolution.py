"""Convolution as one matrix product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.errors import ArgumentError
from psframe.models.base import he_normal
from psframe.models.layers.base import Context, Layer, Shape, image_shape

__all__ = ["Conv2D", "windows"]


class Conv2D(Layer):
    """Cross-correlation with square kernels, plus a bias a channel (LeCun et al. 1998).

        y[o, n, i, j] = b[o] + sum_{c, k, l} w[o, c, k, l] x[c, n, s i + k - p, s j + l - p]

    with stride s, and x zero outside of the image. The patches are laid out as columns
    (c k l, n i j) (im2col; Chellapilla et al., High Performance Convolutional Neural Networks
    for Document Processing, 2006), so that y = w columns + b, dw = g columns^T, and the columns of
    dx are w^T g, added up where patches overlap.

    Args:
        channels: of the result.
        size: rows and columns of a kernel.
        stride: s >= 1.
        padding: p >= 0; "same" is (size - 1) / 2, which keeps the image's size at stride 1.
        bias: whether there is one; before a BatchNorm it would change nothing.

    Raises:
        ArgumentError: a number is out of range, or "same" with an even size.
    """

    kind = "conv"

    def __init__(
        self,
        channels: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: int | str = "same",
        bias: bool = True,
    ) -> None:
        if padding == "same":
            if size % 2 == 0:
                raise ArgumentError(f"Conv2D: padding 'same' needs an odd size, got {size}")
            padding = (size - 1) // 2
        if not isinstance(padding, int):
            raise ArgumentError(f"Conv2D: padding: expected a number or 'same', got {padding!r}")
        for name, value, least in (
            ("channels", channels, 1),
            ("size", size, 1),
            ("stride", stride, 1),
            ("padding", padding, 0),
        ):
            if value < least:
                raise ArgumentError(f"Conv2D: {name}: expected {least} or more, got {value}")
        self.channels, self.size, self.stride, self.padding = channels, size, stride, padding
        self.bias = bias
        self._in: tuple[int, int, int] = (0, 0, 0)
        self._out: tuple[int, int] = (0, 0)

    def build(self, shape: Shape) -> Shape:
        self._in = channels, height, width = image_shape(shape, "Conv2D")
        assert channels
        rows, columns = (
            (length + 2 * self.padding - self.size) // self.stride + 1 for length in (height, width)
        )
        if rows < 1 or columns < 1:
            raise ArgumentError(
                f"Conv2D: a kernel of {self.size} x {self.size} does not fit into images of "
                f"{height} x {width} with padding {self.padding}"
            )
        self._out = rows, columns
        return (self.channels, rows, columns)

    def init(self, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
        fan_in = self._in[0] * self.size**2
        shape = (self.channels, self._in[0], self.size, self.size)
        params = {"w": he_normal(rng, fan_in, shape)}
        if self.bias:
            params["b"] = np.zeros(self.channels, np.float32)
        return params

    def forward(self, params: Mapping[str, Any], x: Any, context: Context, xp: Any) -> Any:
        n = x.shape[1]
        columns = context.save(self, "columns", self._columns(x, context, xp))
        y = context.array(self, "y", (self.channels, n * self._out[0] * self._out[1]), x.dtype, xp)
        xp.matmul(params["w"].reshape(self.channels, -1), columns, out=y)
        if self.bias:
            y += params["b"][:, None]
        return y.reshape(self.channels, n, *self._out)

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
        n = g.shape[1]
        g = g.reshape(self.channels, -1)
        columns = context.saved(self, "columns")
        dw = grads["w"]
        if dw.flags.c_contiguous:
            xp.matmul(g, columns.T, out=dw.reshape(self.channels, -1))
        else:  # reshape would make a copy, and the gradient would be lost with it
            dw[...] = (g @ columns.T).reshape(dw.shape)
        if self.bias:
            g.sum(axis=1, out=grads["b"])
        if not wanted:
            return None
        # The forward pass is done with the columns: the same memory holds their gradient.
        xp.matmul(params["w"].reshape(self.channels, -1).T, g, out=columns)
        channels, height, width = self._in
        patches = columns.reshape(channels, self.size**2, n, *self._out)
        padded = self._padded(n, context, xp, g.dtype, "dx")
        padded[...] = 0
        for number, window in enumerate(windows(padded, self.size, self.stride, self._out)):
            window += patches[:, number]
        p = self.padding
        return padded[:, :, p : p + height, p : p + width]

    def _columns(self, x: Any, context: Context, xp: Any) -> Any:
        """Lay the patches out as columns (c k l, n i j)."""
        channels, n, height, width = x.shape
        source = x
        if self.padding:
            p = self.padding
            source = self._padded(n, context, xp, x.dtype, "x")
            for edge in (np.s_[:, :, :p], np.s_[:, :, -p:], np.s_[..., :p], np.s_[..., -p:]):
                source[edge] = 0
            source[:, :, p : p + height, p : p + width] = x
        shape = (channels, self.size**2, n, *self._out)
        columns = context.array(self, "columns", shape, x.dtype, xp)
        for number, window in enumerate(windows(source, self.size, self.stride, self._out)):
            columns[:, number] = window
        return columns.reshape(channels * self.size**2, -1)

    def _padded(self, n: int, context: Context, xp: Any, dtype: Any, role: str) -> Any:
        channels, height, width = self._in
        p = 2 * self.padding
        return context.array(self, role, (channels, n, height + p, width + p), dtype, xp)


def windows(x: Any, size: int, stride: int, out: tuple[int, int]) -> Iterator[Any]:
    """Give, for each place (k, l) of a kernel in row order, the view of x[..., s i + k, s j + l].

    Args:
        x: (..., h, w).
        size: of the kernel.
        stride: s.
        out: how many places (i, j) the kernel has.
    """
    rows, columns = out
    for k in range(size):
        for l in range(size):
            yield x[
                ...,
                k : k + stride * (rows - 1) + 1 : stride,
                l : l + stride * (columns - 1) + 1 : stride,
            ]
