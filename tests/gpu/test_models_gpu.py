"""The models on a real GPU: against NumPy, memory, and what they learn, in each precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from psframe.data import load, prepare
from psframe.models import CNN, MLP, create
from psframe.optim import Adagrad
from psframe.trainer import Trainer

pytestmark = pytest.mark.gpu

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
# Of the norm of a gradient: float32 sums in another order; factors of products are rounded to 2^-11
# (tf32, float16) or 2^-8, and a few ReLUs and pools decide otherwise for it.
TOLERANCES = {"float32": 1e-4, "tf32": 0.05, "bfloat16": 0.2, "float16": 0.05}
MODELS: dict[str, Any] = {
    "mlp": (lambda: MLP((64,), 10, hidden=(256, 128)), (64,)),
    "small cnn": (lambda: CNN((8, 8), 10), (8, 8)),
    "large cnn": (lambda: CNN((3, 32, 32), 10), (3, 32, 32)),
}


@pytest.fixture
def cupy(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip("cupy")


def can(cupy: Any, precision: str) -> None:
    needed = {"tf32": 80, "bfloat16": 80, "float16": 70}.get(precision, 0)
    if int(cupy.cuda.Device().compute_capability) < needed:
        pytest.skip(f"this GPU has no {precision}")


def given(name: str, n: int) -> tuple[Any, Any, dict[str, Any], Any, Any]:
    make, shape = MODELS[name]
    model, plain = make(), make()
    rng = np.random.default_rng(3)
    x = rng.standard_normal((n, *shape)).astype(np.float32)
    return model, plain, plain.init(rng), x, rng.integers(0, 10, n)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_numpys(cupy: Any, name: str, precision: str) -> None:
    can(cupy, precision)
    model, plain, params, x, y = given(name, 64)
    model.precision = precision
    there = {key: cupy.asarray(p) for key, p in params.items()}
    loss, grads = plain.loss_and_gradients(params, x, y, rng=np.random.default_rng(3))
    found, same = model.loss_and_gradients(
        there, cupy.asarray(x), cupy.asarray(y), rng=np.random.default_rng(3)
    )
    tolerance = TOLERANCES[precision]
    assert float(found) == pytest.approx(loss, rel=tolerance)
    largest = max(float(np.linalg.norm(g)) for g in grads.values())
    for key, g in grads.items():
        error = float(np.linalg.norm(cupy.asnumpy(same[key]) - g))
        assert error <= tolerance * max(float(np.linalg.norm(g)), 0.02 * largest), key
    sums = model.evaluate(there, cupy.asarray(x), cupy.asarray(y))
    assert sums["loss"] == pytest.approx(plain.evaluate(params, x, y)["loss"], rel=tolerance)
    assert sums["count"] == 64


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_memory_is_constant_after_the_first_step(cupy: Any, name: str, precision: str) -> None:
    can(cupy, precision)
    model, _, params, x, y = given(name, 64)
    model.precision = precision
    there = {key: cupy.asarray(p) for key, p in params.items()}
    out = {key: cupy.empty_like(p) for key, p in there.items()}
    samples, labels = cupy.asarray(x), cupy.asarray(y)
    pool, rng, used = cupy.get_default_memory_pool(), np.random.default_rng(3), []
    for _ in range(8):
        loss, _ = model.loss_and_gradients(there, samples, labels, out=out, rng=rng)
        float(loss)
        used.append((pool.used_bytes(), pool.total_bytes()))
    assert len(set(used)) == 1, used


@pytest.mark.parametrize("name", MODELS)
def test_equal_steps_give_equal_bits(cupy: Any, name: str) -> None:
    model, _, params, x, y = given(name, 64)
    there = {key: cupy.asarray(p) for key, p in params.items()}
    samples, labels = cupy.asarray(x), cupy.asarray(y)
    results = []
    for _ in range(2):
        _, grads = model.loss_and_gradients(there, samples, labels)
        results.append({key: cupy.asnumpy(g).tobytes() for key, g in grads.items()})
    assert results[0] == results[1]


def test_an_overflow_makes_gradients_that_are_refused_and_a_smaller_scale(cupy: Any) -> None:
    can(cupy, "float16")
    model = MLP((6,), 3, hidden=(5,))
    model.precision = "float16"
    rng = np.random.default_rng(3)
    there = {key: cupy.asarray(p) for key, p in model.init(rng).items()}
    x, y = cupy.asarray(rng.standard_normal((4, 6)).astype(np.float32)), cupy.asarray([0, 1, 2, 0])
    finite = []
    there["w2"] *= 1000  # the gradient before it is too large at the first scale
    for _ in range(12):
        _, grads = model.loss_and_gradients(there, x, y)
        finite.append(all(bool(cupy.isfinite(g).all()) for g in grads.values()))
    assert not finite[0]
    assert finite[-1]
    assert finite == sorted(finite)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_digits_are_learned(cupy: Any, name: str, precision: str) -> None:
    """As well as on the host, where both reach 97 % and more in ten epochs."""
    can(cupy, precision)
    parts = prepare(load("digits"), 0.2, 1)
    model = create(name, parts.train.input_shape, parts.train.n_classes)
    trainer = Trainer(
        model, optimizer=Adagrad(0.01), epochs=10, device="cuda", precision=precision, workers=1
    )
    trained = trainer.fit(parts)
    assert trained.accuracy is not None
    assert trained.accuracy >= 0.96
