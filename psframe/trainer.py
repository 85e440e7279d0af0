"""Train, evaluate and predict with a model, on whatever `psframe.run` runs on.

Each rank calls `Trainer.fit` with equal arguments. Workers take leased batches, which are prepared
in a thread while the batch before is computed, and leased blocks of the parts that are held out
after each epoch, so that one version is evaluated by all of them.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.consistency import Async, Mode
from psframe.data import Dataset, Parts
from psframe.errors import ArgumentError
from psframe.events import HostEvent
from psframe.history import EpochSummary, History, score
from psframe.inference import Predictions, confusion_matrix, mean_loss, predict
from psframe.layout import Layout
from psframe.models.base import Model, check_model, takes
from psframe.optim import Average, Grouped
from psframe.placement import Servers
from psframe.runtime import Result, run
from psframe.stepping import Stepper

__all__ = ["Evaluation", "TrainResult", "Trainer", "initial_params"]

_log = logging.getLogger("psframe")


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a dataset.

    Attributes:
        accuracy: the part of the samples that is predicted right, in [0, 1].
        loss: mean cross-entropy; None if the model tells no probabilities.
        confusion: (k, k) int64 counts, a row a true label, a column a predicted one.
        predictions: of each sample.
    """

    accuracy: float
    loss: float | None
    confusion: npt.NDArray[np.int64]
    predictions: Predictions


@dataclass(frozen=True)
class TrainResult:
    """What came out of a training.

    Attributes:
        result: the run's result; its `.params` are the parameters, on the root: the last ones, or
            with a validation part those that did best on it.
        accuracy: of these parameters on the test part, in [0, 1]; None but on the root.
        history: one entry an epoch; empty but on the root.
        evaluation: of these parameters on the test part; None but on the root.
        best_epoch: whose parameters they are, with a validation part; else None.
        stopped_early: whether nothing had improved for `patience` epochs.
    """

    result: Result
    accuracy: float | None
    history: list[EpochSummary] = field(default_factory=list)
    evaluation: Evaluation | None = None
    best_epoch: int | None = None
    stopped_early: bool = False


