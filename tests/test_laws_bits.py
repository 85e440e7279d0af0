"""The law of equal bits on real data: a perceptron on the digits, in float32 and float64.

`tests/test_equivalence.py` has the same on made-up gradients, for every optimizer and driver.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from laws import exponential, simulate

from psframe import BSP, SSP, Async, SimResult, Worker, optim
from psframe.data import Dataset
from psframe.layout import Array, Layout
from psframe.models import MLP
from psframe.settings import Settings
from psframe.train import load_parts

BATCH, BLOCKS = 32, 40
LR = 0.05

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


@functools.cache
def digits() -> Dataset:
    return load_parts(Settings().resolved()).train


@functools.cache
def model() -> MLP:
    return MLP(digits().input_shape, digits().n_classes, hidden=(32,))


def initial(dtype: str) -> dict[str, Array]:
    drawn = model().init(np.random.default_rng(5))
    return {name: array.astype(dtype) for name, array in drawn.items()}


def gradient(params: Mapping[str, Array], rows: Array) -> dict[str, Array]:
    x, y = digits().batch(rows)
    x = x.astype(params["w1"].dtype)
    return dict(model().loss_and_gradients(params, x, y)[1])


def blocks(size: int = BATCH) -> Iterator[Array]:
    """The blocks that leases hand out, in order."""
    for begin in range(0, BATCH * BLOCKS, size):
        yield np.arange(begin, begin + size)


def work(worker: Worker) -> None:
    params = worker.pull()
    for rows in worker.leases(BATCH * BLOCKS, BATCH, shuffle=False):
        params = worker.push_pull(gradient(params, rows))


def train(dtype: str, **options: Any) -> SimResult:
    options.setdefault("optimizer", optim.SGD(LR))
    return simulate(work, params=initial(dtype), **options)


def serial(dtype: str, optimizer: Any, batches: Sequence[Sequence[Array]]) -> dict[str, Array]:
    """One process: an update with the mean of the gradients of each batch's blocks, in order."""
    layout = Layout.of(initial(dtype))
    flat = layout.flatten(initial(dtype))
    rule = optimizer.updater(layout, 0, layout.size)
    for step, batch in enumerate(batches):
        params = layout.views(flat)
        total = layout.flatten(gradient(params, batch[0]))
        for rows in batch[1:]:
            total = total + layout.flatten(gradient(params, rows))
        out = np.empty_like(flat)
        assert rule.update(step, flat, total / len(batch) if len(batch) > 1 else total, out)
        flat = out
    return dict(layout.views(flat))


def assert_equal_bits(result: SimResult, expected: Mapping[str, Array]) -> None:
    assert result.params is not None
    for name, array in expected.items():
        assert result.params[name].dtype == array.dtype
        assert result.params[name].tobytes() == array.tobytes(), name


@DTYPES
@pytest.mark.parametrize("mode", [Async(), SSP(0), BSP()], ids=str)
@pytest.mark.parametrize("optimizer", [optim.SGD(LR, momentum=0.9), optim.Adam(0.01)], ids=str)
def test_one_worker_is_serial_sgd(dtype: str, mode: Any, optimizer: Any) -> None:
    result = train(dtype, workers=1, mode=mode, optimizer=optimizer)
    assert_equal_bits(result, serial(dtype, optimizer, [[rows] for rows in blocks()]))


@DTYPES
@pytest.mark.parametrize("workers", [2, 5, 8])
def test_bsp_is_the_mean_in_worker_order(dtype: str, workers: int) -> None:
    """A round's blocks are assigned in worker order."""
    every = list(blocks())
    rounds = [every[begin : begin + workers] for begin in range(0, BLOCKS, workers)]
    expected = serial(dtype, optim.SGD(LR), rounds)
    assert_equal_bits(train(dtype, workers=workers, mode=BSP()), expected)
    # The negative control: sums in another order have other bits.
    backwards = serial(dtype, optim.SGD(LR), [of[::-1] for of in rounds])
    if workers > 2:
        assert any(backwards[name].tobytes() != expected[name].tobytes() for name in expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-4)])
@pytest.mark.parametrize("workers", [2, 8])
def test_bsp_is_minibatch_sgd_on_the_joined_batch(
    dtype: str, tolerance: float, workers: int
) -> None:
    expected = serial(dtype, optim.SGD(LR), [[rows] for rows in blocks(BATCH * workers)])
    result = train(dtype, workers=workers, mode=BSP())
    assert result.version == BLOCKS // workers
    assert result.params is not None
    for name, array in expected.items():
        np.testing.assert_allclose(result.params[name], array, rtol=0, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP(1)], ids=str)
def test_the_number_of_servers_changes_nothing(dtype: str, mode: Any) -> None:
    one = train(dtype, workers=4, mode=mode, servers=1)
    for servers in (2, 5):
        more = train(dtype, workers=4, mode=mode, servers=servers)
        assert more.trace.tobytes() == one.trace.tobytes()
        assert one.params is not None
        assert_equal_bits(more, one.params)


@DTYPES
def test_ssp_0_keeps_the_pace_of_bsp(dtype: str) -> None:
    """Rounds end at the same times, of which each has one step of each worker."""

    def ends(mode: Any) -> list[float]:
        trace = train(dtype, workers=5, mode=mode, time=exponential).trace
        steps = [trace["time_s"][trace["clock"] == k] for k in range(BLOCKS // 5)]
        assert [len(times) for times in steps] == [5] * (BLOCKS // 5)
        return [times.max() for times in steps]

    assert ends(SSP(0)) == ends(BSP())
