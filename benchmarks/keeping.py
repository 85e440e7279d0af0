"""Memory that each rule, mode and codec keeps, over the bytes of the parameters.

    mpirun -n 3 python benchmarks/keeping.py             # a server and two workers on one node
    mpirun -n 3 python benchmarks/keeping.py --apart     # the same as if each had a node of its own

P is --bytes, one square matrix. Every worker makes --steps steps with `worker.gradients()` and
`push_pull`. After each of its own steps each worker looks at what all ranks have: the proportional
set size (a page that k processes share counts a kth in each), split into heap (anonymous memory:
what a process has for itself) and shared (snapshots, gradient slots and landing areas, of which no
page counts that was never touched). The most of all looks, less the same after a run with 16 KiB of
parameters; medians of --rounds such runs. What one call needs for a moment is seen only if a look
falls into it. The parameters that are given to `run` are zeros that take no memory. The columns
`more` are over the first row, `none`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from staleness import print_table

import psframe
from psframe import codecs, optim, stale
from psframe.benchmarks.job import Job, Part, open_job
from psframe.benchmarks.tensors import parse_size

# mallopt's M_MMAP_THRESHOLD: arrays from 1 MiB on go back to the system when they are let go, and
# so are not in what a process "had before" the next run.
MMAP_THRESHOLD, MMAP_FROM = -3, 1 << 20
SMALL = 64  # rows and columns of the parameters in the run before

Way = Mapping[str, Any]  # what `psframe.run` is given


def ways(workers: int) -> dict[str, Way]:
    """Name what is compared; the first is what the others are compared to."""
    compensation = stale.DelayCompensation(2.0)
    return {
        "none": {},
        "inverse": {"stale": stale.Inverse()},
        "delay-adaptive": {"stale": stale.DelayAdaptive(workers)},
        "drop": {"stale": stale.Drop(2 * workers)},
        "clip": {"stale": stale.Clip(1.0)},
        "gap-aware": {"stale": stale.GapAware()},
        "compensate, fixed": {"stale": stale.DelayCompensation(0.04, adaptive=False)},
        "compensate, adaptive": {"stale": compensation},
        "compensate + gap-aware": {"stale": stale.chain(compensation, stale.GapAware())},
        "ssp": {"mode": psframe.SSP(3)},
        "dynamic-ssp": {"mode": psframe.DynamicSSP(3, 12)},
        "bsp": {"mode": psframe.BSP()},
        "bsp, backup 1": {"mode": psframe.BSP(backup=1)},
        "buffered": {"mode": psframe.Buffered(workers)},
        "rennala": {"mode": psframe.Rennala(workers)},
        "ringleader": {"mode": psframe.Ringleader()},
        "sgd with momentum": {"optimizer": optim.SGD(0.01, momentum=0.9)},
        "worker momentum": {"optimizer": optim.WorkerMomentum(0.01)},
        "dana-zero": {"optimizer": optim.DANAZero(0.01)},
        **coded("codec"),
        **coded("pull_codec"),
    }


def coded(argument: str) -> dict[str, Way]:
    """Name the codecs, for gradients or for parameters."""
    made: dict[str, codecs.Codec] = {
        "float16": codecs.Float16(),
        "bfloat16": codecs.BFloat16(),
        "qsgd=127": codecs.QSGD(127),
        "sign": codecs.Sign(),
        "topk=0.01": codecs.TopK(0.01),
        "powersgd=2": codecs.PowerSGD(2),
    }
    if argument == "codec":
        made["float16 without feedback"] = codecs.Float16(error_feedback=False)
        made["topk=0.01, momentum"] = codecs.TopK(0.01, momentum=0.9)
    side = "push" if argument == "codec" else "pull"
    return {f"{side} {name}": {argument: codec} for name, codec in made.items()}


def held(pid: int) -> tuple[int, int]:
    """Give the bytes of heap and of shared memory that a process on this node has."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    found = {line.split()[0]: 1024 * int(line.split()[1]) for line in text.splitlines()[1:]}
    return found["Pss_Anon:"], found["Pss_Shmem:"]


