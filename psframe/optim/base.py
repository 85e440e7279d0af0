"""What the update rules have in common: learning rate, weight decay, and who makes the state."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from psframe.layout import Layout
from psframe.optim.checks import as_float, checked_rate, describe
from psframe.optim.schedules import Schedule
from psframe.optim.updater import Updater

__all__ = ["Optimizer"]


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

    def averages(self, name: str) -> bool:
        """Tell whether the parameter of that name is an average of what is pushed for it."""
        return False

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
