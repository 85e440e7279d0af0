"""Elastic averaging and local SGD, against the papers' algorithms written out in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
import pytest

import psframe
from psframe import BSP, SSP, Async, Diverged, Network, Worker, optim
from psframe.data import load, split
from psframe.local import EASGD, LocalSGD
from psframe.models import MLP
from psframe.plan import Plan
from psframe.simulation import Simulation

Vector = Any
LR, PERIOD, STEPS = 0.1, 3, 14
SCALES = np.linspace(0.5, 1.5, 12)


def start(dtype: Any = np.float64) -> dict[str, Vector]:
    """Twelve parameters, the first six in `w`."""
    flat = np.random.default_rng(7).standard_normal(12).astype(dtype)
    return {"w": flat[:6].reshape(2, 3), "b": flat[6:]}


def flatten(params: Mapping[str, Vector]) -> Vector:
    return np.concatenate([params["w"].ravel(), params["b"]])


def flat_gradient(x: Vector, worker: int, step: int) -> Vector:
    """Of a quadratic, with noise of each worker's own."""
    return SCALES * x + np.random.default_rng((worker, step)).standard_normal(12)


def gradient(params: Mapping[str, Vector], worker: int, step: int) -> dict[str, Vector]:
    flat = flat_gradient(flatten(params), worker, step)
    return {"w": flat[:6].reshape(2, 3), "b": flat[6:]}


def exponential(rng: np.random.Generator, worker: int, clock: int) -> float:
    """Worker 0 is four times slower."""
    return rng.exponential() * (4.0 if worker == 0 else 1.0)


def simulate(work: Callable[[Worker], Any], optimizer: Any, **options: Any) -> psframe.SimResult:
    options = {"workers": 4, "compute_time_s": exponential, "params": start(), **options}
    return psframe.simulate(work, options.pop("params"), optimizer=optimizer, **options)


def final(result: psframe.Result) -> Vector:
    assert result.params is not None
    return flatten(result.params)


def elastic_work(rule: Any, *, steps: int = STEPS) -> Callable[[Worker], None]:
    def work(worker: Worker) -> None:
        easgd = EASGD(worker, rule, period=PERIOD)
        for step in range(steps):
            assert easgd.step(gradient(easgd.params, worker.index, step))
        easgd.finish()
        easgd.finish()  # is nothing more
        assert easgd.steps == steps

    return work


def local_work(rule: Any, *, period: int = PERIOD, steps: int = STEPS) -> Callable[[Worker], None]:
    def work(worker: Worker) -> None:
        local = LocalSGD(worker, rule, period=period)
        for step in range(steps):
            assert local.step(gradient(local.params, worker.index, step))
        local.finish()

    return work


# ---- elastic averaging ---------------------------------------------------------------------------

Elastic = Generator[Vector | None, Vector | None, None]


def easgd_algorithm_1(x: Vector, worker: int, alpha: float, steps: int) -> Elastic:
    """Zhang et al. 2015, algorithm 1, of one worker: asks for the center, gives its change."""
    for t in range(steps):
        before = x
        if t and t % PERIOD == 0:  # at t = 0 x is the center
            center = yield None
            x = x - alpha * (before - center)
            yield alpha * (before - center)
        x = x - LR * flat_gradient(before, worker, t)
    center = yield None
    yield alpha * (x - center)


def eamsgd_algorithm_2(x: Vector, worker: int, alpha: float, steps: int) -> Elastic:
    """The same of algorithm 2, with delta = 0.9."""
    v, delta = np.zeros_like(x), 0.9
    for t in range(steps):
        before = x
        if t and t % PERIOD == 0:
            center = yield None
            x = x - alpha * (before - center)
            yield alpha * (before - center)
        v = delta * v - LR * flat_gradient(before + delta * v, worker, t)
        x = x + v
    center = yield None
    yield alpha * (x - center)


def replayed(result: psframe.SimResult, algorithm: Callable[..., Elastic], workers: int) -> Vector:
    """Run the algorithm in the order of a trace, each exchange on the center that it had read."""
    centers = [flatten(start())]
    others = [algorithm(centers[0], w, 0.9 / workers, STEPS) for w in range(workers)]
    for row in result.trace:
        assert row["applied"]
        other = others[row["worker"]]
        next(other)
        difference = other.send(centers[row["version_read"]])
        centers.append(centers[-1] + difference)
    for other in others:
        assert next(other, "over") == "over"
    return centers[-1]


