"""Steps that compute as long as they communicate: how much of the two happens at once.

A step of push_pull alone is timed, then a compute is made as long as that, then a loop that does
both: 1.0 is all at once, 2.0 one after the other. The compute keeps one core busy with matrix
products that stay in its cache, and writes the gradient, as a backward pass does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from psframe import optim
from psframe.benchmarks.checks import SUM_MAX, code, compile_fill
from psframe.benchmarks.job import Job, Part, WrongAnswer, open_job, take_turns
from psframe.benchmarks.loops import LOOPS, Arrays, Loop, Step, push_pull
from psframe.benchmarks.report import Spread, format_rows
from psframe.benchmarks.tensors import Tensors, parse_size
from psframe.client import Worker
from psframe.errors import ArgumentError
from psframe.layout import Array
from psframe.params import Receipt
from psframe.pending import Pending
from psframe.plan import Result
from psframe.runtime import run

__all__ = ["Overlap"]

_COLUMNS = {
    "bytes": "",
    "loop": "",
    "workers": "d",
    "servers": "d",
    "step_ms": ".3f",
    "communication_ms": ".3f",
    "compute_ms": ".3f",
    "alone_ms": ".3f",
    "ratio": ".2f",
    "ratio_range": ".2f",
    "staleness": ".2f",
    "core_ns": ".0f",
}
_WARM_UP, _LEAST = 6, 6
# A matrix of float32 of this side fills a sixteenth of a second cache of 1 MiB.
_SIDE = 128
# Elements between two that are looked at: the pieces in which updates are made.
_STRIDE = 65536


@dataclass(frozen=True)
class Overlap:
    """Step time over the longer of compute and communication, which are equally long.

    Each loop is one way to use the worker (psframe/benchmarks/loops.py). `communication_ms` is a
    push_pull without any compute, `compute_ms` the compute alone, made equally long, and
    `step_ms` the loop with it; `ratio` is step over the longer of the two, in one round, and its
    median over the rounds. `alone_ms` is the loop without compute. `staleness` is the mean of
    the version just before a gradient is applied minus the version that it was computed on: an
    overlap is paid for with it.
    """

    bytes: str = "16MiB"
    """of the gradient, and of the parameters"""

    loops: tuple[str, ...] = tuple(LOOPS)
    """which"""

    servers: int = 1
    """ranks that hold the parameters; the others work"""

    rounds: int = 5
    """measurements of each loop, in turn"""

    seconds: float = 0.3
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
        unknown = [name for name in self.loops if name not in LOOPS]
        if unknown or self.rounds < 1 or self.seconds <= 0:
            raise ArgumentError(
                f"expected --loops among {', '.join(LOOPS)}, and --rounds and --seconds above 0;"
                f" got {' '.join(self.loops)}, {self.rounds} and {self.seconds}"
            )
        with open_job("overlap") as job:
            part = job.part(self.servers)
            n_bytes = parse_size(self.bytes, self.servers)
            ways = [_Way(job, part, n_bytes // 4, LOOPS[name], self.seconds) for name in self.loops]
            measured = take_turns(job, [way.measure for way in ways], self.rounds)
            common = job.common(part)
            part.close()
        rows = [
            {"benchmark": "overlap", "what": "overlap", "bytes": n_bytes, "loop": name}
            | _figures(found)
            | common
            for name, found in zip(self.loops, measured, strict=True)
        ]
        if job.rank == 0:
            print(format_rows(rows, _COLUMNS, self.json), flush=True)
        return 0


@dataclass(frozen=True)
class _Found:
    """Of the slowest worker, seconds a step; and the mean staleness of all gradients."""

    communication: float
    alone: float
    compute: float
    step: float
    staleness: float


def _figures(found: list[_Found]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, values in (
        ("step_ms", [f.step * 1e3 for f in found]),
        ("communication_ms", [f.communication * 1e3 for f in found]),
        ("compute_ms", [f.compute * 1e3 for f in found]),
        ("alone_ms", [f.alone * 1e3 for f in found]),
        ("ratio", [f.step / max(f.compute, f.communication) for f in found]),
        ("staleness", [f.staleness for f in found]),
    ):
        fields |= Spread(values).fields(name)
    return fields | {"rounds": len(found)}


class _Compute:
    """Matrix products for a given time, and the gradient written."""

    def __init__(self) -> None:
        self._a: Array = np.full((_SIDE, _SIDE), 1e-3, np.float32)
        self._out: Array = np.empty_like(self._a)
        self._fill = compile_fill()
        self._products = 0

    def __call__(self, arrays: Arrays, second: float) -> None:
        """Compute, and write the gradient with this code."""
        a, out = self._a, self._out
        for _ in range(self._products):
            np.matmul(a, a, out=out)
        self.fill(arrays, second)

    def fill(self, arrays: Arrays, second: float) -> None:
        """Write the gradient."""
        for array in arrays.values():
            self._fill(array, second)

    def times(self, arrays: Arrays, second: float, seconds: float) -> list[float]:
        """Give the times of some that last so long together."""
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < _LEAST or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            self(arrays, second)
            times.append(time.perf_counter() - start)
        return times

    def last(self, arrays: Arrays, second: float, seconds: float, bound_s: float) -> None:
        """Choose the products so that one lasts about so many seconds."""

        def typical() -> float:
            return statistics.median(self.times(arrays, second, bound_s))

        self._products = 0
        filling = typical()
        self._products = 256
        each = max(typical() - filling, 1e-6 * self._products) / self._products
        self._products = max(0, round((seconds - filling) / each))
        # Once more, from near by, which is more exact.
        self._products = max(0, self._products + round((seconds - typical()) / each))


class _Way:
    """One loop."""

    def __init__(self, job: Job, part: Part, size: int, loop: Loop, seconds: float) -> None:
        self._job = job
        self._part = part
        self._tensors = Tensors(size, part.servers, apart=_STRIDE)
        self._loop = loop
        self._seconds = seconds

    def measure(self) -> _Found:
        """Measure communication, compute and both in one run; every rank calls it."""
        job, part = self._job, self._part
        worked, result = job.together(self._run)
        everyone = job.gather(*worked)[part.servers :]
        if job.rank == 0:
            assert result is not None
            steps = [round(one[-1]) for one in everyone]
            codes = sum(n * code(worker, 0) for worker, n in enumerate(steps))
            if codes <= SUM_MAX:  # or float32 has rounded
                assert result.params is not None
                self._tensors.check_sum(result.params, result.version, sum(steps), codes)
        job.gather(0.0)
        slowest = [max(one[i] for one in everyone) for i in range(4)]
        staleness = sum(one[4] for one in everyone) / len(everyone)
        return _Found(slowest[0], slowest[1], slowest[2], slowest[3], staleness)

    def _run(self) -> tuple[tuple[float, ...], Result | None]:
        worked: tuple[float, ...] = (0.0,) * 6

        def work(worker: Worker) -> None:
            nonlocal worked
            worked = _Steps(self._tensors, self._loop, worker).work(self._part, self._seconds)

        result = run(
            work,
            self._tensors.zeros(),
            optimizer=optim.SGD(lr=1.0),
            servers=self._part.servers,
            device="cpu",
            comm=self._part.comm,
        )
        return worked, result


class _Steps:
    """A worker's steps of one loop."""

    def __init__(self, tensors: Tensors, loop: Loop, worker: Worker) -> None:
        self._tensors = tensors
        self._loop = loop
        self._worker = worker
        self._code = code(worker.index, 0)
        self._own = tensors.cut(np.empty(tensors.size, np.float32))
        self._compute = _Compute()
        self._produce: Callable[[Arrays], None] = _leave
        self._done = 0
        self._pushed: list[tuple[int, Receipt | Pending | None]] = []

    def work(self, part: Part, seconds: float) -> tuple[float, ...]:
        """Give the seconds of a push_pull, of a step of the loop without compute, of the compute,
        of a step with it; the mean staleness in the last; and the steps in all."""
        with part.meetings(4) as meet:
            communication = self._alone(push_pull, meet, seconds)
            alone = self._alone(self._loop, meet, seconds)
            self._compute.last(self._own, self._code, communication, seconds / 4)
            meet()
            compute = statistics.mean(self._compute.times(self._own, self._code, seconds))
            steps = self._begin(self._loop)
            self._produce = lambda arrays: self._compute(arrays, self._code)
            self._go(steps, _LEAST, 0.0)
            meet()
        self._pushed.clear()
        step = self._go(steps, _LEAST, seconds)
        stale = [_staleness(version, pushed) for version, pushed in self._pushed]
        mean = sum(stale) / len(stale)
        return communication, alone, compute, step, mean, float(self._done)

    def _alone(self, loop: Loop, meet: Callable[[], None], seconds: float) -> float:
        """Give the seconds of a step without compute."""
        steps = self._begin(loop)
        self._produce = lambda arrays: self._compute.fill(arrays, self._code)
        self._go(steps, _WARM_UP, 0.0)
        meet()
        self._produce = _leave  # it is still there: the answers would tell if it were not
        return self._go(steps, _LEAST, seconds)

    def _begin(self, loop: Loop) -> Iterator[Step]:
        return loop(self._worker, self._own, lambda arrays: self._produce(arrays))

    def _go(self, steps: Iterator[Step], least: int, seconds: float) -> float:
        """Take steps for some seconds, and so many at least; give the mean time of one."""
        count, begin = 0, time.perf_counter()
        while count < least or time.perf_counter() - begin < seconds:
            params, version, pushed = next(steps)
            self._tensors.look(params, params.versions, count)
            self._pushed.append((version, pushed))
            count += 1
        self._done += count
        return (time.perf_counter() - begin) / count


def _leave(arrays: Arrays) -> None:
    """Compute nothing."""


def _staleness(version: int, pushed: Receipt | Pending | None) -> int:
    """The version just before a gradient was applied minus the one that it was computed on."""
    receipt = pushed.wait() if isinstance(pushed, Pending) else pushed
    if receipt is None or not receipt.applied:
        raise WrongAnswer(f"a gradient computed on version {version} was not applied: {receipt}")
    return receipt.version - 1 - version
