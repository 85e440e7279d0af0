"""How long single calls of a worker take, alone and while the others keep the server busy.

One worker's calls are timed one by one. Beside it the other workers do nothing, or the same, or
what would hold it up in a server that lets pulls wait for updates or updates for pulls.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psframe import optim
from psframe.benchmarks.checks import SUM_MAX, code
from psframe.benchmarks.job import Job, Part, WrongAnswer, open_job, take_turns
from psframe.benchmarks.report import Spread, format_rows
from psframe.benchmarks.tensors import Tensors, parse_size
from psframe.client import Worker
from psframe.errors import ArgumentError, Stopped
from psframe.params import Receipt
from psframe.pending import Pending
from psframe.plan import Result
from psframe.runtime import run

__all__ = ["Latency", "percentiles"]

PERCENTILES = {"p50_us": 50.0, "p90_us": 90.0, "p99_us": 99.0, "p99_9_us": 99.9, "max_us": 100.0}
_COLUMNS = {
    "bytes": "",
    "what": "",
    "beside": "",
    "workers": "d",
    "servers": "d",
    **dict.fromkeys(PERCENTILES, ",.1f"),
    "p50_us_range": ",.1f",
    "core_ns": ".0f",
}
_WARM_UP, _LEAST = 20, 20


@dataclass(frozen=True)
class Latency:
    """Microseconds that single calls of one worker take with others beside it, under mpirun.

    `beside` is what the other workers do meanwhile. Small push_pulls: nothing, or the same. Large
    pulls: nothing, or push as fast as they can. Large pushes, to their receipt: nothing, or pull
    and hold what they have pulled. Percentiles of each round, and their medians over the rounds.
    With one worker there is nothing beside it.
    """

    bytes: str = "1KiB"
    """of the parameters where calls are push_pulls"""

    large: str = "16MiB"
    """of the parameters where they are pulls or pushes"""

    servers: int = 1
    """ranks that hold the parameters; the others work"""

    rounds: int = 5
    """measurements of each kind, in turn"""

    seconds: float = 0.5
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
        with open_job("latency") as job:
            alone, part = job.part(self.servers, 1), job.part(self.servers)
            ways = []
            for what, beside in _KINDS:
                some = alone if beside == "nothing" else part
                n_bytes = parse_size(
                    self.bytes if what == "push_pull" else self.large, self.servers
                )
                if beside == "nothing" or part.workers > 1:
                    ways.append(_Way(job, some, n_bytes, what, beside))
            timed = [functools.partial(way.measure, self.seconds) for way in ways]
            found = take_turns(job, timed, self.rounds)
            common = job.common(part)
            alone.close()
            part.close()
        if job.rank == 0:
            rows = [
                self._row(way, mine) | common | way.ranks
                for way, mine in zip(ways, found, strict=True)
            ]
            print(format_rows(rows, _COLUMNS, self.json), flush=True)
        return 0

    def _row(self, way: _Way, rounds: list[list[float]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for i, name in enumerate(PERCENTILES):
            fields |= Spread([one[i] for one in rounds]).fields(name)
        calls = sum(round(one[-1]) for one in rounds)
        return {
            "benchmark": "latency",
            "what": way.what,
            "beside": way.beside,
            "bytes": way.n_bytes,
            **fields,
            "calls": calls,
            "rounds": self.rounds,
        }


def percentiles(seconds: Sequence[float]) -> list[float]:
    """Give those of PERCENTILES, in microseconds; each is the time of some call."""
    found = np.percentile(np.array(seconds) * 1e6, list(PERCENTILES.values()), method="higher")
    return [float(value) for value in found]


class _Way:
    """Calls of one kind beside others of one kind.

    Attributes:
        what: push_pull, pull or push.
        beside: what the other workers do.
        n_bytes: of the parameters.
        ranks: for the row.
    """

    def __init__(self, job: Job, part: Part, n_bytes: int, what: str, beside: str) -> None:
        self.what, self.beside, self.n_bytes = what, beside, n_bytes
        self.ranks = {"workers": part.workers, "servers": part.servers}
        self._job = job
        self._part = part
        self._tensors = Tensors(n_bytes // 4, part.servers)

    def measure(self, seconds: float) -> list[float]:
        """Give the percentiles and the number of calls; every rank calls it."""
        job, part = self._job, self._part
        times, applied, result = job.together(lambda: self._run(seconds))
        counts = [round(one[0]) for one in job.gather(float(applied))][part.servers :]
        if result is not None and result.params is not None:
            codes = sum(n * code(worker, 0) for worker, n in enumerate(counts))
            self._tensors.check_sum(result.params, result.version, sum(counts), codes)
        job.gather(0.0)
        mine = [*percentiles(times), float(len(times))] if times else [0.0] * (len(PERCENTILES) + 1)
        return list(job.gather(*mine)[part.servers])

    def _run(self, seconds: float) -> tuple[list[float], int, Result | None]:
        if not self._part.inside:
            return [], 0, None
        times: list[float] = []
        calls: _Calls | None = None

        def work(worker: Worker) -> None:
            nonlocal calls
            calls = _Calls(worker, self._tensors)
            with self._part.meetings() as meet:
                act = calls.kinds[self.what if worker.index == 0 else self.beside]
                for _ in range(_WARM_UP):
                    act()
                meet()
            if worker.index == 0:
                times.extend(calls.time(act, seconds))
                worker.stop()
            else:
                calls.until_the_end(act)

        result = run(
            work,
            self._tensors.zeros(),
            optimizer=optim.SGD(lr=1.0),
            servers=self._part.servers,
            device="cpu",
            comm=self._part.comm,
        )
        return times, 0 if calls is None else calls.applied(), result


class _Calls:
    """A worker's calls, each checked, and how many of its pushes have been applied."""

    def __init__(self, worker: Worker, tensors: Tensors) -> None:
        self._worker = worker
        self._tensors = tensors
        self._grads = tensors.gradients(worker.index)[0]
        self._most = SUM_MAX // (8 * worker.count)  # pushes: all sums stay exact
        self._pushed: list[Pending | Receipt] = []
        self._applied = 0
        self.kinds: dict[str, Callable[[], float]] = {
            "push_pull": self._push_pull,
            "pull": self._pull,
            "push": self._push,
            "the same": self._push_pull,
            "pushes": self._push_on,
            "pulls": self._pull,
        }

    def time(self, act: Callable[[], float], seconds: float) -> list[float]:
        """Call for some seconds; give the time that each took, without the check of its answer."""
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < _LEAST or time.perf_counter() - begin < seconds:
            times.append(act())
            if len(times) >= self._most // 2:
                break
        return times

    def until_the_end(self, act: Callable[[], float]) -> None:
        """Call until the run is over, or until sums would not be exact."""
        calls = 0
        try:
            while calls < self._most // 2:
                act()
                calls += 1
        except Stopped:
            pass

    def applied(self) -> int:
        """Count the pushes applied; the run is over."""
        for pushed in self._pushed:
            receipt = pushed.wait() if isinstance(pushed, Pending) else pushed
            self._applied += receipt.applied
        self._pushed.clear()
        return self._applied

    def _push_pull(self) -> float:
        begin = time.perf_counter()
        params = self._worker.push_pull(self._grads)
        taken = time.perf_counter() - begin
        assert params.receipt is not None
        self._applied += params.receipt.applied
        self._tensors.look(params, params.versions, 0)
        return taken

    def _pull(self) -> float:
        begin = time.perf_counter()
        params = self._worker.pull()
        taken = time.perf_counter() - begin
        self._tensors.look(params, params.versions, 0)
        return taken

    def _push(self) -> float:
        begin = time.perf_counter()
        receipt = self._worker.push(self._grads).wait()
        taken = time.perf_counter() - begin
        if not receipt.applied:
            raise WrongAnswer(f"a push was not applied: {receipt}")
        self._applied += 1
        return taken

    def _push_on(self) -> float:
        self._pushed.append(self._worker.push(self._grads))
        if len(self._pushed) > 8:
            self._applied += self._pushed.pop(0).wait().applied  # type: ignore[union-attr]
        return 0.0


# What is timed, and what the other workers do meanwhile.
_KINDS = (
    ("push_pull", "nothing"),
    ("push_pull", "the same"),
    ("pull", "nothing"),
    ("pull", "pushes"),
    ("push", "nothing"),
    ("push", "pulls"),
)
