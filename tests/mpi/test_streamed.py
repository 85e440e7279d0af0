"""Large gradients over MPI: announced, written, and applied behind who writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe import BSP, SSP, Async, Worker, optim
from psframe.packing import GradientSlot
from psframe.transports import mpi as transport
from psframe.transports import transfers

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
N = 300_000  # 1.2 MB of float32, in two tensors
SHAPES = {"w": (1000, 250), "b": (N - 250_000,)}
PARAMS = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
OPTIMIZERS = [
    optim.SGD(0.1),
    optim.Adam(0.01, weight_decay=0.01, no_decay=("b",)),
    optim.Grouped(optim.SGD(0.1, momentum=0.9), {"b": optim.Average(0.9)}),
]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between nodes, too, a gradient arrives in a dozen of pieces."""
    for module in (transport, transfers):
        monkeypatch.setattr(module, "PIECE_BYTES", 100_000)


def gradient(worker: int, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([worker, step])
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def pieces(monkeypatch: pytest.MonkeyPatch, after: Callable[[int], None]) -> None:
    """Call `after` with how much of a streamed gradient has been written, at each piece."""
    pack = GradientSlot.pack

    def watched(
        slot: GradientSlot,
        grads: Any,
        judge: bool = True,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[bool, float]:
        assert advance is not None, "it is not streamed"

        def told(end: int) -> None:
            advance(end)
            after(end)

        return pack(slot, grads, judge, told)

    monkeypatch.setattr(GradientSlot, "pack", watched)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("shared", [True, False])
def test_one_worker_is_a_serial_loop(optimizer: Any, shared: bool) -> None:
    """The others leave at once; pushes come alone, two at a time, and as gradients()."""

    def work(worker: Worker) -> None:
        if worker.index:
            return
        worker.push_pull(gradient(0, 0))
        first = worker.push(gradient(0, 1))
        second = worker.push(gradient(0, 2))
        assert second.wait().version == 3
        assert first.wait().version == 2
        for name, array in worker.gradients().items():
            array[...] = gradient(0, 3)[name]
        params = worker.push_pull(None)
        assert params.version == 4

    result = psframe.run(work, PARAMS, optimizer=optimizer, shared_memory=shared)
    if RANK == 0:
        layout = psframe.layout.Layout.of(PARAMS)
        rule, old, new = optimizer.updater(layout, 0, N), np.zeros(N, "f"), np.zeros(N, "f")
        for step in range(4):
            flat = np.concatenate([g.ravel() for g in gradient(0, step).values()])
            assert rule.update(step, old, flat, new)
            old, new = new, old
        got = np.concatenate([p.ravel() for p in result.params.values()])
        np.testing.assert_array_equal(got, old)
        assert result.ledger.applied == result.ledger.received == 4


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP()], ids=repr)
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_every_push_is_counted_and_summed(mode: Any, clip_norm: float | None) -> None:
    """Small integers, whose sums are exact in any order."""
    steps = 8

    def work(worker: Worker) -> None:
        ones = {name: np.full(s, 1 + worker.index, np.float32) for name, s in SHAPES.items()}
        worker.pull()
        for _ in range(steps):
            params = worker.push_pull(ones)
            assert params.receipt is not None
            assert params.receipt.applied
            values = np.concatenate([p.ravel()[::997] for p in params.values()])
            assert (values == values[0]).all(), "two versions in one pull"

    result = psframe.run(
        work, PARAMS, optimizer=optim.SGD(1.0), mode=mode, clip_norm=clip_norm, device="cpu"
    )
    if RANK == 0:
        workers = SIZE - 1
        total = sum(range(1, workers + 1)) / (workers if isinstance(mode, BSP) else 1)
        if clip_norm is not None:
            total = (1 if isinstance(mode, BSP) else workers) / np.sqrt(N)
        for array in result.params.values():
            np.testing.assert_allclose(array, -steps * total, rtol=1e-4)
        assert result.ledger.applied == steps * workers


SHARED = pytest.mark.parametrize("shared", [True, False], ids=["memory", "mpi"])


@pytest.mark.mpi(min_size=2)
@SHARED
@pytest.mark.parametrize("where", [0, N - 1])
def test_a_gradient_that_is_not_finite_is_refused_whole(where: int, shared: bool) -> None:
    def work(worker: Worker) -> None:
        if worker.index:
            return
        bad = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
        bad["w" if where == 0 else "b"].reshape(-1)[0 if where == 0 else -1] = np.nan
        receipt = worker.push(bad).wait()
        assert (receipt.applied, receipt.reason) == (False, "non-finite gradient")
        huge = {name: np.full(shape, 3e38, np.float32) for name, shape in SHAPES.items()}
        receipt = worker.push(huge).wait()
        assert (receipt.applied, receipt.reason) == (False, "non-finite update")
        assert worker.push_pull(gradient(0, 0)).version == 1

    result = psframe.run(work, PARAMS, optimizer=optim.SGD(2.0), shared_memory=shared)
    if RANK == 0:
        for name, array in result.params.items():
            np.testing.assert_array_equal(array, -2 * gradient(0, 0)[name])
        assert result.ledger.refused == 2


@pytest.mark.mpi(min_size=2)
@SHARED
def test_who_cannot_write_it_all_is_refused_and_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    class Oops(Exception):
        pass

    def fail(end: int) -> None:
        if end > 100_000:
            raise Oops

    def work(worker: Worker) -> None:
        if worker.index == 0:
            with pytest.raises(Oops):
                worker.push(gradient(0, 0))
            monkeypatch.undo()
            for module in (transport, transfers):
                monkeypatch.setattr(module, "PIECE_BYTES", 100_000)
            assert worker.push_pull(gradient(0, 1)).version == 1

    pieces(monkeypatch, fail)
    result = psframe.run(work, PARAMS, optimizer=optim.SGD(1.0), shared_memory=shared)
    if RANK == 0:
        for name, array in result.params.items():
            np.testing.assert_array_equal(array, -gradient(0, 1)[name])
        assert (result.ledger.refused, result.ledger.applied) == (1, 1)


@pytest.mark.mpi(min_size=3)
@SHARED
def test_who_stalls_in_the_middle_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Worker 0 writes half of its gradient and waits until worker 1 has pushed thrice."""
    stalled = False

    def stall(end: int) -> None:
        nonlocal stalled
        if RANK == 1 and end > N // 2 and not stalled:
            stalled = True
            WORLD.send(None, dest=2, tag=7)
            WORLD.recv(source=2, tag=8)

    def work(worker: Worker) -> None:
        if worker.index == 0:
            worker.pull()
            receipt = worker.push(gradient(0, 0)).wait()
            assert (receipt.applied, receipt.version, receipt.staleness) == (True, 4, 3)
        elif worker.index == 1:
            WORLD.recv(source=1, tag=7)
            for step in range(3):
                assert worker.push_pull(gradient(1, step)).version == step + 1
            WORLD.send(None, dest=1, tag=8)

    pieces(monkeypatch, stall)
    result = psframe.run(work, PARAMS, optimizer=optim.SGD(0.5), shared_memory=shared)
    if RANK == 0:
        for name, array in result.params.items():
            want = np.zeros_like(array)
            for grads in (*(gradient(1, step) for step in range(3)), gradient(0, 0)):
                want -= np.float32(0.5) * grads[name]
            np.testing.assert_array_equal(array, want)
