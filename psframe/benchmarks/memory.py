"""Memory that a run takes on a node, over the bytes of its parameters.

Proportional set size: a page that k processes share counts a kth in each, so that their sum counts
it once. Pages of files do not count, such as those of libraries: the kernel takes and gives them as
it likes. What the processes had before, after a small run of the same kind, is subtracted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psframe import optim
from psframe.benchmarks.apply import RULES
from psframe.benchmarks.checks import PAIRS_ALL, compile_check, compile_fill
from psframe.benchmarks.job import Job, Part, WrongAnswer, open_job, take_turns
from psframe.benchmarks.report import Spread, format_rows
from psframe.benchmarks.tensors import Tensors, parse_size
from psframe.client import Worker
from psframe.errors import ArgumentError
from psframe.layout import Array, Layout
from psframe.runtime import run

__all__ = ["Memory", "expected", "pss"]

_COLUMNS = {
    "bytes": "",
    "optimizer": "",
    "workers": "d",
    "servers": "d",
    "peak_over_p": ".2f",
    "slots_over_p": ".2f",
    "beyond_over_p": ".2f",
    "beyond_over_p_range": ".2f",
    "most_over_p": ".2f",
    "core_ns": ".0f",
}
_CODE = 2.0  # every worker's, so that it does not matter whose gradient came first
_SMALL = 4096  # elements of the parameters in the run before


@dataclass(frozen=True)
class Memory:
    """Memory of the node that a run takes, over P, the bytes of its parameters.

    The most that all ranks had together, looked at after every step of one worker, less what they
    had before. Workers fill `worker.gradients()`, and read what `push_pull` brings in place.
    `slots_over_p` is what the optimizer keeps, twice (docs/decisions/0002); `beyond_over_p` all
    else, for which `most_over_p`, W + 4, is the target. The parameters that the caller gives are
    zeros that no page stands for.
    """

    bytes: str = "64MiB"
    """P"""

    optimizers: tuple[str, ...] = ("sgd", "adam")
    """which rules"""

    servers: int = 1
    """ranks that hold the parameters; the others work"""

    steps: int = 8
    """of each worker"""

    rounds: int = 2
    """runs with each rule"""

    json: bool = False
    """one JSON object a line instead of a table"""

    def main(self) -> int:
        """Measure and print; return the exit status.

        Raises:
            LaunchError: this is no MPI job.
            ArgumentError: a setting will not do, or the ranks are on several nodes.
            WrongAnswer, WorkerFailed: an answer was wrong.
        """
        unknown = [name for name in self.optimizers if name not in RULES]
        if unknown or self.rounds < 1 or self.steps < 1:
            raise ArgumentError(
                f"expected --optimizers among {', '.join(RULES)}, --rounds and --steps of 1 or"
                f" more; got {' '.join(self.optimizers)}, {self.rounds} and {self.steps}"
            )
        with open_job("memory") as job:
            if len(job.here) < job.size:
                raise ArgumentError("memory: expected all ranks on one node")
            part = job.part(self.servers)
            n_bytes = parse_size(self.bytes, self.servers)
            parse_size(f"{4 * _SMALL}B", self.servers)
            ways = [
                _Way(job, part, n_bytes // 4, RULES[name], self.steps) for name in self.optimizers
            ]
            peaks = take_turns(job, [way.measure for way in ways], self.rounds)
            common = job.common(part)
            part.close()
        rows = [
            self._row(name, n_bytes, mine) | common
            for name, mine in zip(self.optimizers, peaks, strict=True)
        ]
        for row in rows:
            row["most_over_p"] = row["workers"] + 4
        if job.rank == 0:
            print(format_rows(rows, _COLUMNS, self.json), flush=True)
        return 0

    def _row(self, name: str, n_bytes: int, peaks: list[float]) -> dict[str, Any]:
        over = [peak / n_bytes for peak in peaks]
        slots = 2 * len(RULES[name].slots)
        return {
            "benchmark": "memory",
            "what": "memory",
            "bytes": n_bytes,
            "optimizer": name,
            **Spread(over).fields("peak_over_p"),
            "slots_over_p": slots,
            **Spread([one - slots for one in over]).fields("beyond_over_p"),
            "rounds": self.rounds,
        }


def pss(pids: Sequence[int]) -> int:
    """Sum the bytes of some processes on this node, pages that they share with each other once, and
    none that are only a file's (before Linux 5.4 these, too).

    Raises:
        OSError: one has ended, or is another user's.
    """
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        found = dict(re.findall(r"^(Pss\w*): +([0-9]+) kB", text, re.MULTILINE))
        kinds = ("Pss_Anon", "Pss_Shmem") if "Pss_Anon" in found else ("Pss",)
        total += 1024 * sum(int(found[kind]) for kind in kinds)
    return total


def expected(rule: optim.Optimizer, updates: int) -> list[tuple[float, float]]:
    """Apply as many gradients (1, 2) one after the other to parameters of 0.

    Returns:
        By version, the pair that the parameters consist of.
    """
    layout = Layout.of({"w": np.zeros(_SMALL, np.float32)})
    grad: Array = np.empty(_SMALL, np.float32)
    compile_fill()(grad, _CODE)
    updater = rule.updater(layout, 0, _SMALL)
    buffers = [np.zeros(_SMALL, np.float32), np.empty(_SMALL, np.float32)]
    pairs = [(0.0, 0.0)]
    for step in range(updates):
        now, then = buffers[step & 1], buffers[1 - (step & 1)]
        assert updater.update(step, now, grad, then), "the results of small gradients are finite"
        pairs.append((float(then[0]), float(then[1])))
    return pairs


class _Way:
    """Runs with one rule."""

    def __init__(self, job: Job, part: Part, size: int, rule: optim.Optimizer, steps: int) -> None:
        self._job = job
        self._part = part
        self._size = size
        self._rule = rule
        self._steps = steps
        self._pairs = expected(rule, steps * part.workers)
        self._pids = [int(one[0]) for one in job.gather(float(os.getpid()))]
        self._check = compile_check()
        self._fill = compile_fill()

    def measure(self) -> float:
        """Give the peak of a run, less what was there before; every rank calls it."""
        job = self._job
        job.together(lambda: self._run(_SMALL))
        before = pss(self._pids) if job.rank == 0 else 0
        job.gather(0.0)
        peak = job.together(lambda: self._run(self._size))
        return job.gather(peak)[self._part.servers][0] - before

    def _run(self, size: int) -> float:
        peak = 0.0

        def work(worker: Worker) -> None:
            nonlocal peak
            peak = self._work(worker)

        tensors = Tensors(size, self._part.servers)
        result = run(
            work,
            tensors.zeros(),
            optimizer=self._rule,
            servers=self._part.servers,
            device="cpu",
            comm=self._part.comm,
        )
        if result.params is not None:
            for name, array in result.params.items():
                self._look(name, array, result.version)
        return peak

    def _work(self, worker: Worker) -> float:
        """Take the steps; worker 0 gives the most that all ranks had after one of them."""
        peak = 0.0
        with self._part.meetings() as meet:
            for _ in range(self._steps):
                for array in worker.gradients().values():
                    self._fill(array, _CODE)
                params = worker.push_pull(None)
                for (name, array), version in zip(params.items(), params.versions, strict=True):
                    self._look(name, array, version)
                if worker.index == 0:
                    peak = max(peak, float(pss(self._pids)))
            meet()
        if worker.index == 0:  # the others have still their parameters
            peak = max(peak, float(pss(self._pids)))
        return peak

    def _look(self, name: str, array: Array, version: int) -> None:
        """Read all of an answer."""
        first, second = self._pairs[version]
        got = self._check(array, first, PAIRS_ALL)
        if got != second:
            raise WrongAnswer(f"{name} of version {version}: got {got}, expected {second}")
