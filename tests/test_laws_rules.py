"""Laws of the rules against staleness, checked through `psframe.simulate`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from laws import check_sum_of_staleness, constant, descend, simulate

import psframe
from psframe import SimResult, Worker, stale
from psframe.layout import Array, Layout

# ---- dropping: Ringmaster's bound -------------------------------------------------------------

# Seconds a gradient of worker i = 1, 2, ... takes.
SLOWNESS = {
    "sqrt": lambda i: math.sqrt(i),
    "linear": lambda i: float(i),
    "square": lambda i: float(i * i),
    "alike": lambda i: 1.0,
}


def check_ringmaster(kind: str, workers: int, threshold: int, updates: int) -> None:
    """Any R consecutive updates take at most 2 min_m (1/m sum_{i<=m} 1/tau_i)^-1 (1 + R/m).

    Maranjyan, Tyurin and Richtarik, 2025, lemma 4.1. A dropped gradient's worker must begin anew at
    once with the present parameters, which the proof counts on.
    """
    taus = np.array([SLOWNESS[kind](i) for i in range(1, workers + 1)])
    result = simulate(
        workers=workers,
        stale=stale.Drop(threshold),
        max_updates=updates,
        time=lambda rng, worker, clock: taus[worker],
    )
    trace = result.trace
    times = np.concatenate([[0.0], trace["time_s"][trace["applied"]]])
    assert len(times) == updates + 1
    m = np.arange(1, workers + 1)
    bound_s = 2 * ((m + threshold) / np.cumsum(1 / taus)).min()
    # Hard, but for the rounding of sums of times.
    assert (times[threshold:] - times[:-threshold]).max() <= bound_s * (1 + 1e-12)
    check_drops(result, threshold, taus)


def check_drops(result: SimResult, threshold: int, taus: np.ndarray) -> None:
    trace = result.trace
    assert (trace["applied"] == (trace["staleness"] < threshold)).all()
    assert result.ledger.dropped == (~trace["applied"]).sum()
    # By worker: the next gradient is of the version after the push, applied or dropped, and comes
    # one compute time later.
    mine = trace[np.argsort(trace["worker"], kind="stable")]
    follows = mine["worker"][1:] == mine["worker"][:-1]
    now, then = mine[:-1][follows], mine[1:][follows]
    assert (then["version_read"] == now["version_applied"]).all()
    np.testing.assert_allclose(then["time_s"], now["time_s"] + taus[now["worker"]], rtol=1e-12)
    check_sum_of_staleness(result, len(taus))


@pytest.mark.parametrize("kind", SLOWNESS)
@pytest.mark.parametrize("threshold", [4, 32])
def test_dropping_what_is_stale_keeps_ringmasters_bound(kind: str, threshold: int) -> None:
    check_ringmaster(kind, 100, threshold, 10 * threshold)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOWNESS)
@pytest.mark.parametrize("threshold", [4, 32, 256])
@pytest.mark.parametrize("workers", [100, 300, 1000])
def test_dropping_keeps_ringmasters_bound(kind: str, threshold: int, workers: int) -> None:
    check_ringmaster(kind, workers, threshold, 40 * threshold)


def test_the_bound_does_not_hold_for_who_waits() -> None:
    """The negative control: BSP waits for workers of i^2 seconds, Ringmaster's bound does not."""
    bound_s = 2 * min((m + 4) / sum(1 / i**2 for i in range(1, m + 1)) for m in range(1, 101))
    result = simulate(
        workers=100,
        mode=psframe.BSP(),
        max_updates=4,
        time=lambda rng, worker, clock: float((worker + 1) ** 2),
    )
    assert result.time_s == 4 * 100**2 > bound_s


# ---- scaling: with a constant delay a factor is a smaller learning rate --------------------------


def bound(delay: int, rule: stale.Rule, accuracy: float) -> float:
    """The largest stable rate of descent on w^2 / 2 with a constant delay, by bisection."""

    def grows(lr: float) -> bool:
        # On the verge, a period is 4 delay + 2 updates. What comes before all workers have the
        # same delay decides nothing.
        period = 4 * delay + 2
        late, n = 60 * period, 4 * period
        path = descend(delay + 1, lr, late + n, time=constant, stale=rule)
        if len(path) <= late + n:
            return True
        return abs(path[late:]).sum() > abs(path[20 * period :][: n + 1]).sum()

    stable, unstable = 0.0, 4.0
    while unstable - stable > accuracy:
        lr = (stable + unstable) / 2
        stable, unstable = (stable, lr) if grows(lr) else (lr, unstable)
    return stable


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        (stale.Accept(), 1.0),
        (stale.Inverse(), 1 / 5),
        (stale.DelayAdaptive(2.5), 1 / 2),
        (stale.DelayAdaptive(5), 1.0),
        (stale.chain(stale.Inverse(), stale.DelayAdaptive(1)), 1 / 25),
    ],
    ids=str,
)
def test_scaling_by_the_delay_allows_for_a_larger_rate(rule: stale.Rule, factor: float) -> None:
    """Delay 5: rate times factor < 2 sin(pi / (2 (2 delay + 1)))."""
    predicted = 2 * math.sin(math.pi / 22) / factor
    if predicted > 4:
        assert bound(5, rule, 1.0) == 3.0  # as far as the bisection goes
    else:
        assert bound(5, rule, 1e-3) == pytest.approx(predicted, abs=2e-3)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_gap_aware_divides_by_the_number_of_workers_where_all_gradients_are_one(
    workers: int,
) -> None:
    """On a slope, a step is lr / (1 + gap / C), with C the mean step and gap = (M - 1) steps.

    So it comes to lr / M, once the running mean, of weight 0.999, has forgotten the first steps:
    they were longer by less than lr, which 0.999^12000 < 1e-5 leaves next to nothing of.
    """
    path: list[float] = []

    def work(worker: Worker) -> None:
        x = worker.pull()["w"]
        while True:
            path.append(float(x[0]))
            x = worker.push_pull({"w": np.ones(1)})["w"]

    simulate(
        work,
        params={"w": np.zeros(1)},
        workers=workers,
        lr=1.0,
        stale=stale.GapAware(),
        max_updates=12_000,
        time=constant,
    )
    steps = -np.diff(path[-1_000:])
    assert steps.mean() == pytest.approx(1 / workers, rel=1e-3)


