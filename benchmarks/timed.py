"""Seconds to an accuracy of real trainings under mpirun, beside the same in virtual time.

    mpirun -n 5 python benchmarks/timed.py straggler     # one worker of four is 4 times slower
    python benchmarks/timed.py link                      # codecs over 100 Mbit/s: root, Linux

Both train on the digits as `psframe train` does by default. `straggler` compares rules and modes,
`link` codecs, between hosts that `tests/cluster/hosts` makes of network namespaces; where there can
be none it says why and ends.

Computing a gradient is made to take --step-ms: a worker computes it, and waits for the rest of that
time, so that less depends on who else uses the cores; it must be much longer than computing takes.
Each seed is trained with all ways in turn. A worker keeps what it reads, once every --look-ms, and
evaluates it when the run is over. The seconds begin with the first worker's `work`, and end when
parameters were read that have the accuracy --target on the test part; the updates are their
version. Medians, least and most over the seeds. The column `simulated` is `psframe.simulate` with
the same seeds, compute times and links, looked at as often; --no-simulated leaves it out. What the
cores alone allow is `link --rate none`.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from staleness import CODECS, Problem, print_table, spread

import psframe
from psframe import stale
from psframe.benchmarks.job import Job, Part, open_job
from psframe.choices import parse_codec
from psframe.coding import Traffic
from psframe.launcher import find_launcher
from psframe.models.contract import Contract
from psframe.settings import Settings
from psframe.stepping import Stepper
from psframe.trainer import initial_params

HOSTS = Path(__file__).resolve().parent.parent / "tests/cluster/hosts"
LINK = psframe.Network(100e-6, 100e6 / 8)  # as simulated
SLOWER = 4.0  # what a straggler's compute time is multiplied by

Way = Mapping[str, Any]  # what `psframe.run` is given beside the problem


def rules_and_modes(workers: int) -> dict[str, Way]:
    """Name the ways to bear a straggler."""
    return {
        "async": {},
        "inverse": {"stale": stale.Inverse()},
        "delay-adaptive=W": {"stale": stale.DelayAdaptive(workers)},
        "compensate=2": {"stale": stale.DelayCompensation(2.0)},
        "compensate=0.04, fixed": {"stale": stale.DelayCompensation(0.04, adaptive=False)},
        "gap-aware": {"stale": stale.GapAware()},
        "drop=2W": {"stale": stale.Drop(2 * workers)},
        "clip=1": {"stale": stale.Clip(1.0)},
        "ssp 0": {"mode": psframe.SSP(0)},
        "ssp 3": {"mode": psframe.SSP(3)},
        "ssp 10": {"mode": psframe.SSP(10)},
        "dynamic-ssp 3-12": {"mode": psframe.DynamicSSP(3, 12)},
        "buffered W": {"mode": psframe.Buffered(workers)},
        "rennala W": {"mode": psframe.Rennala(workers)},
        "ringleader": {"mode": psframe.Ringleader()},
        "bsp": {"mode": psframe.BSP()},
        "bsp backup 1": {"mode": psframe.BSP(backup=1)},
    }


def codecs() -> dict[str, Way]:
    """Name the pairs of codecs, those of the simulated table."""
    return {
        f"{codec}, {pull}": {
            "codec": parse_codec(codec, "codec"),
            "pull_codec": parse_codec(pull, "pull_codec"),
        }
        for codec, pull in CODECS
    }


@dataclass(frozen=True)
class Trained:
    """What came of one training.

    Attributes:
        reached_s: seconds to the target; infinity if it was never seen.
        reached_at: the version that had it.
        time_s, accuracy: at the end.
        updates, staleness: how many there were in all, and the mean of all applied pushes.
    """

    reached_s: float
    reached_at: float
    time_s: float
    accuracy: float
    updates: int
    staleness: float
    traffic: Traffic = field(default_factory=Traffic)


# ---- one training --------------------------------------------------------------------------------


class Looks:
    """What one worker has read, once every so many seconds.

    Attributes:
        begin_s, end_s: of its work, on its clock.
    """

    def __init__(self, every_s: float, now: Callable[[], float]) -> None:
        self._every_s, self._now = every_s, now
        self._kept: dict[int, tuple[float, int, dict[str, Any]]] = {}
        self.begin_s = self.end_s = now()

    def look(self, params: Any) -> None:
        """Keep the parameters if none have been kept in the present period."""
        time_s = self._now()
        period = int((time_s - self.begin_s) / self._every_s)
        if period not in self._kept:
            copies = {name: array.copy() for name, array in params.items()}
            self._kept[period] = (time_s, params.version, copies)

    def evaluated(self, accuracy: Callable[[Any], float]) -> dict[int, tuple[float, int, float]]:
        """Give time, version and accuracy by period."""
        return {
            period: (time_s, version, accuracy(params))
            for period, (time_s, version, params) in self._kept.items()
        }


class Paced(Contract):
    """A model whose gradients take `step_s`, or as long as they take; `look` sees what it reads."""

    def __init__(
        self, model: Any, n_classes: int, step_s: float, look: Callable[[Any], None]
    ) -> None:
        super().__init__(model, n_classes)
        self._step_s, self._look = step_s, look

    def loss_and_gradients(self, params: Any, *batch: Any, **more: Any) -> tuple[Any, Any]:
        until = time.monotonic() + self._step_s
        self._look(params)
        found = super().loss_and_gradients(params, *batch, **more)
        time.sleep(max(0.0, until - time.monotonic()))
        return found


class Training:
    """The digits, trained in real time or in virtual time.

    Args:
        arguments: of the command line.
        slower: what worker 0's time is multiplied by.
        network: of the simulated trainings.
    """

    def __init__(self, arguments: argparse.Namespace, slower: float, network: Any) -> None:
        self._problem = Problem(Settings(epochs=arguments.epochs))
        self._step_s, self._look_s = arguments.step_ms / 1e3, arguments.look_ms / 1e3
        self._target = arguments.target
        self._slower, self._network = slower, network

    def run(self, job: Job, part: Part, way: Way, seed: int, brief: bool = False) -> Trained:
        """Train over MPI; every rank calls it, and rank 0's answer counts.

        Args:
            job, part: the ranks.
            way: what is compared.
            seed: of the parameters, and of the order of samples.
            brief: whether to take only a few steps, for what has to be compiled.
        """
        looks: list[Looks] = []
        result = psframe.run(
            self._work(looks, self._step_s),
            device="cpu",
            comm=part.comm,
            max_updates=20 if brief else None,
            **self._arguments(way, seed, part.workers),
        )
        mine = {0: (math.nan, 0, 0.0)}
        begin_s, end_s = math.inf, -math.inf
        if looks:
            (one,) = looks
            mine = one.evaluated(self._problem.accuracy)
            begin_s, end_s = one.begin_s, one.end_s
        counts = job.gather(begin_s, end_s, max(mine, default=0) + 1)
        periods = int(max(count for *_, count in counts))
        absent = (math.nan, -1, 0.0)
        flat = [number for k in range(periods) for number in mine.get(k, absent)]
        rows = np.array(job.gather(*flat)).reshape(len(counts), periods, 3)
        start_s = min(begin for begin, *_ in counts)
        return self._judged(result, rows, start_s, max(end for _, end, _ in counts))

    def simulate(self, workers: int, way: Way, seed: int) -> Trained:
        """Train in virtual time."""
        looks: list[Looks] = []

        def compute_time_s(rng: np.random.Generator, worker: int, clock: int) -> float:
            return self._step_s * (1.0 if worker else self._slower)

        result = psframe.simulate(
            self._work(looks, 0.0),
            workers=workers,
            compute_time_s=compute_time_s,
            network=self._network,
            **self._arguments(way, seed, workers),
        )
        found = [one.evaluated(self._problem.accuracy) for one in looks]
        periods = max(max(one, default=0) for one in found) + 1
        absent = (math.nan, -1, 0.0)
        rows = np.array([[one.get(k, absent) for k in range(periods)] for one in found])
        return self._judged(result, rows, 0.0, result.time_s)

    def _work(self, looks: list[Looks], step_s: float) -> Callable[[Any], None]:
        problem = self._problem
        train = problem.parts.train

        def work(worker: Any) -> None:
            mine = Looks(self._look_s, worker.now)
            looks.append(mine)
            step = step_s if worker.index else step_s * self._slower
            try:
                Stepper(
                    Paced(problem.model, train.n_classes, step, mine.look),
                    train,
                    {"": None},
                    batch_size=problem.settings.batch_size,
                    epochs=problem.settings.epochs,
                    prefetch=False,
                    spans=False,
                    takes_out=False,
                    takes_rng=False,
                ).work(worker)
            finally:
                mine.end_s = worker.now()

        return work

    def _arguments(self, way: Way, seed: int, workers: int) -> dict[str, Any]:
        problem = self._problem
        params = initial_params(problem.model, seed)
        rule = problem.settings.rule(params, len(problem.parts.train), workers)
        return {"params": params, "optimizer": rule, "seed": seed, **way}

    def _judged(self, result: Any, rows: Any, start_s: float, end_s: float) -> Trained:
        """Take the newest parameters of each period."""
        newest = rows[rows[:, :, 1].argmax(axis=0), np.arange(rows.shape[1])]
        accuracy = 0.0 if result.params is None else self._problem.accuracy(result.params)
        good = [one for one in newest if one[2] >= self._target]
        if not good and accuracy >= self._target:
            good = [(end_s, result.version, accuracy)]
        reached_s, reached_at, _ = good[0] if good else (math.inf, math.nan, 0.0)
        applied = result.staleness
        return Trained(
            reached_s - start_s,
            reached_at,
            end_s - start_s,
            accuracy,
            result.version,
            float((applied * np.arange(len(applied))).sum() / max(1, applied.sum())),
            result.traffic,
        )


# ---- tables --------------------------------------------------------------------------------------


def middle(values: Sequence[float], form: str) -> str:
    """Say median, least and most."""
    if not all(map(math.isfinite, values)):
        return f"{sum(map(math.isfinite, values))} of {len(values)}"
    most, least = max(values), min(values)
    return f"{statistics.median(values):{form}} ({least:{form}} to {most:{form}})"


def straggler_cells(trained: Sequence[Trained]) -> list[str]:
    return [
        middle([one.reached_s for one in trained], ".2f"),
        middle([one.reached_at for one in trained], ".0f"),
        f"{statistics.median(one.staleness for one in trained):.2f}",
        f"{statistics.median(one.time_s for one in trained):.1f}",
        spread([one.accuracy for one in trained]),
    ]


def link_cells(trained: Sequence[Trained]) -> list[str]:
    traffic = trained[0].traffic
    return [
        middle([one.reached_s for one in trained], ".2f"),
        f"{statistics.median(one.time_s for one in trained):.1f}",
        spread([one.accuracy for one in trained]),
        in_mb(traffic.pushed, traffic.pushed_dense),
        in_mb(traffic.pulled, traffic.pulled_dense),
    ]


def in_mb(found: int, dense: int) -> str:
    return f"{found / 1e6:.1f} of {dense / 1e6:.1f} MB" if dense else "all"


def simulated_cells(trained: Sequence[Trained]) -> list[str]:
    return [
        f"{statistics.median(one.reached_s for one in trained):.2f}",
        f"{statistics.median(one.time_s for one in trained):.1f}",
    ]


def measure(training: Training, arguments: argparse.Namespace) -> None:
    """Train with all ways and seeds, and print the table on rank 0."""
    before = os.getloadavg()[0]
    with open_job(arguments.what) as job:
        part = job.part(1)
        ways = codecs() if arguments.what == "link" else rules_and_modes(part.workers)
        if arguments.ways:
            ways = {name: ways[name] for name in arguments.ways}
        for way in ways.values():
            training.run(job, part, way, 0, brief=True)
        found: dict[str, list[Trained]] = {name: [] for name in ways}
        for seed in range(arguments.seeds):
            for name, way in ways.items():
                found[name].append(training.run(job, part, way, seed))
        if job.rank == 0:
            loads = f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} after"
            print(f"{os.cpu_count()} cores, {loads}; {job.library}; {arguments.seeds} seeds\n")
            tell(training, arguments, ways, found, part.workers)
        job.gather(0.0)  # the others wait here, at rest, while rank 0 simulates
        part.close()


def tell(
    training: Training,
    arguments: argparse.Namespace,
    ways: Mapping[str, Way],
    found: Mapping[str, Sequence[Trained]],
    workers: int,
) -> None:
    """Simulate, and print the table."""
    cells = link_cells if arguments.what == "link" else straggler_cells
    rows = {name: cells(trained) for name, trained in found.items()}
    to = f"to {arguments.target:.0%}"
    if arguments.what == "link":
        heads = [f"{to}, s", "in all, s", "accuracy", "pushed", "pulled"]
    else:
        heads = [f"{to}, s", "updates till then", "staleness", "in all, s", "accuracy"]
    if arguments.simulated:
        heads += [f"simulated {to}, s", "in all, s"]
        for name, way in ways.items():
            simulated = [training.simulate(workers, way, s) for s in range(arguments.seeds)]
            rows[name] += simulated_cells(simulated)
    print_table(heads, rows)


def on_hosts(arguments: Sequence[str], workers: int, rate: str) -> None:
    """Become an MPI job with a rank on each of some hosts behind slow links."""
    ranks = workers + 1
    names = ",".join(f"h{rank + 1}:1" for rank in range(ranks))
    mpirun = Path(sys.executable).parent / "mpirun"
    line = [str(HOSTS), "-n", str(ranks), "-r", rate, str(mpirun), "--host", names]
    line += ["-n", str(ranks), sys.executable, str(Path(__file__).resolve()), *arguments]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.execv(line[0], line)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["straggler", "link"])
    parser.add_argument("--workers", type=int, default=3, help="of link, a host each")
    parser.add_argument("--rate", default="100mbit", help="of link's cards, as tc has it; or none")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", help="names of rows; default all")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--target", type=float, default=0.97)
    parser.add_argument("--step-ms", type=float, help="default 20; link 2, as simulated")
    parser.add_argument("--look-ms", type=float, default=100.0)
    parser.add_argument("--no-simulated", dest="simulated", action="store_false")
    arguments = parser.parse_args()
    link = arguments.what == "link"
    if link and find_launcher() is None:
        on_hosts(sys.argv[1:], arguments.workers, arguments.rate)
    if arguments.step_ms is None:
        arguments.step_ms = 2.0 if link else 20.0
    if link:
        training = Training(arguments, 1.0, LINK)
    else:
        training = Training(arguments, SLOWER, psframe.Network())
    measure(training, arguments)


if __name__ == "__main__":
    main()
