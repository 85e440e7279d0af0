"""Predict and evaluate with fixed parameters, on all workers at once.

The blocks are leased like those of a training. Every worker writes what it has found into a vector
of zeros and pushes that once, at its end; a server that adds them up holds everything, each
sample's from whichever worker had it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.consistency import Async
from psframe.data import Dataset
from psframe.errors import RankLost
from psframe.models.base import Model
from psframe.optim import SGD
from psframe.placement import Servers
from psframe.runtime import run

__all__ = ["Predictions", "confusion_matrix", "mean_loss", "predict"]

# Samples in a leased block: large enough for one matrix product to be worth a message, small
# enough to be shared among workers.
_BLOCK_MAX = 1024
_BLOCK_MIN = 64

# The names of what the workers push; the model's own parameters are behind a prefix.
_FOUND, _DONE, _MODEL = "found", "done", "model."


@dataclass(frozen=True)
class Predictions:
    """What a model says of n samples.

    Attributes:
        labels: (n,) int64, the most likely class of each.
        probabilities: (n, k) float32 of each class, if the model tells.
    """

    labels: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32] | None


def predict(
    model: Model,
    params: Mapping[str, Any],
    data: Dataset,
    *,
    servers: Servers = 1,
    workers: int | None = None,
    device: str = "auto",
    comm: Any = None,
) -> Predictions | None:
    """Predict all samples of a dataset; every rank calls it with equal arguments.

    Args:
        model: tells probabilities if it has a method `probabilities(params, x)` -> (n, k).
        params: of the model; rank 0's values count.
        data: the samples; augmentation is left out.
        servers, workers, device, comm: as for `psframe.run`.

    Returns:
        The predictions in the data's order, on the root; None elsewhere.

    Raises:
        What `psframe.run` raises; RankLost: a part of the predictions has not come.
    """
    n, k = len(data), data.n_classes
    wide = callable(getattr(model, "probabilities", None))
    dtype = next(iter(params.values())).dtype
    block = min(_BLOCK_MAX, max(_BLOCK_MIN, -(-n // 8)))
    found = (n, k) if wide else (n,)
    blocks = -(-n // block)

    def work(worker: Any) -> None:
        pulled = worker.pull()
        own = {name[len(_MODEL) :]: pulled[name] for name in pulled if name.startswith(_MODEL)}
        xp = worker.xp
        mine, done = xp.zeros(found, dtype), xp.zeros(blocks, dtype)
        for rows in worker.leases(n, block, shuffle=False):
            begin, end = int(rows[0]), int(rows[-1]) + 1
            x = xp.asarray(data.batch(slice(begin, end))[0])
            with np.errstate(over="ignore", invalid="ignore"):
                mine[begin:end] = (
                    model.probabilities(own, x) if wide else model.predict(own, x)  # type: ignore[attr-defined]
                )
            done[begin // block] = 1
        grads = {name: xp.zeros_like(array) for name, array in pulled.items()}
        grads[_FOUND], grads[_DONE] = -mine, -done
        worker.push(grads).wait()

    given = {_MODEL + name: np.asarray(_host(p)) for name, p in params.items()}
    result = run(
        work,
        {**given, _FOUND: np.zeros(found, dtype), _DONE: np.zeros(blocks, dtype)},
        optimizer=SGD(1.0),
        mode=Async(),
        servers=servers,
        workers=workers,
        device=device,
        comm=comm,
    )
    if result.params is None:
        return None
    if not (result.params[_DONE] == 1).all():
        reasons = ", ".join(result.ledger.reasons) or "a worker was lost"
        raise RankLost(f"predictions of some blocks have not come: {reasons}")
    values = result.params[_FOUND]
    if not wide:
        return Predictions(values.astype(np.int64), None)
    return Predictions(values.argmax(axis=1), values.astype(np.float32))


def confusion_matrix(
    labels: npt.NDArray[Any], predicted: npt.NDArray[Any], n_classes: int
) -> npt.NDArray[np.int64]:
    """Count (k, k): a row a true label, a column a predicted one."""
    pairs = labels * n_classes + predicted
    counts = np.bincount(pairs, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64)


def mean_loss(probabilities: npt.NDArray[Any] | None, labels: npt.NDArray[Any]) -> float | None:
    """Compute the mean cross-entropy of predicted probabilities; None without them."""
    if probabilities is None:
        return None
    of_label = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    loss = -np.log(np.maximum(of_label, np.finfo(np.float32).tiny)).mean()
    return float(loss) if math.isfinite(loss) else None


def _host(array: Any) -> Any:
    return array.get() if hasattr(array, "get") else array
