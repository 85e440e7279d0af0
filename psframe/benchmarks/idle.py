"""What servers and waiting workers burn in silence, and how late the first answer after it is.

Each trial is one step in BSP. Worker 0 sleeps, all others wait for the step's end; then worker 0
pushes, and everyone is answered.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from psframe import optim
from psframe.benchmarks.checks import PAIRS_ALL, compile_check, compile_fill
from psframe.benchmarks.job import Job, Part, WrongAnswer, open_job
from psframe.benchmarks.report import Spread, format_rows
from psframe.benchmarks.tensors import Tensors, parse_size
from psframe.client import Worker
from psframe.consistency import BSP
from psframe.errors import ArgumentError
from psframe.layout import Array
from psframe.runtime import run

__all__ = ["Idle", "processor_seconds"]

_COLUMNS = {
    "bytes": "",
    "workers": "d",
    "servers": "d",
    "silence_ms": ".0f",
    "server_percent": ".2f",
    "worker_percent": ".2f",
    "first_us": ",.0f",
    "first_us_range": ",.0f",
    "woken_us": ",.0f",
    "woken_us_range": ",.0f",
    "busy_us": ",.1f",
    "core_ns": ".0f",
}
_CODE = 2.0  # every worker's: the mean of a round is exact
_WARM_UP = 50
# Silence before burnt time counts: those who wait may look out for an answer that comes soon.
_SPARED_S = 0.1


@dataclass(frozen=True)
class Idle:
    """Processor time burnt in silence, and microseconds to the first answer; start it under mpirun.

    In a silence all workers but one wait for it, in BSP. `server_percent` and `worker_percent` are
    of one core, of the busiest server and waiting worker, after the first 100 ms. `first_us` is how
    long the first push_pull after the silence takes, `woken_us` how long after it began the last
    of the waiting workers had its answer, and `busy_us` a push_pull without a silence before it.
    """

    bytes: str = "1KiB"
    """of the parameters"""

    servers: int = 1
    """ranks that hold the parameters; the others work"""

    silence: float = 0.5
    """seconds; more than 0.1"""

    rounds: int = 10
    """silences"""

    json: bool = False
    """one JSON object a line instead of a table"""

    def main(self) -> int:
        """Measure and print; return the exit status.

        Raises:
            LaunchError: this is no MPI job.
            ArgumentError: a setting will not do, or the ranks are on several nodes.
            WrongAnswer, WorkerFailed: an answer was wrong.
        """
        if self.rounds < 1 or self.silence <= _SPARED_S:
            raise ArgumentError(
                f"expected --rounds of 1 or more and --silence above {_SPARED_S},"
                f" got {self.rounds} and {self.silence}"
            )
        with open_job("idle") as job:
            if len(job.here) < job.size:
                raise ArgumentError("idle: expected all ranks on one node")
            part = job.part(self.servers)
            n_bytes = parse_size(self.bytes, self.servers)
            job.listen()
            trials = _Silences(job, part, n_bytes // 4, self).measure()
            row = {"benchmark": "idle", "what": "idle", "bytes": n_bytes}
            row |= {"silence_ms": 1e3 * self.silence, "rounds": self.rounds}
            for name, values in trials.items():
                row |= Spread(values).fields(name) if values else {}
            row |= job.common(part)
            part.close()
        if job.rank == 0:
            print(format_rows([row], _COLUMNS, self.json), flush=True)
        return 0


def processor_seconds(pid: int) -> float:
    """Give the processor time of all threads of a process on this node.

    Its clock has a number (clock_getcpuclockid(3)): the complement of the process id, three bits
    up, and 2 for the scheduler's own count, in nanoseconds.
    """
    return time.clock_gettime((~pid << 3) | 2)


class _Silences:
    """Some trials in one run."""

    def __init__(self, job: Job, part: Part, size: int, settings: Idle) -> None:
        self._job = job
        self._part = part
        self._settings = settings
        self._tensors = Tensors(size, part.servers)
        self._pids = [int(one[0]) for one in job.gather(float(os.getpid()))]
        self._check = compile_check()
        # By trial: when worker 0 pushed, when this worker had its answer; and worker 0's burnt.
        self._begun: list[float] = []
        self._answered: list[float] = []
        self._burnt: list[list[float]] = []
        self._busy: list[float] = []

    def measure(self) -> dict[str, list[float]]:
        """Give the figures of each trial by name, on rank 0; every rank calls it."""
        job, part, rounds = self._job, self._part, self._settings.rounds
        job.together(self._run)
        first = job.rank == part.servers
        begun = job.gather(*(self._begun if first else [0.0] * rounds))[part.servers]
        nothing = [0.0] * rounds
        answered = job.gather(*(self._answered or nothing))[part.servers :]
        busy = list(job.gather(*(self._busy if first else [0.0] * _WARM_UP))[part.servers])
        flat = [one for burnt in self._burnt for one in burnt] or [0.0] * (job.size * rounds)
        burnt = np.array(job.gather(*flat)[part.servers]).reshape(rounds, job.size) * 100
        late = [[1e6 * (one[i] - begin) for one in answered] for i, begin in enumerate(begun)]
        return {
            "server_percent": burnt[:, : part.servers].max(axis=1).tolist(),
            "worker_percent": burnt[:, part.servers + 1 :].max(axis=1).tolist()
            if part.workers > 1
            else [],
            "first_us": [one[0] for one in late],
            "woken_us": [max(one[1:]) for one in late if len(one) > 1],
            "busy_us": [1e6 * one for one in busy],
        }

    def _run(self) -> None:
        result = run(
            self._work,
            self._tensors.zeros(),
            optimizer=optim.SGD(lr=1.0),
            mode=BSP(),
            servers=self._part.servers,
            device="cpu",
            comm=self._part.comm,
        )
        if result.params is not None:
            rounds = _WARM_UP + self._settings.rounds
            if result.version != rounds:
                raise WrongAnswer(f"{result.version} updates, expected {rounds}")
            self._look(result.params, [rounds] * self._part.servers)

    def _work(self, worker: Worker) -> None:
        grads: dict[str, Array] = {}
        for name, size in self._tensors.sizes.items():
            grads[name] = np.empty(size, np.float32)
            compile_fill()(grads[name], _CODE)
        for _ in range(_WARM_UP):
            begin = time.perf_counter()
            params = worker.push_pull(grads)
            self._busy.append(time.perf_counter() - begin)
            self._look(params, params.versions)
        for _ in range(self._settings.rounds):
            if worker.index == 0:
                self._be_silent()
            self._begun.append(time.monotonic())
            params = worker.push_pull(grads)
            self._answered.append(time.monotonic())
            self._look(params, params.versions)

    def _be_silent(self) -> None:
        """Sleep, and note what each rank has burnt after the first 100 ms, over the time."""
        time.sleep(_SPARED_S)
        before, begin = [processor_seconds(pid) for pid in self._pids], time.monotonic()
        time.sleep(self._settings.silence - _SPARED_S)
        after, end = [processor_seconds(pid) for pid in self._pids], time.monotonic()
        self._burnt.append([(b - a) / (end - begin) for a, b in zip(before, after, strict=True)])

    def _look(self, params: Any, versions: Any) -> None:
        """Read all of an answer; every tensor is a shard."""
        for (name, array), version in zip(params.items(), versions, strict=True):
            got = self._check(array, -version, PAIRS_ALL)
            if got != -_CODE * version:
                raise WrongAnswer(f"{name} of version {version}: got {got}, not {-_CODE * version}")
