"""Laws of the modes that gather pushes or change their pace, checked through `psframe.simulate`."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from laws import check_sum_of_staleness, constant, exponential, simulate

from psframe import (
    BSP,
    SSP,
    Async,
    Buffered,
    DynamicSSP,
    Rennala,
    Ringleader,
    SimResult,
    WarmStart,
    Worker,
)

# ---- what several pushes make -----------------------------------------------------------------


@pytest.mark.parametrize(("workers", "batch"), [(8, 1), (8, 3), (8, 8), (3, 10)])
def test_buffered_ticks_once_in_a_batch(workers: int, batch: int) -> None:
    """Staleness counts updates: (M - 1) / B in the mean."""
    result = simulate(workers=workers, mode=Buffered(batch), max_updates=2_000)
    trace = result.trace
    assert trace["applied"].all()
    assert (trace["version_applied"] == np.arange(1, len(trace) + 1) // batch).all()
    assert result.ledger.applied == len(trace) == 2_000 * batch
    check_sum_of_staleness(result, workers)


def test_buffered_by_one_is_async() -> None:
    def result(mode: Any) -> SimResult:
        return simulate(workers=5, mode=mode, max_updates=500)

    assert result(Buffered(1)).trace.tobytes() == result(Async()).trace.tobytes()


@functools.cache
def pushes_an_update(workers: int, batch: int) -> tuple[float, float]:
    """Mean and variance of the pushes that a Rennala update takes, the next being anybody's.

    With k workers on the present parameters and c of their gradients in the batch, the next push is
    one of theirs with probability k / M; else it is dropped, and its worker is on them from then
    on. An update leaves one worker on the present ones: who made it.
    """

    @functools.cache
    def more(k: int, c: int) -> tuple[float, float]:
        """The mean, and the mean of the square, of the pushes that are still to come."""
        if c == batch:
            return 0.0, 0.0
        p = k / workers
        same, other = more(k, c + 1), more(k + 1, c) if k < workers else (0.0, 0.0)
        mean, square = (p * same[i] + (1.0 - p) * other[i] for i in (0, 1))
        return 1.0 + mean, 1.0 + 2.0 * mean + square

    mean, square = more(1, 0)
    return mean, square - mean**2


def check_rennala(workers: int, batch: int, updates: int) -> None:
    result = simulate(workers=workers, mode=Rennala(batch), max_updates=updates)
    trace = result.trace
    applied = trace["applied"]
    assert (applied == (trace["staleness"] == 0)).all()
    assert applied.sum() == result.ledger.applied == batch * updates
    assert result.ledger.dropped == (~applied).sum()
    # A version changes with the B-th current gradient, and never else.
    assert (trace["version_applied"] == applied.cumsum() // batch).all()
    check_sum_of_staleness(result, workers)
    # Updates are independent of each other; from push to push it is 1 / M, exponential.
    mean, variance = pushes_an_update(workers, batch)
    error = 4 * math.sqrt(variance / updates)
    assert len(trace) / updates == pytest.approx(mean, abs=error + 1e-12)
    error = 4 * math.sqrt((variance + mean) / updates) / workers
    assert result.time_s / updates == pytest.approx(mean / workers, abs=error)


RENNALA = pytest.mark.parametrize(("workers", "batch"), [(1, 4), (8, 1), (8, 4), (8, 16), (32, 8)])


@RENNALA
def test_rennala_drops_what_is_stale(workers: int, batch: int) -> None:
    check_rennala(workers, batch, 500)


@pytest.mark.slow
@RENNALA
def test_rennala_drops_what_is_stale_over_many_updates(workers: int, batch: int) -> None:
    check_rennala(workers, batch, 10_000)


# ---- workers with data of their own -----------------------------------------------------------

# Worker i holds f_i(x) = a_i (x - b_i)^2 / 2, and makes a step in c_i seconds.
A, B, C = np.array([1.0, 2.0, 0.5, 1.5]), np.array([-3.0, 1.0, 4.0, 2.0]), np.array([1, 2, 5, 9.5])
MINIMUM = (A * B).sum() / A.sum()
# Where each worker's gradients count as often as they come.
WEIGHTED = (A * B / C).sum() / (A / C).sum()


def settle(mode: Any, lr: float, time_s: float) -> np.ndarray:
    """The values that the workers pull in the last quarter of the time."""
    seen: list[float] = []

    def work(worker: Worker) -> None:
        x = worker.pull()["w"]
        while True:
            x = worker.push_pull({"w": A[worker.index] * (x - B[worker.index])})["w"]
            if worker.now() > 0.75 * time_s:
                seen.append(float(x[0]))
            if worker.now() >= time_s:
                worker.stop()  # before any of them leaves: who stays would count alone

    simulate(work, workers=4, mode=mode, lr=lr, time=lambda rng, worker, clock: float(C[worker]))
    return np.array(seen)


@pytest.mark.parametrize(("mode", "lr"), [(Ringleader(), 0.05), (BSP(), 0.2)], ids=str)
def test_all_data_counts_alike(mode: Any, lr: float) -> None:
    """Ringleader rests where the mean of all gradients is 0; nothing is left of the speeds."""
    assert abs(settle(mode, lr, 2_000.0) - MINIMUM).max() < 1e-10


@pytest.mark.parametrize("mode", [Async(), Buffered(4), SSP(100_000)], ids=str)
def test_async_weighs_data_by_the_speed_of_who_holds_it(mode: Any) -> None:
    """The negative control: its mean is at the weighted minimum, which is far from the other.

    A period of all workers is 190 s. The error of the mean, and how far x goes about it, are of the
    order of the step.
    """
    seen = settle(mode, 0.004, 6_000.0)
    assert abs(WEIGHTED - MINIMUM) > 1
    assert seen.mean() == pytest.approx(WEIGHTED, abs=0.03)


def test_ringleader_waits_for_all_and_then_for_none() -> None:
    result = simulate(
        workers=4,
        mode=Ringleader(),
        max_updates=100,
        time=lambda rng, worker, clock: float(C[worker]),
    )
    trace = result.trace
    before = trace["version_applied"] == 0
    assert trace["time_s"][~before][0] == C.max()
    assert set(trace["worker"][before]) == {0, 1, 2}
    assert (np.diff(trace["version_applied"][~before]) == 1).all()
    assert trace["applied"].all()


# ---- paces that change ------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0, 1, 5])
def test_dynamic_ssp_with_one_bound_is_ssp(s: int) -> None:
    def result(mode: Any) -> SimResult:
        return simulate(workers=5, mode=mode, max_updates=2_000)

    assert result(DynamicSSP(s, s)).trace.tobytes() == result(SSP(s)).trace.tobytes()


def test_dynamic_ssp_runs_at_the_pace_of_a_persistent_straggler() -> None:
    result = simulate(
        workers=4,
        mode=DynamicSSP(1, 6),
        max_updates=4_000,
        time=lambda rng, worker, clock: 4.0 if worker == 2 else 1.0,
    )
    clocks = np.bincount(result.trace["worker"])
    # The others may be 7 steps ahead, and what is under way at the end is not counted.
    assert abs(clocks / result.time_s - 0.25).max() <= 8 / result.time_s
    assert 2 <= clocks.max() - clocks.min() <= 7


def test_ssp_s_smaller_staleness_allows_for_no_larger_rate() -> None:
    """16 workers, exponential times, w^2 / 2, rate 0.4: async shrinks, and SSP grows.

    Who waits has nothing in flight; so SSP's mean staleness is below W - 1.
    """

    def work(worker: Worker) -> None:
        w = worker.pull()["w"]
        while True:
            w = worker.push_pull({"w": w})["w"]

    def result(mode: Any, seed: int) -> SimResult:
        return simulate(work, workers=16, mode=mode, lr=0.4, max_updates=1_500, seed=seed)

    for seed in range(3):
        free, bounded = result(Async(), seed), result(SSP(3), seed)
        assert free.params is not None
        assert bounded.params is not None
        assert abs(free.params["w"][0]) < 0.1
        assert abs(bounded.params["w"][0]) > 2
        assert bounded.trace["staleness"].mean() < 12 < free.trace["staleness"].mean()


@pytest.mark.parametrize("then", [Async(), SSP(2)], ids=str)
def test_a_warm_start_is_bsp_and_then_the_other(then: Any) -> None:
    rounds, workers = 50, 6
    warm = simulate(workers=workers, mode=WarmStart(rounds, then), max_updates=rounds + 600).trace
    bsp = simulate(workers=workers, mode=BSP(), max_updates=rounds).trace
    n = rounds * workers
    assert warm[:n].tobytes() == bsp.tobytes()
    rest = warm[n:]
    assert (rest["version_applied"] == rounds + 1 + np.arange(600)).all()
    # All begin the rest at once, with the same parameters.
    firsts = [rest["version_read"][rest["worker"] == w][0] for w in range(workers)]
    assert firsts == [rounds] * workers


def test_all_paces_are_one_where_workers_are_alike() -> None:
    """Constant equal times: nobody ever waits, whatever the bound."""
    ends = {
        simulate(workers=4, mode=mode, max_updates=400, time=constant).time_s
        for mode in (Async(), SSP(0), SSP(3), DynamicSSP(0, 4), Buffered(1))
    }
    assert ends == {100.0}
    assert simulate(workers=4, mode=BSP(), max_updates=100, time=constant).time_s == 100.0


def test_exponential_times_have_the_mean_that_is_said() -> None:
    """The check of the checks: all tolerances here count on it."""
    result = simulate(workers=1, max_updates=10_000, time=exponential)
    assert result.time_s == pytest.approx(10_000, rel=4 / math.sqrt(10_000))
