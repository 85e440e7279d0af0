"""Pushes and pulls a second through `psframe.run`, beside a bare MPI echo of the same payload.

Both are measured in the same job, with the same ranks and sizes, in turn, so that what else the
host does touches both. One operation is a worker's gradient there and parameters back; psframe
applies the gradient in between, the echo nothing. Both check every answer in the same places.
"""

from __future__ import annotations

import struct
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from psframe import optim
from psframe.benchmarks.checks import (
    PAIRS_A_PAGE,
    PAIRS_ALL,
    SUM_MAX,
    codes_sum,
    compile_check,
    payload,
)
from psframe.benchmarks.report import Spread, format_rows, parse_count
from psframe.client import Worker
from psframe.errors import ArgumentError, LaunchError, PsframeError
from psframe.launcher import find_launcher
from psframe.runtime import run

__all__ = ["PushPull", "WrongAnswer", "operations"]

# Operations of each worker: in the first look at how fast it goes, and at least in a measurement.
_LOOK, _LEAST = 40, 4
_WARM_UP_PART = 8
_ALIGN = 16  # elements: a server's shard begins at a multiple of this
_COLUMNS = {
    "bytes": "",
    "what": "",
    "workers": "d",
    "servers": "d",
    "ops_per_s": ",.0f",
    "ops_per_s_range": ",.0f",
    "gbytes_per_s": ".2f",
    "ratio": ".2f",
    "ratio_range": ".2f",
}


class WrongAnswer(PsframeError):
    """Raised when an answer is not what it must be: what was measured is worth nothing."""


@dataclass(frozen=True)
class PushPull:
    """Pushes and pulls a second, and their ratio to a bare MPI echo; start it under mpirun.

    Prints, for each size, psframe's figures and the echo's: ops_per_s counts round trips of all
    workers together, gbytes_per_s is the payload of one direction, medians over the rounds, with
    the least and the most in `..._range`; ratio is the median of psframe's rate over the echo's
    in the same round.
    """

    bytes: tuple[str, ...] = ("1KiB", "64KiB", "1MiB", "16MiB")
    """payload of one gradient, and of the parameters"""

    servers: int = 1
    """ranks that hold the parameters; the others work"""

    rounds: int = 5
    """measurements of each size, psframe and echo in turn"""

    seconds: float = 0.2
    """length of one measurement, roughly"""

    check: Literal["pages", "all"] = "pages"
    """look at two elements of each 4 KiB of every answer, or at all; the last answers before and
    after the measurement are read whole in any case"""

    json: bool = False
    """one JSON object a line instead of a table"""

    def main(self) -> int:
        """Measure and print; return the exit status.

        Raises:
            LaunchError: this is no MPI job.
            ArgumentError: a size, or the number of ranks, will not do.
            WrongAnswer, WorkerFailed: an answer was wrong.
        """
        launcher = find_launcher()
        if launcher is None:
            raise LaunchError(
                "push-pull needs the ranks of an MPI job:"
                " mpirun -n 2 python -m psframe.bench push-pull"
            )
        from psframe.transports.mpi import open_mesh  # imports MPI

        mesh = open_mesh(None, launcher, sys.prefix)
        if not 0 < self.servers < mesh.size:
            raise ArgumentError(f"--servers {self.servers}: expected 1 to {mesh.size - 1}")
        sizes = self._sizes()
        bench = _Bench(self, mesh)
        rows: list[dict[str, Any]] = []
        for n_bytes in sizes:
            rows += bench.measure(n_bytes)
            if mesh.rank == 0 and self.json:
                print(format_rows(rows[-2:], _COLUMNS, True), flush=True)
        if mesh.rank == 0 and not self.json:
            print(format_rows(rows, _COLUMNS, False), flush=True)
        bench.close()
        mesh.close()
        return 0

    def _sizes(self) -> list[int]:
        if self.rounds < 1 or self.seconds <= 0:
            raise ArgumentError("--rounds and --seconds: expected more than 0")
        try:
            sizes = [parse_count(text, "B") for text in self.bytes]
        except ValueError as error:
            raise ArgumentError(f"--bytes: {error}") from error
        # Equal shards, each with whole pairs, so that every element's value is known.
        unit = 4 * _ALIGN * self.servers
        for n_bytes in sizes:
            if n_bytes % unit:
                raise ArgumentError(
                    f"--bytes {n_bytes}: expected a multiple of {unit}"
                    f" ({_ALIGN} float32 for each of {self.servers} servers)"
                )
        return sizes


