"""Train, evaluate and predict with a model, on whatever `psframe.run` runs on.

Each rank calls `Trainer.fit` with equal arguments. Workers take leased batches, and leased blocks
of the test part after each epoch, so that one version is evaluated by all of them.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from psframe.consistency import Async, Mode
from psframe.data import Dataset
from psframe.errors import ArgumentError
from psframe.history import EpochSummary, History
from psframe.layout import Layout
from psframe.models.base import Model, check_model, takes
from psframe.optim import Average, Grouped
from psframe.runtime import Result, run

__all__ = ["TrainResult", "Trainer", "initial_params"]

# Samples in a leased block of the test part: large enough for one matrix product to be worth a
# message, small enough to be shared among workers.
_EVAL_BATCH_MAX = 1024

_log = logging.getLogger("psframe")


@dataclass(frozen=True)
class TrainResult:
    """What came out of a training.

    Attributes:
        result: the run's result; its `.params` are the parameters, on the root.
        accuracy: of the final parameters on the test part, in [0, 1]; None but on the root.
        history: one entry an epoch; empty but on the root.
    """

    result: Result
    accuracy: float | None
    history: list[EpochSummary] = field(default_factory=list)


class Trainer:
    """Trains a model with a parameter server.

    Args:
        model: see `psframe.models.Model`; any object with its methods.
        optimizer: a `psframe.optim` rule, applied by the servers.
        mode: Async(), SSP(...) or BSP(...).
        batch_size: samples in a batch of one worker.
        epochs: how often each training sample is used.
        seed: of the initial parameters and the order of samples.
        device: "auto", "cpu" or "cuda".
        servers, workers, run_dir, overwrite, clip_norm, comm, config: as for `psframe.run`.
        observer: called on the root with each `EpochSummary`, once it is complete.

    Raises:
        ArgumentError: the model lacks a method, or a count is not positive.
    """

    def __init__(
        self,
        model: Model,
        *,
        optimizer: Any,
        mode: Mode | None = None,
        batch_size: int = 32,
        epochs: int = 20,
        seed: int = 0,
        device: str = "auto",
        servers: int = 1,
        workers: int | None = None,
        run_dir: str | Path | None = None,
        overwrite: bool = False,
        clip_norm: float | None = None,
        comm: Any = None,
        config: Mapping[str, Any] | None = None,
        observer: Callable[[EpochSummary], None] | None = None,
    ) -> None:
        check_model(model)
        for name, count in (("batch_size", batch_size), ("epochs", epochs)):
            if count < 1:
                raise ArgumentError(f"{name}: expected 1 or more, got {count}")
        self.model = model
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self._observer = observer
        self._takes_out = takes(model, "out")
        self._takes_rng = takes(model, "rng")
        self._run_arguments: dict[str, Any] = {
            "optimizer": _with_averages(optimizer, model),
            "mode": Async() if mode is None else mode,
            "servers": servers,
            "workers": workers,
            "device": device,
            "seed": seed,
            "run_dir": run_dir,
            "overwrite": overwrite,
            "clip_norm": clip_norm,
            "comm": comm,
            "config": config,
        }

    def fit(self, train: Dataset, test: Dataset | None = None) -> TrainResult:
        """Train on `train`; evaluate on `test` after each epoch.

        SPMD: every rank calls it with equal data. What `psframe.run` raises passes through.

        Raises:
            ArgumentError: there are no samples, or the parts differ in shape.
        """
        _check_data(train, test)
        batch_size = min(self.batch_size, len(train))
        if batch_size < self.batch_size:
            _log.warning(
                "batch size %d is larger than the %d training samples; using %d",
                self.batch_size,
                len(train),
                batch_size,
            )
        history = History(test is not None, self._observer)
        result = run(
            self._work(train, test, batch_size),
            initial_params(self.model, self.seed),
            observer=history,
            **self._run_arguments,
        )
        history.close()
        if not result.is_root or result.params is None:
            return TrainResult(result, None)
        accuracy = self._final_accuracy(result, history.epochs, test)
        return TrainResult(result, accuracy, history.epochs)

    def evaluate(self, params: Mapping[str, Any], data: Dataset) -> dict[str, float]:
        """Compute `loss` and `accuracy` over a dataset, in this process.

        Other sums that the model's `evaluate` returns are divided by the count as well.
        """
        sums: dict[str, float] = {}
        for begin in range(0, len(data), _EVAL_BATCH_MAX):
            block = slice(begin, begin + _EVAL_BATCH_MAX)
            with np.errstate(over="ignore", invalid="ignore"):
                part = self.model.evaluate(params, data.x[block], data.y[block])
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        count = sums.pop("count", float(len(data)))
        if "correct" in sums:
            sums["accuracy"] = sums.pop("correct")
        return {name: value / count for name, value in sums.items()}

    def predict(self, params: Mapping[str, Any], x: Any) -> Any:
        """Compute the most likely label of each sample, (n,), in this process."""
        blocks = range(0, len(x), _EVAL_BATCH_MAX)
        parts = [self.model.predict(params, x[i : i + _EVAL_BATCH_MAX]) for i in blocks]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _work(self, train: Dataset, test: Dataset | None, batch_size: int) -> Callable[[Any], None]:
        """Make the function that each worker runs."""
        plan = None if test is None else (len(test), min(_EVAL_BATCH_MAX, _eval_batch(len(test))))

        def loop(worker: Any) -> None:
            asarray = worker.xp.asarray
            params = None
            for task in worker.tasks(len(train), batch_size, epochs=self.epochs, evaluate=plan):
                if task.kind == "evaluate":
                    assert test is not None
                    begin, end = int(task.indices[0]), int(task.indices[-1]) + 1
                    x, y = asarray(test.x[begin:end]), asarray(test.y[begin:end])
                    task.report(**self.model.evaluate(task.params(), x, y))
                    params = None  # they were valid until task.params()
                    continue
                if params is None:
                    params = worker.pull()
                x, y = asarray(train.x[task.indices]), asarray(train.y[task.indices])
                params = self._step(worker, params, x, y, task.rng)

        def work(worker: Any) -> None:
            # A diverging model overflows; the servers refuse what is not finite, and say so.
            with np.errstate(over="ignore", invalid="ignore"):
                loop(worker)

        return work

    def _step(self, worker: Any, params: Any, x: Any, y: Any, rng: np.random.Generator) -> Any:
        """Push one gradient; return the parameters that came back with the answer."""
        extra: dict[str, Any] = {"rng": rng} if self._takes_rng else {}
        grads: Any
        if self._takes_out:
            grads = worker.gradients()
            loss, _ = self.model.loss_and_gradients(params, x, y, out=grads, **extra)
        else:
            loss, grads = self.model.loss_and_gradients(params, x, y, **extra)
        worker.log(loss=loss)
        return worker.push_pull(None if self._takes_out else grads)

    def _final_accuracy(
        self, result: Result, history: list[EpochSummary], test: Dataset | None
    ) -> float | None:
        """Take the last evaluation if it was of the final version, or evaluate that here."""
        if test is None:
            return None
        last = history[-1] if history else None
        if last is not None and last.version == result.version and last.test_accuracy is not None:
            return last.test_accuracy
        return self.evaluate(result.params or {}, test).get("accuracy")


def _with_averages(optimizer: Any, model: Model) -> Any:
    """Let the servers average what the model observes and does not train."""
    averages = getattr(model, "averages", None)
    if not averages:
        return optimizer
    groups = {glob.escape(name): Average(momentum) for name, momentum in averages.items()}
    return Grouped(optimizer, groups)


def initial_params(model: Model, seed: int) -> dict[str, Any]:
    """Draw a model's initial parameters, a function of the seed.

    Raises:
        ArgumentError: they are not what a server can hold.
    """
    params = model.init(np.random.default_rng(seed))
    try:
        Layout.of(params)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"model: {type(model).__name__}.init: {error}") from error
    return dict(params)


def _eval_batch(n: int) -> int:
    """Divide small test parts into about eight blocks, so that several workers share them."""
    return max(64, -(-n // 8))


def _check_data(train: Dataset, test: Dataset | None) -> None:
    for name, part in (("train", train), ("test", test)):
        if part is not None and len(part) == 0:
            raise ArgumentError(f"{name}: expected at least one sample, got none")
    if test is not None and test.input_shape != train.input_shape:
        raise ArgumentError(
            f"test: has samples of shape {test.input_shape}, expected {train.input_shape} as in "
            "the training part"
        )
