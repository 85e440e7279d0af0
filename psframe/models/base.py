"""What a model is, and the pieces that the built-in ones share.

Symbols: n samples in a batch, d features of one sample (its shape flattened), k classes.
Everything is written once for NumPy and CuPy: the array library is the one that the arrays came
with, and results lie where the arguments lay.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from psframe.errors import ArgumentError

__all__ = [
    "Model",
    "array_module",
    "check_model",
    "classification_sums",
    "cross_entropy",
    "he_normal",
    "softmax",
    "takes",
]

_METHODS = ("init", "loss_and_gradients", "evaluate", "predict")


@runtime_checkable
class Model(Protocol):
    """A classifier. A class of one's own needs these methods and no base class.

    For `--model package.module:Class` and `create`, the class is called as
    `Class(input_shape, n_classes)`: the shape of one sample, and the number of classes k. A model
    holds no parameters; it is asked with them.

    State that is observed and not trained, such as batch normalisation's running mean, is among
    the parameters too. An attribute `averages`, names to a momentum in [0, 1), says which; a
    model without such state does without it. What `loss_and_gradients` returns for such a name is
    what this batch has shown, and the server averages it in (`psframe.optim.Average`).
    """

    def init(self, rng: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
        """Draw fresh parameters: names to float32 NumPy arrays, a function of `rng` alone."""
        ...

    def loss_and_gradients(
        self, params: Mapping[str, Any], x: Any, y: Any, out: Mapping[str, Any] | None = None
    ) -> tuple[float, Mapping[str, Any]]:
        """Compute the mean loss over a batch, and its gradient with respect to each parameter.

        One that draws random numbers, as dropout does, takes an argument `rng` too: the batch's
        own NumPy Generator, so that what it draws does not depend on who computes the batch.

        Args:
            params: names to arrays; not to be written.
            x: (n, *input_shape) samples, on the device of the parameters.
            y: (n,) labels in [0, k).
            out: where to write the gradients, by name; saves a copy. A model may do without
                this argument; it is then never given.

        Returns:
            The loss, and the gradients by name (`out`, where that was given).
        """
        ...

    def evaluate(self, params: Mapping[str, Any], x: Any, y: Any) -> dict[str, float]:
        """Compute sums over a batch: `loss`, `correct` and `count`, and what else one likes.

        They are sums, not means, so that batches of different sizes add up. What else there is
        becomes a metric: a sum `top5` is recorded as test_top5 (validation_top5), divided by
        `count`.
        """
        ...

    def predict(self, params: Mapping[str, Any], x: Any) -> Any:
        """Compute the (n,) most likely labels."""
        ...


def check_model(model: Any, where: str = "model") -> None:
    """Raise ArgumentError naming the methods that `model` lacks, if it lacks any."""
    missing = [name for name in _METHODS if not callable(getattr(model, name, None))]
    if missing:
        kind = model.__name__ if inspect.isclass(model) else type(model).__name__
        raise ArgumentError(
            f"{where}: {kind} lacks the method{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"a model has {', '.join(_METHODS)}, see psframe.models.Model"
        )
    if inspect.isclass(model):
        raise ArgumentError(
            f"{where}: expected a model, got the class {model.__name__}; "
            f"call it: {model.__name__}(input_shape, n_classes)"
        )


def takes(model: Model, argument: str) -> bool:
    """Tell whether `model.loss_and_gradients` accepts an argument of that name."""
    parameters = inspect.signature(model.loss_and_gradients).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def array_module(array: Any) -> Any:
    """Return cupy for an array of CuPy's, numpy for anything else; imports neither."""
    package = type(array).__module__.partition(".")[0]
    return sys.modules["cupy"] if package == "cupy" else np


def he_normal(
    rng: np.random.Generator, fan_in: int, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Draw float32 weights with mean 0 and variance 2 / fan_in.

    He et al., Delving Deep into Rectifiers, 2015: keeps the variance through ReLU layers.
    """
    scale = math.sqrt(2.0 / fan_in)
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def softmax(logits: Any) -> Any:
    """Turn (n, k) logits into probabilities, in their memory: exp(z_ij - m_i) / sum_j ..."""
    xp = array_module(logits)
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = xp.exp(logits, out=logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities


def cross_entropy(logits: Any, y: Any) -> tuple[Any, Any]:
    """Compute each sample's loss, and the softmax probabilities.

    loss_i = log sum_j exp(z_ij - m_i) - (z_iy - m_i), with m_i = max_j z_ij, so that no
    exponential overflows.

    Args:
        logits: (n, k) z; overwritten.
        y: (n,) labels.

    Returns:
        (n,) losses and (n, k) probabilities, the latter in the memory of `logits`.
    """
    xp = array_module(logits)
    logits -= logits.max(axis=1, keepdims=True)
    of_label = logits[xp.arange(len(y)), y]
    probabilities = xp.exp(logits, out=logits)
    total = probabilities.sum(axis=1, keepdims=True)
    probabilities /= total
    return xp.log(total[:, 0]) - of_label, probabilities


def classification_sums(logits: Any, y: Any) -> dict[str, float]:
    """Sum loss, correct predictions and samples over a batch; `logits` is overwritten."""
    correct = int((logits.argmax(axis=1) == y).sum())
    losses, _ = cross_entropy(logits, y)
    return {"loss": float(losses.sum()), "correct": float(correct), "count": float(len(y))}
