"""What staleness does to a training, and what each rule and mode does about it, in virtual time.

    python benchmarks/staleness.py accuracy --workers 3 8 16 32 64 --seeds 5
    python benchmarks/staleness.py accuracy --optimizer sgd --momentum 0.9 --lr 0.05
    python benchmarks/staleness.py straggler --workers 8
    python benchmarks/staleness.py codecs --workers 3

`accuracy` trains on the digits as `psframe train` does by default (or with --optimizer, --lr,
--momentum), with exponential compute times, and prints two tables: the test accuracy after all
epochs, mean and spread over the seeds, with the virtual time that they took; and the accuracy at
one time for all, when the fastest way has finished. `straggler` prints the time to --target where
all workers are alike, where one is 4 times slower, and where each step of any worker is 4 times
slower by chance. `codecs` prints what each codec makes of accuracy and bytes, and the time to
--target over links of 100 Mbit/s, where a gradient takes 2 ms. Everything is simulated, so that
load does not matter: the same seeds give the same table. (Another processor's BLAS may sum in
another order, which changes the last digits.)
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import psframe
from psframe.choices import make_mode, parse_codec, parse_stale
from psframe.coding import Traffic
from psframe.models import create
from psframe.models.contract import Contract
from psframe.settings import Settings
from psframe.stepping import Stepper
from psframe.train import load_parts
from psframe.trainer import initial_params

EVERY = 15  # gradients between two looks at the accuracy, of which an epoch has 45
SLOWER = 4.0  # what a straggler's time is multiplied by


@dataclass(frozen=True)
class Way:
    """A way to train: the mode and the rule for stale gradients, as the command has them.

    `w` and `2w` in braces stand for the workers' number and twice that; `momentum` takes the place
    of SGD with momentum.
    """

    mode: str = "async"
    stale: str = "accept"
    numbers: Mapping[str, int] = field(default_factory=dict)
    momentum: Any = None


WAYS = {
    "async": Way(),
    "inverse": Way(stale="inverse"),
    "delay-adaptive=W": Way(stale="delay-adaptive={w}"),
    "compensate=2": Way(stale="compensate=2.0"),
    "gap-aware": Way(stale="gap-aware"),
    "drop=2W": Way(stale="drop={2w}"),
    "clip=1": Way(stale="clip=1.0"),
    "worker momentum": Way(momentum=psframe.optim.WorkerMomentum),
    "dana-zero": Way(momentum=psframe.optim.DANAZero),
    "ssp 3": Way("ssp", numbers={"staleness": 3}),
    "dynamic-ssp 3-12": Way("dynamic-ssp", numbers={"staleness": 3, "staleness_max": 12}),
    "buffered W": Way("buffered"),
    "rennala W": Way("rennala"),
    "ringleader": Way("ringleader"),
    "bsp": Way("bsp"),
    "bsp backup 1": Way("bsp", numbers={"backup": 1}),
}


@dataclass(frozen=True)
class Trained:
    """What came of one simulated training.

    Attributes:
        accuracy: at the end; 0.1, the digits' chance, if it diverged.
        time_s: virtual seconds; NaN if it diverged.
        curve: (virtual seconds, accuracy) after every so many gradients.
    """

    accuracy: float
    time_s: float
    curve: Sequence[tuple[float, float]]
    traffic: Traffic = field(default_factory=Traffic)

    def at(self, time_s: float) -> float:
        """Give the accuracy at that time."""
        if not self.time_s > time_s:
            return self.accuracy
        return max((point for point in self.curve if point[0] <= time_s), default=(0.0, 0.1))[1]

    def reached_s(self, target: float) -> float:
        """Give the first time at which the accuracy was that; infinity if it never was."""
        ends = [*self.curve, (self.time_s, self.accuracy)]
        return next((time for time, accuracy in ends if accuracy >= target), math.inf)


class Watched(Contract):
    """A model that is also evaluated, on the parameters of every `EVERY`-th gradient."""

    def __init__(self, model: Any, n_classes: int, look: Callable[[Any], None]) -> None:
        super().__init__(model, n_classes)
        self._look, self._gradients = look, 0

    def loss_and_gradients(self, params: Any, *batch: Any, **more: Any) -> tuple[Any, Any]:
        if self._gradients % EVERY == 0:
            self._look(params)
        self._gradients += 1
        return super().loss_and_gradients(params, *batch, **more)


class Problem:
    """The digits and a model, as the command has them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.resolved()
        self.parts = load_parts(self.settings)
        train = self.parts.train
        self.model = create(self.settings.model, train.input_shape, train.n_classes)

    def train(
        self,
        name: str,
        workers: int,
        seed: int,
        compute_time_s: Callable[..., float],
        **more: Any,
    ) -> Trained:
        """Train once; `more` is given to `psframe.simulate`."""
        settings, train, way = self.settings, self.parts.train, WAYS[name]
        params = initial_params(self.model, seed)
        optimizer = settings.rule(params, len(train), workers)
        if way.momentum is not None:
            optimizer = way.momentum(optimizer.lr, optimizer.momentum)
        rule = way.stale.replace("{w}", str(workers)).replace("{2w}", str(2 * workers))
        curve: list[tuple[float, float]] = []
        # Virtual time is every worker's.
        clocks: list[Callable[[], float]] = []

        def look(params: Any) -> None:
            curve.append((clocks[0](), self.accuracy(params)))

        stepper = Stepper(
            Watched(self.model, train.n_classes, look),
            train,
            {"": None},
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            prefetch=False,
            spans=False,
            takes_out=False,
            takes_rng=False,
        )

        def work(worker: psframe.Worker) -> None:
            clocks.append(worker.now)
            stepper.work(worker)

        try:
            result = psframe.simulate(
                work,
                params,
                optimizer=optimizer,
                mode=mode_of(way, workers),
                workers=workers,
                compute_time_s=compute_time_s,
                seed=seed,
                stale=parse_stale(rule),
                **more,
            )
        except psframe.Diverged:
            return Trained(0.1, math.nan, curve)
        assert result.params is not None
        return Trained(self.accuracy(result.params), result.time_s, curve, result.traffic)

    def accuracy(self, params: Any) -> float:
        test = self.parts.test
        assert test is not None
        x, y = test.batch(np.arange(len(test)))
        with np.errstate(all="ignore"):  # a model that diverges predicts something, too
            return float((self.model.predict(params, x) == y).mean())


