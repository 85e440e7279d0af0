"""Launches the models' kernels: grids, arguments, and the memory of partial sums.

What each computes is said beside it by the plain expression of its layer, in
`psframe.models.layers`; the tests compare them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from psframe.errors import ArgumentError
from psframe.models.cuda.text import CHUNK, THREADS, source
from psframe.models.layers.base import Context

__all__ = ["PARTS_MAX", "STORAGE", "Geometry", "Kernels"]

# Precision to the storage type of activations, and to NumPy's name of an array of it. NumPy and
# CuPy have no bfloat16 of their own; nobody but these kernels and cuBLAS looks into the arrays.
STORAGE = {"float32": "float32", "tf32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
# Compute capability that a precision needs: tensor cores for it.
_CAPABILITY = {"float32": 0, "tf32": 80, "bfloat16": 80, "float16": 70}

_NULL = 0  # a null pointer among a kernel's arguments; CuPy makes something else of None
_BLOCKS_MAX = 4096  # of kernels that step through their values: a few waves on any GPU
# Threads that keep a large GPU busy, which a sum over rows cuts its rows for; and the parts that
# one thread then adds up, each waiting for memory.
_ENOUGH_THREADS = 1 << 17
_ROWS_MIN = 8
PARTS_MAX = 32
_SIZE_MAX = 2**31 - 1
# Micikevicius et al., Mixed Precision Training, 2018, section 3.2, with the numbers that are usual
# now, but for the start: from 2^15 the ten halvings that a run bears in a row lead to 2^5.
FIRST_SCALE, GROWTH, BACKOFF, INTERVAL = 2.0**15, 2.0, 0.5, 2000
_LEAST_SCALE, _MOST_SCALE = 1.0, 2.0**24


@functools.cache
def _functions(xp: Any, storage: str) -> _Functions:
    return _Functions(xp, storage)


class _Functions(dict[str, Callable[..., None]]):
    """The kernels of one storage type by name; NVRTC compiles them once, at the first use."""

    def __init__(self, xp: Any, storage: str) -> None:
        super().__init__()
        self._module = xp.RawModule(code=source(storage))

    def __missing__(self, name: str) -> Callable[..., None]:
        function: Callable[..., None] = self._module.get_function(name)
        self[name] = function
        return function


class Kernels:
    """The kernels of one precision, and one thread's loss scale; all on the current stream.

    Args:
        xp: cupy.
        precision: see `psframe.models.Sequential`.
        memory: for partial sums.

    Attributes:
        dtype: of stored activations.
        scaled: whether the loss is scaled.
        state: (scale, 1 / scale, finite steps in a row, 0), float32, on the device.
        bad: whether a gradient of the step was not finite, int32, on the device.

    Raises:
        ArgumentError: this GPU has no such arithmetic.
    """

    def __init__(self, xp: Any, precision: str, memory: Context) -> None:
        capability = int(xp.cuda.Device().compute_capability)
        if capability < _CAPABILITY[precision]:
            raise ArgumentError(
                f"precision: {precision!r} needs a GPU of compute capability "
                f"{_CAPABILITY[precision] / 10}, this one has {capability / 10}; take float32"
            )
        storage = STORAGE[precision]
        self.dtype: np.dtype[Any] = np.dtype(_DTYPES[storage])
        self.scaled = precision == "float16"
        scale = FIRST_SCALE if self.scaled else 1.0
        self.state = xp.asarray(np.array([scale, 1 / scale, 0.0, 0.0], np.float32))
        self.bad = xp.zeros(1, np.int32)
        self._xp = xp
        self._memory = memory
        self._run = _functions(xp, storage)

    def check(self, grad: Any) -> None:
        """Note whether a float32 gradient is finite."""
        self.bad |= ~self._xp.isfinite(grad).all()

    # ---- values by themselves

    def cast(self, x: Any, y: Any) -> Any:
        """Store float32 values."""
        self._each("cast", y.size, (x, y, y.size))
        return y

    def cast_span(self, address: int, y: Any) -> None:
        """Store the float32 values from a device address on."""
        self._each("cast", y.size, (address, y, y.size))

    def cast_gradient(self, g: Any, y: Any) -> Any:
        """Store a float32 gradient."""
        self._each("cast_gradient", y.size, (g, y, y.size, self.bad))
        return y

    def uncast(self, x: Any, y: Any) -> Any:
        """Give stored values as float32."""
        self._each("uncast", y.size, (x, y, y.size, self.bad))
        return y

    def relu(self, x: Any, y: Any) -> Any:
        """y = max(x, 0)."""
        self._each("relu", y.size, (x, y, y.size))
        return y

    def relu_gradient(self, g: Any, y: Any) -> Any:
        """g *= y > 0."""
        self._each("relu_gradient", y.size, (g, y, y.size, self.bad))
        return g

    def dropout(self, x: Any, mask: Any, y: Any, scale: Any) -> Any:
        """y = x * mask * scale; also the gradient."""
        self._each("dropout", y.size, (x, mask, y, y.size, scale, self.bad))
        return y

    # ---- features (rows, columns)

    def bias_columns(self, y: Any, b: Any, *, rectify: bool) -> None:
        """y += b, and then its ReLU if wanted."""
        rows, columns = y.shape
        grid, each = _cut(rows, columns)
        self._run["bias_columns"](grid, (THREADS,), (y, b, rows, columns, each, int(rectify)))

    def bias_columns_gradient(self, g: Any, h: Any, db: Any) -> None:
        """g *= h > 0, unless h is None; db = g.sum(axis=0), unscaled."""
        rows, columns = g.shape
        grid, each = _cut(rows, columns)
        partial = self._array("partial", (grid[1], columns))
        arguments = (g, _NULL if h is None else h, partial, rows, columns, each)
        self._run["column_partials"](grid, (THREADS,), arguments)
        self.sum_parts(partial, db)

    def sum_parts(self, partial: Any, out: Any) -> None:
        """out = partial.sum(axis=0), unscaled; out is flat to it."""
        parts, columns = partial.shape[0], out.size
        arguments = (partial, out, parts, columns, self.state, self.bad)
        self._run["column_sums"]((-(-columns // THREADS),), (THREADS,), arguments)

    # ---- the loss

    def cross_entropy(
        self, z: Any, b: Any, y: Any, *, g: Any = None, hits: bool = False
    ) -> tuple[Any, Any]:
        """Compute each row's cross-entropy of softmax(z + b), and its scaled gradient into g."""
        n, k = z.shape
        losses = self._array("losses", (n,))
        right = self._array("hits", (n,)) if hits else None
        threads = 32 if k <= 128 else THREADS
        given = [_NULL if one is None else one for one in (b, g, right)]
        numbers = (k, np.float32(1 / n))
        arguments = (z, given[0], y, given[1], losses, given[2], *numbers, self.state, self.bad)
        self._run["cross_entropy"]((n,), (threads,), arguments)
        return losses, right

    def two_sums(self, a: Any, b: Any, out: Any, factor: float) -> None:
        """out = (factor a.sum(), b.sum()); without b the latter is 0."""
        self._run["two_sums"](
            (1,), (THREADS,), (a, _NULL if b is None else b, out, a.size, np.float32(factor))
        )

    def next_scale(self) -> None:
        """Close a step: halve the loss scale if a gradient was not finite, or let it grow."""
        numbers = (GROWTH, BACKOFF, INTERVAL, _LEAST_SCALE, _MOST_SCALE)
        arguments = (self.state, self.bad, *map(np.float32, numbers))
        self._run["next_scale"]((1,), (1,), arguments)

    # ---- images (c, n, h, w)

    def to_columns(self, x: Any, columns: Any, geometry: Geometry, *, samples: bool) -> None:
        """Lay patches out as columns; `x` is (c, n, h, w), or (n, c, h, w) float32 samples."""
        n, height, width, size, stride, padding, rows, across = geometry
        area = height * width
        channels = x.shape[1] if samples else x.shape[0]
        steps = (area, channels * area) if samples else (n * area, area)
        name = "samples_to_columns" if samples else "to_columns"
        arguments = (x, columns, n, height, width, *steps, size, stride, padding, rows, across)
        grid = (_blocks(n * rows * across), channels)
        self._run[name](grid, (THREADS,), arguments)

    def from_columns(self, columns: Any, dx: Any, geometry: Geometry) -> None:
        """Add up the gradients of patches where they overlap."""
        grid = (_blocks(dx.size // dx.shape[0]), dx.shape[0])
        self._run["from_columns"](grid, (THREADS,), (columns, dx, *geometry, self.bad))

    def max_pool(self, x: Any, y: Any, where: Any, window: tuple[int, ...]) -> None:
        """Take the largest value of each window, and where in it that is."""
        planes, (height, width) = x.shape[0] * x.shape[1], x.shape[2:]
        arguments = (x, y, where, planes, height, width, *window, *y.shape[2:])
        self._each("max_pool", y.size, arguments)

    def max_pool_gradient(self, g: Any, where: Any, dx: Any, window: tuple[int, ...]) -> None:
        """Give each window's gradient to where its largest value was."""
        planes, (height, width) = dx.shape[0] * dx.shape[1], dx.shape[2:]
        arguments = (g, where, dx, planes, height, width, *window, *where.shape[2:], self.bad)
        self._each("max_pool_gradient", dx.size, arguments)

    def swap_axes(self, x: Any, y: Any, shape: tuple[int, int, int]) -> None:
        """y = x.reshape(shape).transpose(1, 0, 2)."""
        self._each("swap_axes", y.size, (x, y, *shape, self.bad))

    def bias_rows(self, y: Any, b: Any, *, rectify: bool) -> None:
        """y += b[:, None], and then its ReLU if wanted."""
        channels, m = y.shape
        self._run["bias_rows"]((_blocks(m), channels), (THREADS,), (y, b, m, int(rectify)))

    def bias_rows_gradient(self, g: Any, h: Any, db: Any) -> None:
        """g *= h > 0, unless h is None; db = g.sum(axis=1), unscaled."""
        channels, m = g.shape
        parts = -(-m // CHUNK)
        partial = self._array("partial", (channels, parts))
        arguments: tuple[Any, ...] = (g, _NULL if h is None else h, partial, m)
        self._run["row_partials"]((parts, channels), (THREADS,), arguments)
        arguments = (partial, db, parts, self.state, self.bad)
        self._run["row_sums"]((channels,), (THREADS,), arguments)

    # ---- batch normalisation; x is (features, m) if `images`, else (m, features)

    def bn_moments(self, x: Any, features: int, mean: Any, variance: Any, *, images: bool) -> None:
        """Compute mean and variance of each feature over the batch."""
        m, parts, step = _features(x, features, images)
        means = self._array("means", (features, parts))
        squares = self._array("squares", (features, parts))
        arguments = (x, means, squares, m, *step)
        self._run["bn_moments"]((parts, features), (THREADS,), arguments)
        arguments = (means, squares, mean, variance, parts, m)
        self._run["bn_statistics"]((features,), (THREADS,), arguments)

    def bn_apply(
        self, x: Any, y: Any, statistics: tuple[Any, ...], eps: Any, *, images: bool, rectify: bool
    ) -> None:
        """y = gamma (x - mean) / sqrt(variance + eps) + beta, and then its ReLU if wanted.

        Args:
            x, y: of one shape.
            statistics: mean, variance, gamma, beta.
            eps: float32.
            images: whether features come first.
            rectify: whether the ReLU is wanted.
        """
        features = statistics[0].size
        arguments = (x, y, *statistics, features, x.size // features, eps)
        self._each("bn_apply", x.size, (*arguments, int(images), int(rectify)))

    def bn_gradient(
        self,
        g: Any,
        x: Any,
        statistics: tuple[Any, ...],
        known: tuple[Any, Any],
        places: tuple[Any, ...],
        eps: Any,
        *,
        images: bool,
        rectify: bool,
    ) -> Any:
        """Compute the gradients of gamma and beta, and what the batch has shown.

        Args:
            g, x, statistics, eps, images, rectify: as `bn_apply`, g the gradient of y.
            known: mean and variance that a batch of one value leaves.
            places: for the gradients of gamma and beta, the mean and the variance.

        Returns:
            What `bn_input_gradient` needs.
        """
        features = statistics[0].size
        m, parts, step = _features(x, features, images)
        sums = self._array("means", (features, parts))
        products = self._array("squares", (features, parts))
        arguments: tuple[Any, ...] = (g, x, *statistics, sums, products, m, *step, eps)
        grid = (parts, features)
        self._run["bn_gradient_partials"](grid, (THREADS,), (*arguments, int(rectify)))
        total = self._array("total", (2, features))
        dgamma, dbeta, mean, variance = places
        arguments = (sums, products, total, dgamma, dbeta, *statistics[:2], *known, mean, variance)
        arguments = (*arguments, parts, m, self.state, self.bad)
        self._run["bn_gradient_sums"]((features,), (THREADS,), arguments)
        return total

    def bn_input_gradient(
        self,
        g: Any,
        x: Any,
        dx: Any,
        statistics: tuple[Any, ...],
        total: Any,
        eps: Any,
        *,
        images: bool,
        rectify: bool,
    ) -> None:
        """Compute the gradient of x; the arguments are those of `bn_gradient`, and its result."""
        features = statistics[0].size
        arguments = (g, x, dx, *statistics, total, features, x.size // features, eps)
        arguments = (*arguments, int(images), int(rectify), self.bad)
        self._each("bn_input_gradient", x.size, arguments)

    def _each(self, name: str, size: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel that steps through values."""
        self._run[name]((_blocks(size),), (THREADS,), arguments)

    def _array(self, role: str, shape: tuple[int, ...]) -> Any:
        return self._memory.array(self, role, shape, np.float32, self._xp)


# n, h, w, then size, stride, padding of the kernel, then its places in rows and columns.
Geometry = tuple[int, int, int, int, int, int, int, int]


def _blocks(size: int) -> int:
    if size > _SIZE_MAX:
        raise ArgumentError(f"a batch makes {size} values of one layer; take a smaller batch size")
    return max(1, min(-(-size // THREADS), _BLOCKS_MAX))


def _cut(rows: int, columns: int) -> tuple[tuple[int, int], int]:
    """Cut rows so that enough threads have a column of a part; give the grid and a part's rows."""
    wanted = max(1, min(PARTS_MAX, _ENOUGH_THREADS // max(columns, THREADS)))
    each = max(_ROWS_MIN, -(-rows // wanted))
    return (-(-columns // THREADS), -(-rows // each)), each


def _features(x: Any, features: int, images: bool) -> tuple[int, int, tuple[int, int]]:
    """Give values a feature, parts of CHUNK of them, and the steps across and along features."""
    m = x.size // features
    return m, -(-m // CHUNK), (m, 1) if images else (1, features)
