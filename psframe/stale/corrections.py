"""The rules that correct a gradient by how far the parameters have moved since it was computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from psframe.layout import Array, Layout
from psframe.optim.checks import as_float
from psframe.stale.kernels import compile_adaptive, compile_distance, compile_fixed
from psframe.stale.on_device import DeviceAdaptive, DeviceFixed, DeviceGap
from psframe.stale.rule import Correction, Rule, Stale

__all__ = ["DelayCompensation", "GapAware"]

_EPS = 1e-7  # Zheng et al.'s
_GAP_DECAY = 0.999  # see GapAware


@dataclass(frozen=True)
class DelayCompensation(Rule):
    """Correct a gradient to first order for the way that the parameters have gone since.

        g + lambda g g (x - x_read)                     (element by element)
        adaptive:  lambda = lam / sqrt(MS + 1e-7),  MS <- decay MS + (1 - decay) g g
        otherwise: lambda = lam

    x are the present parameters, x_read those that the worker had read, and MS is kept for each
    worker, from 0 and without bias correction. Zheng et al., Asynchronous Stochastic Gradient
    Descent with Delay Compensation, 2017: g g stands for the Hessian's diagonal. MS takes this
    gradient in before it is used, as in the authors' own code. Deviation: none known.

    Use it where all gradients are about equally stale, so that scaling them would only slow
    learning down, and the step is small enough that first order says something. What g g stands
    for is a likelihood's Hessian; of another loss it need not be near.

    Memory: P elements for the corrected gradient, and what the workers have read, two snapshots
    each at most; if adaptive P for each worker that has pushed and P more.

    Args:
        lam: lambda_0, or lambda if not adaptive, >= 0. The paper's are 2 (adaptive) and 0.04.
        adaptive: whether it is divided by the root of the running mean square.
        decay: weight of the past in that, in [0, 1); only there has it a meaning.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.

    >>> DelayCompensation(2.0)
    DelayCompensation(lam=2.0, adaptive=True, decay=0.95)
    """

    lam: float
    adaptive: bool = True
    decay: float = 0.95

    needs_read: ClassVar[bool] = True

    def __post_init__(self) -> None:
        as_float(self, "lam", least=0.0)
        as_float(self, "decay", least=0.0, below=1.0)
        if not isinstance(self.adaptive, bool):
            raise TypeError(
                f"DelayCompensation: adaptive is {self.adaptive!r}, expected True or False"
            )

    def factor(self, push: Stale) -> float | None:
        return 1.0

    def correction(self, layout: Layout, begin: int, end: int, workers: int) -> Correction:
        """Make the state for the shard [begin, end).

        Raises:
            ValueError: it is not in the flat vector.
        """
        _check_shard(layout, begin, end)
        return _Adaptive(self, layout, end - begin) if self.adaptive else _Fixed(self, layout)


@dataclass(frozen=True)
class GapAware(Rule):
    """Scale a gradient down by how far the parameters have moved since, counted in steps.

        g / (1 + gap / C),  gap = |x - x_read| / sqrt(P)

    C is the running mean of the steps' root mean square |x_after - x_before| / sqrt(P). Barkai,
    Hakimi and Schuster, Gap-Aware Mitigation of Gradient Staleness, 2020. Deviations: gap and C are
    of the whole shard, of P elements, where theirs may be each element's; so the number of servers
    changes the result. And C is an exponential mean with weight 0.999 of the past, as if it had
    begun with the first step (bias-corrected); before that there is no gap.

    Use it where staleness itself says little of how wrong a gradient is: where steps are of very
    different lengths, such as with learning rates that change.

    Memory: P elements for the scaled gradient, and what the workers have read, two snapshots each
    at most.

    >>> GapAware()
    GapAware()
    """

    needs_read: ClassVar[bool] = True

    def factor(self, push: Stale) -> float | None:
        return 1.0

    def correction(self, layout: Layout, begin: int, end: int, workers: int) -> Correction:
        """Make the state for the shard [begin, end).

        Raises:
            ValueError: it is not in the flat vector.
        """
        _check_shard(layout, begin, end)
        return _Gap(layout, end - begin)


def _check_shard(layout: Layout, begin: int, end: int) -> None:
    if not 0 <= begin <= end <= layout.size:
        raise ValueError(
            f"stale: got the shard [{begin}, {end}), expected it within [0, {layout.size})"
        )


def _scalars(layout: Layout, *values: float) -> Array:
    with np.errstate(over="ignore"):  # what overflows here makes updates refused
        return np.array(values, np.float64).astype(layout.dtype)


class _Fixed:
    """Delay compensation with one lambda: no state."""

    def __init__(self, rule: DelayCompensation, layout: Layout) -> None:
        self._loop = compile_fixed(layout.dtype)
        self._scalars = _scalars(layout, rule.lam)

    def on_device(self) -> DeviceFixed:
        return DeviceFixed(float(self._scalars[0]))

    def correct(self, worker: int, grad: Array, params: Array, read: Array, out: Array) -> Array:
        assert len(grad) == len(params) == len(read) == len(out), "arrays of different shards"
        self._loop(grad, params, read, out, self._scalars)
        return out

    def applied(self, before: Array, after: Array) -> None:
        pass  # no state

    def rejected(self) -> None:
        pass


class _Adaptive:
    """Delay compensation with a running mean square for each worker.

    `correct` reads a worker's and writes a spare array; `applied` makes them change places.
    """

    def __init__(self, rule: DelayCompensation, layout: Layout, size: int) -> None:
        self._loop = compile_adaptive(layout.dtype)
        self._scalars = _scalars(layout, rule.lam, rule.decay, 1.0 - rule.decay, _EPS)
        self._size, self._dtype = size, layout.dtype
        self._of: dict[int, Array] = {}
        self._blank: Array | None = None  # zeros, for a worker that has none
        self._old = self._spare = np.empty(size, layout.dtype)  # what `correct` reads and writes
        self._written: int | None = None  # the worker whose next one the spare is

    def on_device(self) -> DeviceAdaptive:
        return DeviceAdaptive(tuple(self._scalars.tolist()), self._size, self._dtype)

    def correct(self, worker: int, grad: Array, params: Array, read: Array, out: Array) -> Array:
        assert len(grad) == len(params) == len(read) == len(out) == self._size, "another shard"
        old = self._of.get(worker)
        if old is None:
            if self._blank is None:
                self._blank = np.zeros(self._size, self._dtype)
            old = self._blank
        self._loop(grad, params, read, out, self._scalars, old, self._spare)
        self._written, self._old = worker, old
        return out

    def applied(self, before: Array, after: Array) -> None:
        worker = self._written
        assert worker is not None, "nothing has been corrected"
        if self._old is self._blank:
            self._blank = None
        self._of[worker], self._spare, self._written = self._spare, self._old, None

    def rejected(self) -> None:
        self._written = None


class _Gap:
    """Gap-aware scaling, with the running mean of the steps."""

    def __init__(self, layout: Layout, size: int) -> None:
        self._distance = compile_distance(layout.dtype)
        self._size, self._dtype = size, layout.dtype
        # The mean is their quotient: both are as if there had been steps of 0 before the first.
        self._sum, self._weight = 0.0, 0.0

    def on_device(self) -> DeviceGap:
        return DeviceGap(_GAP_DECAY, self._size)

    def correct(self, worker: int, grad: Array, params: Array, read: Array, out: Array) -> Array:
        assert len(grad) == len(out) == self._size, "another shard"
        gap = 0.0 if read is params else self._between(params, read)
        if not gap or not self._sum:
            return grad  # not stale, or nothing that it could be compared to
        factor = 1.0 / (1.0 + gap * self._weight / self._sum)
        np.multiply(grad, self._dtype.type(factor), out=out)
        return out

    def applied(self, before: Array, after: Array) -> None:
        step = self._between(after, before)
        if not step:
            return  # taken into a batch that makes its step later
        self._sum = _GAP_DECAY * self._sum + (1.0 - _GAP_DECAY) * step
        self._weight = _GAP_DECAY * self._weight + (1.0 - _GAP_DECAY)

    def rejected(self) -> None:
        pass  # only steps that are taken change the state

    def _between(self, a: Array, b: Array) -> float:
        assert len(a) == len(b) == self._size, "another shard"
        return math.sqrt(self._distance(a, b) / self._size) if self._size else 0.0