def test_clipping_bounds_every_step() -> None:
    """The slope of |w| beyond 1: each step is lr, whatever the gradient."""
    path = descend(4, 0.01, 50, time=constant, stale=stale.Clip(0.25))
    np.testing.assert_allclose(np.diff(path), -0.01 * 0.25, rtol=1e-9)


# ---- correcting: delay compensation -------------------------------------------------------------


class _ExactCorrection:
    def __init__(self, diagonal: Array) -> None:
        self._diagonal = diagonal

    def correct(self, worker: int, grad: Array, params: Array, read: Array, out: Array) -> Array:
        out[:] = grad + self._diagonal * (params - read)
        return out

    def applied(self, before: Array, after: Array) -> None:
        pass

    def rejected(self) -> None:
        raise AssertionError("all updates are finite")


@dataclass(frozen=True)
class Exact(stale.Rule):
    """Delay compensation with the Hessian of a quadratic, diag(linspace(least, most))."""

    least: float
    most: float

    needs_read: ClassVar[bool] = True

    def factor(self, push: stale.Stale) -> float | None:
        return 1.0

    def diagonal(self, size: int) -> Array:
        return np.linspace(self.least, self.most, size)

    def correction(self, layout: Layout, begin: int, end: int, workers: int) -> _ExactCorrection:
        return _ExactCorrection(self.diagonal(layout.size)[begin:end])


def noisy_descent(rule: Exact | None, servers: int = 1) -> tuple[SimResult, Array]:
    """A run of 8 workers on a noisy quadratic, and sequential SGD with the same noise in order."""
    size, lr = 40, 0.1
    hessian = Exact(0.05, 1.5).diagonal(size)

    def noise(worker: int, clock: int) -> Array:
        return np.random.default_rng((worker, clock)).standard_normal(size)

    def work(worker: Worker) -> None:
        x, clock = worker.pull()["w"], 0
        while True:
            x = worker.push_pull({"w": hessian * x + noise(worker.index, clock)})["w"]
            clock += 1

    start = {"w": np.full(size, 3.0)}
    result = simulate(
        work, params=start, workers=8, servers=servers, lr=lr, stale=rule, max_updates=500
    )
    x = start["w"]
    for row in result.trace:
        x = x - lr * (hessian * x + noise(row["worker"], row["clock"]))
    assert result.version == len(result.trace) == 500
    return result, x


@pytest.mark.parametrize("servers", [1, 3])
def test_compensation_with_the_exact_hessian_is_sequential_sgd(servers: int) -> None:
    result, sequential = noisy_descent(Exact(0.05, 1.5), servers)
    assert result.trace["staleness"].mean() > 6.5
    assert result.params is not None
    np.testing.assert_allclose(result.params["w"], sequential, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [None, Exact(0.05, 1.4)], ids=str)
def test_with_another_hessian_or_none_it_is_not(rule: Exact | None) -> None:
    result, sequential = noisy_descent(rule)
    assert result.params is not None
    assert abs(result.params["w"] - sequential).max() > 1e-3


def error_of_the_path(lr: float, rule: stale.Rule, updates: int = 24) -> float:
    """How far 4 workers end from sequential descent on -log x from 1, of which x increases."""

    def work(worker: Worker) -> None:
        x = worker.pull()["w"]
        while True:
            x = worker.push_pull({"w": -1 / x})["w"]

    result = simulate(work, workers=4, lr=lr, stale=rule, max_updates=updates, time=constant)
    x = 1.0
    for _ in range(updates):
        x = x + lr / x
    assert result.params is not None
    return abs(float(result.params["w"][0]) - x)


@pytest.mark.parametrize(
    ("rule", "order"),
    [(stale.Accept(), 2), (stale.DelayCompensation(1.0, adaptive=False), 3)],
    ids=str,
)
def test_delay_compensation_is_right_to_first_order(rule: stale.Rule, order: int) -> None:
    """Of -log x the squared gradient is the second derivative: lambda = 1 is Taylor's.

    So many steps of length lr differ from sequential ones by lr^2; with the compensation by lr^3.
    """
    errors = [error_of_the_path(lr, rule) for lr in (1e-3, 5e-4)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)
