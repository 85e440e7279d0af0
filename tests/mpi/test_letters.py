"""Push_pulls by letter among real ranks: when, in what order, and with the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe import SSP, Async, Worker, optim
from psframe.transports import letters, mpi_endpoint, mpi_port, mpi_post
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
    """But a worker's first, which prepares what the others need, and its second, which tells that
    all is taken that was sent before."""
    result = pushes(size, 1, mode=mode)
    if RANK == 0:
        assert result.ledger.received == STEPS
    assert written == {0: ["answer"], 1: ["push"]}.get(RANK, []) * (STEPS - 2)


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("mode", [Async(), SSP(1)], ids=repr)
def test_every_letter_is_answered_by_one(written: list[str], mode: Any) -> None:
    result = pushes(SMALL, mode=mode)
    sent = WORLD.allreduce(written.count("push"))
    assert sent == WORLD.allreduce(written.count("answer")) > 0
    if RANK == 0:
        assert result.ledger.received == STEPS * (SIZE - 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("size", [SMALL, STREAMED])
def test_letters_change_no_bit(
    written: list[str], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Of one worker, whose pushes have an order."""
    with_letters = pushes(size, 1)
    assert len(written) == (STEPS - 2 if RANK < 2 else 0)
    without_letters(monkeypatch)
    without = pushes(size, 1)
    assert len(written) == (STEPS - 2 if RANK < 2 else 0)
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

        for _ in range(3):
            push_pull()
        worker.log(loss=1.0)
        worker._notes.flush_log()
        for _ in range(2):
            push_pull()
        worker.push(ones)
        for _ in range(3):
            push_pull()
        worker.pull()
        for _ in range(2):
            push_pull()

    psframe.run(work, {"w": np.zeros(SMALL, np.float32)}, optimizer=optim.SGD(0.1))
    if RANK:
        assert sent == [0, 0, 1, 0, 1, 0, 0, 1, 0, 1]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("size", [SMALL, STREAMED])
def test_a_refused_letter_is_answered(written: list[str], size: int) -> None:
    def work(worker: Worker) -> None:
        worker.pull()
        good, bad = gradient(0, 0, size), gradient(0, 0, size)
        bad["w"][-1] = np.nan
        for _ in range(2):
            assert worker.push_pull(good).receipt.applied  # type: ignore[union-attr]
        assert not written
        refused = worker.push_pull(bad)
        assert refused.receipt is not None
        assert (refused.receipt.applied, refused.receipt.reason) == (False, "non-finite gradient")
        assert np.isfinite(refused["w"]).all()
        assert worker.push_pull(good).receipt.applied  # type: ignore[union-attr]

    result = psframe.run(work, {"w": np.zeros(size, np.float32)}, optimizer=optim.SGD(0.1))
    if RANK == 0:
        assert result.version == 3 * (SIZE - 1)
    assert len(written) == (2 * (SIZE - 1) if RANK == 0 else 2)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("late", ["neither", "server", "worker"])
@pytest.mark.parametrize("mode", [Async(), SSP(2)], ids=repr)
def test_an_answer_comes_also_if_nobody_waited_for_it(
    written: list[str], monkeypatch: pytest.MonkeyPatch, mode: Any, late: str
) -> None:
    """A push_pull that an exception ends is answered later, and what follows comes after it.

    Also where the other end sees its letter only once a message has come that was sent after it.
    """
    looks, steps = Letters.take, 4

    def interrupted(end: Letters, *, once: bool = False) -> bool:
        monkeypatch.setattr(Letters, "take", seen_late if late == "worker" else looks)
        raise KeyError("in the middle")

    taken: list[bool] = [False]

    def seen_late(end: Letters, *, once: bool = False) -> bool:
        return taken[0] and looks(end, once=once)

    take = mpi_post.Post.take

    def noted(post: Any, *, once: bool = False) -> Any:
        message = take(post, once=once)
        taken[0] = message is not None
        return message

    seen = [0] * SIZE

    def blind(desk: Desk) -> int:
        """See a worker's letters in time, but not its last."""
        for worker in desk.pushes:
            if seen[worker] < steps - 3 and desk.take_from(worker):
                seen[worker] += 1
                return worker
        return -1

    if late == "worker":
        monkeypatch.setattr(mpi_post.Post, "take", noted)
    elif late == "server":
        monkeypatch.setattr(Desk, "take", blind)

    def work(worker: Worker) -> None:
        worker.pull()
        for step in range(steps - 1):
            worker.push_pull(gradient(0, step, SMALL))
        monkeypatch.setattr(Letters, "take", interrupted)
        with pytest.raises(KeyError, match="in the middle"):
            worker.push_pull(gradient(0, steps, SMALL))
        assert written == ["push"] * (steps - 2)  # the last of which is late
        params = worker.push_pull(gradient(0, steps + 1, SMALL))
        assert params.receipt is not None
        assert params.receipt.applied

    params = {"w": np.zeros(SMALL, np.float32)}
    result = psframe.run(work, params, optimizer=optim.SGD(0.1), mode=mode, device="cpu")
    if RANK == 0:
        assert result.version == (steps + 1) * (SIZE - 1)
        assert result.lost == ()


@pytest.mark.mpi(min_size=3)
def test_who_has_no_letters_is_served_beside_those_who_have(
    written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in its turn: the server looks at MPI after each letter."""
    made: list[bool] = []
    init = Desk.__init__

    def noted(desk: Desk, *arguments: Any, alone: bool, **more: Any) -> None:
        made.append(alone)
        init(desk, *arguments, alone=alone, **more)

    monkeypatch.setattr(Desk, "__init__", noted)
    monkeypatch.setattr(letters, "_WORKERS_MAX", 1)
    result = pushes(SMALL)
    if RANK == 0:
        assert result.version == STEPS * (SIZE - 1)
        assert made == [False]
    assert len(written) == (STEPS - 2 if RANK < 2 else 0)
