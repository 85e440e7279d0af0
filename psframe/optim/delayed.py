"""Nesterov's momentum for a server whose gradients come one by one, and late."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from psframe.optim import formulas
from psframe.optim.base import Optimizer
from psframe.optim.checks import as_float, as_int
from psframe.optim.schedules import Schedule

__all__ = ["DelayedNesterov"]


@dataclass(frozen=True, repr=False)
class DelayedNesterov(Optimizer):
    """Step against each gradient, and along a momentum that only every N-th update changes.

        g <- (scale g + weight_decay w) / N
        d <- d + g
        m <- momentum m + d,  d <- 0        in the updates N, 2N, ... only: d is a mean then
        w <- w - lr (k momentum m + g),  k = 1 - c N + c  in those, and c in the others

    with N = `every` and c = `activation`. Liu et al., Asynchronous Local-SGD Training for Language
    Modeling, 2024, algorithm 3. Deviations: d sums g / N instead of being divided at the end; and
    there is a weight decay.

    With c = 0, N updates come to one step of SGD(lr, momentum, nesterov=True) on the mean of their
    gradients, and with N = 1 this is that rule: the momentum carries a stale gradient on no more
    often than in a synchronous run. It is meant for `psframe.local.LocalSGD`, whose few, large and
    late steps need a momentum, and serves plain gradients too where SGD's momentum diverges. Take
    the number of workers for N. `lr` is that of a whole step: one gradient moves w by lr g / N.

    A refused gradient counts for nothing. Memory: two arrays as large as the parameters (each
    twice, as all rules keep them); 28 bytes a float32 parameter are moved, as Adam does.

    Args:
        lr: learning rate >= 0, or a schedule of the number of the update.
        every: N >= 1, the updates between two changes of the momentum.
        momentum: in [0, 1).
        activation: c in [0, 1/N]: the share of a step along the momentum that each update in
            between makes, the N-th making the rest; with 1/N all make equal shares.
        weight_decay: factor of the L2 penalty, >= 0.
        no_decay: patterns of the names of parameters that are not decayed.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> DelayedNesterov(0.7, every=4).slots
    ('momentum', 'mean')
    """

    lr: float | Schedule
    every: int
    momentum: float = 0.9
    activation: float = 0.0
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = field(default=(), kw_only=True)

    counts_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        as_int(self, "every", least=1)
        as_float(self, "momentum", least=0.0, below=1.0)
        as_float(self, "activation", least=0.0)
        if self.activation > 1.0 / self.every:
            raise ValueError(
                f"DelayedNesterov: activation is {self.activation!r}, expected a number in"
                f" [0, 1/every], so at most {1.0 / self.every!r}; leave it out for 0"
            )

    @property
    def formula(self) -> Callable[..., Any]:
        return formulas.delayed_nesterov

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum", "mean")

    def scalars(self, step: int, lr: float, scale: float, weight_decay: float) -> tuple[float, ...]:
        n, c = self.every, self.activation
        full = (step + 1) % n == 0
        ahead = (1.0 - c * n + c if full else c) * self.momentum
        return (scale, weight_decay, lr, self.momentum, 1.0 / n, ahead, float(full))