def mode_of(way: Way, workers: int) -> Any:
    """Make a way's mode."""
    given: dict[str, int | None] = dict.fromkeys(("staleness", "staleness_max", "backup", "pushes"))
    if way.mode in ("buffered", "rennala"):
        given["pushes"] = workers
    return make_mode(way.mode, {**given, **way.numbers})


# ---- compute times, a second in the mean or for most workers ------------------------------------


def exponential(rng: np.random.Generator, worker: int, clock: int) -> float:
    return float(rng.exponential())


def alike(rng: np.random.Generator, worker: int, clock: int) -> float:
    return float(rng.uniform(0.9, 1.1))


def one_slower(rng: np.random.Generator, worker: int, clock: int) -> float:
    return alike(rng, worker, clock) * (SLOWER if worker == 0 else 1.0)


def any_slower(rng: np.random.Generator, worker: int, clock: int) -> float:
    """One step in 8 is slow, whose it may be."""
    return alike(rng, worker, clock) * (SLOWER if rng.random() < 0.125 else 1.0)


# ---- tables -------------------------------------------------------------------------------------


def accuracy(problem: Problem, arguments: argparse.Namespace) -> None:
    """Print the tables of rules and workers."""
    seeds = range(arguments.seeds)
    found = {
        way: {w: [problem.train(way, w, s, exponential) for s in seeds] for w in arguments.workers}
        for way in arguments.ways
    }
    heads = [f"W={workers}" for workers in arguments.workers]
    print("After all epochs:\n")
    print_table(heads, {way: map(at_the_end, of.values()) for way, of in found.items()})

    limits = {w: min(median_s(of[w]) for of in found.values()) for w in arguments.workers}
    print("\nWhen the fastest way has finished:\n")
    heads = [f"W={workers}, {limits[workers]:.0f} s" for workers in arguments.workers]
    rows = {
        way: (spread([one.at(limits[w]) for one in trained]) for w, trained in of.items())
        for way, of in found.items()
    }
    print_table(heads, rows)