MOMENTUM = optim.SGD(LR, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("mode", [Async(), SSP(1)])
def test_elastic_averaging_is_the_paper_s_algorithm(workers: int, mode: Any) -> None:
    result = simulate(
        elastic_work(optim.SGD(LR)), EASGD.server_optimizer(), workers=workers, mode=mode
    )
    assert final(result).tobytes() == replayed(result, easgd_algorithm_1, workers).tobytes()


@pytest.mark.parametrize("workers", [1, 4])
def test_elastic_averaging_with_momentum_is_the_paper_s_algorithm(workers: int) -> None:
    result = simulate(elastic_work(MOMENTUM), EASGD.server_optimizer(), workers=workers)
    want = replayed(result, eamsgd_algorithm_2, workers)
    np.testing.assert_allclose(final(result), want, rtol=1e-11)


def test_the_center_of_rounds_moves_by_the_sum() -> None:
    """Synchronous EASGD: center + alpha sum (x - center)."""
    result = simulate(elastic_work(optim.SGD(LR)), optim.SGD(4.0), mode=BSP())
    center, alpha = flatten(start()), 0.9 / 4
    xs = [center] * 4
    for t in range(STEPS):
        before = list(xs)
        if t and t % PERIOD == 0:
            xs = [x - alpha * (x - center) for x in before]
            center = center + alpha * sum(x - center for x in before)
        xs = [
            x - LR * flat_gradient(old, w, t)
            for w, (x, old) in enumerate(zip(xs, before, strict=True))
        ]
    center = center + alpha * sum(x - center for x in xs)
    np.testing.assert_allclose(final(result), center, rtol=1e-12)


# ---- local SGD -----------------------------------------------------------------------------------


def local_round(x: Vector, worker: int, first: int, steps: int) -> Vector:
    """The change that some local steps make, as a pseudo-gradient."""
    w = x
    for t in range(first, first + steps):
        x = x - LR * flat_gradient(x, worker, t)
    return w - x


class NesterovOfN:
    """Liu et al. 2024, algorithm 3, with their names."""

    def __init__(self, lr: float, beta: float, n: int, c: float) -> None:
        self.lr, self.beta, self.n, self.c = lr, beta, n, c
        self.t, self.m, self.delta = 0, np.zeros(12), np.zeros(12)

    def __call__(self, theta: Vector, g: Vector) -> Vector:
        beta, n, c = self.beta, self.n, self.c
        self.delta = self.delta + g
        if (self.t + 1) % n == 0:
            self.m = beta * self.m + self.delta / n
            theta = theta - self.lr * ((1 - c * n + c) * beta * self.m + g / n)
            self.delta = np.zeros(12)
        else:
            theta = theta - self.lr * (c * beta * self.m + g / n)
        self.t += 1
        return theta


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize(("workers", "activation"), [(1, 0.0), (4, 0.0), (4, 0.1)])
def test_local_sgd_with_delayed_nesterov_is_the_paper_s_algorithm(
    workers: int, activation: float, servers: int
) -> None:
    rule = optim.DelayedNesterov(0.7, every=4, momentum=0.8, activation=activation)
    result = simulate(local_work(optim.SGD(LR)), rule, workers=workers, servers=servers)
    versions, outer = [flatten(start())], NesterovOfN(0.7, 0.8, 4, activation)
    done = [0] * workers
    for row in result.trace:
        w = row["worker"]
        steps = min(PERIOD, STEPS - done[w])
        change = local_round(versions[row["version_read"]], w, done[w], steps)
        versions.append(outer(versions[-1], change))
        done[w] += steps
    assert done == [STEPS] * workers
    assert result.version == workers * math.ceil(STEPS / PERIOD)
    np.testing.assert_allclose(final(result), versions[-1], rtol=1e-11)


def test_local_sgd_in_rounds_with_nesterov_is_diloco() -> None:
    rule = optim.SGD(0.7, momentum=0.9, nesterov=True)
    result = simulate(local_work(optim.SGD(LR), steps=12), rule, mode=BSP())
    x, m = flatten(start()), np.zeros(12)
    for t in range(0, 12, PERIOD):
        mean = np.mean([local_round(x, w, t, PERIOD) for w in range(4)], axis=0)
        m = 0.9 * m + mean
        x = x - 0.7 * (mean + 0.9 * m)
    np.testing.assert_allclose(final(result), x, rtol=1e-12)


@pytest.mark.parametrize("workers", [1, 4])
def test_one_local_step_is_a_gradient_for_the_server(workers: int) -> None:
    def plain(worker: Worker) -> None:
        params = worker.pull()
        for step in range(STEPS):
            params = worker.push_pull(gradient(params, worker.index, step))

    want = simulate(plain, optim.SGD(LR), workers=workers)
    got = simulate(local_work(optim.SGD(LR), period=1), optim.SGD(1.0), workers=workers)
    assert got.trace.tobytes() == want.trace.tobytes()
    np.testing.assert_allclose(final(got), final(want), rtol=1e-12)


@pytest.mark.parametrize(
    "rule", [optim.SGD(LR), MOMENTUM, optim.Adam(optim.schedules.Cosine(0.1, 9))]
)
@pytest.mark.parametrize("period", [1, 3, 100])
def test_one_worker_is_a_serial_loop_whose_rule_keeps_its_state(rule: Any, period: int) -> None:
    def serial(worker: Worker) -> None:
        params = worker.pull()
        for step in range(STEPS):
            params = worker.push_pull(gradient(params, 0, step))

    want = simulate(serial, rule, workers=1)
    got = simulate(local_work(rule, period=period), optim.SGD(1.0), workers=1)
    np.testing.assert_allclose(final(got), final(want), rtol=1e-11)
    assert got.version == math.ceil(STEPS / period)


def test_slower_workers_may_make_fewer_steps() -> None:
    """Steps as the speed, so that all push at one pace and nobody's push is older than W - 1."""
    periods = (2, 8, 8, 8)

    def work(worker: Worker) -> None:
        local = LocalSGD(worker, optim.SGD(LR), period=8)
        local.period = periods[worker.index]
        for step in range(5 * local.period):
            local.step(gradient(local.params, worker.index, step))

    result = simulate(
        work,
        optim.SGD(0.25),
        compute_time_s=lambda rng, worker, clock: periods[worker] * (4.0 if worker == 0 else 1.0),
    )
    assert np.bincount(result.trace["worker"]).tolist() == [5] * 4
    assert result.trace["staleness"].max() == 3
    np.testing.assert_array_equal(result.trace["clock"], np.repeat(np.arange(5), 4))


# ---- leases --------------------------------------------------------------------------------------

SAMPLES, BATCH, EPOCHS = 60, 4, 3


def counting_work(local_leases: bool) -> Callable[[Worker], None]:
    """Each sample adds one to its own parameter, in every epoch."""

    def work(worker: Worker) -> None:
        local = LocalSGD(worker, optim.SGD(1.0), period=4)
        lease = local.leases if local_leases else worker.leases
        for indices in lease(SAMPLES, BATCH, epochs=EPOCHS):
            ones = np.zeros(SAMPLES)
            ones[indices] = -1.0
            local.step({"n": ones})
        local.finish()

    return work


@pytest.mark.parametrize("messages", range(2, 14))
def test_a_death_costs_no_sample_of_leases_of_whole_periods(messages: int) -> None:
    counts = counted(True, {1: messages})
    assert counts.tolist() == [EPOCHS] * SAMPLES


def test_of_leases_of_batches_a_death_costs_what_was_not_pushed() -> None:
    lost = {
        messages: EPOCHS * SAMPLES - int(counted(False, {1: messages}).sum())
        for messages in range(2, 14)
    }
    assert set(lost.values()) == {0, BATCH, 2 * BATCH, 3 * BATCH}


def counted(local_leases: bool, deaths: dict[int, int]) -> Vector:
    work, params = counting_work(local_leases), {"n": np.zeros(SAMPLES)}
    plan = Plan.check(work, params, optimizer=optim.SGD(1.0), mode=Async(), servers=1)
    result = Simulation(work, plan, 3, Network(0.1), exponential, deaths=deaths).run()
    assert result.params is not None
    return result.params["n"]


def test_the_last_block_of_an_epoch_is_pushed_too() -> None:
    pushes, sizes = [], []

    def work(worker: Worker) -> None:
        local = LocalSGD(worker, optim.SGD(LR), period=4)
        for indices in local.leases(23, 3, epochs=2, shuffle=False):
            sizes.append(indices.tolist())
            local.step({name: np.zeros_like(p) for name, p in local.params.items()})
            pushes.append(local.receipt is not None and local.receipt.version)

    result = simulate(work, optim.SGD(1.0), workers=1)
    assert sizes[:8] == [list(range(k, min(k + 3, 23))) for k in range(0, 23, 3)]
    assert result.version == 4  # 4 and 4 batches an epoch
    assert pushes[3::4] == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, 2.0])
