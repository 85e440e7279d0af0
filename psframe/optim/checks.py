"""Argument checks of the optimizers and schedules, and their stable text form."""

from __future__ import annotations

import functools
import math
import numbers
import operator
from typing import Any

__all__ = ["as_float", "as_int", "checked_rate", "describe", "to_float"]


def to_float(value: Any) -> float:
    """Give a number as a float; an integer that is too large for one is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def as_float(
    owner: Any, name: str, *, least: float, below: float = math.inf, above: bool = False
) -> None:
    """Make the field `name` of a frozen dataclass a float, or say what is wrong with it.

    Args:
        owner: the dataclass.
        name: the field.
        least: the smallest number allowed.
        below: allowed are only smaller numbers than this.
        above: `least` itself is not allowed.

    Raises:
        TypeError: it is no real number.
        ValueError: it is not finite or outside the range.
    """
    value, where = getattr(owner, name), type(owner).__name__
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{where}: {name} is {value!r} of type {type(value).__name__}, expected a number"
        )
    number = to_float(value)
    low = number > least if above else number >= least
    if not (low and number < below):
        allowed = f"{'>' if above else '>='} {least:g}"
        if below < math.inf:
            allowed += f" and < {below:g}"
        raise ValueError(
            f"{where}: {name} is {number!r}, expected a finite number {allowed}; "
            f"pass {name}= such a number or leave it out if it has a default"
        )
    object.__setattr__(owner, name, number)


def as_int(owner: Any, name: str, *, least: int) -> None:
    """Make the field `name` of a frozen dataclass an int >= `least`.

    Raises:
        TypeError: it is no integer.
        ValueError: it is smaller.
    """
    value, where = getattr(owner, name), type(owner).__name__
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{where}: {name} is {value!r} of type {type(value).__name__}, expected an integer"
        )
    if operator.index(value) < least:
        raise ValueError(f"{where}: {name} is {value!r}, expected an integer >= {least}")
    object.__setattr__(owner, name, operator.index(value))


def checked_rate(schedule: Any, step: int) -> float:
    """Ask a schedule for the learning rate of update number `step`.

    Raises:
        TypeError: it gave no number.
        ValueError: it gave one that is not finite or below 0.
    """
    rate = schedule(step)
    if type(rate) is not float:
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
            raise TypeError(
                f"lr: {describe(schedule)} gave {rate!r} for update {step}, "
                "expected a number; return a float"
            )
        rate = to_float(rate)
    if not 0.0 <= rate < math.inf:
        raise ValueError(
            f"lr: {describe(schedule)} gave {rate!r} for update {step}, "
            "expected a finite number >= 0"
        )
    return rate


def describe(value: Any) -> str:
    """Write a value as text that is the same on every rank, so without addresses in memory."""
    if isinstance(value, functools.partial):
        parts = [describe(value.func), *(describe(a) for a in value.args)]
        parts += [f"{name}={describe(v)}" for name, v in sorted(value.keywords.items())]
        return f"partial({', '.join(parts)})"
    code = getattr(value, "__code__", None)
    if code is not None:
        return f"<function {value.__module__}.{value.__qualname__} line {code.co_firstlineno}>"
    text = repr(value)
    if " at 0x" in text:
        kind = type(value)
        return f"<{kind.__module__}.{kind.__qualname__}>"
    return text
