"""Virtual time: when things happen, in which order, and who is told when nothing can happen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import psframe
from psframe import BSP, SSP, Async, Network, SimResult, Worker, optim
from psframe.events import Lost
from psframe.plan import Plan
from psframe.simulation import TRACE_DTYPE, Simulation

PARAMS = {"w": np.zeros(2)}
HEADER = 72  # bytes of a message without its array


def push_pulls(steps: int) -> Any:
    def work(worker: Worker) -> None:
        worker.pull()
        for _ in range(steps):
            worker.push_pull({"w": np.ones(2)})

    return work


def simulate(work: Any, times: Any = 1.0, **kwargs: Any) -> SimResult:
    """`times`: seconds of every step, or a list of them by worker."""

    def compute_time_s(rng: Any, worker: int, clock: int) -> float:
        return float(times[worker] if isinstance(times, list) else times)

    return psframe.simulate(
        work,
        PARAMS,
        **{
            "optimizer": optim.SGD(lr=1.0),
            "compute_time_s": compute_time_s,
            "workers": 1,
            **kwargs,
        },
    )


def test_the_trace_is_what_users_read() -> None:
    result = simulate(push_pulls(2), [1.0, 1.5], workers=2)
    assert result.trace.dtype == TRACE_DTYPE
    assert TRACE_DTYPE.itemsize == 45, "packed"
    assert result.trace.tolist() == [
        (1.0, 0, 0, 0, 1, 0, True),
        (1.5, 1, 0, 0, 2, 1, True),
        (2.0, 0, 1, 1, 3, 1, True),
        (3.0, 1, 1, 2, 4, 1, True),
    ]
    assert result.time_s == 3.0
    assert result.version == 4
    assert result.staleness.tolist() == [1, 3]
    assert result.ledger.applied == 4


def test_ties_are_broken_by_worker() -> None:
    result = simulate(push_pulls(3), workers=4)
    assert result.trace["worker"].tolist() == [0, 1, 2, 3] * 3


def test_latency_is_paid_each_way() -> None:
    result = simulate(push_pulls(2), network=Network(latency_s=0.25))
    # The first pull takes 0.5; then a second of work and 0.25 to the server, 0.25 back.
    assert result.trace["time_s"].tolist() == [1.75, 3.25]


def test_bandwidth_is_shared_by_the_senders() -> None:
    """Two workers' pushes are taken in one after the other by the server's one link."""
    rate = 1000.0
    result = simulate(push_pulls(1), workers=2, network=Network(0.0, rate))
    push_s, pull_s, answer_s = (HEADER + 16) / rate, HEADER / rate, (HEADER + 16) / rate
    first = pull_s + answer_s + 1.0 + push_s
    assert result.trace["time_s"].tolist() == pytest.approx([first, first + push_s])


def test_a_second_push_after_one_answer_costs_nothing() -> None:
    def work(worker: Worker) -> None:
        worker.pull()
        for _ in range(3):
            worker.push({"w": np.ones(2)})

    assert simulate(work).trace["time_s"].tolist() == [1.0, 1.0, 1.0]


def test_compute_time_is_told_worker_and_clock_and_has_its_own_generator() -> None:
    seen: list[tuple[int, int]] = []
    draws: dict[int, list[float]] = {0: [], 1: []}

    def compute_time_s(rng: np.random.Generator, worker: int, clock: int) -> float:
        seen.append((worker, clock))
        draws[worker].append(rng.random())
        return 1.0

    def work(worker: Worker) -> None:
        params = worker.pull()
        own = worker.rng.random()
        for _ in range(2):
            params = worker.push_pull({"w": np.ones_like(params["w"])})
        assert own not in draws[worker.index]

    simulate(work, workers=2, compute_time_s=compute_time_s)
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({draw for drawn in draws.values() for draw in drawn}) == 4


def test_a_wait_has_a_bound_in_virtual_time() -> None:
    def work(worker: Worker) -> None:
        worker.pull()
        pending = worker.push({"w": np.ones(2)})
        if worker.index == 0:  # the round waits for worker 1
            with pytest.raises(psframe.WaitTimeout):
                pending.wait(timeout_s=1.0)
        assert pending.wait().applied

    simulate(work, [0.0, 5.0], workers=2, mode=BSP())


@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP(1)], ids=str)
def test_max_updates_is_exact_and_ends_the_clock(mode: Any) -> None:
    def for_ever(worker: Worker) -> None:
        worker.pull()
        while True:
            worker.push_pull({"w": np.ones(2)})

    result = simulate(for_ever, [1.0, 1.3, 50.0], workers=3, mode=mode, servers=2, max_updates=7)
    assert result.version == 7
    assert result.trace["version_applied"].max() == 7
    assert result.time_s == result.trace["time_s"][-1]
    assert result.params is not None


def test_what_work_raises_is_raised() -> None:
    class Oops(Exception):
        pass

    def work(worker: Worker) -> None:
        worker.pull()
        if worker.index == 1:
            raise Oops("no")
        while True:
            worker.push_pull({"w": np.ones(2)})

    with pytest.raises(Oops, match="no"):
        simulate(work, workers=3)


def test_divergence_is_raised() -> None:
    def work(worker: Worker) -> None:
        worker.pull()
        while True:
            worker.push_pull({"w": np.full(2, np.nan)})

    with pytest.raises(psframe.Diverged, match="20 pushes in a row"):
        simulate(work, workers=2)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_compute_time_must_make_sense(bad: float) -> None:
    with pytest.raises(ValueError, match="compute_time_s: expected 0 or more for worker 0"):
        simulate(push_pulls(1), bad)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [({"latency_s": -1.0}, "latency_s"), ({"bandwidth_bytes_per_s": 0.0}, "bandwidth")],
)
def test_networks_must_make_sense(arguments: dict[str, float], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Network(**arguments)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="workers"):
        simulate(push_pulls(1), workers=0)
    with pytest.raises(TypeError, match="compute_time_s"):
        simulate(push_pulls(1), compute_time_s=1.0)


@pytest.mark.parametrize("messages", range(1, 9))
def test_the_dead_take_along_what_they_had_in_flight_and_no_more(messages: int) -> None:
    """Worker 1 dies after so many messages; worker 0 never notices."""
    plan = Plan.check(push_pulls(4), PARAMS, optimizer=optim.SGD(lr=1.0), mode=Async(), servers=2)
    simulation = Simulation(
        push_pulls(4), plan, 2, Network(0.1), lambda rng, worker, clock: 1.0, deaths={1: messages}
    )
    result = simulation.run()
    pushed = max(0, messages - 1) // 2  # two servers: messages 1, 2 are the pull's
    mine = result.trace[result.trace["worker"] == 1]
    assert len(mine) == pushed
    assert (result.trace["worker"] == 0).sum() == 4
    assert result.ledger.partial == (messages > 2 and messages % 2)
    assert [machine.store.held for machine in simulation.machines] == [0, 0]


def test_a_push_names_the_version_it_was_computed_on() -> None:
    """A prefetch that nobody has waited for is no reason to tell another."""

    def work(worker: Worker) -> None:
        params = worker.pull()
        worker.push({"w": np.ones(2)})
        worker.pull_async()
        assert params.version == 0
        receipt = worker.push_pull({"w": np.ones(2)}).receipt
        assert receipt is not None
        assert receipt.staleness == 1

    simulate(work)


def test_the_fenced_cannot_write_into_a_gradient_under_way() -> None:
    """A worker taken for dead, which is not, may have a push that a follower has yet to apply."""
    seen: list[str] = []

    def work(worker: Worker) -> None:
        worker.pull()
        worker.push({"w": np.ones(2)})
        if worker.index == 1:
            return
        worker.push({"w": np.ones(2)})
        try:
            worker.gradients()  # waits for the first push; is told of the end instead
        except psframe.Stopped:
            seen.append("stopped")
        else:
            seen.append("given")

    plan = Plan.check(work, PARAMS, optimizer=optim.SGD(lr=1.0), mode=BSP(), servers=1)
    simulation = Simulation(work, plan, 2, Network(), lambda rng, worker, clock: 2.0 + worker)
    simulation._virtual.at(2.5, 0, simulation._virtual.deliver[0], Lost(0))
    simulation.run()
    assert seen == ["stopped"]


def test_a_run_that_cannot_go_on_says_who_waits() -> None:
    """Were an answer lost, the simulation would say so and not spin."""
    plan = Plan.check(push_pulls(1), PARAMS, optimizer=optim.SGD(lr=1.0), mode=Async(), servers=1)
    simulation = Simulation(push_pulls(1), plan, 2, Network(), lambda rng, worker, clock: 1.0)
    simulation._virtual.endpoints[1].take_in = lambda *a: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"workers \[1\] wait for what never comes"):
        simulation.run()