def test_a_batch_has_samples(size: Any) -> None:
    def work(worker: Worker) -> None:
        LocalSGD(worker, optim.SGD(LR)).leases(10, size)

    with pytest.raises((ValueError, TypeError), match="batch_size: expected"):
        simulate(work, optim.SGD(1.0), workers=1)


# ---- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 8])
def test_both_find_the_minimum_of_a_quadratic(period: int) -> None:
    target = start()

    def away(params: Mapping[str, Vector]) -> dict[str, Vector]:
        return {name: p - target[name] for name, p in params.items()}

    def elastic(worker: Worker) -> None:
        easgd = EASGD(worker, optim.SGD(0.2), period=period)
        while True:
            easgd.step(away(easgd.params))

    def local_sgd(worker: Worker) -> None:
        local = LocalSGD(worker, optim.SGD(0.2), period=period)
        while True:
            local.step(away(local.params))

    zeros = {name: np.zeros_like(p) for name, p in target.items()}
    ways = [
        (elastic, EASGD.server_optimizer()),
        (local_sgd, optim.SGD(0.25)),
        (local_sgd, optim.DelayedNesterov(0.5, every=4, momentum=0.5)),
    ]
    for work, rule in ways:
        result = simulate(work, rule, params=zeros, max_updates=600)
        np.testing.assert_allclose(final(result), flatten(target), atol=1e-6, err_msg=str(rule))


