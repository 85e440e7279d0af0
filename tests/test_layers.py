"""Every layer's gradients against finite differences in float64; what it refuses."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from psframe.errors import ArgumentError
from psframe.models.layers import (
    AveragePool2D,
    BatchNorm,
    Context,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePool2D,
    Layer,
    MaxPool2D,
    ReLU,
    Tanh,
)

STEP = 1e-6


class Bench:
    """A layer with random parameters, and the scalar sum(weights * layer(x)) of its result."""

    def __init__(self, layer: Layer, shape: tuple[int, ...], n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.layer = layer
        self.result = layer.build(shape)
        self.params = {
            name: p.astype(np.float64) + 0.1 * rng.normal(size=p.shape)
            for name, p in layer.init(rng).items()
        }
        full = (n, *shape) if len(shape) == 1 else (shape[0], n, *shape[1:])
        # No two values are equal or near a kink, so that differences are of smooth functions.
        size = int(np.prod(full))
        values = rng.permutation(np.arange(size) - size / 2 + 0.25) / size * 4
        self.x = values.reshape(full)
        self.weights = rng.normal(size=self.forward().shape)

    def forward(self) -> Any:
        self.context = Context()
        self.context.training = True
        self.context.rng = np.random.default_rng(7)
        return self.layer.forward(self.params, self.x.copy(), self.context, np).copy()

    def value(self) -> float:
        return float((self.forward() * self.weights).sum())

    def gradients(self) -> tuple[Any, dict[str, Any]]:
        self.forward()
        grads = {name: np.full_like(p, np.nan) for name, p in self.params.items()}
        dx = self.layer.backward(
            self.params, self.weights.copy(), grads, self.context, np, wanted=True
        )
        return dx.copy(), grads

    def difference(self, array: Any) -> Any:
        """The derivative of `value` with respect to each element of an array of the bench's."""
        result = np.empty_like(array)
        for index in np.ndindex(*array.shape):
            kept = array[index]
            array[index] = kept + STEP
            above = self.value()
            array[index] = kept - STEP
            result[index] = (above - self.value()) / (2 * STEP)
            array[index] = kept
        return result


FLAT, IMAGE = (5,), (2, 5, 6)
CASES = [
    (Dense(3), FLAT),
    (ReLU(), FLAT),
    (Tanh(), FLAT),
    (Dropout(0.4), FLAT),
    (BatchNorm(), FLAT),
    (BatchNorm(), IMAGE),
    (Flatten(), FLAT),
    (Flatten(), IMAGE),
    (ReLU(), IMAGE),
    (Dropout(0.4), IMAGE),
    (Conv2D(3), IMAGE),
    (Conv2D(3, 1), IMAGE),
    (Conv2D(2, 2, padding=1), IMAGE),
    (Conv2D(2, 3, stride=2), IMAGE),
    (Conv2D(2, 3, stride=2, padding=0, bias=False), IMAGE),
    (Conv2D(2, 5, stride=3, padding=2), IMAGE),
    (MaxPool2D(2), IMAGE),
    (MaxPool2D(3, stride=1), IMAGE),
    (MaxPool2D(2, stride=3), IMAGE),
    (AveragePool2D(2), IMAGE),
    (AveragePool2D(3, stride=2), IMAGE),
    (GlobalAveragePool2D(), IMAGE),
]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(
    ("layer", "shape"),
    CASES,
    ids=[f"{type(x).__name__}{len(s)}-{i}" for i, (x, s) in enumerate(CASES)],
)
def test_gradients_are_those_of_finite_differences(
    layer: Layer, shape: tuple[int, ...], n: int
) -> None:
    bench = Bench(layer, shape, n)
    dx, grads = bench.gradients()
    np.testing.assert_allclose(dx, bench.difference(bench.x), rtol=1e-6, atol=1e-7)
    for name, p in bench.params.items():
        if name not in layer.averages:
            found = bench.difference(p)
            np.testing.assert_allclose(grads[name], found, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(("layer", "shape"), [(BatchNorm(), FLAT), (BatchNorm(), IMAGE)])
def test_batch_normalisation_observes_mean_and_unbiased_variance(
    layer: BatchNorm, shape: tuple[int, ...]
) -> None:
    bench = Bench(layer, shape, 4)
    _, grads = bench.gradients()
    features = bench.x.reshape(2, -1) if len(shape) == 3 else bench.x.T
    np.testing.assert_allclose(grads["mean"], features.mean(axis=1))
    np.testing.assert_allclose(grads["variance"], features.var(axis=1, ddof=1))


def test_batch_normalisation_evaluates_with_the_running_averages() -> None:
    bench = Bench(BatchNorm(eps=1e-3), FLAT, 4)
    bench.params["variance"] = np.abs(bench.params["variance"])
    p = bench.params
    y = bench.layer.forward(p, bench.x, Context(), np)
    expected = p["gamma"] * (bench.x - p["mean"]) / np.sqrt(p["variance"] + 1e-3) + p["beta"]
    np.testing.assert_allclose(y, expected)


@pytest.mark.parametrize("shape", [FLAT, (2, 1, 1)])
def test_a_batch_of_one_value_leaves_the_running_averages(shape: tuple[int, ...]) -> None:
    """A variance of 0 would be averaged in: after some of them an evaluation divides by nothing."""
    bench = Bench(BatchNorm(), shape, 1)
    _, grads = bench.gradients()
    np.testing.assert_array_equal(bench.forward().ravel(), bench.params["beta"])
    for name in ("mean", "variance"):
        np.testing.assert_array_equal(grads[name], bench.params[name])


def test_a_batch_of_one_image_has_a_variance() -> None:
    bench = Bench(BatchNorm(), IMAGE, 1)
    _, grads = bench.gradients()
    features = bench.x.reshape(2, -1)
    np.testing.assert_allclose(grads["variance"], features.var(axis=1, ddof=1))


@pytest.mark.parametrize("layer", [MaxPool2D(2), MaxPool2D(2, stride=1), MaxPool2D(3)])
def test_the_gradient_of_equal_values_goes_to_the_first(layer: MaxPool2D) -> None:
    """As many gradients arrive as were sent, at the upper left corner of each window."""
    rows, columns = layer.build((1, 3, 3))[1:]
    context = Context()
    layer.forward({}, np.ones((1, 1, 3, 3)), context, np)
    g = np.arange(1.0, 1.0 + rows * columns).reshape(1, 1, rows, columns)
    dx = layer.backward({}, g.copy(), {}, context, np, wanted=True)
    expected = np.zeros((3, 3))
    expected[:rows, :columns] = g[0, 0]
    np.testing.assert_array_equal(dx[0, 0], expected)


def test_a_gradient_may_lie_anyhow_in_memory() -> None:
    """reshape() of what is not contiguous is a copy: nothing must be written into one."""
    for layer, shape in ((Conv2D(3), IMAGE), (Dense(3), FLAT), (BatchNorm(), IMAGE)):
        bench = Bench(layer, shape, 4)
        _, expected = bench.gradients()
        bench.forward()
        strided = {name: np.full((*p.shape, 2), np.nan)[..., 0] for name, p in bench.params.items()}
        turned = {name: np.full_like(p, np.nan, order="F") for name, p in bench.params.items()}
        for grads in (strided, turned):
            bench.forward()
            layer.backward(
                bench.params, bench.weights.copy(), grads, bench.context, np, wanted=True
            )
            for name, array in expected.items():
                np.testing.assert_allclose(grads[name], array, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (3, 2, 5, 6), (2, 3, 7, 4)])
