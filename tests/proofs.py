"""Runs whose result is known to the last bit, whatever carries them out.

`cases` gives them with the bytes that a serial loop leaves; the same ones are tried in threads, in
the simulator and under MPI. Nothing here knows of servers, messages or time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psframe import BSP, SSP, Async, Params, Worker, optim
from psframe.layout import Array, Layout

__all__ = ["Case", "averaged", "blocks_of", "cases", "check", "gradient", "initial", "serial"]

# 54 elements: with three servers the shards are 16, 16 and 22, and tensors lie across their ends.
SHAPES = {"w1": (4, 5), "b1": (5,), "w2": (5, 5), "b2": (4,)}
STEPS = 7
OPTIMIZERS: dict[str, Any] = {
    "sgd": optim.SGD(lr=0.1),
    "decay": optim.SGD(lr=optim.schedules.Cosine(0.1, 9), weight_decay=0.01),
    "momentum": optim.SGD(lr=0.05, momentum=0.9),
    "nesterov": optim.SGD(lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": optim.Adagrad(lr=0.1),
    "rmsprop": optim.RMSProp(lr=0.01),
    "adam": optim.Adam(lr=0.01),
    "adamw": optim.AdamW(lr=0.01),
}

Gradients = dict[str, Array]


@dataclass(frozen=True)
class Case:
    """Attributes:
    name: for the test's id.
    work, params, kwargs: the run's arguments; `mode`, `optimizer` and `seed` are in kwargs.
    workers: W; under a launcher the ranks that do not serve must be as many.
    servers: the numbers of servers that must leave the same bits.
    expected: names to the final parameters.
    version: the final version; None where it depends on the schedule.
    """

    name: str
    work: Callable[[Worker], None]
    params: Mapping[str, Array]
    kwargs: Mapping[str, Any]
    workers: int
    servers: Sequence[int]
    expected: Mapping[str, Array]
    version: int | None = None


def check(case: Case, result: Any) -> None:
    """Compare the root's Result with what the case expects, bit for bit."""
    for name, expected in case.expected.items():
        got = result.params[name]
        assert got.dtype == expected.dtype
        assert got.tobytes() == expected.tobytes(), f"{case.name}: {name!r} differs"
    if case.version is not None:
        assert result.version == case.version


# ---- gradients that depend on parameters, worker and step ------------------------------------


def initial(dtype: Any) -> dict[str, Array]:
    """Parameters to begin with."""
    rng = np.random.default_rng(7)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def gradient(params: Mapping[str, Array], worker: int, step: int) -> Gradients:
    """An element-wise, deterministic gradient."""
    grads = {}
    for name, p in params.items():
        noise = np.random.default_rng((worker, step, p.size)).standard_normal(p.shape)
        grads[name] = p * p.dtype.type(0.5) + noise.astype(p.dtype)
    return grads


# ---- the oracles: one process, one vector, no server -----------------------------------------


class _Serial:
    """The parameters in one place, and the rule applied to all of them at once."""

    def __init__(self, params: Mapping[str, Array], optimizer: Any) -> None:
        self.layout = Layout.of(params)
        self.flat = self.layout.flatten(params)
        self.rule = optimizer.updater(self.layout, 0, self.layout.size)
        self.version = 0

    @property
    def params(self) -> dict[str, Array]:
        return {name: view.copy() for name, view in self.layout.views(self.flat).items()}

    def apply(self, flat_grad: Array) -> None:
        out = np.empty_like(self.flat)
        assert self.rule.update(self.version, self.flat, flat_grad, out)
        self.flat = out
        self.version += 1

    def apply_mean(self, grads: Sequence[Gradients]) -> None:
        mean = self.layout.flatten(grads[0])
        for grad in grads[1:]:
            mean = mean + self.layout.flatten(grad)
        if len(grads) > 1:
            mean = mean / len(grads)
        assert mean.dtype == self.flat.dtype
        self.apply(mean)


def serial(params: Mapping[str, Array], optimizer: Any, steps: int) -> dict[str, Array]:
    """Plain stochastic gradient descent of one process."""
    loop = _Serial(params, optimizer)
    for step in range(steps):
        loop.apply(loop.layout.flatten(gradient(loop.params, 0, step)))
    return loop.params


def averaged(
    params: Mapping[str, Array], optimizer: Any, workers: int, steps: int
) -> dict[str, Array]:
    """One process that averages W gradients a step, summed in worker order."""
    loop = _Serial(params, optimizer)
    for step in range(steps):
        now = loop.params
        loop.apply_mean([gradient(now, worker, step) for worker in range(workers)])
    return loop.params


# ---- the work --------------------------------------------------------------------------------


def push_pulls(worker: Worker) -> None:
    params = worker.pull()
    for step in range(STEPS):
        params = worker.push_pull(gradient(params, worker.index, step))


def pull_then_push(worker: Worker) -> None:
    for step in range(STEPS):
        params = worker.pull()
        worker.push(gradient(params, worker.index, step))


def in_place(worker: Worker) -> None:
    for step in range(STEPS):
        params = worker.pull()
        arrays = worker.gradients()
        for name, grad in gradient(params, worker.index, step).items():
            arrays[name][...] = grad
        worker.push(None)


def prefetching(worker: Worker) -> None:
    """Pushes, then pulls ahead: the pull is behind the push, so that nothing is stale."""
    params = worker.pull()
    for step in range(STEPS):
        worker.push(gradient(params, worker.index, step))
        params = worker.pull_async().wait()


# ---- leases ------------------------------------------------------------------------------------

