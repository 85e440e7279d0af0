"""The ranks of a benchmark: those that take part in a measurement, and what all are told.

A measurement is made by the first ranks of the job, servers in front, in a communicator of their
own; the others wait. Nothing that one rank raises leaves another waiting.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from psframe.benchmarks.regime import round_trip_ns
from psframe.benchmarks.report import Spread
from psframe.errors import ArgumentError, LaunchError, PsframeError
from psframe.launcher import find_launcher, starting_mpi

__all__ = ["Job", "Part", "WrongAnswer", "open_job", "take_turns"]

T = TypeVar("T")

# Whoever is not needed in a measurement waits so long for its end.
_BOUND_S = 1800.0


class WrongAnswer(PsframeError):
    """Raised when an answer is not what it must be: what was measured is worth nothing."""


class Part:
    """The ranks of one measurement: [0, servers) serve, and the next `workers` work.

    Attributes:
        servers, workers: S and W.
        inside: whether this rank takes part.
        comm: a communicator of those that do, for `psframe.run`.
    """

    def __init__(self, mesh: Any, servers: int, workers: int, crowded: bool) -> None:
        self.servers, self.workers = servers, workers
        rank = mesh.rank
        self.inside = rank < servers + workers
        self.comm = mesh.comm.Split(int(self.inside), rank)
        # Of the workers; the others have one of their own.
        self._peers = self.comm.Split(int(rank < servers), rank)
        self._crowded = crowded

    @contextlib.contextmanager
    def meetings(self, count: int = 1) -> Iterator[Callable[[], None]]:
        """Give a function that waits for the other workers, to be called `count` times.

        Whoever fails makes the calls that are left on leaving: the others would wait for it.
        """
        left = count

        def meet() -> None:
            nonlocal left
            assert left, "one meeting too many"
            left -= 1
            self._wait()

        try:
            yield meet
        finally:
            while left:
                meet()

    def close(self) -> None:
        """Give the communicators back; every rank of the job does."""
        self._peers.Free()
        self.comm.Free()

    def _wait(self) -> None:
        from psframe.transports.mpi import Patience

        patience = Patience(self._crowded)
        request = self._peers.Ibarrier()
        while not request.Test():
            patience.wait()


class Job:
    """All ranks under one launcher.

    Attributes:
        rank, size: as in MPI.
        crowded: whether the node has more ranks than cores that this process may use.
        library: the MPI library's name and version.
        here: ranks on this rank's node.
    """

    def __init__(self, mesh: Any) -> None:
        self._mesh = mesh
        self.rank: int = mesh.rank
        self.size: int = mesh.size
        self.library: str = mesh.library
        self.here = [r for r, node in enumerate(mesh.nodes) if node == mesh.nodes[mesh.rank]]
        self.crowded = len(self.here) > len(os.sched_getaffinity(0))
        self._core_ns: list[float] = []

    def part(self, servers: int, workers: int | None = None) -> Part:
        """Choose the ranks of a measurement, all by default; every rank calls it.

        Raises:
            ArgumentError: there are not so many.
        """
        if not 0 < servers < self.size:
            raise ArgumentError(f"--servers {servers}: expected 1 to {self.size - 1}")
        most = self.size - servers
        workers = most if workers is None else workers
        if not 0 < workers <= most:
            raise ArgumentError(f"--workers {workers}: expected 1 to {most} of {self.size} ranks")
        return Part(self._mesh, servers, workers, self.crowded)

    def gather(self, *values: float) -> list[tuple[float, ...]]:
        """Gather equally many numbers of every rank, by rank."""
        record = struct.Struct(f"<{len(values)}d")
        everyone = self._mesh.all_gather(record.pack(*values), "what was measured", _BOUND_S)
        return [record.unpack(one) for one in everyone]

    def together(self, act: Callable[[], T]) -> T:
        """Act; should any rank raise, all do.

        Raises:
            WrongAnswer: another rank has raised something, which it says itself.
        """
        error: Exception | None = None
        result: T | None = None
        try:
            result = act()
        except Exception as raised:  # whatever it is, the others must not wait for this rank
            error = raised
        failed = [
            rank for rank, flag in enumerate(self.gather(float(error is not None))) if flag[0]
        ]
        if error is not None:
            raise error
        if failed:
            raise WrongAnswer(f"ranks {failed} have failed")
        return result  # type: ignore[return-value]  # act has returned it

    def listen(self) -> None:
        """Measure the core-to-core round trip of the moment on rank 0, while the others wait."""
        if self.rank == 0:
            trip = round_trip_ns()
            if trip is not None:
                self._core_ns.append(trip)
        self.gather(0.0)

    def common(self, part: Part) -> dict[str, Any]:
        """Give what every row of a measurement says, and forget the round trips till now."""
        trips, self._core_ns = self._core_ns, []
        return {
            "workers": part.workers,
            "servers": part.servers,
            **(Spread(trips, digits=3).fields("core_ns") if trips else {}),
            "crowded": self.crowded,
            "mpi": self.library,
        }

    def close(self) -> None:
        """Give the communicator back; every rank does."""
        self._mesh.close()


@contextlib.contextmanager
def open_job(benchmark: str, ranks: int = 2) -> Iterator[Job]:
    """Open the ranks of this job.

    Args:
        benchmark: its name, for the message.
        ranks: how many it needs.

    Raises:
        LaunchError: this is no MPI job.
        ArgumentError: it has too few ranks.
    """
    launcher = find_launcher()
    if launcher is None:
        raise LaunchError(
            f"{benchmark} needs the ranks of an MPI job:"
            f" mpirun -n {ranks} python -m psframe.bench {benchmark}"
        )
    with starting_mpi():
        from psframe.transports.mpi import open_mesh  # imports MPI

    job = Job(open_mesh(None, launcher, sys.prefix))
    if job.size < ranks:
        raise ArgumentError(f"{benchmark}: expected {ranks} ranks at least, got {job.size}")
    yield job
    job.close()


def take_turns(job: Job, ways: Sequence[Callable[[], T]], rounds: int) -> list[list[T]]:
    """Call some functions in turn, `rounds` times; give what each returned, by function."""
    results: list[list[T]] = [[] for _ in ways]
    for _ in range(rounds):
        job.listen()
        for way, mine in zip(ways, results, strict=True):
            mine.append(way())
    return results
