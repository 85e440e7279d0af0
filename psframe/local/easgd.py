"""Elastic averaging: parameters of a worker's own, tied to the server's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psframe.client import Worker
from psframe.local.base import LocalSteps, quietly
from psframe.optim import SGD
from psframe.optim.checks import as_float
from psframe.plan import OptimizerLike

__all__ = ["EASGD"]


class EASGD(LocalSteps):
    """Keep parameters of one's own, tied to the server's, the center, by an elastic force.

        every H steps:  d = alpha (x - center),  x <- x - d,  center <- center + d
        every step:     x <- local rule(x, gradient at x as it was before)

    Zhang, Choromanska and LeCun, Deep Learning with Elastic Averaging SGD, 2015: algorithm 1
    (asynchronous EASGD), and with `optim.SGD(lr, momentum, nesterov=True)` algorithm 2 (EAMSGD):
    `params` is then x + momentum v, where its gradient is taken, and the elastic force acts on x.
    Deviations: no exchange before the first step, where x is the center that was pulled; with a
    schedule v takes over the rate of its step (see `optim.SGD`).

    The run's optimizer must be `EASGD.server_optimizer()`, which adds what is pushed to the center;
    the run's result is the center. Use it where workers shall explore on their own between rare
    exchanges; d is pushed without waiting for the answer, so only the pull costs time. In `BSP()`
    the center moves by the mean of the pushes: take `optim.SGD(W)` for their sum.

    In a simulation the time of the local steps lies between an exchange's pull and its push, as all
    computing does there; so the center that is read is older than it would be on a cluster.

    Leases: with `Worker.leases` a batch is completed by asking for the next one, or by an exchange.
    What a worker has learned beyond what the exchanges have brought into the center dies with it,
    and is not in checkpoints: a replacement, or a run that is resumed, begins from the center.

    Memory on the worker's device: 3 P and the local rule's slots twice.

    Args:
        worker: the worker that `work` was called with; its parameters are pulled.
        optimizer: the local rule, one of `psframe.optim`.
        alpha: the moving rate, in (0, 1]; None for 0.9 / W, the paper's beta / p.
        period: H >= 1.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.
        Stopped: the run is over.

    >>> import numpy as np, psframe
    >>> def work(worker):
    ...     easgd = psframe.local.EASGD(worker, psframe.optim.SGD(0.5), alpha=0.5, period=4)
    ...     for indices in worker.leases(80, 10):
    ...         easgd.step({"w": easgd.params["w"] - 3.0})
    ...     easgd.finish()
    >>> rule = psframe.local.EASGD.server_optimizer()
    >>> result = psframe.run(work, {"w": np.zeros(1)}, optimizer=rule)
    >>> result.version, result.params["w"].tolist()
    (2, [2.109375])
    """

    def __init__(
        self,
        worker: Worker,
        optimizer: OptimizerLike,
        *,
        alpha: float | None = None,
        period: int = 10,
    ) -> None:
        self.alpha = 0.9 / worker.count if alpha is None else alpha
        as_float(self, "alpha", least=0.0, above=True)
        if self.alpha > 1.0:
            raise ValueError(f"EASGD: alpha is {alpha!r}, expected a number in (0, 1]")
        super().__init__(worker, optimizer, period)

    @staticmethod
    def server_optimizer() -> SGD:
        """Give the rule for `psframe.run` that adds what is pushed to the center."""
        return SGD(lr=1.0)

    def step(self, grads: Mapping[str, Any]) -> bool:
        """Make a local step; before every H-th but the first, exchange with the center.

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
        if self._since >= self._period:
            self.exchange()
        return self._step(grads)

    def exchange(self) -> None:
        """Pull the center, and move it and the parameters towards each other.

        Raises:
            RuntimeError: after `finish`.
            Stopped: the run is over.
        """
        self._check("exchange")
        self._since = 0
        center = self._worker.pull()
        grads = self._worker.gradients()
        with quietly():
            self._find_point()
            for name, difference in self._works.items():
                self._xp.subtract(difference, center[name], out=difference)
            self._work *= self.alpha
            self._flat -= self._work
            for name, difference in self._works.items():
                self._xp.negative(difference, out=grads[name])
        self._pending = self._worker.push(None)

    def finish(self) -> None:
        """Exchange a last time; no step may follow.

        Raises:
            Stopped: the run is over.
        """
        if not self._finished:
            self.exchange()
            self._finished = True

    def _find_point(self) -> None:
        """Write x, where the force acts: `params`, but for Nesterov's, which look ahead of it.

        They are x + momentum v with v = -lr m in the rule's terms.
        """
        rule = self._optimizer
        if self._steps and isinstance(rule, SGD) and rule.nesterov:
            velocity = self._updater.slots["momentum"]
            ahead = rule.learning_rate(self._steps - 1) * rule.momentum
            self._xp.multiply(velocity, ahead, out=self._work)
            self._work += self._flat
        else:
            self._work[...] = self._flat
