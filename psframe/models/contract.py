"""A model whose answers are checked, so that a mistake in it is told as one, where it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from psframe.errors import ArgumentError
from psframe.models.base import Model

__all__ = ["Contract", "check_parameters"]

_WORDS_MAX = 200  # of a wrong answer


class Contract:
    """Asks a model and checks what it answers; has `probabilities` only if the model has.

    Values on a device are looked at only where somebody waits for them anyway: gradients are
    checked when they are pushed.

    Args:
        model: the model.
        n_classes: k.
    """

    def __init__(self, model: Model, n_classes: int) -> None:
        self._model: Any = model
        self._n_classes = n_classes
        if callable(getattr(model, "probabilities", None)):
            self.probabilities = self._probabilities

    def init(self, rng: np.random.Generator) -> Any:
        """Draw fresh parameters, as the model does."""
        return self._model.init(rng)

    def loss_and_gradients(
        self, params: Any, x: Any, y: Any, out: Mapping[str, Any] | None = None, **more: Any
    ) -> tuple[Any, Any]:
        """Compute a batch's loss and gradients.

        Raises:
            ArgumentError: the answer is not a number and a mapping.
        """
        if out is not None:
            more["out"] = out
        found = self._model.loss_and_gradients(params, x, y, **more)
        pair = isinstance(found, (tuple, list)) and len(found) == 2
        if not pair or not (isinstance(found[1], Mapping) or out is not None):
            raise self._wrong("loss_and_gradients", "the loss and a dict of gradients", found)
        if not _is_number(found[0]):
            raise self._wrong("loss_and_gradients", "a loss that is one number", found[0])
        return found[0], found[1]

    def evaluate(self, params: Any, x: Any, y: Any) -> dict[str, float]:
        """Compute sums over a batch.

        Raises:
            ArgumentError: they are no dict of numbers, or cannot be counts of the batch's samples.
        """
        found = self._model.evaluate(params, x, y)
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise self._wrong("evaluate", "a dict of sums: loss, correct and count", found)
        for name, value in found.items():
            if not _is_number(value):
                raise self._wrong("evaluate", f"a number as {name!r}", value)
        if "count" not in found:
            raise self._wrong(
                "evaluate", "'count', the samples in the batch, among its sums", found
            )
        count, correct = float(found["count"]), float(found.get("correct", 0.0))
        if not 0.0 < count < math.inf:
            raise self._wrong("evaluate", f"a 'count' above 0 ({len(y)} samples)", found["count"])
        if not 0.0 <= correct <= count:
            raise self._wrong(
                "evaluate", f"'correct' to be from 0 to 'count' ({count:g})", found["correct"]
            )
        return dict(found)

    def predict(self, params: Any, x: Any) -> Any:
        """Compute the most likely labels.

        Raises:
            ArgumentError: they are not one class number a sample.
        """
        found = self._model.predict(params, x)
        expected = f"an array of {len(x)} labels"
        self._check_array("predict", found, (len(x),), expected)
        # What is not finite is told by whoever asked, with the samples that it was made from.
        if len(x) and (float(found.min()) < 0 or float(found.max()) >= self._n_classes):
            raise self._wrong("predict", f"labels from 0 to {self._n_classes - 1}", found)
        return found

    def _probabilities(self, params: Any, x: Any) -> Any:
        found = self._model.probabilities(params, x)
        shape = (len(x), self._n_classes)
        self._check_array("probabilities", found, shape, f"an array of shape {shape}")
        return found

    def _check_array(self, method: str, found: Any, shape: tuple[int, ...], expected: str) -> None:
        got = getattr(found, "shape", None)
        kind = getattr(getattr(found, "dtype", None), "kind", "")
        if got is None or kind not in "biuf":
            raise self._wrong(method, expected, found)
        if tuple(got) != shape:
            name = type(self._model).__name__
            raise ArgumentError(f"model: {name}.{method}: expected {expected}, got shape {got}")

    def _wrong(self, method: str, expected: str, got: Any) -> ArgumentError:
        name = type(self._model).__name__
        words = " ".join(repr(got).split())
        words = words if len(words) <= _WORDS_MAX else f"{words[:_WORDS_MAX]}..."
        return ArgumentError(f"model: {name}.{method}: expected {expected}, got {words}")


def check_parameters(params: Mapping[str, Any], where: str) -> None:
    """Raise ArgumentError if initial parameters are empty or not finite."""
    for name, value in params.items():
        if 0 in value.shape:
            raise ArgumentError(f"{where}: {name!r} has shape {value.shape}, which has no elements")
        if not np.isfinite(value).all():
            raise ArgumentError(f"{where}: {name!r} is not finite; it has NaN or infinity")


def _is_number(value: Any) -> bool:
    if isinstance(value, (int, float, np.number)):
        return not isinstance(value, np.complexfloating)
    if isinstance(value, (str, bytes, complex)) or getattr(value, "size", 1) != 1:
        return False
    return hasattr(value, "__float__")