def straggler(problem: Problem, arguments: argparse.Namespace) -> None:
    """Print the table of modes and kinds of stragglers."""
    kinds = {"all alike": alike, "one 4x slower": one_slower, "any, by chance": any_slower}
    for workers in arguments.workers:
        print(f"Seconds to {arguments.target:.0%} with {workers} workers:\n")
        rows: dict[str, list[str]] = {}
        for way in arguments.ways:
            cells = rows[way] = []
            for time in kinds.values():
                trained = [problem.train(way, workers, s, time) for s in range(arguments.seeds)]
                reached = statistics.median(one.reached_s(arguments.target) for one in trained)
                cells.append(f"{reached:.0f}" if reached < math.inf else "never")
        print_table(list(kinds), rows)


CODECS = (
    ("none", "none"),
    ("float16", "none"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("qsgd=127", "float16"),
    ("sign", "float16"),
    ("topk=0.01", "float16"),
    ("topk=0.01", "topk=0.05"),
    ("powersgd=2", "float16"),
    ("powersgd=2", "topk=0.05"),
)
LINK = psframe.Network(100e-6, 100e6 / 8)
STEP_S = 2e-3  # of computing a gradient


def compute_briefly(rng: np.random.Generator, worker: int, clock: int) -> float:
    return STEP_S * alike(rng, worker, clock)


def coded(problem: Problem, arguments: argparse.Namespace) -> None:
    """Print the table of codecs."""
    target, rows = arguments.target, {}
    for codec, pull_codec in CODECS:
        more = {
            "codec": parse_codec(codec, "codec"),
            "pull_codec": parse_codec(pull_codec, "pull_codec"),
            "network": LINK,
        }
        trained = [
            problem.train("async", arguments.workers[0], seed, compute_briefly, **more)
            for seed in range(arguments.seeds)
        ]
        traffic = trained[0].traffic
        rows[f"{codec}, {pull_codec}"] = (
            spread([one.accuracy for one in trained]),
            fewer(traffic.pushed_dense, traffic.pushed),
            fewer(traffic.pulled_dense, traffic.pulled),
            f"{statistics.median(one.reached_s(target) for one in trained):.1f} s",
            f"{median_s(trained):.1f} s",
        )
    heads = ("accuracy", "pushed", "pulled", f"to {target:.0%}", "in all")
    print_table(heads, rows)


def fewer(dense: int, found: int) -> str:
    """Say how many times fewer bytes there were."""
    return f"1/{dense / found:.0f}" if found else "1/1"


def print_table(heads: Sequence[str], rows: Mapping[str, Iterable[str]]) -> None:
    print(f"| | {' | '.join(heads)} |")
    print(f"|---|{'---|' * len(heads)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def median_s(trained: Sequence[Trained]) -> float:
    """Give the median time of those that have come to their end."""
    ended = [one.time_s for one in trained if math.isfinite(one.time_s)]
    return statistics.median(ended) if ended else math.inf


def at_the_end(trained: Sequence[Trained]) -> str:
    """Say mean, spread and virtual time."""
    said, time_s = spread([one.accuracy for one in trained]), median_s(trained)
    return f"{said}, {time_s:.0f} s" if time_s < math.inf else said


def spread(accuracies: Sequence[float]) -> str:
    """Say mean and standard deviation."""
    return f"{statistics.mean(accuracies):.1%} ± {statistics.pstdev(accuracies) * 100:.1f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["accuracy", "straggler", "codecs"])
    parser.add_argument("--workers", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--target", type=float, default=0.97)
    parser.add_argument("--optimizer", default="adagrad")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--momentum", type=float, default=0.0)
    arguments = parser.parse_args()
    settings = Settings(optimizer=arguments.optimizer, lr=arguments.lr, momentum=arguments.momentum)
    problem = Problem(replace(settings, epochs=arguments.epochs))
    if arguments.ways is None:
        momentum = arguments.momentum > 0
        arguments.ways = [name for name, way in WAYS.items() if momentum or way.momentum is None]
    if arguments.what == "accuracy":
        arguments.workers = arguments.workers or [3, 8, 16, 32, 64]
        accuracy(problem, arguments)
    elif arguments.what == "codecs":
        arguments.workers = arguments.workers or [3]
        coded(problem, arguments)
    else:
        arguments.workers = arguments.workers or [8]
        straggler(problem, arguments)


if __name__ == "__main__":
    main()
