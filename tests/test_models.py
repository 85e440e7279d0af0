"""Models: gradients against finite differences, losses against closed forms, names and errors."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe.errors import ArgumentError
from psframe.models import MLP, Model, Softmax, check_model, create
from psframe.models.base import array_module, cross_entropy, takes

MODELS = [Softmax((3, 2), 4), MLP((3, 2), 4, hidden=(5,)), MLP((6,), 4, hidden=(7, 5))]


def batch(model: Any, seed: int, n: int = 9) -> tuple[dict[str, Any], Any, Any]:
    """Draw float64 parameters and a batch."""
    rng = np.random.default_rng(seed)
    params = {
        name: 0.5 * rng.standard_normal(p.shape)
        for name, p in model.init(np.random.default_rng(seed)).items()
    }
    x = rng.standard_normal((n, 3, 2))
    return params, x, rng.integers(0, 4, n)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_gradients_equal_central_differences(model: Any, seed: int) -> None:
    params, x, y = batch(model, seed)
    _, grads = model.loss_and_gradients(params, x, y)
    assert list(grads) == list(params)
    step = 1e-6
    for name, p in params.items():
        for place in np.ndindex(p.shape):
            value = p[place]
            p[place] = value + step
            above, _ = model.loss_and_gradients(params, x, y)
            p[place] = value - step
            below, _ = model.loss_and_gradients(params, x, y)
            p[place] = value
            expected = (above - below) / (2 * step)
            assert grads[name][place] == pytest.approx(expected, rel=1e-6, abs=1e-8), (name, place)


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_gradients_written_in_place_are_the_same_bits(model: Any) -> None:
    params, x, y = batch(model, 5)
    loss, grads = model.loss_and_gradients(params, x, y)
    out = {name: np.full_like(p, np.nan) for name, p in params.items()}
    same_loss, same = model.loss_and_gradients(params, x, y, out=out)
    assert same_loss == loss
    for name in params:
        assert same[name] is out[name]
        np.testing.assert_array_equal(out[name], grads[name])


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_nothing_given_is_written(model: Any) -> None:
    params, x, y = batch(model, 6)
    for array in (x, y, *params.values()):
        array.flags.writeable = False
    model.loss_and_gradients(params, x, y)
    model.evaluate(params, x, y)
    model.predict(params, x)


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_parts_sum_to_the_whole(model: Any) -> None:
    params, x, y = batch(model, 7, n=20)
    whole = model.evaluate(params, x, y)
    parts = [model.evaluate(params, x[s], y[s]) for s in (slice(0, 13), slice(13, 20))]
    for name, total in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(total)
    assert whole["count"] == 20
    assert whole["correct"] == (model.predict(params, x) == y).sum()
    loss, _ = model.loss_and_gradients(params, x, y)
    assert whole["loss"] / 20 == pytest.approx(loss)


def test_float32_stays_float32() -> None:
    model = MLP((4,), 3)
    params = model.init(np.random.default_rng(0))
    assert {p.dtype for p in params.values()} == {np.dtype(np.float32)}
    x = np.ones((2, 4), np.float32)
    loss, grads = model.loss_and_gradients(params, x, np.array([0, 2]))
    assert isinstance(loss, float)
    assert {g.dtype for g in grads.values()} == {np.dtype(np.float32)}


def test_uniform_prediction_costs_log_k() -> None:
    model = Softmax((5,), 10)
    params = model.init(np.random.default_rng(0))
    loss, _ = model.loss_and_gradients(params, np.ones((3, 5), np.float32), np.array([1, 2, 3]))
    assert loss == pytest.approx(np.log(10))


def test_cross_entropy_neither_overflows_nor_loses_small_probabilities() -> None:
    logits = np.array([[1000.0, 0.0], [-1000.0, 0.0], [0.0, 0.0]])
    losses, probabilities = cross_entropy(logits, np.array([1, 0, 0]))
    np.testing.assert_allclose(losses, [1000.0, 1000.0, np.log(2)])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)


def test_init_is_a_function_of_the_seed_and_has_he_variance() -> None:
    model = MLP((100,), 10, hidden=(400,))
    first, again, other = (model.init(np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first["w1"], again["w1"])
    assert (first["w1"] != other["w1"]).any()
    assert first["w1"].var() == pytest.approx(2 / 100, rel=0.05)
    assert not first["b1"].any()


def test_array_module_follows_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeArray:
        __module__ = "cupy._core.core"

    library = object()
    monkeypatch.setitem(sys.modules, "cupy", library)  # type: ignore[arg-type]
    assert array_module(np.zeros(1)) is np
    assert array_module(FakeArray()) is library


@pytest.mark.gpu
def test_cupy_agrees_with_numpy() -> None:
    import cupy

    for model in MODELS:
        params, x, y = batch(model, 8)
        loss, grads = model.loss_and_gradients(params, x, y)
        on_gpu = {name: cupy.asarray(p) for name, p in params.items()}
        gpu_loss, gpu_grads = model.loss_and_gradients(on_gpu, cupy.asarray(x), cupy.asarray(y))
        assert gpu_loss == pytest.approx(loss)
        for name, g in grads.items():
            np.testing.assert_allclose(cupy.asnumpy(gpu_grads[name]), g, rtol=1e-9, atol=1e-12)
        sums = model.evaluate(on_gpu, cupy.asarray(x), cupy.asarray(y))
        assert sums == pytest.approx(model.evaluate(params, x, y))


def test_built_in_models_are_models() -> None:
    for name in ("mlp", "softmax"):
        model = create(name, (8, 8), 10)
        assert isinstance(model, Model)
        assert takes(model, "out")
        check_model(model)


USER_MODULE = """
    import numpy as np
    from psframe.models import MLP

    class Mine(MLP):
        pass

    class Lacking:
        def __init__(self, input_shape, n_classes):
            pass
        def init(self, rng):
            return {}
        def predict(self, params, x):
            return x

    class Picky:
        def __init__(self, input_shape):
            pass

    class Bare:
        def __init__(self, input_shape, n_classes):
            pass
        def init(self, rng): ...
        def loss_and_gradients(self, params, x, y): ...
        def evaluate(self, params, x, y): ...
        def predict(self, params, x): ...
