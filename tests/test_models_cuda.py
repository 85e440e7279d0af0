"""The models' kernels against their layers: whole steps, run by a `cupy` that is not there."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from cuda_emulator import FakeCupy

from psframe.errors import ArgumentError
from psframe.models import CNN, MLP, Sequential, Softmax
from psframe.models.layers import (
    AveragePool2D,
    BatchNorm,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePool2D,
    MaxPool2D,
    ReLU,
    Tanh,
)

IMAGES = (2, 9, 8)
MODELS: dict[str, Any] = {
    "softmax": lambda: Softmax(IMAGES, 4),
    "mlp": lambda: MLP(IMAGES, 4, hidden=(17, 9)),
    "wide": lambda: MLP((6,), 300, hidden=(5,)),
    "small cnn": lambda: CNN((8, 8), 5),
    "large cnn": lambda: CNN((3, 17, 16), 4),
    "biases": lambda: Sequential(
        IMAGES,
        [
            *(Conv2D(3, stride=2), ReLU(), Conv2D(4, size=2, padding=0), MaxPool2D(2, stride=1)),
            *(ReLU(), Conv2D(3, bias=False), ReLU(), Conv2D(2, bias=False), Flatten(), Dense(4)),
        ],
    ),
    "pools": lambda: Sequential(
        IMAGES,
        [
            *(MaxPool2D(3, stride=2), Conv2D(3), Tanh(), AveragePool2D(2, stride=1), BatchNorm()),
            *(GlobalAveragePool2D(), Dense(4), ReLU()),
        ],
    ),
    "flat": lambda: Sequential(
        (6,), [Flatten(), Dense(40), BatchNorm(), ReLU(), Dropout(0.3), Dense(8), Tanh(), Dense(4)]
    ),
    "normalised first": lambda: Sequential(IMAGES, [BatchNorm(), Flatten(), Dense(3)]),
}
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
# Of the norm of a gradient: float32 sums in another order; halves round by 2^-9 and 2^-12, and some
# of a few ReLUs and pools decide otherwise. (TF32 is a tensor core's; here it computes float32.)
TOLERANCES = {"float32": 1e-5, "tf32": 1e-5, "bfloat16": 0.1, "float16": 0.02}


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def given(model: Any, n: int, seed: int = 8) -> tuple[dict[str, Any], Any, Any]:
    rng = np.random.default_rng(seed)
    shape = model.input_shape if isinstance(model, Sequential) else (model.widths[0],)
    params = {
        name: (p + 0.2 * rng.random(p.shape)).astype(np.float32)
        for name, p in model.init(rng).items()
    }
    classes = model.n_classes if isinstance(model, Sequential) else model.widths[-1]
    x = rng.standard_normal((n, *shape)).astype(np.float32)
    return params, x, rng.integers(0, classes, n)


def together(cupy: FakeCupy, params: dict[str, Any], *, gap: int = 0) -> dict[str, Any]:
    """Lay parameters one after the other, as a worker's lie; with a gap, not quite."""
    flat = cupy.empty(sum(p.size + gap for p in params.values()), np.float32)
    found, begin = {}, 0
    for name, p in params.items():
        found[name] = flat[begin : begin + p.size].reshape(p.shape)
        found[name].view(np.ndarray)[...] = p
        begin += p.size + gap
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_on_kernels_is_the_layers_step(cupy: FakeCupy, name: str, precision: str) -> None:
    model, plain = MODELS[name](), MODELS[name]()
    model.precision = precision
    params, x, y = given(model, 7)
    loss, grads = plain.loss_and_gradients(params, x, y, rng=np.random.default_rng(3))
    tolerance = TOLERANCES[precision]
    largest = max(np.linalg.norm(g) for g in grads.values())
    for gap in (0, 4):
        there = together(cupy, params, gap=gap)
        out = {key: cupy.empty_like(p) for key, p in there.items()}
        found, same = model.loss_and_gradients(
            there, cupy.asarray(x), cupy.asarray(y), out=out, rng=np.random.default_rng(3)
        )
        assert float(found) == pytest.approx(loss, rel=tolerance)
        cupy.stream.check()
        for key, g in grads.items():
            assert same[key] is out[key]
            error = np.linalg.norm(cupy.asnumpy(out[key]) - g)
            assert error <= tolerance * max(np.linalg.norm(g), 0.02 * largest), key
    assert set(cupy.cublas.computes) == {77 if precision == "tf32" else 68}
    sums = model.evaluate(there, cupy.asarray(x), cupy.asarray(y))
    expected = plain.evaluate(params, x, y)
    assert sums["count"] == 7
    assert sums["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    if precision in ("float32", "tf32"):
        assert sums["correct"] == expected["correct"]
        labels = cupy.asnumpy(model.predict(there, cupy.asarray(x)))
        np.testing.assert_array_equal(labels, plain.predict(params, x))
    found = cupy.asnumpy(model.probabilities(there, cupy.asarray(x)))
    np.testing.assert_allclose(found, plain.probabilities(params, x), atol=tolerance)
    assert model.predict(there, cupy.asarray(x[:0])).shape == (0,)
    cupy.stream.check()
