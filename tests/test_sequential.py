"""Models made of layers: gradients as a whole, names, threads, and the CNN on the digits."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest

import psframe
from psframe.data import load, prepare
from psframe.errors import ArgumentError
from psframe.models import CNN, Sequential, check_model, create
from psframe.models.layers import (
    BatchNorm,
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
from psframe.trainer import Trainer

K = 3


def batch(shape: tuple[int, ...], n: int, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, *shape)), rng.integers(K, size=n)


MODELS: dict[str, tuple[tuple[int, ...], list[Layer]]] = {
    "dense": ((5,), [Dense(4), BatchNorm(), Tanh(), Dense(K)]),
    "image": (
        (6, 5),
        [Conv2D(4), BatchNorm(), ReLU(), MaxPool2D(), Flatten(), Dense(6), Tanh(), Dense(K)],
    ),
    "colour": (
        (2, 7, 6),
        [Conv2D(4, stride=2), Tanh(), Conv2D(3, 1), Tanh(), GlobalAveragePool2D(), Dense(K)],
    ),
    "activation last": ((5,), [Dense(4), ReLU(), Dense(K), Tanh()]),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    shape, layers = MODELS[name]
    model = Sequential(shape, layers)
    check_model(model)
    params = {n: p.astype(np.float64) for n, p in model.init(np.random.default_rng(1)).items()}
    x, y = batch(shape, 7)
    loss, grads = model.loss_and_gradients(params, x, y)
    assert loss == pytest.approx(np.log(K), abs=1.5)
    for parameter, array in params.items():
        if parameter in model.averages:
            continue
        for index in list(np.ndindex(*array.shape))[:12]:
            kept = array[index]
            array[index] = kept + 1e-6
            above, _ = model.loss_and_gradients(params, x, y)
            array[index] = kept - 1e-6
            below, _ = model.loss_and_gradients(params, x, y)
            array[index] = kept
            found = (above - below) / 2e-6
            assert grads[parameter][index] == pytest.approx(found, rel=1e-5, abs=1e-8), parameter


def test_gradients_go_where_they_are_wanted() -> None:
    shape, layers = MODELS["image"]
    model = Sequential(shape, layers)
    params = model.init(np.random.default_rng(0))
    x, y = batch(shape, 4)
    out = {name: np.full_like(p, np.nan) for name, p in params.items()}
    loss, grads = model.loss_and_gradients(params, x.astype(np.float32), y, out=out)
    again, fresh = model.loss_and_gradients(params, x.astype(np.float32), y)
    assert grads is out
    assert loss == again
    for name, array in out.items():
        np.testing.assert_array_equal(array, fresh[name])
        assert array.dtype == np.float32


def test_evaluation_in_blocks_is_evaluation() -> None:
    shape, layers = MODELS["colour"]
    model = Sequential(shape, layers)
    params = model.init(np.random.default_rng(0))
    x, y = batch(shape, 300)
    sums = model.evaluate(params, x, y)
    parts = [model.evaluate(params, x[i : i + 100], y[i : i + 100]) for i in (0, 100, 200)]
    for name in ("loss", "correct", "count"):
        assert sums[name] == pytest.approx(sum(part[name] for part in parts), rel=1e-5)
    assert (model.predict(params, x) == y).sum() == sums["correct"]


@pytest.mark.parametrize("name", MODELS)
def test_no_samples_are_no_error(name: str) -> None:
    shape, layers = MODELS[name]
    model = Sequential(shape, layers)
    params = model.init(np.random.default_rng(0))
    x, y = np.zeros((0, *shape), np.float32), np.zeros(0, np.int64)
    assert model.predict(params, x).shape == (0,)
    assert model.probabilities(params, x).shape == (0, K)
    assert model.probabilities(params, x).dtype == np.float32
    assert model.evaluate(params, x, y) == {"loss": 0.0, "correct": 0.0, "count": 0.0}


def test_evaluation_leaves_nothing_out_at_random() -> None:
    """Not even after a training step of the same thread, which had a generator."""
    model = Sequential((5,), [Dropout(0.5), Dense(K)])
    params = model.init(np.random.default_rng(0))
    x, y = batch((5,), 6)
    before = model.probabilities(params, x)
    model.loss_and_gradients(params, x, y, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(model.probabilities(params, x), before)


def test_threads_share_a_model() -> None:
    """What one computes is not in the way of what another does."""
    shape, layers = MODELS["image"]
    model = Sequential(shape, layers)
    params = model.init(np.random.default_rng(0))
    batches = [batch(shape, 16, seed) for seed in range(4)]
    expected = [model.loss_and_gradients(params, *b) for b in batches]
    wrong: list[str] = []

    def compute(number: int) -> None:
        for _ in range(30):
            loss, grads = model.loss_and_gradients(params, *batches[number])
            same = all((grads[name] == expected[number][1][name]).all() for name in grads)
            if loss != expected[number][0] or not same:
                wrong.append(f"thread {number}")

    threads = [threading.Thread(target=compute, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_does_not_grow_after_the_first_step() -> None:
    model = CNN((3, 32, 32), 10)
    params = model.init(np.random.default_rng(0))
    rng = np.random.default_rng(0)
    x, y = rng.random((16, 3, 32, 32), np.float32), rng.integers(10, size=16)
    out = {name: np.empty_like(p) for name, p in params.items()}
    model.loss_and_gradients(params, x, y, out=out, rng=rng)
    tracemalloc.start()
    try:
        model.loss_and_gradients(params, x, y, out=out, rng=rng)
        before = tracemalloc.get_traced_memory()[0]
        for n in (16, 5, 16, 1):
            model.loss_and_gradients(params, x[:n], y[:n], out=out, rng=rng)
        assert tracemalloc.get_traced_memory()[0] - before < 64 << 10
    finally:
        tracemalloc.stop()


def test_names_tell_layer_and_number() -> None:
    model = CNN((8, 8), 10)
    assert list(model.init(np.random.default_rng(0)))[:5] == [
        *("conv1.w", "bn1.gamma", "bn1.beta", "bn1.mean", "bn1.variance")
    ]
    assert model.averages["bn2.variance"] == 0.9
    assert set(model.averages) == {
        f"bn{i}.{name}" for i in (1, 2, 3) for name in ("mean", "variance")
    }


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sequential((4,), []), "at least one layer"),
        (lambda: Sequential((4, 4), [Conv2D(3)]), r"the last layer gives \(3, 4, 4\)"),
        (lambda: create("cnn", (64,), 10), "take --model mlp"),
        (lambda: create("cnn", (3, 2, 9), 10), "images of 2 x 9 are too small"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        make()


def test_the_cnn_learns_the_digits() -> None:
    """98.5% in full; a few epochs, so that the test stays short."""
    train, _, test = prepare(load("digits"), seed=1)
    trainer = Trainer(CNN((8, 8), 10), optimizer=psframe.optim.Adagrad(), epochs=6, workers=2)
    trained = trainer.fit(train, test)
    assert trained.accuracy is not None
    assert trained.accuracy > 0.96
    params = trained.result.params
    assert params is not None
    assert (params["bn1.variance"] > 0).all()
    assert not (params["bn1.mean"] == 0).any(), "the running mean has reached the server"
    assert trained.result.ledger.refused == 0
