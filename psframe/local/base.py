"""The parameters of one worker's own, and the rule that steps them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from psframe.client import Worker
from psframe.errors import Diverged
from psframe.layout import Layout
from psframe.packing import check_gradients
from psframe.params import Receipt
from psframe.pending import Pending
from psframe.plan import OptimizerLike, check_count

__all__ = ["LocalSteps", "quietly"]

_REFUSALS_MAX = 10  # in a row, as a run bears 10 a worker


def quietly() -> np.errstate:
    """What overflows is refused where it is applied."""
    return np.errstate(over="ignore", under="ignore", invalid="ignore")


class LocalSteps:
    """What `LocalSGD` and `EASGD` have in common; they say when to exchange what.

    Memory on the worker's device: P for the parameters, P for a gradient, P to work in, and the
    rule's slots twice.
    """

    def __init__(self, worker: Worker, optimizer: OptimizerLike, period: int) -> None:
        self._name = type(self).__name__
        self.period = period
        if not callable(getattr(optimizer, "updater", None)) or isinstance(optimizer, type):
            raise TypeError(
                f"{self._name}: optimizer: expected one of psframe.optim, such as"
                f" psframe.optim.SGD(lr=0.1), got {optimizer!r}"
            )
        pulled = worker.pull()
        layout = self._layout = Layout.of(pulled)
        self._worker, self._xp = worker, worker.xp
        self._optimizer = optimizer
        self._updater: Any = optimizer.updater(layout, 0, layout.size)
        if getattr(self._updater, "per_worker", False):
            raise TypeError(
                f"{self._name}: optimizer: {optimizer!r} keeps a velocity for every worker; the"
                " local rule is one worker's, so take psframe.optim.SGD with momentum"
            )
        self._flat, self._params = self._vector()
        self._grad, self._grads = self._vector()
        self._work, self._works = self._vector()
        for name, array in self._params.items():
            array[...] = pulled[name]
        self._steps = 0  # that were applied
        self._since = 0  # steps, applied or refused, since the last exchange
        self._refusals = 0
        self._finished = False
        self._receipt: Receipt | None = None
        self._pending: Pending | None = (
            None  # the last push, where nobody has asked for its receipt
        )

    @property
    def params(self) -> Mapping[str, Any]:
        """This worker's own parameters: the same arrays all along, written in place by steps.

        So a tensor of another library that shares their memory stays good.
        """
        return self._params

    @property
    def period(self) -> int:
        """H, the steps between two exchanges; it may be changed at any time."""
        return self._period

    @period.setter
    def period(self, value: int) -> None:
        check_count(f"{self._name}: period", value, 1)
        self._period = int(value)

    @property
    def steps(self) -> int:
        """How many steps this worker has made, without the refused ones."""
        return self._steps

    @property
    def receipt(self) -> Receipt | None:
        """What became of the last push, for which it waits; None before the first."""
        if self._pending is not None:
            self._receipt, self._pending = self._pending.wait(), None
        return self._receipt

    def _vector(self) -> tuple[Any, Mapping[str, Any]]:
        """Allocate P elements on the device; the flat array, and the names in it."""
        flat = self._xp.empty(self._layout.size, self._layout.dtype)
        return flat, MappingProxyType(self._layout.views(flat))

    def _check(self, what: str, grads: Mapping[str, Any] | None = None) -> None:
        where = f"{self._name}.{what} of worker {self._worker.index}"
        if self._finished:
            raise RuntimeError(f"{where}: finish() has been called; make a new {self._name}")
        if grads is not None:
            check_gradients(self._layout, grads, where)

    def _step(self, grads: Mapping[str, Any]) -> bool:
        """Apply a checked gradient to the parameters, or refuse; count it."""
        with quietly():
            for name, array in self._grads.items():
                array[...] = self._xp.asarray(grads[name])
        self._since += 1
        if self._updater.update(self._steps, self._flat, self._grad, self._work):
            self._flat[...] = self._work
            self._steps += 1
            self._refusals = 0
            return True
        self._refusals += 1
        if self._refusals == _REFUSALS_MAX:
            raise Diverged(
                f"{self._name} of worker {self._worker.index}: the last {_REFUSALS_MAX} local steps"
                f" in a row were refused after {self._steps} that were not; try a smaller learning"
                " rate or less momentum"
            )
        return False
