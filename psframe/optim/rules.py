"""The optimizers: what a user chooses, and the scalars that each gives to its formula."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from psframe.layout import Layout
from psframe.optim import formulas
from psframe.optim.checks import as_float, checked_rate, describe
from psframe.optim.schedules import Schedule
from psframe.optim.updater import Updater

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Optimizer", "RMSProp"]


class Optimizer(ABC):
    """What all update rules have in common: the learning rate and the weight decay.

    A rule is a frozen dataclass without state; `updater` makes what has state.
    """

    lr: float | Schedule
    weight_decay: float
    no_decay: tuple[str, ...]

    counts_steps: ClassVar[bool] = False  # do the scalars depend on the number of the update?

    @property
    @abstractmethod
    def formula(self) -> Callable[..., Any]:
        """The function of `formulas` that this rule applies."""

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """The names of the arrays that it keeps beside the parameters."""

    @abstractmethod
    def scalars(self, step: int, lr: float, scale: float, weight_decay: float) -> tuple[float, ...]:
        """Compute what the formula takes after the slots, in float64."""

    @property
    def scalar_count(self) -> int:
        """How many scalars the formula takes."""
        return self.formula.__code__.co_argcount - 2 - len(self.slots)

    def learning_rate(self, step: int) -> float:
        """Give the learning rate of update number `step`, 0 for the first."""
        lr = self.lr
        return lr if isinstance(lr, float) else checked_rate(lr, step)

    def updater(self, layout: Layout, begin: int, end: int) -> Updater:
        """Make the state for the shard [begin, end) of the flat vector.

        Raises:
            ValueError: the shard is not in the vector, or `eps` is 0 in its dtype.
        """
        return Updater(self, layout, begin, end)

    def check_dtype(self, dtype: np.dtype[Any]) -> None:
        """Raise ValueError if `eps` is too small for the parameters' dtype."""
        eps = getattr(self, "eps", None)
        if eps is not None and dtype.type(eps) == 0:
            raise ValueError(
                f"{type(self).__name__}: eps is {eps!r}, which is 0 in {dtype}, so that a gradient "
                "of 0 would give NaN; choose a larger one, such as 1e-8"
            )

    def __post_init__(self) -> None:
        if not callable(self.lr):
            as_float(self, "lr", least=0.0)
        as_float(self, "weight_decay", least=0.0)
        patterns: Any = self.no_decay
        where = type(self).__name__
        if isinstance(patterns, str) or not isinstance(patterns, tuple | list):
            raise TypeError(
                f"{where}: no_decay is {patterns!r}, expected a tuple of patterns of names, "
                "such as ('*bias',)"
            )
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(
                f"{where}: no_decay is {patterns!r}, expected patterns that are strings"
            )
        object.__setattr__(self, "no_decay", tuple(patterns))

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every rule is a dataclass
        inner = ", ".join(f"{f.name}={describe(getattr(self, f.name))}" for f in fields)
        return f"{type(self).__name__}({inner})"


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