"""


@pytest.fixture
def user_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    """Write a module of a user's into the current directory; return its name."""
    name = f"user_model_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(USER_MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_a_users_class_is_imported_from_the_current_directory(user_module: str) -> None:
    model = create(f"{user_module}:Mine", (2, 3), 4)
    assert model.init(np.random.default_rng(0))["w1"].shape[0] == 6


def test_a_users_class_may_do_without_out(user_module: str) -> None:
    assert not takes(create(f"{user_module}:Bare", (2,), 2), "out")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mpl", ["mlp, softmax", "package.module:Class", "did you mean 'mlp'?"]),
        ("there_is_no_such:Model", ["importing there_is_no_such", "ModuleNotFoundError"]),
        (":Model", ["package.module:Class"]),
        ("{module}:Mime", ["no 'Mime'", "did you mean 'Mine'?", ".py"]),
        ("{module}:Lacking", ["Lacking lacks the methods loss_and_gradients, evaluate"]),
        ("{module}:Picky", ["Picky(input_shape=(2,), n_classes=2)", "TypeError"]),
    ],
)
def test_a_wrong_model_is_named(user_module: str, spec: str, words: list[str]) -> None:
    with pytest.raises(ArgumentError) as caught:
        create(spec.format(module=user_module), (2,), 2)
    for word in words:
        assert word in str(caught.value)


def test_what_a_users_module_raises_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_model.py").write_text("x = 1\nimport not_a_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ArgumentError, match=r"not_a_module.*broken_model.py, line 2"):
        create("broken_model:Model", (2,), 2)


def test_a_class_in_place_of_a_model_is_told_apart() -> None:
    with pytest.raises(ArgumentError, match=r"got the class MLP; call it: MLP\(input_shape"):
        check_model(MLP)
