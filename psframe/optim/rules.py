"""The optimizers: what a user chooses, and the scalars that each gives to its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from psframe.optim import formulas
from psframe.optim.base import Optimizer
from psframe.optim.checks import as_float
from psframe.optim.schedules import Schedule

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSProp"]


@dataclass(frozen=True, repr=False)
class SGD(Optimizer):
    """Step against the gradient, with momentum if wanted.

        g <- scale g + weight_decay w        (the L2 penalty's gradient)
        m <- momentum m + g
        w <- w - lr m,  with Nesterov  w - lr (g + momentum m)

    Polyak 1964; Sutskever et al., On the Importance of Initialization and Momentum in Deep
    Learning, 2013. Deviation: as in PyTorch the learning rate is outside the momentum, so that
    changing it does not rescale past gradients, and Nesterov's gradient is taken at w.

    On stale gradients the server's momentum adds to what staleness itself amounts to (1 - 1/W with
    W workers) and ruins training from about 8 workers on: keep it at 0 there.

    Args:
        lr: learning rate >= 0, or a schedule: a function of the number of the update, from 0.
        momentum: in [0, 1).
        nesterov: look ahead along the momentum; needs momentum > 0.
        weight_decay: factor of the L2 penalty, >= 0.
        no_decay: patterns, as of a shell, of the names of parameters that are not decayed; one
            that matches nothing is no error.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> SGD(0.1, momentum=0.9)
    SGD(lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0, no_decay=())
    """

    lr: float | Schedule
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        as_float(self, "momentum", least=0.0, below=1.0)
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"SGD: nesterov is {self.nesterov!r}, expected True or False")
        if self.nesterov and not self.momentum:
            raise ValueError(
                "SGD: nesterov=True needs a momentum > 0, got 0.0; pass momentum=0.9, say"
            )

    @property
    def formula(self) -> Callable[..., Any]:
        return formulas.momentum if self.momentum else formulas.sgd

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def scalars(self, step: int, lr: float, scale: float, weight_decay: float) -> tuple[float, ...]:
        if not self.momentum:
            return (scale, weight_decay, lr)
        return (scale, weight_decay, lr, self.momentum, float(self.nesterov))


@dataclass(frozen=True, repr=False)
class Adagrad(Optimizer):
    """Divide each parameter's step by the root of the sum of its squared gradients.

        g <- scale g + weight_decay w
        s <- s + g^2
        w <- w - lr g / (sqrt(s) + eps)

    Duchi, Hazan and Singer, Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization, 2011, with diagonal matrices. Deviation: eps (their delta) is outside the root as
    there, but 1e-10 by default as in PyTorch.

    Args:
        lr: learning rate >= 0, or a schedule.
        eps: > 0.
        weight_decay: factor of the L2 penalty, >= 0.
        no_decay: patterns of the names of parameters that are not decayed.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> Adagrad(0.1).slots
    ('sum_of_squares',)
    """

    lr: float | Schedule = 1e-2
    eps: float = 1e-10
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        as_float(self, "eps", least=0.0, above=True)

    @property
    def formula(self) -> Callable[..., Any]:
        return formulas.adagrad

    @property
    def slots(self) -> tuple[str, ...]:
        return ("sum_of_squares",)

    def scalars(self, step: int, lr: float, scale: float, weight_decay: float) -> tuple[float, ...]:
        return (scale, weight_decay, lr, self.eps)


@dataclass(frozen=True, repr=False)
class RMSProp(Optimizer):
    """Divide each parameter's step by the root of a running mean of its squared gradients.

        g <- scale g + weight_decay w
        v <- rho v + (1 - rho) g^2
        w <- w - lr g / (sqrt(v) + eps)

    Tieleman and Hinton, lecture 6.5 of Neural Networks for Machine Learning, 2012. Deviation: eps,
    which the lecture leaves out, is added outside the root as in PyTorch (whose alpha is rho).

    Args:
        lr: learning rate >= 0, or a schedule.
        rho: weight of the past, in [0, 1).
        eps: > 0.
        weight_decay: factor of the L2 penalty, >= 0.
        no_decay: patterns of the names of parameters that are not decayed.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> RMSProp(0.01, rho=0.99).slots
    ('mean_square',)
    """

    lr: float | Schedule = 1e-3
    rho: float = 0.9
    eps: float = 1e-8
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        as_float(self, "rho", least=0.0, below=1.0)
        as_float(self, "eps", least=0.0, above=True)

    @property
    def formula(self) -> Callable[..., Any]:
        return formulas.rmsprop

    @property
    def slots(self) -> tuple[str, ...]:
        return ("mean_square",)

    def scalars(self, step: int, lr: float, scale: float, weight_decay: float) -> tuple[float, ...]:
        return (scale, weight_decay, lr, self.rho, 1.0 - self.rho, self.eps)


@dataclass(frozen=True, repr=False)
class Adam(Optimizer):
    """Step along the running mean of the gradient over the root of its running mean square.

        g <- scale g + weight_decay w
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        w <- w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps),  t = step + 1

    Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, algorithm 1. No deviation but
    in rounding: the bias corrections are folded into two scalars, computed in float64. The weight
    decay is an L2 penalty, as in PyTorch; for the decoupled one see AdamW.

    Args:
        lr: learning rate >= 0, or a schedule.
        beta1: weight of the past in the mean, in [0, 1).
        beta2: weight of the past in the mean square, in [0, 1).
        eps: > 0.
        weight_decay: factor of the L2 penalty, >= 0.
        no_decay: patterns of the names of parameters that are not decayed.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> Adam().slots
    ('mean', 'mean_square')
    """

    lr: float | Schedule = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = field(default=(), kw_only=True)

    counts_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        as_float(self, "beta1", least=0.0, below=1.0)
        as_float(self, "beta2", least=0.0, below=1.0)
        as_float(self, "eps", least=0.0, above=True)

    @property
    def formula(self) -> Callable[..., Any]:
        return formulas.adam

    @property
    def slots(self) -> tuple[str, ...]:
        return ("mean", "mean_square")

    def scalars(self, step: int, lr: float, scale: float, weight_decay: float) -> tuple[float, ...]:
        return self._scalars(step, lr, scale, weight_decay, 0.0)

    def _scalars(
        self, step: int, lr: float, scale: float, l2: float, lr_decay: float
    ) -> tuple[float, ...]:
        t = step + 1
        return (
            scale,
            l2,
            lr_decay,
            lr / (1.0 - self.beta1**t),
            self.beta1,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            (1.0 - self.beta2**t) ** -0.5,
            self.eps,
        )


@dataclass(frozen=True, repr=False)
class AdamW(Adam):
    """Adam with decoupled weight decay: it shrinks the parameters, not through the moments.

        w <- w - (Adam's step on scale g  +  lr weight_decay w)

    Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2. Deviation: the
    decay is multiplied by the whole learning rate, as in PyTorch and optax, not only by the
    schedule's part of it.

    Args:
        lr: learning rate >= 0, or a schedule.
        beta1: weight of the past in the mean, in [0, 1).
        beta2: weight of the past in the mean square, in [0, 1).
        eps: > 0.
        weight_decay: the decay's rate per unit of learning rate, >= 0.
        no_decay: patterns of the names of parameters that are not decayed.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> AdamW(1e-3, no_decay=("*bias",)).weight_decay
    0.01
    """

    weight_decay: float = 1e-2

    def scalars(self, step: int, lr: float, scale: float, weight_decay: float) -> tuple[float, ...]:
        return self._scalars(step, lr, scale, 0.0, lr * weight_decay)