N_SAMPLES, BATCH, EPOCHS, SEED = 43, 4, 2, 11


def blocks_of(plan: int, *, n: int, batch: int, epochs: int, seed: int) -> list[Array]:
    """The blocks that a plan's leases hand out, in order."""
    blocks = []
    for epoch in range(epochs):
        order = np.arange(n)
        sequence = np.random.SeedSequence(seed, spawn_key=(1, plan, epoch))
        np.random.Generator(np.random.PCG64(sequence)).shuffle(order)
        blocks += [order[begin : begin + batch] for begin in range(0, n, batch)]
    return blocks


def _of_samples(params: Mapping[str, Array], indices: Array) -> Gradients:
    return gradient(params, int(indices[0]), int(indices.sum()))


def leasing(worker: Worker) -> None:
    """Two calls of `leases`; in BSP both are cut into rounds in worker order."""
    for _ in range(2):
        params = worker.pull()
        for indices in worker.leases(N_SAMPLES, BATCH, epochs=EPOCHS):
            params = worker.push_pull(_of_samples(params, indices))


def leased_in_rounds(
    params: Mapping[str, Array], optimizer: Any, workers: int
) -> tuple[dict[str, Array], int]:
    loop = _Serial(params, optimizer)
    for plan in range(2):
        blocks = blocks_of(plan, n=N_SAMPLES, batch=BATCH, epochs=EPOCHS, seed=SEED)
        for first in range(0, len(blocks), workers):
            now = loop.params
            loop.apply_mean([_of_samples(now, b) for b in blocks[first : first + workers]])
    return loop.params, loop.version


# ---- sums of small integers, which no order of summation changes -------------------------------


def counting(worker: Worker) -> None:
    """Every push adds the worker's number, two pushes a pull, whoever is first."""
    for _ in range(STEPS):
        params = worker.pull()
        worker.push(_ones(params, 1.0 + worker.index))
        worker.push(_ones(params, 2.0))


def counting_samples(worker: Worker) -> None:
    """Every sample adds its own number once an epoch, whoever computes it."""
    params = worker.pull()
    for indices in worker.leases(N_SAMPLES, BATCH, epochs=EPOCHS):
        params = worker.push_pull(_ones(params, float(indices.sum())))


def _ones(params: Params, value: float) -> Gradients:
    return {name: np.full_like(p, value) for name, p in params.items()}


def _less(params: Mapping[str, Array], value: float) -> dict[str, Array]:
    return {name: p - p.dtype.type(value) for name, p in params.items()}


def cases(workers: int = 3, servers: Sequence[int] = (1, 3)) -> Iterator[Case]:
    """Give every case for W workers and these numbers of servers."""
    if workers == 1:
        yield from _serial_cases(servers)
    yield from _rounds(workers, servers)
    yield from _sums(workers, servers)


def _serial_cases(servers: Sequence[int]) -> Iterator[Case]:
    for dtype in ("float32", "float64"):
        params = initial(dtype)
        for name, optimizer in OPTIMIZERS.items():
            expected = serial(params, optimizer, STEPS)
            kwargs = {"optimizer": optimizer, "mode": Async()}
            yield Case(
                f"serial-{name}-{dtype}", push_pulls, params, kwargs, 1, servers, expected, STEPS
            )
    expected = serial(params, OPTIMIZERS["adam"], STEPS)
    for work in (pull_then_push, in_place, prefetching):
        for mode in (Async(), SSP(0), SSP(2), BSP(), BSP(1)):
            kwargs = {"optimizer": OPTIMIZERS["adam"], "mode": mode}
            name = f"serial-{work.__name__}-{mode}"
            yield Case(name, work, params, kwargs, 1, servers, expected, STEPS)


def _rounds(workers: int, servers: Sequence[int]) -> Iterator[Case]:
    for dtype in ("float32", "float64"):
        params = initial(dtype)
        for name in ("sgd", "momentum", "adamw"):
            optimizer = OPTIMIZERS[name]
            kwargs = {"optimizer": optimizer, "mode": BSP()}
            expected = averaged(params, optimizer, workers, STEPS)
            for work in (push_pulls, pull_then_push, in_place):
                case = f"bsp{workers}-{work.__name__}-{name}-{dtype}"
                yield Case(case, work, params, kwargs, workers, servers, expected, STEPS)
        kwargs = {"optimizer": OPTIMIZERS["adam"], "mode": BSP(), "seed": SEED}
        expected, version = leased_in_rounds(params, OPTIMIZERS["adam"], workers)
        case = f"bsp{workers}-leasing-{dtype}"
        yield Case(case, leasing, params, kwargs, workers, servers, expected, version)


def _sums(workers: int, servers: Sequence[int]) -> Iterator[Case]:
    # With lr = 1/4 and all numbers below 2^20 every sum is exact, even in float32.
    params = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    pushed = sum(STEPS * (3.0 + worker) for worker in range(workers))
    samples = EPOCHS * N_SAMPLES * (N_SAMPLES - 1) / 2.0
    for mode in (Async(), SSP(0), SSP(3)):
        kwargs = {"optimizer": optim.SGD(lr=0.25), "mode": mode, "seed": SEED}
        for work, total, version in (
            (counting, pushed, 2 * STEPS * workers),
            (counting_samples, samples, EPOCHS * -(-N_SAMPLES // BATCH)),
        ):
            expected = _less(params, 0.25 * total)
            name = f"sum{workers}-{work.__name__}-{mode}"
            yield Case(name, work, params, kwargs, workers, servers, expected, version)
