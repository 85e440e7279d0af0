"""`psframe.bench` on real ranks: its rows, and that a wrong buffer fails every benchmark."""

import json
from typing import Any

import pytest
from mpi4py import MPI

from psframe.bench import main
from psframe.benchmarks.latency import PERCENTILES
from psframe.benchmarks.loops import LOOPS
from psframe.benchmarks.scaling import combinations
from psframe.transports.echo import EchoLine
from psframe.transports.mpi_endpoint import MpiEndpoint

SMALL = ["push-pull", "--json", "--rounds", "2", "--seconds", "0.002", "--bytes", "1KiB", "64KiB"]


TINY = ["--rounds", "2", "--json"]
OTHERS = {
    "tensors": [*SMALL, "--tensors", "50"],
    "overlap": ["overlap", *TINY, "--seconds", "0.002", "--bytes", "64KiB"],
    "scaling": ["scaling", *TINY, "--seconds", "0.002", "--bytes", "64KiB"],
    "latency": ["latency", *TINY, "--seconds", "0.002", "--large", "1MiB"],
    # Large beside what a kernel may take back meanwhile of the pages of libraries.
    "memory": ["memory", *TINY, "--bytes", "32MiB"],
    "idle": ["idle", *TINY, "--silence", "0.11"],
}


def rows_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """The rows on rank 0; the others print nothing."""
    assert main(list(arguments)) == 0
    printed = capsys.readouterr().out.splitlines()
    if MPI.COMM_WORLD.rank:
        assert printed == []
    return [json.loads(line) for line in printed]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("read", [False, True])
def test_rows_of_psframe_and_of_the_echo(read: bool, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, *SMALL, *(["--read"] if read else []))
    if MPI.COMM_WORLD.rank:
        return
    assert [(row["what"], row["bytes"]) for row in rows] == [
        (what, n_bytes) for n_bytes in (1024, 65536) for what in ("psframe", "echo")
    ]
    for row in rows:
        assert (row["workers"], row["servers"]) == (MPI.COMM_WORLD.size - 1, 1)
        assert row["ops_per_s"] > 0
        assert row["gbytes_per_s"] == pytest.approx(row["ops_per_s"] * row["bytes"] / 1e9, rel=1e-3)
        assert row["read"] is read
    assert [("ratio" in row) for row in rows] == [True, False] * 2


@pytest.mark.mpi(min_size=2)
def test_many_tensors_are_measured_beside_one(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, *OTHERS["tensors"])
    if MPI.COMM_WORLD.rank:
        return
    assert [row["what"] for row in rows] == ["psframe", "one tensor", "echo"] * 2
    assert [row.get("tensors") for row in rows] == [50, 1, None] * 2
    assert [("ratio_to_one" in row) for row in rows] == [True, False, False] * 2


@pytest.mark.mpi(min_size=2)
def test_overlap_of_every_loop(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, *OTHERS["overlap"])
    if MPI.COMM_WORLD.rank:
        return
    assert [row["loop"] for row in rows] == list(LOOPS)
    for row in rows:
        assert row["step_ms"] > 0
        assert row["ratio"] > 0
        if row["workers"] == 1:
            ahead = row["loop"] not in ("push_pull", "in-slot")
            assert row["staleness_range"] == [ahead, ahead]


@pytest.mark.mpi(min_size=2)
def test_scaling_of_all_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, *OTHERS["scaling"])
    if MPI.COMM_WORLD.rank:
        return
    chosen = combinations(MPI.COMM_WORLD.size, (), ())
    assert [(row["servers"], row["workers"]) for row in rows] == chosen
    assert rows[0]["ratio_range"] == [1, 1]


@pytest.mark.mpi(min_size=2)
def test_latencies_rise_with_the_percentile(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, *OTHERS["latency"])
    if MPI.COMM_WORLD.rank:
        return
    kinds = [(row["what"], row["beside"]) for row in rows]
    alone = [("push_pull", "nothing"), ("pull", "nothing"), ("push", "nothing")]
    with_others = [("push_pull", "the same"), ("pull", "pushes"), ("push", "pulls")]
    several = MPI.COMM_WORLD.size > 2
    both = [pair for pairs in zip(alone, with_others, strict=True) for pair in pairs]
    assert kinds == (both if several else alone)
    for row in rows:
        found = [row[name] for name in PERCENTILES]
        assert found[0] > 0
        assert found == sorted(found)


@pytest.mark.mpi(min_size=2)
def test_memory_names_the_optimizer_s_apart(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, *OTHERS["memory"])
    if MPI.COMM_WORLD.rank:
        return
    assert [(row["optimizer"], row["slots_over_p"]) for row in rows] == [("sgd", 0), ("adam", 4)]
    for row in rows:
        rest = row["peak_over_p"] - row["slots_over_p"]
        assert row["beyond_over_p"] == pytest.approx(rest, abs=0.02)  # all are rounded
        # A current snapshot and the next, and a gradient of each worker, are there in any case.
        assert row["beyond_over_p"] > 1


@pytest.mark.mpi(min_size=2)
def test_idle_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, *OTHERS["idle"])
    if MPI.COMM_WORLD.rank:
        return
    assert len(rows) == 1
    assert rows[0]["server_percent"] >= 0
    assert rows[0]["first_us"] > 0
    assert ("woken_us" in rows[0]) == ("worker_percent" in rows[0]) == (MPI.COMM_WORLD.size > 2)


@pytest.mark.mpi(min_size=3)
def test_two_servers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--servers", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == (0 if MPI.COMM_WORLD.rank else 4)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["push-pull", *OTHERS])
def test_a_snapshot_in_a_wrong_buffer_fails_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = MpiEndpoint.snapshot

    def wrong(self: MpiEndpoint, server: int, buffer: int) -> object:
        return right(self, server, 2 if buffer == 1 else buffer)

    monkeypatch.setattr(MpiEndpoint, "snapshot", wrong)
    assert main(OTHERS.get(name, SMALL)) == 1
    error = capsys.readouterr().err
    if MPI.COMM_WORLD.rank == 0:
        assert "WrongAnswer" in error
        assert "of version" in error


@pytest.mark.mpi(min_size=2)
def test_an_echo_of_something_else_fails_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = EchoLine.trip
    monkeypatch.setattr(EchoLine, "trip", lambda self, which: right(self, 1 - which))
    assert main(SMALL) == 1
    assert "got another payload back" in capsys.readouterr().err


@pytest.mark.mpi
def test_too_many_servers(capsys: pytest.CaptureFixture[str]) -> None:
    size = MPI.COMM_WORLD.size
    if size == 1:
        pytest.skip("alone, the launcher may not say that there is one")
    assert main([*SMALL, "--servers", str(size)]) == 2
    if MPI.COMM_WORLD.rank == 0:
        assert f"--servers {size}: expected 1 to {size - 1}" in capsys.readouterr().err