TRAIN, TEST = split(load("digits"))


def elastic_digits(worker: Worker, model: MLP, period: int) -> None:
    easgd = EASGD(worker, optim.SGD(0.2), period=period)
    for rows in worker.leases(len(TRAIN), 20, epochs=12):
        easgd.step(model.loss_and_gradients(easgd.params, *TRAIN.batch(rows))[1])
    easgd.finish()


def local_digits(worker: Worker, model: MLP, period: int) -> None:
    local = LocalSGD(worker, optim.SGD(0.2), period=period)
    for rows in local.leases(len(TRAIN), 20, epochs=12):
        local.step(model.loss_and_gradients(local.params, *TRAIN.batch(rows))[1])


@pytest.mark.parametrize(
    ("digits", "rule"),
    [
        (elastic_digits, EASGD.server_optimizer()),
        (local_digits, optim.SGD(0.5)),
        (local_digits, optim.DelayedNesterov(1.0, every=4, momentum=0.5)),
    ],
)
def test_four_workers_one_of_them_slow_learn_the_digits_with_few_pushes(
    digits: Callable[..., None], rule: Any
) -> None:
    model, period = MLP(TRAIN.input_shape, TRAIN.n_classes), 8
    params = model.init(np.random.default_rng(0))
    result = simulate(lambda worker: digits(worker, model, period), rule, params=params)
    steps = 12 * math.ceil(len(TRAIN) / 20)
    assert steps / period - 4 <= result.version <= steps / period + 12
    x, y = TEST.batch(slice(None))
    accuracy = np.mean(model.predict(result.params, x) == y)
    assert accuracy > 0.94, f"{rule}: {accuracy:.1%} after {result.version} updates"


# ---- what a worker sees --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [EASGD, LocalSGD])
def test_the_parameters_are_the_same_arrays_all_along(cls: Any) -> None:
    def work(worker: Worker) -> None:
        mine = cls(worker, optim.SGD(LR), period=2)
        arrays = dict(mine.params)
        assert mine.receipt is None
        for step in range(5):
            before = flatten(arrays)
            mine.step(gradient(arrays, 0, step))
            assert not np.array_equal(before, flatten(arrays))
        mine.finish()
        assert {name: id(p) for name, p in mine.params.items()} == {
            name: id(p) for name, p in arrays.items()
        }
        assert mine.receipt.applied
        with pytest.raises(TypeError):
            mine.params["w"] = arrays["w"]

    simulate(work, optim.SGD(1.0), workers=1)


