"""What the tests of laws share: compute times, idle workers, descent on w^2 / 2.

M workers, one gradient in flight each: a worker pulls again right after its push.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import psframe

__all__ = ["check_sum_of_staleness", "constant", "descend", "exponential", "idle_work", "simulate"]


def exponential(rng: np.random.Generator, worker: int, clock: int) -> float:
    return float(rng.exponential())


def constant(rng: np.random.Generator, worker: int, clock: int) -> float:
    return 1.0


def idle_work(worker: psframe.Worker) -> None:
    """Push zeros for ever: only times and versions matter."""
    grads = {"w": np.zeros(1)}
    worker.pull()
    while True:
        worker.push_pull(grads)


def simulate(
    work: Any = idle_work, *, time: Any = exponential, lr: float = 0.0, **options: Any
) -> psframe.SimResult:
    """`psframe.simulate` of one parameter that begins at 1, with SGD, unless told otherwise."""
    params = options.pop("params", {"w": np.ones(1)})
    options.setdefault("optimizer", psframe.optim.SGD(lr=lr))
    return psframe.simulate(work, params, compute_time_s=time, **options)


def descend(workers: int, lr: float, updates: int, *, time: Any, **options: Any) -> np.ndarray:
    """The values of w, 1 at first, of descent on w^2 / 2: one after each update, up to 1e9."""
    path = [1.0]

    def work(worker: psframe.Worker) -> None:
        w = worker.pull()["w"]
        while True:
            w = worker.push_pull({"w": w})["w"]
            path.append(float(w[0]))
            if abs(path[-1]) > 1e9:
                worker.stop()

    # The answer to the last update only says that the run is over.
    simulate(work, workers=workers, lr=lr, max_updates=updates + 1, time=time, **options)
    assert len(path) == updates + 1 or abs(path[-1]) > 1e9
    return np.array(path)


def check_sum_of_staleness(result: psframe.SimResult, workers: int) -> None:
    """Check that each version has passed over the M - 1 other gradients in flight then.

    So the sum over all gradients, those still in flight at the end included, and dropped ones too,
    is (M - 1) times the number of versions: an identity.
    """
    trace = result.trace
    in_flight = sum(
        result.version - trace["version_applied"][trace["worker"] == w].max(initial=0)
        for w in range(workers)
    )
    assert trace["staleness"].sum() + in_flight == (workers - 1) * result.version
