"""Pushes and pulls a second with more and more workers, and servers, of one job.

Every combination is measured in turn by the first ranks of the job, each in a communicator of its
own, beside one worker and one server; who is not needed waits, asleep.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from psframe.benchmarks.job import Job, open_job, take_turns
from psframe.benchmarks.report import Spread, format_rows
from psframe.benchmarks.tensors import Tensors, parse_sizes
from psframe.benchmarks.ways import PsframeWay
from psframe.errors import ArgumentError

__all__ = ["Scaling", "combinations"]

_COLUMNS = {
    "bytes": "",
    "workers": "d",
    "servers": "d",
    "ops_per_s": ",.0f",
    "ops_per_s_range": ",.0f",
    "gbytes_per_s": ".2f",
    "ratio": ".2f",
    "ratio_range": ".2f",
    "core_ns": ".0f",
}


def combinations(
    size: int, workers: tuple[int, ...], servers: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Choose (servers, workers) that fit into `size` ranks, (1, 1) first.

    Args:
        size: ranks.
        workers, servers: how many; if empty 1, 2, 4, ... and as many as fit (of servers: as many as
            leave a worker each).

    Raises:
        ArgumentError: a number is not above 0, or fits in no combination.
    """
    some_servers = servers or _doubling(size // 2)
    for name, counts in (("workers", workers), ("servers", servers)):
        wrong = [count for count in counts if not 0 < count < size]
        if wrong:
            raise ArgumentError(f"--{name} {wrong[0]}: expected 1 to {size - 1} of {size} ranks")
    found = [(1, 1)]
    for s in some_servers:
        for w in workers or _doubling(size - s):
            if s + w <= size and (s, w) != (1, 1):
                found.append((s, w))
    return found


def _doubling(most: int) -> list[int]:
    counts = [1 << i for i in range(most.bit_length())]
    return counts if counts[-1] == most else [*counts, most]


@dataclass(frozen=True)
class Scaling:
    """Pushes and pulls a second by the number of workers and of servers; start it under mpirun.

    ops_per_s counts round trips of all workers together. `ratio` is to one worker and one server in
    the same round, and its median over the rounds. On one node workers and servers share its
    cores and its memory: with more ranks than cores there is little to gain.
    """

    bytes: tuple[str, ...] = ("64KiB", "16MiB")
    """payload of one gradient, and of the parameters"""

    workers: tuple[int, ...] = ()
    """how many; by default 1, 2, 4, ... and as many as there are ranks for"""

    servers: tuple[int, ...] = ()
    """how many; by default 1, 2, 4, ... and as many as leave a worker each"""

    rounds: int = 5
    """measurements of each combination, in turn"""

    seconds: float = 0.2
    """length of one measurement, roughly"""

    json: bool = False
    """one JSON object a line instead of a table"""

    def main(self) -> int:
        """Measure and print; return the exit status.

        Raises:
            LaunchError: this is no MPI job.
            ArgumentError: a setting will not do.
            WrongAnswer, WorkerFailed: an answer was wrong.
        """
        if self.rounds < 1 or self.seconds <= 0:
            raise ArgumentError("--rounds and --seconds: expected more than 0")
        with open_job("scaling") as job:
            chosen = combinations(job.size, self.workers, self.servers)
            sizes: list[int] = []
            for servers, _ in chosen:  # what suits them all
                sizes = parse_sizes(self.bytes, servers)
            rows: list[dict[str, Any]] = []
            for n_bytes in sizes:
                added = self._measure(job, chosen, n_bytes)
                rows += added
                if job.rank == 0 and self.json:
                    print(format_rows(added, {}, True), flush=True)
            if job.rank == 0 and not self.json:
                print(format_rows(rows, _COLUMNS, False), flush=True)
        return 0

    def _measure(
        self, job: Job, chosen: list[tuple[int, int]], n_bytes: int
    ) -> list[dict[str, Any]]:
        """Measure one size; the rows count on rank 0."""
        parts = [job.part(servers, workers) for servers, workers in chosen]
        timed = []
        for part in parts:
            way = PsframeWay(job, part, Tensors(n_bytes // 4, part.servers))
            timed.append(functools.partial(way, *way.for_about(n_bytes, self.seconds)))
        rates = take_turns(job, timed, self.rounds)
        common = job.common(parts[0])
        rows = []
        for part, mine in zip(parts, rates, strict=True):
            rate = Spread(mine)
            rows.append(
                {"benchmark": "scaling", "what": "psframe", "bytes": n_bytes}
                | rate.fields("ops_per_s")
                | {"gbytes_per_s": float(f"{rate.median * n_bytes / 1e9:.4g}")}
                | Spread([a / b for a, b in zip(mine, rates[0], strict=True)]).fields("ratio")
                | {"rounds": self.rounds}
                | common
                | {"workers": part.workers, "servers": part.servers}
            )
            part.close()
        return rows
