"""What a rule against staleness is: the protocol between it and the servers."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from psframe.layout import Array, Layout
from psframe.optim.checks import to_float

__all__ = ["Correction", "Rule", "Stale", "as_rule", "checked_factor"]


@dataclass(frozen=True, slots=True)
class Stale:
    """What server 0 knows of a push from its header.

    Attributes:
        worker: whose it is.
        workers: W.
        staleness: updates that have been applied since the parameters which it was computed on.
        norm: Euclidean norm of the whole gradient, as pushed; NaN unless the rule needs it.
    """

    worker: int
    workers: int
    staleness: int
    norm: float


class Correction(Protocol):
    """The state of a rule's correction for one shard.

    Arrays are flat, contiguous, of the shard, on the host, and of the parameters' dtype. A call of
    `correct` is followed by one of `applied` or `rejected`, or, if the update was abandoned, by the
    next `correct`: then it must be as if it had been rejected.
    """

    def correct(self, worker: int, grad: Array, params: Array, read: Array, out: Array) -> Array:
        """Give the gradient to be applied in place of one.

        Args:
            worker: whose gradient it is.
            grad: as pushed; only read.
            params: the present parameters, to which it is going to be applied; only read.
            read: the parameters that it was computed on, if the rule `needs_read`; only read. It
                may be `params`.
            out: overlaps none of the others.

        Returns:
            `grad` itself, or `out`, all of it written.
        """

    def applied(self, before: Array, after: Array) -> None:
        """Take note that the update with the last corrected gradient has been published.

        Args:
            before, after: the parameters; only read. They are the same ones where the gradient has
                only been taken into a batch.
        """

    def rejected(self) -> None:
        """Go back to the state before `correct`: that update was not finite."""


@dataclass(frozen=True)
class Rule(ABC):
    """What becomes of a stale gradient; see `psframe.stale` for how to write one.

    Attributes:
        needs_norm: whether `factor` is given the gradient's norm.
        needs_read: whether `correct` is given the parameters that the worker had read, which have
            to be kept for that.
    """

    needs_norm: ClassVar[bool] = False
    needs_read: ClassVar[bool] = False

    @abstractmethod
    def factor(self, push: Stale) -> float | None:
        """Give the factor >= 0 on the (corrected) gradient, in all shards; None drops it."""

    def correction(self, layout: Layout, begin: int, end: int, workers: int) -> Correction | None:
        """Make the state for the shard [begin, end); None if gradients stay as they are."""
        return None


def as_rule(value: Any) -> Rule:
    """Give a rule back.

    Raises:
        TypeError: it is none, or its text would differ from rank to rank.
    """
    if isinstance(value, type) and issubclass(value, Rule):
        raise TypeError(
            f"stale: got the class {value.__name__}, expected a rule; write {value.__name__}(...)"
        )
    if not isinstance(value, Rule):
        raise TypeError(
            f"stale: got {value!r} of type {type(value).__name__}, expected a rule of"
            " psframe.stale, such as psframe.stale.Inverse()"
        )
    if " at 0x" in repr(value):
        raise TypeError(
            f"stale: the text of {value!r} differs from rank to rank, which compare it; make"
            f" {type(value).__name__} a frozen dataclass of numbers"
        )
    return value


def checked_factor(rule: Rule, push: Stale) -> float | None:
    """Ask a rule for its factor.

    Returns:
        A finite number >= 0, or None if the gradient is to be dropped.

    Raises:
        RuntimeError: it gave something else.
    """
    factor: Any = rule.factor(push)  # whatever a user's rule gives
    if factor is None:
        return None
    if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
        got = f"{factor!r} of type {type(factor).__name__}"
    elif 0.0 <= (number := to_float(factor)) < math.inf:
        return number
    else:
        got = repr(number)
    raise RuntimeError(
        f"stale: {rule!r} gave the factor {got} for {push}, expected a finite number >= 0, or None"
        " to drop the gradient"
    )
