"""`psframe.bench push-pull` on real ranks: its rows, and that a wrong buffer fails it."""

import json

import pytest
from mpi4py import MPI

from psframe.bench import main
from psframe.transports.echo import EchoLine
from psframe.transports.mpi_endpoint import MpiEndpoint

SMALL = ["push-pull", "--json", "--rounds", "2", "--seconds", "0.002", "--bytes", "1KiB", "64KiB"]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("check", ["pages", "all"])
def test_rows_of_psframe_and_of_the_echo(check: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--check", check]) == 0
    printed = capsys.readouterr().out.splitlines()
    if MPI.COMM_WORLD.rank:
        assert printed == []
        return
    rows = [json.loads(line) for line in printed]
    assert [(row["what"], row["bytes"]) for row in rows] == [
        (what, n_bytes) for n_bytes in (1024, 65536) for what in ("psframe", "echo")
    ]
    for row in rows:
        assert (row["workers"], row["servers"]) == (MPI.COMM_WORLD.size - 1, 1)
        assert row["ops_per_s"] > 0
        assert row["gbytes_per_s"] == pytest.approx(row["ops_per_s"] * row["bytes"] / 1e9, rel=1e-3)
    assert [("ratio" in row) for row in rows] == [True, False] * 2


@pytest.mark.mpi(min_size=3)
def test_two_servers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--servers", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == (0 if MPI.COMM_WORLD.rank else 4)


@pytest.mark.mpi(min_size=2)
def test_a_snapshot_in_a_wrong_buffer_fails_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = MpiEndpoint.snapshot

    def wrong(self: MpiEndpoint, server: int, buffer: int) -> object:
        return right(self, server, 2 if buffer == 1 else buffer)

    monkeypatch.setattr(MpiEndpoint, "snapshot", wrong)
    assert main(SMALL) == 1
    error = capsys.readouterr().err
    if MPI.COMM_WORLD.rank == 0:
        assert "WrongAnswer" in error
        assert "is not of version" in error


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