class Trainer:
    """Trains a model with a parameter server.

    Args:
        model: see `psframe.models.Model`; any object with its methods.
        optimizer: a `psframe.optim` rule, applied by the servers. What the model only averages
            (`model.averages`) is averaged, whatever the rule.
        mode: Async(), SSP(...) or BSP(...).
        batch_size: samples in a batch of one worker.
        epochs: how often each training sample is used.
        seed: of the initial parameters, the order of samples, augmentation and dropout.
        patience: stop after so many epochs without a better accuracy on the validation part.
        device: "auto", "cpu" or "cuda".
        servers, workers, run_dir, overwrite, clip_norm, comm, config: as for `psframe.run`.
        callbacks: each is called on the root with each `EpochSummary`, once it is complete; one
            that returns True ends the training.
        observer: called on the root with each event of the run, every push among them; it may
            have methods `tick` and `opened`, as for `psframe.run`.
        prefetch: whether a thread prepares the next batch meanwhile.
        spans: whether the observer is told when which rank was at what.

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
        patience: int | None = None,
        device: str = "auto",
        servers: Servers = 1,
        workers: int | None = None,
        run_dir: str | Path | None = None,
        overwrite: bool = False,
        clip_norm: float | None = None,
        comm: Any = None,
        config: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callable[[EpochSummary], Any]] = (),
        observer: Callable[[HostEvent], Any] | None = None,
        prefetch: bool = True,
        spans: bool = False,
    ) -> None:
        check_model(model)
        for name, count in (("batch_size", batch_size), ("epochs", epochs), ("patience", patience)):
            if count is not None and count < 1:
                raise ArgumentError(f"{name}: expected 1 or more, got {count}")
        for callback in callbacks:
            if not callable(callback):
                raise ArgumentError(f"callbacks: expected functions, got {callback!r}")
        self.model = model
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.patience = patience
        self._callbacks = tuple(callbacks)
        self._observer = observer
        self._prefetch = prefetch
        self._spans = spans
        self._placement: dict[str, Any] = {
            "servers": servers,
            "workers": workers,
            "device": device,
            "comm": comm,
        }
        self._run_arguments: dict[str, Any] = {
            "optimizer": _with_averages(optimizer, model),
            "mode": Async() if mode is None else mode,
            "seed": seed,
            "run_dir": run_dir,
            "overwrite": overwrite,
            "clip_norm": clip_norm,
            "config": config,
        }

    def fit(
        self,
        train: Dataset | Parts,
        test: Dataset | None = None,
        validation: Dataset | None = None,
    ) -> TrainResult:
        """Train on `train`; evaluate on the other parts after each epoch.

        SPMD: every rank calls it with equal data. What `psframe.run` raises passes through. With
        a validation part the parameters that did best on it are kept.

        Raises:
            ArgumentError: there are no samples, the parts differ in shape, or there is patience
                and no validation part.
        """
        if isinstance(train, Parts):
            train, validation, test = train
        _check_data(train, validation, test)
        if self.patience is not None and validation is None:
            raise ArgumentError(
                "patience: early stopping needs a validation part; hold one out, such as with "
                "--validation-fraction 0.1"
            )
        stepper = Stepper(
            self.model,
            train,
            {"": test, "validation_": validation},
            batch_size=self._batch_size(len(train)),
            epochs=self.epochs,
            prefetch=self._prefetch,
            spans=self._spans,
            takes_out=takes(self.model, "out"),
            takes_rng=takes(self.model, "rng"),
        )
        history = History(stepper.evaluates, self._callbacks, self.patience)
        observer = _Observer(history, self._observer)
        result = run(
            stepper.work,
            initial_params(self.model, self.seed),
            observer=observer,
            trace=True,
            spans=self._spans,
            score=None if validation is None else score,
            **self._placement,
            **self._run_arguments,
        )
        history.close()
        evaluation = None if test is None else self._evaluate(result.params, test)
        if not result.is_root:
            return TrainResult(result, None)
        return TrainResult(
            result,
            None if evaluation is None else evaluation.accuracy,
            history.epochs,
            evaluation,
            history.best_epoch,
            history.stopped_early,
        )

    def evaluate(self, params: Mapping[str, Any] | None, data: Dataset) -> Evaluation | None:
        """Evaluate a dataset on all workers; every rank calls it with equal arguments.

        Args:
            params: of the model, on the root; ignored elsewhere.
            data: with labels.

        Returns:
            The evaluation, on the root; None elsewhere.
        """
        return self._evaluate(params, data)

    def predict(self, params: Mapping[str, Any] | None, data: Dataset) -> Predictions | None:
        """Predict a dataset on all workers, in its order; as `evaluate`."""
        if params is None:  # not the root: only names, shapes and dtypes count
            params = initial_params(self.model, self.seed)
        return predict(self.model, params, data, **self._placement)

    def _evaluate(self, params: Mapping[str, Any] | None, data: Dataset) -> Evaluation | None:
        predictions = self.predict(params, data)
        if predictions is None:
            return None
        y = data.labels
        return Evaluation(
            float((predictions.labels == y).mean()),
            mean_loss(predictions.probabilities, y),
            confusion_matrix(y, predictions.labels, data.n_classes),
            predictions,
        )

    def _batch_size(self, samples: int) -> int:
        size = min(self.batch_size, samples)
        if size < self.batch_size:
            _log.warning(
                "batch size %d is larger than the %d training samples; using %d",
                self.batch_size,
                samples,
                size,
            )
        return size


class _Observer:
    """Hands each event to the history and to the caller's own observer."""

    def __init__(self, history: History, other: Callable[[HostEvent], Any] | None) -> None:
        self._history = history
        self._other = other
        self.tick: Callable[[], None] = getattr(other, "tick", lambda: None)
        self.opened: Callable[[Path], None] = getattr(other, "opened", lambda folder: None)

    def __call__(self, event: HostEvent) -> bool:
        asked = self._other is not None and self._other(event) is True
        return self._history(event) or asked


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


def _check_data(train: Dataset, validation: Dataset | None, test: Dataset | None) -> None:
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if part is None:
            continue
        if len(part) == 0:
            raise ArgumentError(f"{name}: expected at least one sample, got none")
        if part.input_shape != train.input_shape:
            raise ArgumentError(
                f"{name}: has samples of shape {part.input_shape}, expected {train.input_shape} as "
                "in the training part"
            )
