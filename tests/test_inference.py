"""Predictions on all workers, merged in order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from psframe.data import Dataset
from psframe.errors import RankLost
from psframe.inference import confusion_matrix, mean_loss, predict
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


def test_a_model_may_tell_labels_only() -> None:
    samples = data(200)
    found = predict(LabelsOnly(), PARAMS, samples, workers=2)  # type: ignore[arg-type]
    assert found is not None
    assert found.probabilities is None
    np.testing.assert_array_equal(found.labels, samples.batch(slice(None))[0].argmax(axis=1))
    assert mean_loss(found.probabilities, samples.labels) is None


def test_what_is_not_finite_is_no_prediction() -> None:
    bad = {**PARAMS, "b1": np.full(3, np.nan, np.float32)}
    with pytest.raises(RankLost, match="have not come: non-finite gradient"):
        predict(Softmax((3,), 3), bad, data(100), workers=2)


def test_confusion_and_loss() -> None:
    y, predicted = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 2, 0])
    np.testing.assert_array_equal(
        confusion_matrix(y, predicted, 3), [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    )
    p = np.array([[0.5, 0.5], [0.25, 0.75]])
    assert mean_loss(p, np.array([0, 1])) == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)
    assert mean_loss(np.array([[0.0, 1.0]]), np.array([0])) == pytest.approx(87.3, abs=0.1)