@pytest.mark.parametrize("cls", [EASGD, LocalSGD])
def test_a_gradient_is_cast_and_the_parameters_keep_their_dtype(cls: Any) -> None:
    def work(worker: Worker) -> None:
        mine = cls(worker, optim.SGD(LR), period=2)
        dtypes.update(p.dtype for p in worker.pull().values())
        for step in range(5):
            grads = gradient(mine.params, 0, step)
            assert grads["w"].dtype == np.float64
            mine.step({name: g.T.copy().T for name, g in grads.items()})  # anyhow in memory
            dtypes.update(p.dtype for p in mine.params.values())
        mine.finish()

    dtypes: set[Any] = set()
    want = simulate(work, optim.SGD(1.0), workers=1)
    dtypes.clear()
    result = simulate(work, optim.SGD(1.0), workers=1, params=start(np.float32))
    assert dtypes == {np.dtype(np.float32)}
    np.testing.assert_allclose(final(result), final(want), rtol=1e-5)


@pytest.mark.parametrize("cls", [EASGD, LocalSGD])
def test_parameters_may_have_any_shape(cls: Any) -> None:
    def work(worker: Worker) -> None:
        mine = cls(worker, optim.SGD(0.5), period=2)
        for _ in range(30):
            mine.step({name: p - 1.0 for name, p in mine.params.items()})
        mine.finish()

    params = {"scalar": np.zeros(()), "none": np.zeros((0, 3)), "cube": np.zeros((2, 1, 2))}
    result = simulate(work, optim.SGD(1.0), workers=1, params=params)
    assert result.params is not None
    for name, array in result.params.items():
        assert array.shape == params[name].shape
        np.testing.assert_allclose(array, 1.0, atol=1e-3)


@pytest.mark.parametrize("cls", [EASGD, LocalSGD])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e308])
def test_a_step_that_is_not_finite_is_refused_and_counted(cls: Any, bad: float) -> None:
    def work(worker: Worker) -> None:
        mine = cls(worker, optim.SGD(1e9), period=2)
        zeros = {name: np.zeros_like(p) for name, p in mine.params.items()}
        assert mine.step(zeros)
        before = flatten(mine.params)
        assert not mine.step({**zeros, "b": np.full(6, bad)})
        assert flatten(mine.params).tobytes() == before.tobytes()
        assert mine.step(zeros)
        assert mine.steps == 2
        for _ in range(9):
            assert not mine.step({**zeros, "b": np.full(6, bad)})
        with pytest.raises(
            Diverged, match=r"worker 0: the last 10 local steps in a row .* after 2"
        ):
            mine.step({**zeros, "b": np.full(6, bad)})

    assert simulate(work, optim.SGD(1.0), workers=1).version > 4


@pytest.mark.parametrize("cls", [EASGD, LocalSGD])
def test_what_is_no_gradient_is_refused_and_changes_nothing(cls: Any) -> None:
    def work(worker: Worker) -> None:
        mine = cls(worker, optim.SGD(LR), period=1)
        good = gradient(mine.params, 0, 0)
        before = flatten(mine.params)
        cases: list[tuple[Any, type[Exception], str]] = [
            ({"w": good["w"]}, ValueError, r"missing: \['b'\], unknown: none"),
            ({**good, "c": good["b"]}, ValueError, r"missing: none, unknown: \['c'\]"),
            ({**good, "b": np.zeros(5)}, ValueError, r"'b' has shape \(5,\), expected \(6,\)"),
            ({**good, "b": np.zeros(6, int)}, TypeError, "'b' has dtype int64"),
            (list(good), TypeError, "expected a mapping"),
        ]
        for grads, error, words in cases:
            with pytest.raises(error, match=f"{cls.__name__}.step of worker 0: .*{words}"):
                mine.step(grads)
        assert flatten(mine.params).tobytes() == before.tobytes()
        mine.finish()
        for call in (lambda: mine.step(good), mine.exchange):
            with pytest.raises(RuntimeError, match=r"of worker 0: finish\(\) has been called"):
                call()

    simulate(work, optim.SGD(1.0), workers=1)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda w: LocalSGD(w, optim.SGD(LR), period=0),
            ValueError,
            "LocalSGD: period: .* 1, got 0",
        ),
        (lambda w: EASGD(w, optim.SGD(LR), period=1.5), TypeError, "EASGD: period: .* integer"),
        (lambda w: LocalSGD(w, optim.SGD), TypeError, "LocalSGD: optimizer: expected one of"),
        (lambda w: LocalSGD(w, 0.1), TypeError, "LocalSGD: optimizer: .* got 0.1"),
        (lambda w: EASGD(w, optim.SGD(LR), alpha=0.0), ValueError, "EASGD: alpha is 0.0, .* > 0"),
        (lambda w: EASGD(w, optim.SGD(LR), alpha=1.01), ValueError, r"alpha is 1.01, .*\(0, 1\]"),
        (lambda w: EASGD(w, optim.SGD(LR), alpha="1"), TypeError, "alpha is '1' of type str"),
    ],
)
def test_arguments_are_checked(make: Any, error: type[Exception], words: str) -> None:
    def work(worker: Worker) -> None:
        with pytest.raises(error, match=words):
            make(worker)

    simulate(work, optim.SGD(1.0), workers=1)


