"""Models: gradients against finite differences, losses against closed forms, names and errors."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from psframe.data import load, prepare
from psframe.errors import ArgumentError
from psframe.models import CNN, MLP, NAMES, Model, Sequential, Softmax, check_model, create
from psframe.models.base import array_module, cross_entropy, takes
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
from psframe.optim import Adagrad
from psframe.trainer import Trainer

MODELS = [Softmax((3, 2), 4), MLP((3, 2), 4, hidden=(5,)), MLP((6,), 4, hidden=(7, 5))]
IDS = ["softmax", "one hidden layer", "two hidden layers"]


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
@pytest.mark.parametrize("model", MODELS, ids=IDS)
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


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_gradients_written_in_place_are_the_same_bits(model: Any) -> None:
    params, x, y = batch(model, 5)
    loss, grads = model.loss_and_gradients(params, x, y)
    out = {name: np.full_like(p, np.nan) for name, p in params.items()}
    same_loss, same = model.loss_and_gradients(params, x, y, out=out)
    assert same_loss == loss
    for name in params:
        assert same[name] is out[name]
        np.testing.assert_array_equal(out[name], grads[name])


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_nothing_given_is_written(model: Any) -> None:
    params, x, y = batch(model, 6)
    for array in (x, y, *params.values()):
        array.flags.writeable = False
    model.loss_and_gradients(params, x, y)
    model.evaluate(params, x, y)
    model.predict(params, x)


@pytest.mark.parametrize("model", MODELS, ids=IDS)
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


# ---- on a GPU ----------------------------------------------------------------------------------

IMAGES = (2, 8, 7)
# Every layer there is, with and without an overlap of windows.
ON_DEVICE: dict[str, Any] = {
    "softmax": lambda: Softmax(IMAGES, 4),
    "mlp": lambda: MLP(IMAGES, 4, hidden=(7, 5)),
    "small cnn": lambda: CNN(IMAGES, 4),
    "large cnn": lambda: CNN((2, 16, 17), 4),
    "pools": lambda: Sequential(
        IMAGES,
        [
            *(Conv2D(3, stride=2), Tanh(), MaxPool2D(2, stride=1), AveragePool2D(2, stride=1)),
            *(GlobalAveragePool2D(), Dense(4)),
        ],
    ),
    "flat": lambda: Sequential(
        (6,), [Flatten(), Dense(5), BatchNorm(), ReLU(), Dropout(0.3), Dense(4)]
    ),
}


def agrees_on_device(cupy: Any, model: Any) -> None:
    """Compare all that a model does on a device with the same on the host."""
    rng = np.random.default_rng(8)
    shape = getattr(model, "input_shape", IMAGES)
    params = {name: p + 0.2 * rng.random(p.shape) for name, p in model.init(rng).items()}
    x, y = rng.standard_normal((5, *shape)), rng.integers(0, 4, 5)
    there = {name: cupy.asarray(p) for name, p in params.items()}
    out = {name: cupy.empty_like(p) for name, p in there.items()}
    for more in ({}, {"rng": 3}, {"rng": 3, "out": out}):
        draws = {"rng": np.random.default_rng(3)} if "rng" in more else {}
        loss, grads = model.loss_and_gradients(params, x, y, **draws)
        draws = {"rng": np.random.default_rng(3)} if "rng" in more else {}
        given = {"out": out} if "out" in more else {}
        found, found_grads = model.loss_and_gradients(
            there, cupy.asarray(x), cupy.asarray(y), **draws, **given
        )
        assert found == pytest.approx(loss)
        assert set(found_grads) == set(grads)
        for name, g in grads.items():
            assert array_module(found_grads[name]) is cupy
            np.testing.assert_allclose(
                cupy.asnumpy(found_grads[name]), g, rtol=1e-8, atol=1e-11, err_msg=name
            )
    sums = model.evaluate(there, cupy.asarray(x), cupy.asarray(y))
    assert sums == pytest.approx(model.evaluate(params, x, y))
    labels, probabilities = (
        cupy.asnumpy(ask(there, cupy.asarray(x))) for ask in (model.predict, model.probabilities)
    )
    np.testing.assert_array_equal(labels, model.predict(params, x))
    np.testing.assert_allclose(probabilities, model.probabilities(params, x), rtol=1e-8)
    assert model.predict(there, cupy.asarray(x[:0])).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_DEVICE)
def test_cupy_agrees_with_numpy(name: str) -> None:
    import cupy

    agrees_on_device(cupy, ON_DEVICE[name]())


class DeviceArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array that, as CuPy's, meets no array of NumPy's and is never turned into one unasked."""

    __module__ = "cupy._core.core"

    def __init__(self, memory: Any) -> None:
        self._memory = np.asarray(memory)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **how: Any) -> Any:
        return on_device(getattr(ufunc, method))(*inputs, **how)

    def __getattr__(self, name: str) -> Any:
        if name not in {*METHODS, "T", "flags", "shape", "size", "dtype", "ndim"}:
            raise AttributeError(f"{name} is not among the names that these tests know of CuPy")
        found = getattr(self._memory, name)
        if isinstance(found, np.ndarray):
            return DeviceArray(found)
        return on_device(found) if name in METHODS else found

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, key: Any) -> DeviceArray:
        return DeviceArray(self._memory[to_memory(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._memory[to_memory(key)] = to_memory(value)

    def __float__(self) -> float:
        return float(self._memory)

    def __int__(self) -> int:
        return int(self._memory)


METHODS = {"reshape", "transpose", "astype", "copy", "sum", "mean", "max", "argmax"}
FUNCTIONS = {
    *("arange", "empty", "empty_like", "exp", "log", "sqrt", "tanh", "matmul", "maximum"),
    *("multiply", "subtract", "greater", "equal", "concatenate", "ascontiguousarray"),
}


def to_memory(value: Any) -> Any:
    """Unwrap device arrays, in tuples and lists too; refuse NumPy's."""
    if isinstance(value, DeviceArray):
        return value._memory
    if isinstance(value, (tuple, list)):
        return type(value)(map(to_memory, value))
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value


def on_device(function: Any) -> Any:
    def call(*args: Any, **how: Any) -> Any:
        found = function(*map(to_memory, args), **{k: to_memory(v) for k, v in how.items()})
        return DeviceArray(found)

    return call


class FakeCupy(ModuleType):
    """The few names of CuPy that models use."""

    def __init__(self) -> None:
        super().__init__("cupy")
        for name in FUNCTIONS:
            setattr(self, name, on_device(getattr(np, name)))

    @staticmethod
    def asarray(array: Any) -> DeviceArray:
        return array if isinstance(array, DeviceArray) else DeviceArray(np.array(array))

    @staticmethod
    def asnumpy(array: DeviceArray) -> Any:
        return array._memory.copy()


@pytest.mark.parametrize("name", ON_DEVICE)
def test_models_mix_no_arrays_of_host_and_device(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    agrees_on_device(cupy, ON_DEVICE[name]())


def test_the_fake_device_refuses_what_cupy_refuses() -> None:
    array, host = FakeCupy.asarray(np.ones(3)), np.ones(3)
    for wrong in (
        lambda: array + host,
        lambda: host * array,
        lambda: FakeCupy().exp(host),
        lambda: np.asarray(array),
        lambda: array[host.astype(int)],
        lambda: array.__setitem__(0, host[:1]),
    ):
        with pytest.raises(TypeError):
            wrong()


# ---- users' models -----------------------------------------------------------------------------


def test_a_models_own_sums_become_metrics(tmp_path: Path) -> None:
    class Generous(Softmax):
        def evaluate(self, params: Any, x: Any, y: Any) -> dict[str, float]:
            ranked = np.argsort(self.probabilities(params, x), axis=1)[:, -2:]
            top2 = float((ranked == y[:, None]).any(axis=1).sum())
            return {**super().evaluate(params, x, y), "top2": top2}

    parts = prepare(load("digits"), validation_fraction=0.1)
    trainer = Trainer(
        Generous((8, 8), 10), optimizer=Adagrad(), epochs=2, run_dir=tmp_path / "r", workers=2
    )
    history = trainer.fit(parts).history
    text = (tmp_path / "r" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for summary, line in zip(history, lines, strict=True):
        assert set(summary.more) == {"test_top2", "validation_top2"}
        assert summary.test_accuracy is not None
        assert summary.test_accuracy <= summary.more["test_top2"] <= 1
        assert {name: line[name] for name in summary.more} == summary.more


def test_the_linear_model_of_the_documentation_descends_its_loss() -> None:
    page = (Path(__file__).parents[1] / "docs" / "model.md").read_text(encoding="utf-8")
    source = page[page.index("# linear.py") :].split("```")[0]
    names: dict[str, Any] = {}
    exec(source, names)
    model = names["Linear"]((3, 2), 4)
    _, x, y = batch(MODELS[0], 2)
    params = {"w": np.random.default_rng(0).standard_normal((6, 4))}
    _, grads = model.loss_and_gradients(params, x, y)
    for place in np.ndindex(6, 4):
        values = []
        for step in (1e-6, -1e-6):
            moved = params["w"].copy()
            moved[place] += step
            values.append(model.loss_and_gradients({"w": moved}, x, y)[0])
        assert grads["w"][place] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)


def test_a_model_that_hands_on_whatever_it_is_given() -> None:
    class Loose(MLP):
        def loss_and_gradients(self, *args: Any, **how: Any) -> Any:
            return super().loss_and_gradients(*args, **how)

    model = Loose((8, 8), 10, hidden=(8,))
    assert takes(model, "out")
    assert takes(model, "rng")
    train, _, test = prepare(load("digits"))
    trained = Trainer(model, optimizer=Adagrad(), epochs=1, workers=1).fit(train, test)
    assert trained.result.version == -(-len(train) // 32)


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_no_samples_are_no_error(model: Any) -> None:
    params, x, y = batch(model, 3)
    assert model.predict(params, x[:0]).shape == (0,)
    assert model.evaluate(params, x[:0], y[:0]) == {"loss": 0.0, "correct": 0.0, "count": 0.0}


def test_built_in_models_are_models() -> None:
    for name in NAMES:
        model = create(name, (8, 8), 10)
        assert isinstance(model, Model)
        assert takes(model, "out")
        assert takes(model, "rng")
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