def operations(rate: float, workers: int, seconds: float) -> tuple[int, int]:
    """Choose (warm-up, measured) operations of each worker, both even, for one measurement.

    Args:
        rate: operations a second of all workers.
        workers: W.
        seconds: what the measurement should take.
    """
    most = SUM_MAX // (12 * workers)  # all sums stay exact, the warm-up included
    measured = int(min(max(_LEAST, rate * seconds / workers), most)) // 2 * 2
    # Enough that every buffer has been touched.
    warm_up = max(2 * (workers + 4), measured // _WARM_UP_PART) // 2 * 2
    return warm_up, measured


class _Bench:
    def __init__(self, settings: PushPull, mesh: Any) -> None:
        from psframe.transports.echo import Echo

        self._settings = settings
        self._mesh = mesh
        self._servers = settings.servers
        self._workers = mesh.size - settings.servers
        self._stride = PAIRS_ALL if settings.check == "all" else PAIRS_A_PAGE
        self._echo = Echo(settings.servers)
        self._check = compile_check()

    def measure(self, n_bytes: int) -> list[dict[str, Any]]:
        """Measure one size; the rows count on rank 0."""
        size, ways = n_bytes // 4, (self._psframe, self._bare)
        counts = []
        for way in ways:
            rate = way(size, 2 * (self._workers + 4), _LOOK if n_bytes < 2**20 else _LEAST)
            counts.append(operations(rate, self._workers, self._settings.seconds))
        ours: list[float] = []
        echoes: list[float] = []
        for _ in range(self._settings.rounds):
            for way, rates, count in zip(ways, (ours, echoes), counts, strict=True):
                rates.append(way(size, *count))
        ratios = [a / b for a, b in zip(ours, echoes, strict=True)]
        return [
            {**self._row("psframe", n_bytes, ours), **Spread(ratios).fields("ratio")},
            self._row("echo", n_bytes, echoes),
        ]

    def close(self) -> None:
        """Give the communicators back."""
        self._echo.close()

    def _row(self, what: str, n_bytes: int, rates: list[float]) -> dict[str, Any]:
        rate = Spread(rates)
        return {
            "benchmark": "push-pull",
            "what": what,
            "bytes": n_bytes,
            "workers": self._workers,
            "servers": self._servers,
            **rate.fields("ops_per_s"),
            "gbytes_per_s": float(f"{rate.median * n_bytes / 1e9:.4g}"),
            "rounds": len(rates),
            "checked": self._settings.check,
            "crowded": self._echo.crowded,
            "mpi": self._mesh.library,
        }

    # ---- psframe -------------------------------------------------------------------------

    def _psframe(self, size: int, warm_up: int, measured: int) -> float:
        """Give the operations a second of all workers."""
        seconds = 0.0

        def work(worker: Worker) -> None:
            nonlocal seconds
            seconds = self._work(worker, warm_up, measured)

        part = size // self._servers
        params = {f"shard {s}": np.zeros(part, np.float32) for s in range(self._servers)}
        result = run(work, params, optimizer=optim.SGD(lr=1.0), servers=self._servers, device="cpu")
        if result.params is not None:
            self._check_end(result.params, result.version, warm_up + measured)
        return self._rate(seconds, measured)

    def _work(self, worker: Worker, warm_up: int, measured: int) -> float:
        """Push and pull, checking every answer; return the seconds of the measured part."""
        size = next(iter(worker.pull().values())).size
        names = [f"shard {s}" for s in range(self._servers)]
        grads = [dict.fromkeys(names, payload(size, worker.index, p)) for p in (0, 1)]
        check, stride, push_pull = self._check, self._stride, worker.push_pull

        def step(number: int, stride: int) -> None:
            params = push_pull(grads[number & 1])
            for name, version in zip(names, params.versions, strict=True):
                second = check(params[name], -version, stride)
                if second != second:
                    raise WrongAnswer(f"worker {worker.index}: {name} is not of version {version}")

        try:
            for number in range(warm_up):
                step(number, PAIRS_ALL)
        finally:
            self._echo.meet()  # whoever has failed, too: the others would wait for it here
        begin = time.perf_counter()
        for number in range(measured - 1):
            step(number, stride)
        step(measured - 1, PAIRS_ALL)
        return time.perf_counter() - begin

    def _check_end(self, params: dict[str, Any], version: int, steps: int) -> None:
        """Compare the parameters after all pushes with what they must be, every element."""
        want = -float(codes_sum(self._workers, steps))
        if version != steps * self._workers:
            raise WrongAnswer(f"{version} updates, expected {steps * self._workers}")
        for name, array in params.items():
            got = self._check(array, -version, PAIRS_ALL)
            if got != want:
                raise WrongAnswer(f"{name}: the gradients' codes sum to {got}, expected {want}")

    # ---- the echo ------------------------------------------------------------------------

    def _bare(self, size: int, warm_up: int, measured: int) -> float:
        """Give the operations a second of all workers."""
        part = size // self._servers
        seconds, right = 0.0, True
        if self._mesh.rank < self._servers:
            arrays = [np.zeros(part, np.float32) for _ in range(self._workers)]
            self._echo.serve(arrays, warm_up)
            self._echo.serve(arrays, measured)
        else:
            seconds, right = self._send(part, warm_up, measured)
        everyone = self._mesh.all_gather(struct.pack("<?", right), "the check of the echo")
        wrong = [rank for rank, flag in enumerate(everyone) if flag == b"\0"]
        if wrong:
            raise WrongAnswer(f"ranks {wrong} got another payload back than they had sent")
        return self._rate(seconds, measured)

    def _send(self, part: int, warm_up: int, measured: int) -> tuple[float, bool]:
        worker = self._mesh.rank - self._servers
        sent = [payload(part, worker, parity) for parity in (0, 1)]
        seconds_of_pairs = [float(array[1]) for array in sent]
        back = [np.zeros(part, np.float32) for _ in range(self._servers)]
        line = self._echo.line([[array] * self._servers for array in sent], back)
        check, stride, trip = self._check, self._stride, line.trip
        right = True

        def step(number: int, stride: int) -> None:
            nonlocal right
            which = number & 1
            trip(which)
            for array in back:
                if check(array, 1, stride) != seconds_of_pairs[which]:
                    right = False

        for number in range(warm_up):
            step(number, PAIRS_ALL)
        self._echo.meet()
        begin = time.perf_counter()
        for number in range(measured - 1):
            step(number, stride)
        step(measured - 1, PAIRS_ALL)
        seconds = time.perf_counter() - begin
        line.close()
        return seconds, right

    def _rate(self, seconds: float, measured: int) -> float:
        """Divide by the slowest worker's time; every rank calls it."""
        everyone = self._mesh.all_gather(struct.pack("<d", seconds), "the measured times")
        slowest = max(struct.unpack("<d", record)[0] for record in everyone)
        return float(measured * self._workers / slowest)