@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 0), (2, 3, 1)]
)
def test_convolution_is_the_sum_that_it_is_said_to_be(
    shape: tuple[int, ...], size: int, stride: int, padding: int
) -> None:
    channels, n, height, width = shape
    layer = Conv2D(4, size, stride=stride, padding=padding)
    bench = Bench(layer, (channels, height, width), n)
    y = bench.forward()
    x = np.pad(bench.x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    w, b = bench.params["w"], bench.params["b"]
    for o, image, i, j in np.ndindex(*y.shape):
        patch = x[:, image, stride * i : stride * i + size, stride * j : stride * j + size]
        assert y[o, image, i, j] == pytest.approx((w[o] * patch).sum() + b[o])


def test_dropout_keeps_the_mean_and_evaluation_keeps_everything() -> None:
    layer = Dropout(0.3)
    layer.build((1000,))
    context = Context()
    x = np.ones((200, 1000), np.float32)
    assert layer.forward({}, x, context, np) is x
    context.rng = np.random.default_rng(0)
    assert layer.forward({}, x, context, np) is x, "an evaluation, even with a generator"
    context.rng, context.training = None, True
    assert layer.forward({}, x, context, np) is x, "without a generator"
    context.rng = np.random.default_rng(0)
    y = layer.forward({}, x, context, np)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(0.7)}
    assert float((y == 0).mean()) == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Dense(0), "units: expected 1 or more, got 0"),
        (lambda: Dense(3).build((2, 4, 4)), "put a Flatten"),
        (lambda: Conv2D(3, 2), "needs an odd size, got 2"),
        (lambda: Conv2D(3, padding="valid"), "expected a number or 'same'"),
        (lambda: Conv2D(0), "channels: expected 1 or more"),
        (lambda: Conv2D(3, padding=-1), "padding: expected 0 or more"),
        (lambda: Conv2D(3).build((64,)), r"expected images of \(channels, height, width\)"),
        (
            lambda: Conv2D(3, 7, padding=0).build((1, 4, 9)),
            "7 x 7 does not fit into images of 4 x 9",
        ),
        (lambda: MaxPool2D(0), "size: expected 1 or more"),
        (lambda: AveragePool2D(2, stride=0), "stride: expected 1 or more"),
        (lambda: MaxPool2D(5).build((1, 4, 9)), "5 x 5 does not fit into images of 4 x 9"),
        (lambda: GlobalAveragePool2D().build((5,)), "expected images"),
        (lambda: Dropout(1.0), r"expected a number in \[0, 1\)"),
        (lambda: BatchNorm(momentum=1.0), r"momentum: expected a number in \[0, 1\)"),
        (lambda: BatchNorm(eps=0.0), "eps: expected more than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        make()


def test_memory_is_reused_and_belongs_to_one_context() -> None:
    """A smaller batch in between changes nothing; another thread's context is other memory."""
    layer = Conv2D(2)
    layer.build((1, 6, 6))
    params = {
        name: p.astype(np.float64) for name, p in layer.init(np.random.default_rng(0)).items()
    }
    context = Context()

    def address(n: int, context: Context) -> int:
        y = layer.forward(params, np.ones((1, n, 6, 6)), context, np)
        return int(y.ctypes.data)

    first = address(8, context)
    assert [address(n, context) for n in (3, 8, 1)] == [first] * 3
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(address(8, Context())))
    thread.start()
    thread.join()
    assert others != [first]
