"""Modes in which several pushes make one update, and nobody waits: Rennala, buffered, Ringleader.

A push is taken into the batch when it is handled, and counts as applied then; the version changes
with the push that completes the batch. What an incomplete batch holds when the run ends makes the
last update, unless the run ends at its `max_updates`.

    Rennala     the mean of B gradients, all computed at the present parameters.
                (Tyurin and Richtarik, Optimal Time Complexities of Parallel Stochastic Optimization
                Methods Under a Fixed Computation Model, 2023.)
    Buffered    the mean of any B gradients: n-softsync (Zhang, Gupta, Lian and Liu, Staleness-aware
                Async-SGD for Distributed Deep Learning, 2016), FedBuff (Nguyen et al., Federated
                Learning with Buffered Asynchronous Aggregation, 2022).
    Ringleader  the mean of the latest gradient of each worker, anew with every push.
                (Wang et al., Incremental Aggregated Asynchronous SGD for Arbitrarily Heterogeneous
                Data, 2025; Maranjyan and Richtarik, Ringleader ASGD, 2025, whose rounds of
                accumulation and update are left out.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from psframe.consistency import Batch, Policy, Verdict, check_count
from psframe.layout import Array

__all__ = ["Buffered", "Rennala", "Ringleader"]


class _SumBatch:
    """The sum of the gradients of a batch, in the order in which they came.

    Should the update that they make not be finite, all are lost, and the last is told so.
    """

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self.pending = 0
        self._sum = np.zeros(size, dtype)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to make an update with."""
        return not self.pending

    def add(self, worker: int, grad: Array) -> None:
        """Take a gradient in."""
        with np.errstate(over="ignore", invalid="ignore"):  # judged by the rule
            if self.pending:
                self._sum += grad
            else:
                self._sum[:] = grad
        self.pending += 1

    def mean(self) -> Array:
        """Give the mean of what there is, which is forgotten."""
        self._sum /= self.pending
        self.pending = 0
        return self._sum

    def refused(self) -> None:
        """Nothing: all of it is forgotten."""

    def forget(self, worker: int) -> None:
        """Nothing: what a worker has given stays."""


class _Table:
    """The latest gradient of each worker, and their sum.

    The sum is kept up to date, and made anew from the rows once as many have come as there are
    rows: that bounds what rounding adds up to.

    Attributes:
        pending: gradients that have come since the last update.
    """

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self.pending = 0
        self._rows: dict[int, Array] = {}
        self._sum = np.zeros(size, dtype)
        self._mean = np.empty(size, dtype)
        self._changes = 0
        # Whose row came last, and what it replaced: put back, should the update be refused.
        self._last = -1
        self._before: Array | None = None
        self._spare = np.empty(0, dtype)

    @property
    def empty(self) -> bool:
        """Whether no worker has given any."""
        return not self._rows

    def add(self, worker: int, grad: Array) -> None:
        """Replace a worker's gradient."""
        if self._before is not None:
            self._spare = self._before
        new = self._spare if self._spare.size else np.empty_like(grad)
        self._spare = np.empty(0, grad.dtype)
        new[:] = grad
        self._last, self._before = worker, self._rows.get(worker)
        self._rows[worker] = new
        self.pending += 1
        with np.errstate(over="ignore", invalid="ignore"):  # judged by the rule
            if self._before is not None:
                self._sum -= self._before
            self._sum += grad
            self._changes += 1
            if self._changes > len(self._rows):
                self._add_up()

    def mean(self) -> Array:
        """Give the mean of the rows."""
        self.pending = 0
        return np.divide(self._sum, len(self._rows), out=self._mean)

    def refused(self) -> None:
        """Put back what the last gradient replaced: the update with it was refused."""
        if self._last in self._rows:
            self._spare = self._rows.pop(self._last)
            if self._before is not None:
                self._rows[self._last] = self._before
        self._last, self._before = -1, None
        self._add_up()

    def forget(self, worker: int) -> None:
        """Leave a worker's gradient out from now on."""
        if worker == self._last:
            self._last, self._before = -1, None
        if self._rows.pop(worker, None) is not None:
            self._add_up()
        if not self._rows:
            self.pending = 0

    def _add_up(self) -> None:
        self._changes = 0
        self._sum[:] = 0
        for _, row in sorted(self._rows.items()):
            self._sum += row


class _BatchPolicy(Policy):
    gathers = True

    def __init__(self, workers: int, batch: int, current_only: bool) -> None:
        super().__init__(workers)
        self._batch = batch
        self._current_only = current_only
        self._taken = 0

    def offer(self, worker: int, *, current: bool = True) -> Verdict:
        return Verdict.TAKE if current or not self._current_only else Verdict.STALE

    def gathered(self, worker: int) -> bool:
        self._taken = (self._taken + 1) % self._batch
        return not self._taken

    def ungathered(self) -> None:
        self._taken = (self._taken - 1) % self._batch

    def batch(self, size: int, dtype: np.dtype[Any]) -> Batch:
        return _SumBatch(size, dtype)


class _TablePolicy(Policy):
    gathers = True
    forgets = True

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._heard: set[int] = set()

    def gathered(self, worker: int) -> bool:
        self._heard.add(worker)
        return all(w in self._heard for w, live in enumerate(self.live) if live)

    def leave(self, worker: int) -> bool:
        self._heard.discard(worker)
        return super().leave(worker)

    def batch(self, size: int, dtype: np.dtype[Any]) -> Batch:
        return _Table(size, dtype)


@dataclass(frozen=True)
class Rennala:
    """Apply the mean of `batch` gradients that were all computed at the present parameters.

    One that was computed on earlier ones is dropped (reason "stale"). To use where compute times
    differ without limit: no stale gradient is ever applied, and no slow worker waited for.

    Args:
        batch: B >= 1. Costs one more array as large as the parameters, and one where a rule scales
            gradients.

    Raises:
        ValueError, TypeError: it is no such number.
    """

    batch: int

    def __post_init__(self) -> None:
        check_count("Rennala: batch", self.batch, 1)

    def policy(self, workers: int) -> Policy:
        """Make the bookkeeping for `workers` workers."""
        return _BatchPolicy(workers, self.batch, current_only=True)


@dataclass(frozen=True)
class Buffered:
    """Apply the mean of any `batch` gradients, whatever they were computed on.

    To use where many workers make many small, noisy gradients: fewer updates, each staler by
    the number of updates and not of pushes.

    Args:
        batch: B >= 1; 1 is Async. Costs one more array as large as the parameters, and one where a
            rule scales gradients.

    Raises:
        ValueError, TypeError: it is no such number.
    """

    batch: int

    def __post_init__(self) -> None:
        check_count("Buffered: batch", self.batch, 1)

    def policy(self, workers: int) -> Policy:
        """Make the bookkeeping for `workers` workers."""
        return _BatchPolicy(workers, self.batch, current_only=False)


@dataclass(frozen=True)
class Ringleader:
    """Step along the mean of each live worker's latest gradient, with every push.

    The first update is made once every live worker has pushed. To use where workers hold different
    data: asynchronous SGD would weigh the data of fast workers more, and this does not. Costs W + 3
    more arrays as large as the parameters, and one where a rule scales gradients; checkpoints do
    not have them, so that after a resume the first update waits again.
    """

    def policy(self, workers: int) -> Policy:
        """Make the bookkeeping for `workers` workers."""
        return _TablePolicy(workers)
