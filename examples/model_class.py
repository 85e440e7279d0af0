"""A model of one's own as a class, for the command and for `Trainer`.

    mpirun -n 4 python -m psframe.train --model examples.model_class:TanhNet --lr 0.02
    python examples/model_class.py

A class needs four methods and no base class; `psframe.models.Model` says what each returns. It
holds no parameters, it is asked with them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from psframe import optim
from psframe.data import load, prepare
from psframe.trainer import Trainer


class TanhNet:
    """One hidden layer: p = softmax(tanh(x a) b).

    Args:
        input_shape: shape of one sample.
        n_classes: k.
    """

    def __init__(self, input_shape: tuple[int, ...], n_classes: int, hidden: int = 64) -> None:
        self.sizes = (int(np.prod(input_shape)), hidden, n_classes)

    def init(self, rng: np.random.Generator) -> dict[str, Any]:
        """Draw fresh parameters."""
        d, h, k = self.sizes
        a = rng.normal(0, d**-0.5, (d, h)).astype(np.float32)
        return {"a": a, "b": np.zeros((h, k), np.float32)}

    def _forward(self, params: Mapping[str, Any], x: Any) -> tuple[Any, Any, Any]:
        x = x.reshape(len(x), -1)
        hidden = np.tanh(x @ params["a"])
        scores = hidden @ params["b"]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return x, hidden, scores / scores.sum(axis=1, keepdims=True)

    def loss_and_gradients(
        self, params: Mapping[str, Any], x: Any, y: Any
    ) -> tuple[float, dict[str, Any]]:
        """Compute the mean cross-entropy of a batch and its gradients."""
        x, hidden, p = self._forward(params, x)
        rows = range(len(y))
        loss = -np.log(p[rows, y]).mean()
        p[rows, y] -= 1
        p /= len(y)
        back = (p @ params["b"].T) * (1 - hidden**2)
        return float(loss), {"a": x.T @ back, "b": hidden.T @ p}

    def evaluate(self, params: Mapping[str, Any], x: Any, y: Any) -> dict[str, float]:
        """Compute sums over a batch, so that batches of different sizes add up."""
        p = self._forward(params, x)[2]
        return {
            "loss": float(-np.log(p[range(len(y)), y]).sum()),
            "correct": float((p.argmax(axis=1) == y).sum()),
            "count": float(len(y)),
        }

    def predict(self, params: Mapping[str, Any], x: Any) -> Any:
        """Compute the most likely labels."""
        return self._forward(params, x)[2].argmax(axis=1)


def main() -> None:
    """Train on the digits with three workers."""
    parts = prepare(load("digits"), 0.2, seed=1)
    model = TanhNet(parts.train.input_shape, parts.train.n_classes)
    trainer = Trainer(model, optimizer=optim.Adagrad(lr=0.02), epochs=20, workers=3)
    trained = trainer.fit(parts)
    if trained.accuracy is not None:
        print(f"test accuracy {trained.accuracy:.1%} after {trained.result.version} updates")


if __name__ == "__main__":
    main()
