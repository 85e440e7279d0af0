"""Push_pulls by letter among real ranks: when, in what order, and with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe import SSP, Async, Worker, optim
from psframe.transports import letters, mpi_endpoint, mpi_port
from psframe.transports.letters import Desk, Letters, can_write

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
SMALL, STREAMED = 1000, 200_000
STEPS = 12

pytestmark = pytest.mark.skipif(not can_write(1, 0), reason="this machine has no letters")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this rank has sent by letter."""
    sent: list[str] = []
    push, answer = Letters.send, Desk.send

    def send_push(end: Letters) -> None:
        sent.append("push")
        push(end)

    def send_answer(desk: Desk, worker: int) -> None:
        sent.append("answer")
        answer(desk, worker)

    monkeypatch.setattr(Letters, "send", send_push)
    monkeypatch.setattr(Desk, "send", send_answer)
    return sent


def without_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mpi_endpoint, mpi_port):
        monkeypatch.setattr(module, "can_write", lambda servers, worker: False)


def gradient(worker: int, step: int, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([worker, step])
    return {"w": rng.standard_normal(size, np.float32)}


def pushes(size: int, workers: int = SIZE, **settings: Any) -> Any:
    """Run STEPS push_pulls of each worker, or of so many; the others leave at once."""

    def work(worker: Worker) -> None:
        if worker.index >= workers:
            return
        worker.pull()
        for step in range(STEPS):
            params = worker.push_pull(gradient(worker.index, step, size))
            assert params.receipt is not None
            assert params.receipt.applied

    params = {"w": np.zeros(size, np.float32)}
    return psframe.run(work, params, optimizer=optim.SGD(0.1, momentum=0.9), **settings)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("size", [SMALL, STREAMED])
@pytest.mark.parametrize("mode", [Async(), SSP(1)], ids=repr)
def test_push_pulls_are_letters_and_so_are_their_answers(
    written: list[str], mode: Any, size: int
) -> None:
    """All but a worker's first, which prepares what the others need."""
    result = pushes(size, mode=mode)
    if RANK == 0:
        assert result.ledger.received == STEPS * (SIZE - 1)
        assert written == ["answer"] * (STEPS - 1) * (SIZE - 1)
    else:
        assert written == ["push"] * (STEPS - 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("size", [SMALL, STREAMED])
def test_letters_change_no_bit(
    written: list[str], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Of one worker, whose pushes have an order."""
    with_letters = pushes(size, 1)
    assert len(written) == (STEPS - 1 if RANK < 2 else 0)
    without_letters(monkeypatch)
    without = pushes(size, 1)
    assert len(written) == (STEPS - 1 if RANK < 2 else 0)
    if RANK == 0:
        np.testing.assert_array_equal(with_letters.params["w"], without.params["w"])
        assert np.any(without.params["w"])


@pytest.mark.mpi(min_size=2)
def test_nothing_overtakes_what_went_through_mpi(written: list[str]) -> None:
    """What follows it goes the same way, if it is not answered, and what comes then by letter."""
    sent: list[int] = []

    def work(worker: Worker) -> None:
        ones = gradient(worker.index, 0, SMALL)
        worker.pull()

        def push_pull() -> None:
            before = len(written)
            worker.push_pull(ones)
            sent.append(len(written) - before)

        push_pull()
        push_pull()
        worker.log(loss=1.0)
        worker._notes.flush_log()
        push_pull()
        push_pull()
        worker.push(ones)
        push_pull()
        push_pull()
        worker.pull()
        push_pull()

    psframe.run(work, {"w": np.zeros(SMALL, np.float32)}, optimizer=optim.SGD(0.1))
    if RANK:
        assert sent == [0, 1, 0, 1, 0, 1, 1]


@pytest.mark.mpi(min_size=2)
def test_leases_leave_the_push_pulls_letters(written: list[str]) -> None:
    """The answer with the block tells that all before it has been taken."""

    def work(worker: Worker) -> None:
        worker.pull()
        for _ in worker.leases(40, 2):
            worker.push_pull(gradient(worker.index, 0, SMALL))

    result = psframe.run(work, {"w": np.zeros(SMALL, np.float32)}, optimizer=optim.SGD(0.1))
    total = WORLD.allreduce(written.count("push"))
    if RANK == 0:
        assert result.version == 20
        assert total == 20 - (SIZE - 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("size", [SMALL, STREAMED])
def test_a_refused_letter_is_answered(written: list[str], size: int) -> None:
    def work(worker: Worker) -> None:
        worker.pull()
        good, bad = gradient(0, 0, size), gradient(0, 0, size)
        bad["w"][-1] = np.nan
        assert worker.push_pull(good).receipt.applied  # type: ignore[union-attr]
        assert not written
        refused = worker.push_pull(bad)
        assert refused.receipt is not None
        assert (refused.receipt.applied, refused.receipt.reason) == (False, "non-finite gradient")
        assert np.isfinite(refused["w"]).all()
        assert worker.push_pull(good).receipt.applied  # type: ignore[union-attr]

    result = psframe.run(work, {"w": np.zeros(size, np.float32)}, optimizer=optim.SGD(0.1))
    if RANK == 0:
        assert result.version == 2 * (SIZE - 1)
    assert len(written) == (2 * (SIZE - 1) if RANK == 0 else 2)


@pytest.mark.mpi(min_size=2)
def test_an_answer_comes_also_if_nobody_waited_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A push_pull that an exception ends is answered later, and the worker goes on."""
    looks = Letters.take

    def interrupted(end: Letters, *, once: bool = False) -> bool:
        monkeypatch.setattr(Letters, "take", looks)
        raise KeyError("in the middle")

    def work(worker: Worker) -> None:
        worker.pull()
        worker.push_pull(gradient(0, 0, SMALL))
        monkeypatch.setattr(Letters, "take", interrupted)
        with pytest.raises(KeyError, match="in the middle"):
            worker.push_pull(gradient(0, 1, SMALL))
        params = worker.push_pull(gradient(0, 2, SMALL))
        assert params.receipt is not None
        assert params.receipt.applied

    result = psframe.run(work, {"w": np.zeros(SMALL, np.float32)}, optimizer=optim.SGD(0.1))
    if RANK == 0:
        assert result.version == 3 * (SIZE - 1)


@pytest.mark.mpi(min_size=3)
def test_who_has_no_letters_is_served_beside_those_who_have(
    written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(letters, "_WORKERS_MAX", 1)
    result = pushes(SMALL)
    if RANK == 0:
        assert result.version == STEPS * (SIZE - 1)
    assert len(written) == (STEPS - 1 if RANK < 2 else 0)
