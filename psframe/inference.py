"""Predict and evaluate with fixed parameters, on all workers at once.

The blocks are leased like those of a training. First every worker gets the parameters; then it
sends the predictions of each block as it has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.data import Dataset
from psframe.devices import choose_device, make_device
from psframe.errors import ArgumentError, RankLost
from psframe.gathering import AT, ROWS, Gather
from psframe.launcher import find_launcher
from psframe.layout import Array, Layout
from psframe.models.base import Model
from psframe.optim import SGD
from psframe.placement import Servers
from psframe.runtime import run

__all__ = ["Predictions", "confusion_matrix", "mean_loss", "predict", "predict_alone"]

# Samples in a leased block: large enough for one matrix product to be worth a message, small
# enough to be shared among workers.
_BLOCK_MAX = 1024
_BLOCK_MIN = 64


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
        What `psframe.run` raises; ArgumentError: a prediction is not finite; RankLost: a part of
        the predictions has not come.
    """
    n, block, wide = len(data), _block_of(data), _is_wide(model)
    copies = _share(params, servers=servers, workers=workers, device=device, comm=comm)

    def work(worker: Any) -> None:
        try:
            copy = copies.pop()
        except IndexError:  # this rank served in the run before
            return
        copy.use_device()
        for rows in worker.leases(n, block, shuffle=False):
            begin, end = int(rows[0]), int(rows[-1]) + 1
            found = _found(model, copy, data, begin, end, wide)
            grads = worker.gradients()
            grads[AT][0] = begin // block
            grads[ROWS][: end - begin] = found
            grads[ROWS][end - begin :] = 0
            worker.push(None)

    answer = _Answer(n, block)
    gather = Gather(-(-n // block), answer.take)
    dtype = next(iter(params.values())).dtype
    result = run(
        work,
        {AT: np.zeros(1, dtype), ROWS: np.zeros((block, data.n_classes) if wide else block, dtype)},
        optimizer=gather,
        workers=workers if _alone(comm) else None,  # of which the run before has warned
        device="cpu",  # what is pushed comes from the host, whatever it was computed on
        comm=comm,
    )
    if not result.is_root:
        return None
    if gather.missing:
        reasons = ", ".join(result.ledger.reasons) or "a worker was lost"
        raise RankLost(f"predictions of {gather.missing} blocks have not come: {reasons}")
    return Predictions(answer.labels, answer.probabilities)


def predict_alone(
    model: Model, params: Mapping[str, Any], data: Dataset, *, device: str = "auto"
) -> Predictions:
    """Predict all samples of a dataset in this process, whoever else is left; see `predict`."""
    block, wide = _block_of(data), _is_wide(model)
    given = {name: np.asarray(_host(p)) for name, p in params.items()}
    layout = Layout.of(given)
    opened = make_device(choose_device(device, worker=0), layout)
    try:
        on_host = opened.name == "cpu"
        arrays = given if on_host else opened.params([layout.flatten(given)])
        copy = _Copy(arrays, opened.xp, opened.name)
        answer = _Answer(len(data), block)
        for begin in range(0, len(data), block):
            end = min(begin + block, len(data))
            answer.take(begin // block, _found(model, copy, data, begin, end, wide))
    finally:
        opened.close()
    return Predictions(answer.labels, answer.probabilities)


def _block_of(data: Dataset) -> int:
    """How many samples are predicted at a time."""
    return min(_BLOCK_MAX, max(_BLOCK_MIN, -(-len(data) // 8)))


def _is_wide(model: Model) -> bool:
    """Whether the model tells probabilities."""
    return callable(getattr(model, "probabilities", None))


@dataclass(frozen=True)
class _Copy:
    """A worker's own copy of the model's parameters, and where it is."""

    params: dict[str, Any]
    xp: ModuleType
    device: str

    def use_device(self) -> None:
        """Let the calling thread, which may be another than the copy was made in, compute there."""
        if self.device != "cpu":
            self.xp.cuda.Device(int(self.device.partition(":")[2])).use()


class _Answer:
    """The predictions, as they come; there is memory for them where some do.

    Args:
        n: samples.
        block: samples in a block.
    """

    def __init__(self, n: int, block: int) -> None:
        self.labels: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self.probabilities: npt.NDArray[np.float32] | None = None
        self._n = n
        self._block = block

    def take(self, at: int, rows: Array) -> None:
        """Take block number `at`: labels, or the probabilities of each."""
        if not len(self.labels):
            self.labels = np.empty(self._n, np.int64)
            if rows.ndim == 2:
                self.probabilities = np.empty((self._n, rows.shape[1]), np.float32)
        begin = at * self._block
        rows = rows[: self._n - begin]
        place = slice(begin, begin + len(rows))
        if self.probabilities is None:
            self.labels[place] = rows
        else:
            self.labels[place] = rows.argmax(axis=1)
            self.probabilities[place] = rows


def _share(params: Mapping[str, Any], **placement: Any) -> list[_Copy]:
    """Give every worker of this process its copy of rank 0's parameters."""
    copies: list[_Copy] = []

    def work(worker: Any) -> None:
        copies.append(_Copy(worker.pull().copy(), worker.xp, worker.device))

    given = {name: np.asarray(_host(p)) for name, p in params.items()}
    run(work, given, optimizer=SGD(0.0), **placement)
    return copies


def _found(model: Any, copy: _Copy, data: Dataset, begin: int, end: int, wide: bool) -> Array:
    """Predict the samples [begin, end)."""
    x = copy.xp.asarray(data.batch(slice(begin, end))[0])
    predict_block = model.probabilities if wide else model.predict
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.asarray(_host(predict_block(copy.params, x)))
    if not np.isfinite(found).all():
        raise ArgumentError(
            f"{data.name}: the model's predictions for samples {begin} to {end - 1} are not finite;"
            " samples may be much larger than those that it was trained on, or it has diverged"
        )
    return found


def _alone(comm: Any) -> bool:
    return comm is None and find_launcher() is None


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
