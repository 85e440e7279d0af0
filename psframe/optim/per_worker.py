"""Optimizers whose momentum survives staleness: a velocity for every worker, in place of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from psframe.layout import Layout
from psframe.optim import formulas
from psframe.optim.base import Optimizer
from psframe.optim.checks import as_float
from psframe.optim.schedules import Schedule
from psframe.optim.worker_updater import SLOT, WorkerUpdater

__all__ = ["DANAZero", "PerWorker", "WorkerMomentum"]


class PerWorker(Optimizer):
    """What rules with a velocity for every worker have in common.

    `momentum` is above 0: without it there is nothing to keep for a worker, and SGD does it.
    """

    momentum: float

    def __post_init__(self) -> None:
        super().__post_init__()
        as_float(self, "momentum", least=0.0, below=1.0, above=True)

    @property
    def formula(self) -> Callable[..., Any]:
        return formulas.momentum

    @property
    def slots(self) -> tuple[str, ...]:
        return (SLOT,)

    @property
    @abstractmethod
    def looks_ahead(self) -> bool:
        """Whether the step is g + momentum v, Nesterov's, in place of v."""

    def scalars(self, step: int, lr: float, scale: float, weight_decay: float) -> tuple[float, ...]:
        return (scale, weight_decay, lr, self.momentum, float(self.looks_ahead))

    def updater(self, layout: Layout, begin: int, end: int) -> WorkerUpdater:
        """Make the state for the shard [begin, end) of the flat vector; as `Optimizer.updater`."""
        return WorkerUpdater(self, layout, begin, end)


@dataclass(frozen=True, repr=False)
class WorkerMomentum(PerWorker):
    """Step along the velocity of the worker whose gradient it is.

        g <- scale g + weight_decay w
        v_i <- momentum v_i + g                                  (i: the worker that pushed g)
        w <- w - lr v_i,  with Nesterov  w - lr (g + momentum v_i)

    The baseline Multi-ASGD of Hakimi et al., Taming Momentum in a Distributed Asynchronous
    Environment, 2019. The learning rate is outside the momentum, as for SGD; with one worker it is
    SGD, bit for bit.

    Use it in place of SGD's momentum where gradients are stale: a velocity that all workers share
    adds to the momentum that staleness itself amounts to and ruins training from about 8 workers
    on; with one for each worker, no gradient is carried on by the others' pushes.

    Memory: P elements for each worker that has pushed, and P more. While a checkpoint is being
    written P for each worker that pushes meanwhile, which are kept for the next one.

    Args:
        lr: learning rate >= 0, or a schedule.
        momentum: in (0, 1).
        nesterov: look ahead along the worker's velocity.
        weight_decay: factor of the L2 penalty, >= 0.
        no_decay: patterns of the names of parameters that are not decayed.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> WorkerMomentum(0.1)
    WorkerMomentum(lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0, no_decay=())
    """

    lr: float | Schedule
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.nesterov, bool):
            raise TypeError(
                f"WorkerMomentum: nesterov is {self.nesterov!r}, expected True or False"
            )

    @property
    def looks_ahead(self) -> bool:
        return self.nesterov


@dataclass(frozen=True, repr=False)
class DANAZero(PerWorker):
    """Step along the worker's velocity, and give workers the parameters where all will have led.

        g <- scale g + weight_decay w
        v_i <- momentum v_i + g                                  (i: the worker that pushed g)
        x <- x - lr v_i
        w = x - lr momentum sum_j v_j                            (what workers are sent)

    Hakimi et al., Taming Momentum in a Distributed Asynchronous Environment, 2019: DANA-Zero. It is
    w that is stored, not x, and neither x nor the sum is computed. Let v' be v_i after the push.
    w' = (x - lr v') - lr momentum (sum_j v_j + v' - v_i) = w - lr (v' + momentum (v' - v_i)), and
    as v' - momentum v_i = g, w' = w - lr (g + momentum v'): Nesterov's form with the worker's
    velocity. So the numbers are those of WorkerMomentum with nesterov=True.

    Two things follow. Where the learning rate changes, from lr to lr', the paper's w jumps by
    (lr - lr') momentum sum_j v_j without a push; here w stays and x moves instead. And what is
    evaluated, kept in checkpoints and left by the run is w, not x = w + lr momentum sum_j v_j; they
    meet as the learning rate goes to 0. Weight decay is of w, too.

    Use it as WorkerMomentum, and before that one where there are many workers: a gradient is taken
    about where the velocities of all of them will have led when it is applied.

    Memory: as WorkerMomentum.

    Args:
        lr: learning rate >= 0, or a schedule.
        momentum: in (0, 1).
        weight_decay: factor of the L2 penalty, >= 0.
        no_decay: patterns of the names of parameters that are not decayed.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> DANAZero(0.1, 0.95).momentum
    0.95
    """

    lr: float | Schedule
    momentum: float = 0.9
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def looks_ahead(self) -> bool:
        return True
