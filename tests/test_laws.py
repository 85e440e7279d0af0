"""Laws that any correct asynchronous scheduler obeys, checked through `psframe.simulate`.

M workers, one gradient in flight each: a worker pulls again right after its push. None of these
tests knows how the servers work; what they predict follows from queueing and from linear algebra.
Seeds are fixed, so a test passes always or never; tolerances are what the number of samples
allows, and that is computed where the law is a mean.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from laws import check_sum_of_staleness, constant, descend, exponential, simulate

import psframe

# ---- staleness ---------------------------------------------------------------------------

SPEEDS: dict[str, Callable] = {
    "constant with jitter": lambda rng, w, c: 1.0 + 0.1 * rng.random(),
    "exponential": exponential,
    "log-normal": lambda rng, w, c: rng.lognormal(0.0, 1.5),
    "one worker 100x slower": lambda rng, w, c: (100.0 if w == 3 else 1.0) * rng.exponential(),
    "Pareto": lambda rng, w, c: 1.0 + rng.pareto(1.2),
}


def check_mean_staleness(time: Callable, updates: int, workers: int = 8) -> None:
    result = simulate(workers=workers, max_updates=updates, time=time)
    trace = result.trace
    assert len(trace) == result.version == updates
    check_sum_of_staleness(result, workers)
    assert (trace["version_read"] + trace["staleness"] == np.arange(updates)).all()
    assert (result.staleness == np.bincount(trace["staleness"])).all()


@pytest.mark.parametrize("speeds", SPEEDS)
def test_mean_staleness_is_one_less_than_the_workers(speeds):
    check_mean_staleness(SPEEDS[speeds], 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("speeds", SPEEDS)
def test_mean_staleness_over_many_updates(speeds):
    check_mean_staleness(SPEEDS[speeds], 200_000)


# ---- implicit momentum -------------------------------------------------------------------


def fit_heavy_ball(paths: np.ndarray) -> np.ndarray:
    """Fit w[k+1] - w[k] = momentum (w[k] - w[k-1]) - step w[k] to the mean of independent paths.

    Least squares on the mean itself would be biased towards 0 by the noise in its inputs. So the
    products in the normal equations are taken between different paths only.
    """
    steps = np.diff(paths)
    inputs = np.stack([steps[:, :-1], -paths[:, 1:-1]], axis=2)
    output = steps[:, 1:, None]
    everything = inputs.sum(axis=0).T
    square = everything @ inputs.sum(axis=0) - np.einsum("rki,rkj->ij", inputs, inputs)
    right = everything @ output.sum(axis=0) - np.einsum("rki,rkj->ij", inputs, output)
    return np.linalg.solve(square, right)[:, 0]


def estimate_heavy_ball(workers: int, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """The two coefficients fitted to `runs` runs, and their standard errors.

    The errors come of the jackknife over 20 groups of runs: each group in turn is left out.
    """
    paths = np.array([descend(workers, 0.5, 60, time=exponential, seed=s) for s in range(runs)])
    group = np.arange(runs) % 20
    left_out = np.array([fit_heavy_ball(paths[group != g]) for g in range(20)])
    return fit_heavy_ball(paths), np.sqrt(19 * left_out.var(axis=0))


def check_implicit_momentum(workers: int, runs: int, error_max: float) -> None:
    fitted, errors = estimate_heavy_ball(workers, runs)
    predicted = np.array([1 - 1 / workers, 0.5 / workers])
    assert (errors < error_max).all(), f"too few runs: standard errors {errors}"
    assert (abs(fitted - predicted) < 4 * errors).all(), f"{fitted} for {predicted} +- {errors}"


@pytest.mark.parametrize("workers", [4, 8, 16])
def test_asynchrony_begets_momentum(workers):
    """Mitliagkas et al. 2016: the mean follows heavy-ball momentum 1 - 1/M with step lr / M."""
    check_implicit_momentum(workers, 400, 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [4, 8, 16])
def test_asynchrony_begets_momentum_over_many_runs(workers):
    check_implicit_momentum(workers, 2_000, 0.01)


def test_a_constant_delay_begets_no_momentum():
    """The negative control: the same M, step and problem, but workers take turns."""
    random = np.mean([descend(8, 0.5, 400, time=exponential, seed=s) for s in range(10)], axis=0)
    assert abs(random[-8:]).max() < 1e-2
    turns = descend(8, 0.5, 400, time=constant)
    assert abs(turns[-8:]).max() > 1e6


# ---- delayed gradients -------------------------------------------------------------------


def grows(delay: int, lr: float) -> bool:
    """Say whether descent with a constant delay grows in the long run.

    On the verge of stability it oscillates with a period of 4 delay + 2 updates, so that equal
    numbers of periods, early and late, are compared.
    """
    period = 4 * delay + 2
    early, late, n = 20 * period, 60 * period, 4 * period
    path = descend(delay + 1, lr, late + n, time=constant)
    if len(path) <= late + n:
        return True
    return abs(path[late : late + n]).sum() > abs(path[early : early + n]).sum()


@pytest.mark.parametrize("delay", [1, 3, 7, 15])
def test_delayed_descent_is_stable_up_to_its_bound(delay):
    """lr times curvature < 2 sin(pi / (2 (2 delay + 1))); found by bisection to 1e-5."""
    stable, unstable = 0.0, 2.0
    while unstable - stable > 1e-5:
        lr = (stable + unstable) / 2
        stable, unstable = (stable, lr) if grows(delay, lr) else (lr, unstable)
    assert stable == pytest.approx(2 * math.sin(math.pi / (2 * (2 * delay + 1))), abs=1e-4)


def test_workers_that_take_turns_have_a_constant_delay():
    trace = simulate(workers=8, max_updates=100, time=constant).trace
    assert trace["staleness"].tolist() == list(range(8)) + [7] * 92
    assert (trace["worker"] == np.arange(100) % 8).all()


# ---- BSP ---------------------------------------------------------------------------------


# Seconds a round of 16 workers with exponential times: H_16; with laggards that are dropped and
# join the current round, the figures of an independent simulation. (Could laggards be cancelled,
# it were H_16 - H_b: 2.381, 1.881, 1.297.)
ROUNDS = pytest.mark.parametrize(
    ("backup", "round_s"), [(0, 3.381), (1, 2.531), (2, 2.116), (4, 1.636)]
)


def check_rounds(backup: int, round_s: float, rounds: int, tolerance_s: float) -> None:
    result = simulate(workers=16, mode=psframe.BSP(backup=backup), max_updates=rounds)
    assert result.time_s / rounds == pytest.approx(round_s, abs=tolerance_s)
    applied = result.trace["applied"]
    assert applied.sum() == rounds * (16 - backup)
    assert (result.trace["staleness"][applied] == 0).all()
    assert result.ledger.dropped == len(applied) - applied.sum()
    assert backup > 0 or applied.all()


@ROUNDS
def test_bsp_round_takes_as_long_as_its_slowest_member(backup, round_s):
    # The standard deviation of one round is at most that of the slowest of 16, 1.26.
    check_rounds(backup, round_s, 2_000, 3 * 1.26 / math.sqrt(2_000))


@pytest.mark.slow
@ROUNDS
def test_bsp_rounds_over_many_rounds(backup, round_s):
    check_rounds(backup, round_s, 5_000, 0.015 * round_s)


# ---- SSP ---------------------------------------------------------------------------------


def gaps(trace: np.ndarray, workers: int) -> np.ndarray:
    """Just after each step, the fastest worker's clock less the slowest's."""
    clocks = np.zeros((len(trace) + 1, workers), int)
    clocks[np.arange(1, len(trace) + 1), trace["worker"]] = 1
    clocks = clocks.cumsum(axis=0)[1:]
    assert (clocks[np.arange(len(trace)), trace["worker"]] == trace["clock"] + 1).all()
    return clocks.max(axis=1) - clocks.min(axis=1)


def check_ssp_pace(staleness: int, steps: int, tolerance: float) -> None:
    result = simulate(workers=2, mode=psframe.SSP(staleness=staleness), max_updates=steps)
    rate = steps / 2 / result.time_s
    assert rate == pytest.approx((2 * staleness + 2) / (2 * staleness + 3), rel=tolerance)
    assert gaps(result.trace, 2).max() == staleness + 1


@pytest.mark.parametrize("staleness", [0, 1, 5])
def test_ssp_pace_of_two_workers(staleness):
    # Waiting makes steps more regular than a Poisson process: their number has a relative
    # standard deviation below 1 / sqrt(steps), here 0.007.
    check_ssp_pace(staleness, 20_000, 3 / math.sqrt(20_000))


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1, 5])
def test_ssp_pace_of_two_workers_over_many_steps(staleness):
    check_ssp_pace(staleness, 200_000, 0.005)


@pytest.mark.parametrize("staleness", [0, 1, 5])
def test_ssp_runs_at_the_pace_of_a_persistent_straggler(staleness):
    def time(rng, worker, clock):
        return 4.0 if worker == 2 else 1.0

    result = simulate(
        workers=4, mode=psframe.SSP(staleness=staleness), max_updates=4_000, time=time
    )
    clocks = np.bincount(result.trace["worker"])
    # The others may be s + 1 steps ahead, and what is under way at the end is not counted.
    assert abs(clocks / result.time_s - 0.25).max() <= (staleness + 2) / result.time_s
    assert gaps(result.trace, 4).max() == staleness + 1


# ---- bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (8, 1), (8, 4), (2, 4)])
def test_no_run_is_faster_than_its_links(workers, servers):
    """A push_pull of P bytes each way by W workers takes at least max(P/B, W P / (S B))."""
    n, steps, link = 16_384, 50, 1e6  # 128 KiB of float64, 1 MB/s
    grads = {"w": np.zeros(n)}

    def work(worker):
        worker.pull()
        for _ in range(steps):
            worker.push_pull(grads)

    result = simulate(
        work,
        params=grads,
        workers=workers,
        servers=servers,
        time=lambda rng, worker, clock: 0.0,
        network=psframe.Network(bandwidth_bytes_per_s=link),
    )
    one_way_s = max(8 * n / link, workers * 8 * n / (servers * link))
    assert result.version == workers * steps
    assert result.time_s >= steps * one_way_s
    # Nobody overlaps its own push with its own pull: a lone worker needs both ways in turn. Then
    # headers, the first pull, and the start and the end of the pipe.
    turns = 2 if workers <= servers else 1
    assert result.time_s <= 1.1 * turns * (steps + 2) * one_way_s
