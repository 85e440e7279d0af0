"""What must come out the same: against serial loops, across servers, modes and drivers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from proofs import STEPS, Case, averaged, cases, check, gradient, initial, push_pulls, serial

import psframe
from psframe import BSP, SSP, Async, Network, Worker, optim

CASES = [case for workers in (1, 2, 3) for case in cases(workers)]
RUNS = [
    pytest.param(case, servers, id=f"{case.name}-servers{servers}")
    for case in CASES
    for servers in case.servers
]
NETWORKS = [Network(), Network(0.5), Network(0.01, 1000.0)]


def uneven(rng: np.random.Generator, worker: int, clock: int) -> float:
    return float(rng.choice([0.0, 1.0, 1.0, rng.exponential()]))


def distinct(rng: np.random.Generator, worker: int, clock: int) -> float:
    """No two pushes ever fall on one moment."""
    return 1.0 + 0.037 * worker + 0.0011 * clock


def simulate(work: Callable[[Worker], Any], params: Any, **kwargs: Any) -> psframe.SimResult:
    return psframe.simulate(work, params, **{"compute_time_s": uneven, **kwargs})


def flat(result: psframe.Result) -> bytes:
    assert result.params is not None
    return b"".join(array.tobytes() for array in result.params.values())


# ---- known results, in threads and in the simulator -----------------------------------------


@pytest.mark.parametrize(("case", "servers"), RUNS)
def test_simulated(case: Case, servers: int) -> None:
    for network in NETWORKS:
        result = simulate(
            case.work,
            case.params,
            workers=case.workers,
            servers=servers,
            network=network,
            **case.kwargs,
        )
        check(case, result)


@pytest.mark.parametrize(("case", "servers"), RUNS)
def test_threads(case: Case, servers: int) -> None:
    result = psframe.run(
        case.work, case.params, workers=case.workers, servers=servers, device="cpu", **case.kwargs
    )
    check(case, result)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sgd_against_its_formula(dtype: str) -> None:
    """Plain NumPy, without any of the project's rules."""
    lr = np.dtype(dtype).type(0.1)
    params = initial(dtype)
    expected = dict(params)
    for step in range(STEPS):
        grads = gradient(expected, 0, step)
        expected = {name: p - lr * grads[name] for name, p in expected.items()}
    result = simulate(push_pulls, params, workers=1, optimizer=optim.SGD(lr=0.1))
    assert result.params is not None
    for name in params:
        assert result.params[name].tobytes() == expected[name].tobytes()


# ---- BSP and minibatches ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 4])
def test_bsp_is_minibatch_descent_on_the_joined_batch(workers: int) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((48, 6)), rng.standard_normal(48)

    def slope(w: Any, rows: Any) -> Any:
        return x[rows].T @ (x[rows] @ w - y[rows]) / len(rows)

    def work(worker: Worker) -> None:
        params = worker.pull()
        for rows in worker.leases(48, 4, epochs=5, shuffle=False):
            params = worker.push_pull({"w": slope(params["w"], rows)})

    result = simulate(
        work, {"w": np.zeros(6)}, mode=BSP(), workers=workers, optimizer=optim.SGD(lr=0.1)
    )
    w = np.zeros(6)
    for _ in range(5):
        for first in range(0, 48, 4 * workers):
            w = w - 0.1 * slope(w, np.arange(first, first + 4 * workers))
    assert result.params is not None
    np.testing.assert_allclose(result.params["w"], w, rtol=1e-12, atol=0)


def test_ssp_0_keeps_the_pace_of_bsp() -> None:
    def rounds(mode: Any) -> list[float]:
        """When the last worker's step of each clock was finished."""
        result = simulate(
            push_pulls,
            initial("float64"),
            mode=mode,
            workers=5,
            optimizer=optim.SGD(lr=0.1),
            network=Network(0.25),
            seed=5,
        )
        times = [result.trace["time_s"][result.trace["clock"] == clock] for clock in range(STEPS)]
        assert [len(steps) for steps in times] == [5] * STEPS
        return [steps.max() for steps in times]

    assert rounds(SSP(0)) == rounds(BSP())
    assert rounds(SSP(1)) != rounds(BSP())


# ---- the number of servers ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP(), BSP(1)], ids=str)
@pytest.mark.parametrize("latency_s", [0.0, 0.5])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_servers_change_no_bit(mode: Any, latency_s: float, name: str) -> None:
    """With equal latencies and round trips only, all shards see one order."""

    def result(servers: int) -> psframe.SimResult:
        return simulate(
            push_pulls,
            initial("float32"),
            mode=mode,
            workers=4,
            servers=servers,
            optimizer={"sgd": optim.SGD(lr=0.1), "adamw": optim.AdamW(lr=0.01)}[name],
            compute_time_s=distinct,
            network=Network(latency_s),
        )

    one, three = result(1), result(3)
    assert flat(one) == flat(three)
    if latency_s == 0:  # otherwise the followers' answers come a journey later
        assert one.trace.tobytes() == three.trace.tobytes()


def test_more_servers_than_pieces() -> None:
    """A shard may be empty."""
    params = {"w": np.ones(20)}
    expected = serial(params, optim.Adam(lr=0.1), STEPS)
    result = simulate(push_pulls, params, workers=1, servers=4, optimizer=optim.Adam(lr=0.1))
    assert flat(result) == expected["w"].tobytes()


# ---- repeatability -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [Async(), SSP(2), BSP(1)], ids=str)
@pytest.mark.parametrize("servers", [1, 3])
def test_same_seed_same_bytes(mode: Any, servers: int) -> None:
    def work(worker: Worker) -> None:
        params = worker.pull()
        for indices in worker.leases(40, 3, epochs=2):
            step = int(worker.rng.integers(9)) + int(indices[0])
            params = worker.push_pull(gradient(params, worker.index, step))

    def result(seed: int) -> psframe.SimResult:
        return simulate(
            work,
            initial("float32"),
            mode=mode,
            workers=6,
            servers=servers,
            optimizer=optim.Adam(lr=0.01),
            network=Network(0.1, 5000.0),
            seed=seed,
        )

    first, again, other = result(1), result(1), result(2)
    assert first.trace.tobytes() == again.trace.tobytes()
    assert flat(first) == flat(again)
    assert first.time_s == again.time_s
    assert first.trace.tobytes() != other.trace.tobytes()


def test_oracles_differ_from_each_other() -> None:
    """A proof is worth something only if another order or mode has other bits."""
    params = initial("float32")
    sgd = optim.SGD(lr=0.1)
    assert (
        averaged(params, sgd, 3, STEPS)["w1"].tobytes()
        != serial(params, sgd, STEPS)["w1"].tobytes()
    )
    result = simulate(push_pulls, params, workers=3, optimizer=sgd, mode=Async())
    assert flat(result) != b"".join(a.tobytes() for a in averaged(params, sgd, 3, STEPS).values())
