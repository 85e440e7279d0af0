"""The rules that scale a whole gradient, or drop it, by what its header says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from psframe.optim.checks import as_float, as_int
from psframe.optim.clipping import clip_scale
from psframe.stale.rule import Rule, Stale

__all__ = ["Accept", "Clip", "DelayAdaptive", "Drop", "Inverse"]


@dataclass(frozen=True)
class Accept(Rule):
    """Apply every gradient as it is, however stale.

    Use it for few workers of equal speed; it costs nothing.

    >>> Accept()
    Accept()
    """

    def factor(self, push: Stale) -> float | None:
        return 1.0


@dataclass(frozen=True)
class Inverse(Rule):
    """Divide a gradient by its staleness tau.

        1 / max(1, tau)

    Zhang et al., Staleness-aware Async-SGD for Distributed Deep Learning, 2016: there the learning
    rate is divided, which is the same for SGD without momentum.

    Use it where staleness differs much and nothing is to be tuned; as its mean is W - 1, learning
    is some W times slower. It costs nothing.

    >>> Inverse().factor(Stale(worker=1, workers=4, staleness=5, norm=math.nan))
    0.2
    """

    def factor(self, push: Stale) -> float | None:
        return 1.0 / max(1, push.staleness)


@dataclass(frozen=True)
class DelayAdaptive(Rule):
    """Scale a gradient down if its staleness tau is beyond a threshold.

        1 if tau <= threshold, else threshold / tau

    Koloskova, Stich and Jaggi, Sharper Convergence Guarantees for Asynchronous SGD, 2022, and
    Mishchenko et al., Asynchronous SGD Beats Minibatch SGD Under Arbitrary Delays, 2022. Deviation:
    theirs is a learning rate of at most 1 / (4 L tau) with the smoothness L; here the threshold
    takes the place of 1 / (4 L), in units of the learning rate.

    Use it where only a few workers are slow; W - 1, the mean staleness, or twice that are natural
    thresholds. It costs nothing.

    Args:
        threshold: staleness up to which nothing changes, > 0.

    Raises:
        TypeError, ValueError: it is no number, or not finite and > 0.

    >>> DelayAdaptive(4).factor(Stale(worker=1, workers=4, staleness=5, norm=math.nan))
    0.8
    """

    threshold: float

    def __post_init__(self) -> None:
        as_float(self, "threshold", least=0.0, above=True)

    def factor(self, push: Stale) -> float | None:
        return 1.0 if push.staleness <= self.threshold else self.threshold / push.staleness


@dataclass(frozen=True)
class Drop(Rule):
    """Apply a gradient if its staleness tau is below a threshold, else drop it.

    Maranjyan, Tyurin and Richtarik, Ringmaster ASGD: The First Asynchronous SGD with Optimal Time
    Complexity, 2025, without the interruption of workers whose gradient is known to come too late.

    Use it where slow workers' gradients do more harm than good. A threshold below W - 1, the mean
    staleness, drops most of all gradients. It costs nothing.

    Args:
        threshold: the staleness from which on gradients are dropped, >= 1.

    Raises:
        TypeError, ValueError: it is no integer, or smaller.

    >>> print(Drop(5).factor(Stale(worker=1, workers=4, staleness=5, norm=math.nan)))
    None
    """

    threshold: int

    def __post_init__(self) -> None:
        as_int(self, "threshold", least=1)

    def factor(self, push: Stale) -> float | None:
        return 1.0 if push.staleness < self.threshold else None


@dataclass(frozen=True)
class Clip(Rule):
    """Bound a gradient's norm.

        min(1, norm / |g|)

    |g| is the Euclidean norm over all shards; Pascanu, Mikolov and Bengio, On the Difficulty of
    Training Recurrent Neural Networks, 2013. In a chain it is the norm of the gradient as earlier
    rules have scaled it, but never as they have corrected it. A gradient whose norm is too large
    for a number is dropped.

    Use it where some gradients are too long, stale or not. It costs nothing.

    Args:
        norm: the largest norm that is left as it is, > 0.

    Raises:
        TypeError, ValueError: it is no number, or not finite and > 0.

    >>> Clip(2.0).factor(Stale(worker=1, workers=4, staleness=0, norm=8.0))
    0.25
    """

    norm: float

    needs_norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        as_float(self, "norm", least=0.0, above=True)

    def factor(self, push: Stale) -> float | None:
        return clip_scale(push.norm, self.norm) if math.isfinite(push.norm) else None