def test_groups_of_rules_step_locally_too() -> None:
    """A running average is averaged locally and its change is added by the server."""
    rule = optim.Grouped(optim.SGD(LR), {"b": optim.Average(0.5)})
    server = optim.Grouped(optim.DelayedNesterov(1.0, every=2), {"b": optim.SGD(1.0)})

    def work(worker: Worker) -> None:
        local = LocalSGD(worker, rule, period=3)
        for _ in range(12):
            local.step({"w": np.zeros((2, 3)), "b": np.full(6, 8.0)})

    result = simulate(work, server, workers=1)
    assert result.params is not None
    assert result.params["w"].tobytes() == start()["w"].tobytes()
    np.testing.assert_allclose(result.params["b"], 8.0, atol=0.01)


# ---- threads, and the end of a run ---------------------------------------------------------------


@pytest.mark.parametrize("mode", [Async(), SSP(0), BSP()])
@pytest.mark.parametrize("servers", [1, 2])
def test_threads_train_with_both(mode: Any, servers: int) -> None:
    for work, rule in (
        (elastic_work(optim.SGD(LR)), EASGD.server_optimizer()),
        (local_work(optim.SGD(LR)), optim.DelayedNesterov(0.5, every=3)),
    ):
        result = psframe.run(
            work, start(), optimizer=rule, mode=mode, workers=3, servers=servers, device="cpu"
        )
        rounds = math.ceil(STEPS / PERIOD)
        assert result.version == (rounds if mode == BSP() else 3 * rounds)
        assert result.ledger.applied == result.ledger.received == 3 * rounds


@pytest.mark.parametrize(
    "work", [elastic_work(optim.SGD(LR), steps=10**9), local_work(optim.SGD(LR), steps=10**9)]
)
def test_a_run_of_so_many_updates_ends(work: Callable[[Worker], None]) -> None:
    result = psframe.run(work, start(), optimizer=optim.SGD(0.3), workers=3, max_updates=40)
    assert result.version == 40


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [optim.SGD(LR), MOMENTUM, optim.Adam(0.1)])
def test_a_gpu_leaves_what_the_host_leaves(rule: Any) -> None:
    def elastic(worker: Worker) -> None:
        mine = EASGD(worker, rule, period=PERIOD)
        steps(worker, mine)

    def local_sgd(worker: Worker) -> None:
        steps(worker, LocalSGD(worker, rule, period=PERIOD))

    def steps(worker: Worker, mine: Any) -> None:
        for step in range(STEPS):
            noise = gradient(start(np.float32), 0, step)
            xp = worker.xp
            grads = {name: p + xp.asarray(noise[name]) for name, p in mine.params.items()}
            assert all(isinstance(p, xp.ndarray) for p in mine.params.values())
            mine.step(grads if step % 2 else noise)  # the host's are as welcome
        mine.finish()

    for work, server in ((elastic, EASGD.server_optimizer()), (local_sgd, optim.SGD(1.0))):
        host, gpu = (
            psframe.run(work, start(np.float32), optimizer=server, device=device)
            for device in ("cpu", "cuda")
        )
        assert final(gpu).tobytes() == final(host).tobytes()
