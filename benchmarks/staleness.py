"""What staleness does to a training, and what each rule and mode does about it, in virtual time.

    python benchmarks/staleness.py accuracy --workers 3 8 16 32 64 --seeds 5

`accuracy` trains on the digits as `psframe train` does by default (or with --optimizer, --lr,
--momentum), with exponential compute times, and prints the test accuracy, mean and spread over the
seeds, and the virtual time that it took. Everything is simulated: the same seed gives the same
table on any machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import psframe
from psframe.choices import make_mode, parse_stale
from psframe.models import create
from psframe.models.contract import Contract
from psframe.settings import Settings
from psframe.stepping import Stepper
from psframe.train import load_parts
from psframe.trainer import initial_params

# A way to train: its name, the mode, and the rule for stale gradients, as the command has them.
WAYS = {
    "async": ("async", "accept"),
    "inverse": ("async", "inverse"),
    "delay-adaptive=W": ("async", "delay-adaptive={w}"),
    "compensate=0.04": ("async", "compensate=0.04"),
    "gap-aware": ("async", "gap-aware"),
    "drop=2W": ("async", "drop={2w}"),
    "clip=1": ("async", "clip=1.0"),
    "ssp 3": ("ssp", "accept"),
    "buffered W": ("buffered", "accept"),
    "rennala W": ("rennala", "accept"),
    "ringleader": ("ringleader", "accept"),
    "bsp": ("bsp", "accept"),
}


@dataclass(frozen=True)
class Trained:
    """What came of one simulated training."""

    accuracy: float  # 0.1, the digits' chance, if it diverged
    time_s: float
    updates: int


class Problem:
    """The digits and a model, as the command has them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.resolved()
        self.parts = load_parts(self.settings)
        train = self.parts.train
        self.model = create(self.settings.model, train.input_shape, train.n_classes)

    def train(
        self,
        way: str,
        workers: int,
        seed: int,
        compute_time_s: Callable[..., float],
        *,
        optimizer: Any = None,
        limit_s: float = float("inf"),
        curve: list[tuple[float, float]] | None = None,
    ) -> Trained:
        """Train once; `curve` gets (virtual seconds, accuracy) after every epoch's worth."""
        settings, train = self.settings, self.parts.train
        params = initial_params(self.model, seed)
        mode, stale = WAYS[way]
        rule = parse_stale(stale.replace("{w}", str(workers)).replace("{2w}", str(2 * workers)))
        pushes = workers if mode in ("buffered", "rennala") else None
        given = {"staleness": None, "staleness_max": None, "backup": None, "pushes": pushes}
        contract = Contract(self.model, train.n_classes)
        stepper = Stepper(
            contract,
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
            stepper.work(worker)

        try:
            result = psframe.simulate(
                work,
                params,
                optimizer=optimizer or settings.rule(params, len(train), workers),
                mode=make_mode(mode, given),
                workers=workers,
                compute_time_s=compute_time_s,
                seed=seed,
                stale=rule,
            )
        except psframe.Diverged:
            return Trained(0.1, float("nan"), 0)
        assert result.params is not None
        return Trained(self.accuracy(result.params), result.time_s, result.version)

    def accuracy(self, params: Any) -> float:
        test = self.parts.test
        assert test is not None
        x, y = test.batch(np.arange(len(test)))
        return float((self.model.predict(params, x) == y).mean())


def exponential(rng: np.random.Generator, worker: int, clock: int) -> float:
    """A second in the mean."""
    return float(rng.exponential())


def accuracy(arguments: argparse.Namespace) -> None:
    """Print the table of rules and workers."""
    settings = Settings(optimizer=arguments.optimizer, lr=arguments.lr, momentum=arguments.momentum)
    problem = Problem(replace(settings, epochs=arguments.epochs))
    print(f"| | {' | '.join(f'W={w}' for w in arguments.workers)} |")
    print(f"|---|{'---|' * len(arguments.workers)}")
    for way in arguments.ways:
        cells = []
        for workers in arguments.workers:
            found = [
                problem.train(way, workers, seed, exponential) for seed in range(arguments.seeds)
            ]
            cells.append(cell([one.accuracy for one in found], [one.time_s for one in found]))
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


def cell(accuracies: Sequence[float], times: Sequence[float]) -> str:
    """Say mean, spread and virtual time."""
    mean, spread = statistics.mean(accuracies), statistics.pstdev(accuracies)
    return f"{mean:.1%} ± {spread * 100:.1f}, {statistics.median(times):.0f} s"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["accuracy"])
    parser.add_argument("--workers", type=int, nargs="+", default=[3, 8, 16, 32, 64])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--optimizer", default="adagrad")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--momentum", type=float, default=0.0)
    accuracy(parser.parse_args())


if __name__ == "__main__":
    main()
