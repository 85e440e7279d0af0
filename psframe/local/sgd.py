"""Local SGD: many steps of a worker's own, pushed as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.client import Worker
from psframe.local.base import LocalSteps, quietly
from psframe.plan import OptimizerLike, check_count

__all__ = ["LocalSGD"]


class LocalSGD(LocalSteps):
    """Make H local steps from the pulled parameters, then push what they have changed in all.

        x <- w (pulled);  H times: x <- local rule(x, gradient at x);  push  w - x

    What is pushed, the pseudo-gradient, is applied by the run's optimizer, which decides what the
    whole is:

    * `optim.SGD(1.0)` in `Async()`: asynchronous local SGD, or federated averaging without rounds
      (Stich, Local SGD Converges Fast and Communicates Little, 2019). Divide the rate by the
      number of workers where it diverges.
    * `optim.DelayedNesterov(0.7, every=W)` in `Async()`: Liu et al., Asynchronous Local-SGD
      Training for Language Modeling, 2024, usually with AdamW as the local rule.
    * `optim.SGD(0.7, momentum=0.9, nesterov=True)` in `BSP()`: DiLoCo (Douillard et al., 2023).

    Use it where links, not computing, set the pace: a run pushes and pulls H times less often. The
    local rule's state (momentum, the number of the step for its schedule) is this worker's and
    goes on from round to round; nothing of it is in checkpoints, and a replacement begins anew.

    Leases: with `LocalSGD.leases` a block of H batches is leased at a time and completed by the
    push that its steps have led to, so that a worker that dies loses none: its block goes to
    another. With `Worker.leases` a batch is completed by asking for the next one, and up to H - 1
    batches whose steps were not pushed yet are lost with a worker.

    Workers may have different periods: with H v_i / max(v), rounded down, for speeds v they finish
    at about the same times (DyLU in the paper above). Those use `Worker.leases`.

    Memory on the worker's device: 4 P and the local rule's slots twice.

    Args:
        worker: the worker that `work` was called with; its parameters are pulled.
        optimizer: the local rule, one of `psframe.optim`.
        period: H >= 1.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.
        Stopped: the run is over.

    >>> import numpy as np, psframe
    >>> def work(worker):
    ...     local = psframe.local.LocalSGD(worker, psframe.optim.SGD(0.5), period=4)
    ...     for indices in local.leases(80, 10):
    ...         local.step({"w": local.params["w"] - 3.0})
    >>> result = psframe.run(work, {"w": np.zeros(1)}, optimizer=psframe.optim.SGD(1.0))
    >>> result.version, result.params["w"].tolist()
    (2, [2.98828125])
    """

    def __init__(self, worker: Worker, optimizer: OptimizerLike, *, period: int = 10) -> None:
        super().__init__(worker, optimizer, period)
        self._begin, self._begins = self._vector()  # what was pulled last
        self._begin[...] = self._flat

    def step(self, grads: Mapping[str, Any]) -> bool:
        """Make a local step; after the H-th push, and begin again from the server's answer.

        Args:
            grads: as for `Worker.push`: the gradient at `params`.

        Returns:
            True; False if the step was refused because something would not be finite: then the
            parameters are as before.

        Raises:
            ValueError, TypeError: as `Worker.push`; nothing has changed.
            RuntimeError: after `finish`.
            Diverged: so were the last 10 steps.
            Stopped: the run is over.
        """
        self._check("step", grads)
        applied = self._step(grads)
        if self._since >= self._period:
            self.exchange()
        return applied

    def exchange(self) -> None:
        """Push now what the steps so far have changed, and begin again from the server's answer.

        Raises:
            RuntimeError: after `finish`.
            Stopped: the run is over.
        """
        self._check("exchange")
        self._write_gradients()
        pulled = self._worker.push_pull(None)
        self._receipt = pulled.receipt
        for name, array in self._begins.items():
            array[...] = pulled[name]
        self._flat[...] = self._begin

    def finish(self) -> None:
        """Push what has not been pushed yet, if there were steps; no step may follow.

        Raises:
            Stopped: the run is over.
        """
        if self._finished:
            return
        if self._since:
            self._write_gradients()
            self._pending = self._worker.push(None)
        self._finished = True

    def leases(
        self, n_samples: int, batch_size: int, *, epochs: int = 1, shuffle: bool = True
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Lease `period` batches at a time and give one after the other; push after the last.

        The last block of an epoch may be shorter; its steps are pushed all the same. Every worker
        must ask with equal arguments and have the same period.

        Args:
            n_samples, batch_size, epochs, shuffle: as for `Worker.leases`.

        Yields:
            int64 index arrays, the caller's own.

        Raises:
            ValueError, TypeError, Stopped: as `Worker.leases`.
        """
        check_count("leases: batch_size", batch_size, 1)
        whole = batch_size * self._period
        blocks = self._worker.leases(n_samples, whole, epochs=epochs, shuffle=shuffle)
        return self._batches(blocks, batch_size)

    def _batches(
        self, blocks: Iterator[npt.NDArray[np.int64]], size: int
    ) -> Iterator[npt.NDArray[np.int64]]:
        for block in blocks:
            for begin in range(0, len(block), size):
                yield block[begin : begin + size]
            if self._since:
                self.exchange()

    def _write_gradients(self) -> None:
        self._since = 0
        grads = self._worker.gradients()
        with quietly():
            for name, array in self._begins.items():
                self._xp.subtract(array, self._params[name], out=grads[name])
