"""The two ways of `push-pull`, psframe's and the bare echo's; both check every answer."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from psframe import optim
from psframe.benchmarks.checks import PAIRS_ALL, SUM_MAX, compile_check, payload
from psframe.benchmarks.job import Job, Part, WrongAnswer
from psframe.benchmarks.tensors import Tensors
from psframe.client import Worker
from psframe.layout import Array
from psframe.runtime import run

__all__ = ["EchoWay", "PsframeWay", "operations", "rate_of"]

# Operations of each worker: in the first look at how fast it goes, and at least in a measurement.
_LOOK, _LEAST = 40, 4
_WARM_UP_PART = 8


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


def first_look(n_bytes: int, workers: int) -> tuple[int, int]:
    """Choose (warm-up, measured) operations of each worker to see how fast it goes."""
    return 2 * (workers + 4), _LOOK if n_bytes < 2**20 else _LEAST


def rate_of(job: Job, part: Part, seconds: float, measured: int) -> float:
    """Give the operations a second of all workers, by the slowest's time; every rank calls it."""
    everyone = job.gather(seconds)[part.servers : part.servers + part.workers]
    return float(measured * part.workers / max(one[0] for one in everyone))


class PsframeWay:
    """Pushes and pulls through `psframe.run`, SGD applied, a whole snapshot returned.

    Args:
        job, part: every rank calls it; those of the part run it.
        tensors: of the parameters.
    """

    def __init__(self, job: Job, part: Part, tensors: Tensors) -> None:
        self._job = job
        self._part = part
        self._tensors = tensors

    def __call__(self, warm_up: int, measured: int) -> float:
        """Give the operations a second of all workers."""
        seconds = self._job.together(lambda: self._run(warm_up, measured))
        return rate_of(self._job, self._part, seconds, measured)

    def for_about(self, n_bytes: int, seconds: float) -> tuple[int, int]:
        """Choose the operations of a measurement of so many seconds, by a first look."""
        return operations(
            self(*first_look(n_bytes, self._part.workers)), self._part.workers, seconds
        )

    def _run(self, warm_up: int, measured: int) -> float:
        part, tensors = self._part, self._tensors
        if not part.inside:
            return 0.0
        seconds = 0.0

        def work(worker: Worker) -> None:
            nonlocal seconds
            seconds = self._work(worker, warm_up, measured)

        result = run(
            work,
            tensors.zeros(),
            optimizer=optim.SGD(lr=1.0),
            servers=part.servers,
            device="cpu",
            comm=part.comm,
        )
        if result.params is not None:
            tensors.check_end(result.params, result.version, part.workers, warm_up + measured)
        return seconds

    def _work(self, worker: Worker, warm_up: int, measured: int) -> float:
        """Push and pull, checking every answer; return the seconds of the measured part."""
        grads, look = self._tensors.gradients(worker.index), self._tensors.look
        read, push_pull = self._tensors.read, worker.push_pull
        with self._part.meetings() as meet:
            for number in range(warm_up):
                params = push_pull(grads[number & 1])
                read(params, params.versions)
            meet()
        begin = time.perf_counter()
        for number in range(measured - 1):
            params = push_pull(grads[number & 1])
            look(params, params.versions, number)
        params = push_pull(grads[(measured - 1) & 1])
        read(params, params.versions)
        return time.perf_counter() - begin


class EchoWay:
    """The payload there and back, applied to nothing.

    Args:
        job, part: every rank calls it; the part has them all.
        echo: their echo.
        size: elements of the payload.
        apart: elements between two pairs that are looked at in an answer; PAIRS_ALL to read it.
    """

    def __init__(self, job: Job, part: Part, echo: Any, size: int, apart: int) -> None:
        self._job = job
        self._part = part
        self._echo = echo
        self._size = size // part.servers
        self._stride = apart
        self._check = compile_check()

    def __call__(self, warm_up: int, measured: int) -> float:
        """Give the operations a second of all workers."""
        part, seconds, right = self._part, 0.0, True
        if self._job.rank < part.servers:
            arrays = [np.zeros(self._size, np.float32) for _ in range(part.workers)]
            self._echo.serve(arrays, warm_up)
            self._echo.serve(arrays, measured)
        else:
            seconds, right = self._send(warm_up, measured)
        wrong = [rank for rank, flag in enumerate(self._job.gather(float(right))) if not flag[0]]
        if wrong:
            raise WrongAnswer(f"ranks {wrong} got another payload back than they had sent")
        return rate_of(self._job, part, seconds, measured)

    def for_about(self, n_bytes: int, seconds: float) -> tuple[int, int]:
        """Choose the operations of a measurement of so many seconds, by a first look."""
        return operations(
            self(*first_look(n_bytes, self._part.workers)), self._part.workers, seconds
        )

    def _send(self, warm_up: int, measured: int) -> tuple[float, bool]:
        servers, worker = self._part.servers, self._job.rank - self._part.servers
        sent = [payload(self._size, worker, parity) for parity in (0, 1)]
        back = [np.zeros(self._size, np.float32) for _ in range(servers)]
        line = self._echo.line([[array] * servers for array in sent], back)
        stride, trip, wrong = self._stride, line.trip, 0
        seconds_of_pairs = [float(array[1]) for array in sent]
        for number in range(warm_up):
            trip(number & 1)
            wrong += self._wrong(back, seconds_of_pairs[number & 1], PAIRS_ALL)
        self._echo.meet()
        begin = time.perf_counter()
        for number in range(measured - 1):
            trip(number & 1)
            wrong += self._wrong(back, seconds_of_pairs[number & 1], stride)
        trip((measured - 1) & 1)
        wrong += self._wrong(back, seconds_of_pairs[(measured - 1) & 1], PAIRS_ALL)
        seconds = time.perf_counter() - begin
        line.close()
        return seconds, not wrong

    def _wrong(self, back: list[Array], second: float, stride: int) -> int:
        """Count the arrays that are not what was sent."""
        check, count = self._check, 0
        for array in back:
            if check(array, 1, stride) != second:
                count += 1
        return count
