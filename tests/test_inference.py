"""Predictions on all workers, merged in order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import psframe
from psframe import inference
from psframe.data import Dataset
from psframe.errors import ArgumentError, RankLost
from psframe.gathering import AT, ROWS, Gather
from psframe.inference import confusion_matrix, mean_loss, predict, predict_alone
from psframe.layout import Layout
from psframe.models import Softmax

PARAMS = {"w1": np.eye(3, dtype=np.float32), "b1": np.zeros(3, np.float32)}
RNG = np.random.default_rng(0)


def data(n: int) -> Dataset:
    return Dataset(RNG.normal(size=(n, 3)).astype(np.float32), np.arange(n) % 3, 3, "made")


@pytest.mark.parametrize("n", [3, 64, 1000])
@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (3, 1), (2, 2)])
def test_predictions_come_in_the_datas_order(n: int, workers: int, servers: int) -> None:
    samples, model = data(n), Softmax((3,), 3)
    found = predict(model, PARAMS, samples, workers=workers, servers=servers)
    assert found is not None
    x = samples.batch(slice(None))[0]
    np.testing.assert_array_equal(found.labels, model.predict(PARAMS, x))
    assert found.probabilities is not None
    expected = model.probabilities(PARAMS, x)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-6, atol=1e-7)


class LabelsOnly:
    """A model without probabilities, as a user's may be."""

    def predict(self, params: Any, x: Any) -> Any:
        return (x @ params["w1"]).argmax(axis=1)


def test_one_process_may_predict_alone_as_many_do() -> None:
    samples, model = data(500), Softmax((3,), 3)
    found = predict(model, PARAMS, samples, workers=2)
    alone = predict_alone(model, PARAMS, samples)
    assert found is not None
    np.testing.assert_array_equal(alone.labels, found.labels)
    np.testing.assert_array_equal(alone.probabilities, found.probabilities)
    labels = predict_alone(LabelsOnly(), PARAMS, samples)  # type: ignore[arg-type]
    np.testing.assert_array_equal(
        labels.labels, LabelsOnly().predict(PARAMS, samples.batch(slice(None))[0])
    )


def test_a_model_may_tell_labels_only() -> None:
    samples = data(200)
    found = predict(LabelsOnly(), PARAMS, samples, workers=2)  # type: ignore[arg-type]
    assert found is not None
    assert found.probabilities is None
    np.testing.assert_array_equal(found.labels, samples.batch(slice(None))[0].argmax(axis=1))
    assert mean_loss(found.probabilities, samples.labels) is None


def test_what_is_not_finite_is_no_prediction() -> None:
    bad = {**PARAMS, "b1": np.full(3, np.nan, np.float32)}
    with pytest.raises(
        ArgumentError, match=r"made: .* predictions for samples \d+ to .* not finite"
    ):
        predict(Softmax((3,), 3), bad, data(100), workers=2)


class Wide:
    """Probabilities of so many classes that a block is applied while it is written."""

    def __init__(self, k: int) -> None:
        self.k = k

    def predict(self, params: Any, x: Any) -> Any:
        raise AssertionError("it tells probabilities")

    def probabilities(self, params: Any, x: Any) -> Any:
        return np.abs(np.sin(x[:, :1] * np.arange(1, self.k + 1))).astype(np.float32)


def test_what_travels_is_a_block_however_many_samples_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []

    def recorded(work: Any, params: Any, **more: Any) -> Any:
        sizes.append(sum(np.size(p) for p in params.values()))
        return psframe.run(work, params, **more)

    monkeypatch.setattr(inference, "run", recorded)
    n, model = 9000, Wide(100)
    samples = Dataset(RNG.normal(size=(n, 3)).astype(np.float32), np.zeros(n, np.int64), 100, "m")
    found = predict(model, PARAMS, samples, workers=3)  # type: ignore[arg-type]
    assert sizes == [12, 1024 * 100 + 1]
    assert found is not None
    expected = model.probabilities(PARAMS, samples.x)
    assert found.probabilities is not None
    np.testing.assert_array_equal(found.probabilities, expected)
    np.testing.assert_array_equal(found.labels, expected.argmax(axis=1))


def test_a_thread_computes_on_the_gpu_that_its_copy_is_on() -> None:
    """Which is the current one in the thread that made the copy, and perhaps in no other."""
    used: list[int] = []

    class Gpu:
        def __init__(self, ordinal: int) -> None:
            self.ordinal = ordinal

        def use(self) -> None:
            used.append(self.ordinal)

    cupy: Any = SimpleNamespace(cuda=SimpleNamespace(Device=Gpu))
    inference._Copy({}, cupy, "cuda:3").use_device()
    inference._Copy({}, cupy, "cpu").use_device()
    assert used == [3]


def test_blocks_that_have_not_come_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends without an error, but too early."""

    def stopped(work: Any, params: Any, **more: Any) -> Any:
        return psframe.run(work, params, **more, **({"max_updates": 2} if AT in params else {}))

    monkeypatch.setattr(inference, "run", stopped)
    with pytest.raises(RankLost, match="predictions of 6 blocks have not come"):
        predict(Softmax((3,), 3), PARAMS, data(500), workers=1)


def test_a_block_may_come_in_parts_twice_or_not_at_all() -> None:
    taken: list[tuple[int, list[float]]] = []
    gather = Gather(3, lambda at, rows: taken.append((at, rows.tolist())))
    layout = Layout.of({AT: np.zeros(1), ROWS: np.zeros(2)})
    rule = gather.updater(layout, 0, layout.size)
    params, out = np.zeros(3), np.zeros(3)

    def grad(at: float, *rows: float) -> Any:
        return layout.flatten({AT: np.array([at]), ROWS: np.array(rows)})

    assert rule.update(0, params, grad(2, 5, 6), out)
    assert (taken, gather.missing) == ([(2, [5, 6])], 2)
    rule.begin(1, params)
    assert rule.extend(params, grad(0, 1, 2), out, 0, 2)
    rule.begin(1, params)  # in vain: another push was applied meanwhile
    words = np.array([2], np.int64)
    assert rule.follow(params, grad(0, 3, 4), out, 0, 9, words) == (2, True)
    assert rule.follow(params, grad(0, 3, 4), out, 2, 9, words) == (2, True)
    words[0] = 3
    assert rule.follow(params, grad(0, 3, 4), out, 2, 9, words) == (3, True)
    rule.finish()
    assert (taken[1:], gather.missing) == ([(0, [3, 4])], 1)
    assert not rule.update(2, params, grad(1, 3, np.nan), out)
    assert gather.missing == 1
    assert rule.update(2, params, grad(0, 3, 4), out), "whose worker was thought lost"
    assert (taken[2:], gather.missing) == ([(0, [3, 4])], 1)


def test_confusion_and_loss() -> None:
    y, predicted = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 2, 0])
    np.testing.assert_array_equal(
        confusion_matrix(y, predicted, 3), [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    )
    p = np.array([[0.5, 0.5], [0.25, 0.75]])
    assert mean_loss(p, np.array([0, 1])) == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)
    assert mean_loss(np.array([[0.0, 1.0]]), np.array([0])) == pytest.approx(87.3, abs=0.1)
