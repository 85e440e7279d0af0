"""Learning rates that change with the number of updates.

A schedule is a frozen dataclass that maps the number of an update, 0 for the first, to a learning
rate. It is equal, and prints equally, wherever it was made with equal arguments, so that the ranks
of a run can compare theirs. Any other function of an int serves as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from psframe.optim.checks import as_float, as_int, describe

__all__ = ["Composed", "Constant", "Cosine", "LinearWarmup", "Schedule", "Step"]

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """Keep the learning rate at `value`.

    Args:
        value: >= 0.

    Raises:
        TypeError, ValueError: `value` is no finite number >= 0.

    >>> Constant(0.1)(1000)
    0.1
    """

    value: float

    def __post_init__(self) -> None:
        as_float(self, "value", least=0.0)

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Step:
    """Multiply the learning rate by `factor` after every `every` updates.

        value * factor^floor(step / every)

    Args:
        value: the rate of the first `every` updates, >= 0.
        every: updates between two changes, >= 1.
        factor: in [0, 1].

    Raises:
        TypeError, ValueError: an argument is outside its range.

    >>> [Step(0.5, every=2, factor=0.5)(k) for k in range(5)]
    [0.5, 0.5, 0.25, 0.25, 0.125]
    """

    value: float
    every: int
    factor: float = 0.1

    def __post_init__(self) -> None:
        as_float(self, "value", least=0.0)
        as_int(self, "every", least=1)
        as_float(self, "factor", least=0.0)
        if self.factor > 1.0:
            raise ValueError(
                f"Step: factor is {self.factor!r}, expected a number in [0, 1]; "
                "to raise the rate use LinearWarmup"
            )

    def __call__(self, step: int) -> float:
        return float(self.value * self.factor ** (step // self.every))


@dataclass(frozen=True)
class Cosine:
    """Lower the learning rate from `value` to `end` along half a cosine, then keep it.

        end + (value - end) (1 + cos(pi min(step, steps) / steps)) / 2

    Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5.
    Deviation: no restarts.

    Args:
        value: the rate of the first update, >= 0.
        steps: updates until `end` is reached, >= 1.
        end: >= 0.

    Raises:
        TypeError, ValueError: an argument is outside its range.

    >>> [round(Cosine(1.0, steps=4)(k), 3) for k in (0, 2, 4, 9)]
    [1.0, 0.5, 0.0, 0.0]
    """

    value: float
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        as_float(self, "value", least=0.0)
        as_int(self, "steps", least=1)
        as_float(self, "end", least=0.0)

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        share = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.end + (self.value - self.end) * share


@dataclass(frozen=True)
class LinearWarmup:
    """Raise the learning rate in a straight line from `start` to `value`, then keep it.

        start + (value - start) min(step, steps) / steps

    Goyal et al., Accurate, Large Minibatch SGD, 2017, section 2.2.

    Args:
        value: the rate from update number `steps` on, >= 0.
        steps: updates until then, >= 1.
        start: the rate of the first update, >= 0.

    Raises:
        TypeError, ValueError: an argument is outside its range.

    >>> [LinearWarmup(1.0, steps=4)(k) for k in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    value: float
    steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        as_float(self, "value", least=0.0)
        as_int(self, "steps", least=1)
        as_float(self, "start", least=0.0)

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.value
        return self.start + (self.value - self.start) * step / self.steps


@dataclass(frozen=True)
class Composed:
    """Join schedules end to end; each counts updates from its own beginning.

    Args:
        schedules: at least one; the last has no end.
        boundaries: the numbers of the updates at which the second, third, ... begin; increasing,
            one fewer than the schedules.

    Raises:
        TypeError: `schedules` is no sequence of callables, a boundary no integer.
        ValueError: none, a number of boundaries that does not fit, or not increasing from 1.

    >>> lr = Composed((LinearWarmup(1.0, steps=2), Step(1.0, every=2, factor=0.5)), (2,))
    >>> [lr(k) for k in range(6)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.5]
    """

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("schedules", "boundaries"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list):
                raise TypeError(
                    f"Composed: {name} is a {type(value).__name__}, expected a tuple; "
                    "for one element write (x,)"
                )
            object.__setattr__(self, name, tuple(value))
        for schedule in self.schedules:
            if not callable(schedule):
                raise TypeError(
                    f"Composed: expected schedules, got {schedule!r}; write Constant({schedule!r})"
                )
        for boundary in self.boundaries:
            if isinstance(boundary, bool) or not isinstance(boundary, int):
                raise TypeError(f"Composed: expected boundaries that are ints, got {boundary!r}")
        if len(self.boundaries) != len(self.schedules) - 1:
            raise ValueError(
                f"Composed: got {len(self.schedules)} schedules and {len(self.boundaries)} "
                "boundaries, expected one boundary between two schedules"
            )
        if any(a >= b for a, b in pairwise((0, *self.boundaries))):
            raise ValueError(
                f"Composed: boundaries are {self.boundaries}, expected increasing numbers from 1 on"
            )

    def __call__(self, step: int) -> float:
        begin, current = 0, self.schedules[0]
        for boundary, schedule in zip(self.boundaries, self.schedules[1:], strict=True):
            if step >= boundary:
                begin, current = boundary, schedule
        return current(step - begin)

    def __repr__(self) -> str:
        inner = ", ".join(describe(schedule) for schedule in self.schedules)
        return f"Composed(schedules=({inner},), boundaries={self.boundaries})"
