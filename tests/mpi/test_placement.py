"""Servers on ranks of the user's choice: who serves, that nothing else changes, what errors say."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe import Worker
from psframe.launcher import find_launcher
from psframe.placement import find_serving
from psframe.transports import mpi

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
PARAMS = {"w": np.zeros((4, 2), np.float32), "b": np.zeros(3, np.float32)}
ONES = {name: np.ones_like(p) for name, p in PARAMS.items()}
SGD = psframe.optim.SGD(lr=0.5)


def run(work: Any, **kwargs: Any) -> psframe.Result:
    return psframe.run(work, PARAMS, optimizer=SGD, **kwargs)


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks 0 and 1 be on one node, 2 and 3 on the next."""
    monkeypatch.setattr(mpi, "node_id", lambda: bytes([RANK // 2] * 16))


def took_part(servers: Any, comm: Any = None, **kwargs: Any) -> tuple[list[int], psframe.Result]:
    """Run, and give each rank's worker index, -1 for a server."""
    index = np.full(1, -1)

    def work(worker: Worker) -> None:
        index[0] = worker.index
        for _ in range(6):
            worker.push_pull(ONES)

    result = run(work, servers=servers, comm=comm, **kwargs)
    everyone = np.empty((comm or WORLD).size, index.dtype)
    (comm or WORLD).Allgather(index, everyone)
    return everyone.tolist(), result


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("shared", [True, False], ids=["memory", "mpi"])
@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ([0, 2], [-1, 0, -1, 1]),
        ([0, 3, 1], [-1, -1, 0, -1]),
        ([0], [-1, 0, 1, 2]),
        (np.array([0, 1]), [-1, -1, 0, 1]),
    ],
    ids=str,
)
def test_the_ranks_that_are_named_serve(servers: Any, expected: list[int], shared: bool) -> None:
    if SIZE != 4:
        pytest.skip("for four ranks")
    found, result = took_part(servers, shared_memory=shared)
    assert found == expected
    assert result.is_root == (RANK == 0)
    assert result.version == 6 * (SIZE - len(servers))
    if result.params is not None:
        for array in result.params.values():  # of all shards
            np.testing.assert_array_equal(array, -0.5 * result.version)


@pytest.mark.mpi(min_size=4)
@pytest.mark.usefixtures("pairs")
def test_one_server_a_node(caplog: pytest.LogCaptureFixture) -> None:
    if SIZE != 4:
        pytest.skip("for four ranks")
    launcher = find_launcher()
    assert launcher is not None
    assert find_serving("per-node", launcher) == (0, 2)
    with caplog.at_level(logging.WARNING, "psframe"):
        found, result = took_part("per-node")
    assert found == [-1, 0, -1, 1]
    assert result.version == 12
    assert not caplog.records


@pytest.mark.mpi(min_size=4)
@pytest.mark.usefixtures("pairs")
def test_ranks_are_those_of_the_communicator() -> None:
    backwards = WORLD.Split(0, SIZE - RANK)
    try:
        found, result = took_part([0, backwards.size - 1], backwards)
        assert found == [-1, *range(SIZE - 2), -1]
        assert result.is_root == (backwards.rank == 0)
        with (
            pytest.raises(psframe.WorkerFailed)
            if backwards.rank != 1
            else pytest.raises(ValueError, match="boom") as caught
        ):
            run(_failing, servers=[0, backwards.size - 1], comm=backwards)
        if backwards.rank != 1:
            error = caught.value
            assert isinstance(error, psframe.WorkerFailed)
            assert (error.worker, error.rank) == (0, 1)
    finally:
        backwards.Free()


def _failing(worker: Worker) -> None:
    worker.pull()
    if worker.index == 0:
        raise ValueError("boom")
    while True:
        worker.push_pull(ONES)


@pytest.mark.mpi(min_size=3)
def test_an_error_names_the_rank_as_the_user_knows_it() -> None:
    failing = 1  # worker 0, since rank 2 serves; the first in the line after two servers
    with pytest.raises((psframe.WorkerFailed, ValueError)) as caught:
        run(_failing, servers=[0, 2])
    if failing == RANK:
        assert caught.type is ValueError
    else:
        assert isinstance(caught.value, psframe.WorkerFailed)
        assert (caught.value.worker, caught.value.rank) == (0, failing)
        assert f"worker 0 (rank {failing}) failed with ValueError: boom" in str(caught.value)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("servers", "words"),
    [
        ([0, SIZE], f"there is no rank {SIZE}"),
        (list(range(SIZE)), f"{SIZE} of {SIZE} ranks serve, which leaves no worker"),
        ([0, 1, 1], "rank 1 is twice"),
        ([1, 0], "rank 0 is server 0"),
        ("per-rack", "'per-node' or a list of ranks"),
    ],
)
def test_what_cannot_be_is_an_error_on_every_rank(servers: Any, words: str) -> None:
    with pytest.raises((ValueError, psframe.ArgumentError), match=words):
        run(lambda worker: None, servers=servers)


@pytest.mark.mpi(min_size=2)
def test_a_node_of_one_rank_leaves_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "node_id", lambda: bytes([RANK] * 16))
    with pytest.raises(psframe.ArgumentError, match="two ranks or more on a node"):
        run(lambda worker: None, servers="per-node")


@pytest.mark.mpi(min_size=2)
def test_every_rank_has_to_say_the_same() -> None:
    with pytest.raises(psframe.ArgumentError, match=r"servers: rank 1.* another value than rank 0"):
        run(lambda worker: None, servers=1 if RANK == 0 else [0])
