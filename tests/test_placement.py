"""Which ranks serve: what is accepted, who it is, and what is said when it cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import psframe
from psframe import optim
from psframe.errors import ArgumentError
from psframe.launcher import Launcher
from psframe.placement import (
    PER_NODE,
    check_servers,
    find_serving,
    line_of,
    no_room,
    one_process,
    parse_servers,
    serving_ranks,
)

PARAMS = {"w": np.zeros(4, np.float32)}


@pytest.mark.parametrize(
    ("given", "checked"),
    [
        (3, 3),
        (np.int32(2), 2),
        ("per-node", PER_NODE),
        ([0], (0,)),
        ((0, 8, 4), (0, 8, 4)),
        (range(0, 6, 2), (0, 2, 4)),
        (np.array([0, 3]), (0, 3)),
    ],
)
def test_what_is_accepted(given: Any, checked: Any) -> None:
    found = check_servers(given)
    assert found == checked
    assert repr(found) == repr(checked), "ranks compare it by its text"


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (0, ValueError, "servers: expected at least 1, got 0"),
        (1.5, TypeError, "servers: expected a number of servers, 'per-node' or a list"),
        (True, TypeError, "got True"),
        (None, TypeError, "got None"),
        ("per-host", ValueError, "'per-node' or a list of ranks that begins with 0, got 'per-host"),
        ([], ValueError, r"got \[\]; rank 0 is server 0"),
        ([1, 2], ValueError, r"got \[1, 2\]; rank 0 is server 0"),
        ([4, 0], ValueError, "begins with 0"),
        ([0, -1], ValueError, "there is no rank -1"),
        ([0, 2, 2], ValueError, r"rank 2 is twice in \[0, 2, 2\]"),
        ([0, "1"], TypeError, "got .0, '1'."),
        ([0, True], TypeError, "got .0, True."),
        (b"\0", TypeError, "servers: "),
        ({0, 1}, TypeError, "servers: "),
    ],
)
def test_what_is_refused(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_servers(given)


@pytest.mark.parametrize(
    ("text", "checked"),
    [("2", 2), ("per-node", PER_NODE), ("0,4,8", (0, 4, 8)), (" 0, 3 ", (0, 3)), ("0,", (0,))],
)
def test_flags(text: str, checked: Any) -> None:
    assert parse_servers(text) == checked


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("two", "--servers: expected a number of servers, per-node, or ranks such as 0,4,8; got"),
        ("", "--servers: expected"),
        ("0,x", "--servers: expected"),
        ("0", "--servers: expected at least 1, got 0"),
        ("4,8", r"--servers: .*got \[4, 8\]; rank 0"),
    ],
)
def test_wrong_flags(text: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        parse_servers(text)


def test_the_first_rank_of_each_node_serves() -> None:
    assert serving_ranks(PER_NODE, ["a", "a", "b", "b"]) == (0, 2)
    assert serving_ranks(PER_NODE, ["a", "b", "a", "c", "b"]) == (0, 1, 3)
    assert serving_ranks(2, ["a", "b", "c"]) == (0, 1)
    assert serving_ranks((0, 2), ["a", "b", "c"]) == (0, 2)


def test_the_others_stand_behind_the_servers_as_they_were() -> None:
    assert line_of((0, 1), 4) == (0, 1, 2, 3)
    assert line_of((0, 4, 2), 6) == (0, 4, 2, 1, 3, 5)


@pytest.mark.parametrize(
    ("servers", "nodes", "words"),
    [
        (2, "ab", "servers: 2 of 2 ranks serve, which leaves no worker; start at least 3 ranks"),
        (PER_NODE, "ab", "'per-node' makes each of 2 ranks serve.*two ranks or more on a node"),
        ((0, 1), "ab", "2 of 2 ranks serve"),
        ((0, 2), "ab", r"there is no rank 2 of \[0, 2\]: the run has 2 ranks, 0 to 1"),
        (2, "abc", None),
        (PER_NODE, "aab", None),
        ((0, 2), "abc", None),
    ],
)
def test_someone_has_to_work(servers: Any, nodes: str, words: str | None) -> None:
    error = no_room(servers, serving_ranks(servers, nodes), len(nodes))
    if words is None:
        assert error is None
    else:
        with pytest.raises(ArgumentError, match=words):
            raise error or AssertionError("no error")


def test_before_a_run_without_mpi_none_serves() -> None:
    assert find_serving(PER_NODE, None) == find_serving(2, None) == ()
    with pytest.raises(ArgumentError, match="this is one process"):
        find_serving((0, 1), None)
    assert find_serving((0, 2), Launcher("mpirun", 0, 4)) == (0, 2)
    assert find_serving(2, Launcher("mpirun", 0, None)) == (0, 1)


@pytest.fixture
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_launcher")
def test_one_process_is_one_node() -> None:
    assert (one_process(PER_NODE), one_process(3)) == (1, 3)
    versions = []

    def work(worker: psframe.Worker) -> None:
        versions.append(worker.pull().versions)

    psframe.run(work, PARAMS, optimizer=optim.SGD(0.1), servers="per-node")
    assert versions == [(0,)]
    with pytest.raises(ValueError, match=r"servers: \[0, 2\] are ranks of an MPI job.*how many .2"):
        psframe.run(work, PARAMS, optimizer=optim.SGD(0.1), servers=[0, 2])


def test_the_simulator_takes_a_number() -> None:
    for servers in ("per-node", [0, 1]):
        with pytest.raises(TypeError, match="servers: expected an integer"):
            psframe.simulate(
                lambda worker: None,
                PARAMS,
                optimizer=optim.SGD(0.1),
                workers=1,
                servers=servers,  # type: ignore[arg-type]
                compute_time_s=lambda rng, worker, clock: 1.0,
            )
