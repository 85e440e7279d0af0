"""A model's wrong answers are told as its own, in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from psframe.errors import ArgumentError
from psframe.models import MLP, Softmax
from psframe.models.contract import Contract, check_parameters

X, Y = np.zeros((4, 2), np.float32), np.array([0, 1, 2, 0])


class Answers:
    """A model that answers whatever it is told to."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def init(self, rng: np.random.Generator) -> Any:
        return self.found

    def loss_and_gradients(self, params: Any, x: Any, y: Any, **more: Any) -> Any:
        return self.found

    def evaluate(self, params: Any, x: Any, y: Any) -> Any:
        return self.found

    def predict(self, params: Any, x: Any) -> Any:
        return self.found

    def probabilities(self, params: Any, x: Any) -> Any:
        return self.found


def ask(method: str, found: Any) -> Any:
    """Ask a model that answers so."""
    labels = (Y,) if method in ("loss_and_gradients", "evaluate") else ()
    return getattr(Contract(Answers(found), 3), method)({}, X, *labels)


@pytest.mark.parametrize(
    ("method", "found", "words"),
    [
        ("loss_and_gradients", None, "expected the loss and a dict of gradients, got None"),
        ("loss_and_gradients", 1.0, "expected the loss and a dict of gradients, got 1.0"),
        ("loss_and_gradients", (1.0, None), "expected the loss and a dict of gradients"),
        ("loss_and_gradients", (1.0, {}, {}), "expected the loss and a dict of gradients"),
        ("loss_and_gradients", ("1", {}), "a loss that is one number, got '1'"),
        ("loss_and_gradients", (1j, {}), "a loss that is one number"),
        ("loss_and_gradients", (np.zeros(2), {}), r"one number, got array\(\[0., 0.\]\)"),
        ("evaluate", None, "expected a dict of sums: loss, correct and count, got None"),
        ("evaluate", {1: 2.0}, "expected a dict of sums"),
        ("evaluate", {"foo": 1.0}, "expected 'count', the samples in the batch"),
        ("evaluate", {"count": "four"}, "expected a number as 'count', got 'four'"),
        ("evaluate", {"correct": -5.0, "count": 0.0}, r"a 'count' above 0 \(4 samples\), got 0"),
        ("evaluate", {"correct": 1.0, "count": np.nan}, "a 'count' above 0"),
        ("evaluate", {"correct": 1e9, "count": 4.0}, r"'correct' to be from 0 to 'count' \(4\)"),
        ("evaluate", {"correct": -1, "count": 4}, "'correct' to be from 0 to 'count'"),
        ("evaluate", {"correct": np.nan, "count": 4}, "'correct' .*, got nan"),
        ("predict", None, "expected an array of 4 labels, got None"),
        ("predict", [0, 1, 2, 0], "expected an array of 4 labels"),
        ("predict", np.zeros((4, 3)), r"expected an array of 4 labels, got shape \(4, 3\)"),
        ("predict", np.array(list("abcd")), "expected an array of 4 labels"),
        ("predict", np.full(4, 99), r"expected labels from 0 to 2, got array\(\[99, 99"),
        ("predict", np.full(4, -1), "expected labels from 0 to 2"),
        ("probabilities", np.zeros((4, 4)), r"an array of shape \(4, 3\), got shape \(4, 4\)"),
        ("probabilities", None, "got None"),
    ],
)
def test_a_wrong_answer_is_told(method: str, found: Any, words: str) -> None:
    with pytest.raises(
        ArgumentError, match=rf"model: Answers\.{method}: expected .*{words}|{words}"
    ):
        ask(method, found)


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("loss_and_gradients", (np.float32(1), {})),
        ("loss_and_gradients", [np.array(1.0), {}]),
        ("loss_and_gradients", (float("nan"), {})),  # what diverges, the servers refuse
        ("evaluate", {"count": np.int64(4), "top5": 3}),
        ("evaluate", {"loss": float("inf"), "correct": 4, "count": 4}),
        ("predict", np.array([0.0, 1.0, 2.0, 0.0])),
        ("predict", np.full(4, np.nan)),  # told by whoever asked, with the samples
        ("probabilities", np.zeros((4, 3))),
    ],
)
def test_a_right_answer_is_passed_on(method: str, found: Any) -> None:
    answer = ask(method, found)
    assert answer is found or answer == found or answer == tuple(found)


def test_what_is_written_in_place_need_not_be_given_back() -> None:
    model = Contract(Answers((1.0, None)), 3)
    assert model.loss_and_gradients({}, X, Y, out={"w": X}) == (1.0, None)


def test_a_long_answer_is_cut() -> None:
    with pytest.raises(ArgumentError) as caught:
        ask("evaluate", "x" * 10**6)
    assert len(str(caught.value)) < 400


def test_probabilities_are_there_if_the_model_has_them() -> None:
    assert hasattr(Contract(Softmax((2,), 3), 3), "probabilities")
    silent: Any = Answers(None)
    silent.probabilities = None
    assert not hasattr(Contract(silent, 3), "probabilities")


def test_built_in_models_keep_it() -> None:
    model = MLP((2,), 3, hidden=(4,))
    asked, params = Contract(model, 3), model.init(np.random.default_rng(0))
    check_parameters(params, "init")
    loss, grads = asked.loss_and_gradients(params, X, Y)
    assert loss == model.loss_and_gradients(params, X, Y)[0]
    assert grads.keys() == params.keys()
    assert asked.evaluate(params, X, Y) == model.evaluate(params, X, Y)
    np.testing.assert_array_equal(asked.predict(params, X), model.predict(params, X))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros((0, 3), np.float32), r"init: 'w' has shape \(0, 3\), which has no elements"),
        (np.full(3, np.nan, np.float32), "init: 'w' is not finite"),
    ],
)
def test_parameters_that_are_none(value: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        check_parameters({"v": np.ones(2), "w": value}, "init")
