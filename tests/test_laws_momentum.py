"""Laws of momentum under staleness: the server's, and a worker's own."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from laws import constant, descend, exponential, simulate

from psframe import Worker, optim
from psframe.data import Parts
from psframe.models import MLP
from psframe.settings import Settings
from psframe.train import load_parts

BETA = 0.9

RULES = {
    "none": lambda lr: optim.SGD(lr),
    "server": lambda lr: optim.SGD(lr, momentum=BETA),
    "worker": lambda lr: optim.WorkerMomentum(lr, BETA),
    "dana": lambda lr: optim.DANAZero(lr, BETA),
}


def recurrence(rule: str, workers: int, lr: float) -> np.ndarray:
    """The characteristic polynomial of descent on w^2 / 2 by M workers that take turns.

    With d[k] = w[k+1] - w[k] and the gradient w[k - M + 1]:
        none    d[k] = -lr w[k-M+1]
        server  d[k] = beta d[k-1] - lr w[k-M+1]
        worker  d[k] = beta d[k-M] - lr w[k-M+1], since the M-th last velocity was its own
        dana    d[k] = beta d[k-M] - lr ((1 + beta) w[k-M+1] - beta w[k-2M+1])
    """
    m = workers
    c = np.zeros(2 * m + 2)  # of w[k+1], w[k], ...
    c[0] += 1
    c[1] -= 1
    if rule != "none":
        lag = 1 if rule == "server" else m
        c[lag] -= BETA
        c[lag + 1] += BETA
    ahead = BETA if rule == "dana" else 0.0
    c[m] += lr * (1 + ahead)
    c[2 * m] -= lr * ahead
    return c


def largest_stable(rule: str, workers: int) -> float:
    """The rate at which the largest root first leaves the unit circle."""

    def stable(lr: float) -> bool:
        return bool(abs(np.roots(recurrence(rule, workers, lr))).max() < 1)

    rates = np.geomspace(1e-3, 8, 400)
    high = next(lr for lr in rates if not stable(lr))
    low = high / (rates[1] / rates[0])
    while high - low > 1e-9 * high:
        lr = (low + high) / 2
        low, high = (lr, high) if stable(lr) else (low, lr)
    return float(low)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_the_stable_rate_is_that_of_the_recurrence(rule: str, workers: int) -> None:
    """Within 4% of the roots' bound, descent goes from shrinking to growing."""
    bound = largest_stable(rule, workers)
    for factor, grows in ((0.96, False), (1.04, True)):
        lr = factor * bound
        root = abs(np.roots(recurrence(rule, workers, lr))).max()
        updates = 300 + int(3.5 / abs(np.log(root)))  # a factor of e^3.5 = 33
        path = descend(workers, 0.0, updates, time=constant, optimizer=RULES[rule](lr))
        late, early = abs(path[-100:]).max(), abs(path[200:300]).max() if len(path) > 300 else 0.0
        assert (late > 10 * early) if grows else (late < early / 10)


def test_a_server_s_momentum_costs_more_than_workers_own() -> None:
    """What 8 workers leave of the rate: of 1 without momentum 0.105, with the server's 0.0041."""
    left = {rule: largest_stable(rule, 8) / largest_stable(rule, 1) for rule in RULES}
    assert left["none"] == pytest.approx(0.20906 / 2, abs=1e-5)
    assert left["server"] < 0.005 < 0.007 < left["worker"] < 0.008
    assert left["dana"] > 0.07


@pytest.mark.parametrize(("rule", "grows"), [("server", True), ("worker", False), ("dana", False)])
def test_with_random_times_a_worker_s_own_momentum_bears_a_larger_rate(
    rule: str, grows: bool
) -> None:
    """8 workers, exponential times, rate 0.05: all of five runs grow, or all shrink."""
    for seed in range(5):
        path = descend(8, 0.0, 1_000, time=exponential, optimizer=RULES[rule](0.05), seed=seed)
        assert (abs(path[-1]) > 1e3) if grows else (abs(path[-1]) < 1e-1)


# ---- the digits -------------------------------------------------------------------------------


@functools.cache
def digits() -> Parts:
    return load_parts(Settings().resolved())


def accuracy(optimizer: Any, workers: int, epochs: int, seed: int) -> float:
    """The test accuracy after so many epochs, with exponential times, of the command's model."""
    train, test = digits().train, digits().test
    model = MLP(train.input_shape, train.n_classes)
    assert test is not None

    def work(worker: Worker) -> None:
        params = worker.pull()
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in worker.leases(len(train), 32, epochs=epochs):
                x, y = train.batch(rows)
                params = worker.push_pull(model.loss_and_gradients(params, x, y)[1])

    result = simulate(
        work,
        params=model.init(np.random.default_rng(seed)),
        workers=workers,
        optimizer=optimizer,
        seed=seed,
    )
    assert result.params is not None
    x, y = test.batch(np.arange(len(test)))
    with np.errstate(over="ignore", invalid="ignore"):
        return float((model.predict(result.params, x) == y).mean())


def mean_accuracy(rule: str, workers: int, *, epochs: int, seeds: int) -> float:
    """At lr 0.05 and momentum 0.9; chance is 0.1."""
    found = [accuracy(RULES[rule](0.05), workers, epochs, seed) for seed in range(seeds)]
    return float(np.mean(found))


@pytest.mark.parametrize(("rule", "ruined"), [("server", True), ("worker", False), ("dana", False)])
def test_a_server_s_momentum_ruins_the_digits_with_8_workers(rule: str, ruined: bool) -> None:
    # The bounds leave room for what other orders of sums in a BLAS make of a chaotic training.
    found = mean_accuracy(rule, 8, epochs=12, seeds=1)
    assert (found < 0.5) if ruined else (found > 0.75)


@pytest.mark.slow
def test_a_server_s_momentum_ruins_the_digits_over_many_seeds() -> None:
    assert mean_accuracy("server", 4, epochs=20, seeds=5) > 0.9
    assert mean_accuracy("server", 8, epochs=20, seeds=5) < 0.4
    assert mean_accuracy("worker", 8, epochs=20, seeds=5) > 0.9
    assert mean_accuracy("dana", 8, epochs=20, seeds=5) > 0.9