class Measured:
    """Runs of one job.

    Args:
        job, part: the ranks.
        steps: of each worker.
        apart: whether all goes through MPI, as between nodes.
    """

    def __init__(self, job: Job, part: Part, steps: int, apart: bool) -> None:
        self._job, self._part = job, part
        self._steps, self._apart = steps, apart
        self._pids = [int(one[0]) for one in job.gather(float(os.getpid()))]

    def measure(self, way: Way, side: int) -> Any:
        """Give bytes: each rank's heap, and what is shared; every rank calls it."""
        job = self._job
        job.together(lambda: self._run(way, SMALL))
        before = self._look()
        job.gather(0.0)
        peak = job.together(lambda: self._run(way, side))
        return np.array(job.gather(*peak)).max(axis=0) - before

    def _look(self) -> Any:
        heaps, shared = zip(*map(held, self._pids), strict=True)
        return np.array([*heaps, sum(shared)], np.float64)

    def _run(self, way: Way, side: int) -> Any:
        """Train; give the most that each rank has had, and the most that was shared."""
        peak = np.zeros(len(self._pids) + 1)

        def work(worker: psframe.Worker) -> None:
            nonlocal peak
            up, down = np.linspace(0.5, 1.5, side), worker.rng.normal(size=side)
            with self._part.meetings() as meet:
                for _ in range(self._steps):
                    np.multiply.outer(up, down, out=worker.gradients()["w"], casting="same_kind")
                    params = worker.push_pull(None)
                    float(params["w"].sum())  # touches every page
                    peak = np.maximum(peak, self._look())
                meet()  # the others still have theirs
            peak = np.maximum(peak, self._look())

        psframe.run(
            work,
            {"w": np.zeros((side, side), np.float32)},
            device="cpu",
            comm=self._part.comm,
            shared_memory=not self._apart,
            **{"optimizer": optim.SGD(0.01), **way},
        )
        return peak


def cells(peaks: Sequence[Any], first: Sequence[Any] | None, n_bytes: int) -> list[str]:
    """Say medians in units of P: the server's heap, a worker's, what is shared, all; and more."""
    now = split(np.median(peaks, axis=0)) / n_bytes
    said = [f"{value:.2f}" for value in now]
    if first is None:
        return [*said, "", "", ""]
    more = now - split(np.median(first, axis=0)) / n_bytes
    return [*said, *(f"{value:+.2f}" for value in more[:3])]


def split(peak: Any) -> Any:
    """Give the server's heap, the mean worker's, what is shared, and the sum of all."""
    server, *workers, shared = peak
    return np.array([server, statistics.mean(workers), shared, peak.sum()])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", default="64MiB")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", help="names of rows; default all")
    parser.add_argument("--apart", action="store_true", help="without shared memory")
    arguments = parser.parse_args()
    side = int((parse_size(arguments.bytes, 1) // 4) ** 0.5)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, MMAP_FROM)
    with open_job("keeping", 3) as job:
        part = job.part(1)
        measured = Measured(job, part, arguments.steps, arguments.apart)
        compared = ways(part.workers)
        if arguments.ways:
            compared = {name: compared[name] for name in ("none", *arguments.ways)}
        found: dict[str, list[Any]] = {name: [] for name in compared}
        for _ in range(arguments.rounds):
            for name, way in compared.items():
                found[name].append(measured.measure(way, side))
                if job.rank == 0:
                    print(f"{name}: {split(found[name][-1]) / (4 * side * side)}", file=sys.stderr)
        part.close()
        root = job.rank == 0
    if root:
        heads = ["server's heap", "a worker's", "shared", "all"]
        heads += ["more: server's", "a worker's", "shared"]
        first = found["none"]
        rows = {
            name: cells(peaks, None if name == "none" else first, 4 * side * side)
            for name, peaks in found.items()
        }
        print_table(heads, rows)


if __name__ == "__main__":
    main()
