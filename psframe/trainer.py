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

from psframe.codecs import Codec
from psframe.consistency import Async, Mode
from psframe.data import Dataset, Parts
from psframe.ending import Ending, name_of
from psframe.errors import ArgumentError
from psframe.events import HostEvent
from psframe.history import EpochSummary, History, Onlookers, score
from psframe.inference import (
    Predictions,
    confusion_matrix,
    mean_loss,
    predict,
    predict_alone,
)
from psframe.launcher import find_launcher
from psframe.layout import Layout
from psframe.models.base import Model, check_model, takes
from psframe.models.contract import Contract, check_parameters
from psframe.models.precision import check_host, set_precision
from psframe.optim import Average, Grouped
from psframe.placement import Servers
from psframe.plan import TIMEOUT_S
from psframe.runtime import Result, run
from psframe.stale import Rule
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
        failure: why there is no evaluation, on every rank, if the last one failed; accuracy is then
            what was found during the run, if that was of these parameters.
        best_epoch: whose parameters they are, with a validation part; else None.
        stopped_early: whether nothing had improved for `patience` epochs.
    """

    result: Result
    accuracy: float | None
    history: list[EpochSummary] = field(default_factory=list)
    evaluation: Evaluation | None = None
    failure: Exception | None = None
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
        patience: stop after so many epochs without a better accuracy on the validation part; that
            its loss still falls does not count.
        device: "auto", "cpu" or "cuda".
        precision: "float32", "tf32", "bfloat16" or "float16": the arithmetic on GPUs, of models
            that have an attribute `precision`, which is set; None leaves it. The servers' is
            float32 in any case.
        server_device, gpu_direct: as for `psframe.run`.
        servers, workers, overwrite, checkpoint_every, keep_checkpoints: as for `psframe.run`.
        resume, clip_norm, stale, codec, pull_codec, timeout_s, respawn, comm, config: as for
            `psframe.run`.
        run_dir: as for `psframe.run`; the weights go there, too, so that ``psframe evaluate`` and
            ``psframe predict`` find them, or `psframe.weights.load_weights`.
        callbacks: each is called on the root with each `EpochSummary`, once it is complete; one
            that returns True ends the training.
        observer: called on the root with each event of the run, every push among them; it may
            have methods `tick` and `opened`, as for `psframe.run`.
        prefetch: whether a thread prepares the next batch meanwhile.
        spans: whether the observer is told when which rank was at what.
        name: of the model, as ``--model`` has it, for its weights; package.module:Class if None.

    Raises:
        ArgumentError: the model lacks a method, a count is not positive, or the precision is not
            one of the model's or the device's.
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
        precision: str | None = None,
        server_device: str = "cpu",
        gpu_direct: str = "auto",
        servers: Servers = 1,
        workers: int | None = None,
        run_dir: str | Path | None = None,
        overwrite: bool = False,
        checkpoint_every: int | str | None = None,
        keep_checkpoints: int = 3,
        resume: bool = False,
        clip_norm: float | None = None,
        stale: Rule | None = None,
        codec: Codec | None = None,
        pull_codec: Codec | None = None,
        timeout_s: float = TIMEOUT_S,
        respawn: int = 0,
        comm: Any = None,
        config: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callable[[EpochSummary], Any]] = (),
        observer: Callable[[HostEvent], Any] | None = None,
        prefetch: bool = True,
        spans: bool = False,
        name: str | None = None,
    ) -> None:
        check_model(model)
        if precision is not None:
            set_precision(model, precision)
        if device == "cpu":
            check_host(getattr(model, "precision", "float32"))
        for what, count in (("batch_size", batch_size), ("epochs", epochs), ("patience", patience)):
            if count is not None:
                _check_count(what, count)
        given: object = callbacks
        if not isinstance(given, Sequence) or not all(map(callable, given)):
            raise ArgumentError(f"callbacks: expected a tuple of functions, got {callbacks!r}")
        self.model = model
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.patience = patience
        self._callbacks = tuple(callbacks)
        self._observer = observer
        self._prefetch = prefetch
        self._spans = spans
        self._name = name_of(model) if name is None else name
        self._here = False  # whether only this rank is left to evaluate
        self._placement: dict[str, Any] = {
            "servers": servers,
            "workers": workers,
            "device": device,
            "comm": comm,
        }
        self._run_arguments: dict[str, Any] = {
            "optimizer": _with_averages(optimizer, model),
            "server_device": server_device,
            "gpu_direct": gpu_direct,
            "mode": Async() if mode is None else mode,
            "seed": seed,
            "run_dir": run_dir,
            "overwrite": overwrite,
            "checkpoint_every": checkpoint_every,
            "keep_checkpoints": keep_checkpoints,
            "resume": resume,
            "clip_norm": clip_norm,
            "stale": stale,
            "codec": codec,
            "pull_codec": pull_codec,
            "timeout_s": timeout_s,
            "respawn": respawn,
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
        a validation part the parameters that did best on it are kept. They are saved before they
        are evaluated for the last time: if that fails, the training is not lost, and the result
        says why.

        Raises:
            ArgumentError: there are no samples, the parts differ in shape, or there is patience
                and no validation part.
            RunDirError: the weights cannot be saved, on the root, at the end.
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
            Contract(self.model, train.n_classes),
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
        observer = Onlookers(history, self._observer)
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
        if not self._alone():
            self._placement["workers"] = None  # which it has said to be ignored
        if result.is_root and len(result.lost) == result.workers:
            self._here = True  # others worked in the lost ranks' places, and have gone
        history.close()
        evaluation: Evaluation | None = None
        failure: Exception | None = None
        version = result.version if result.kept_version is None else result.kept_version
        with Ending(result, self._name, train, history.accuracy(version)) as ending:
            try:
                evaluation = None if test is None else self._evaluate(result.params, test)
            except Exception as error:  # on every rank, as `run` raises
                ending.error = failure = error
            if evaluation is not None:
                ending.accuracy = evaluation.accuracy
        if not result.is_root:
            return TrainResult(result, None, failure=failure)
        return TrainResult(
            result,
            ending.accuracy,
            history.epochs,
            evaluation,
            failure,
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
        self._check_given(params, data)
        return self._evaluate(params, data)

    def predict(self, params: Mapping[str, Any] | None, data: Dataset) -> Predictions | None:
        """Predict a dataset on all workers, in its order; as `evaluate`."""
        self._check_given(params, data)
        return self._predict(params, data)

    def _predict(self, params: Mapping[str, Any] | None, data: Dataset) -> Predictions | None:
        if params is None:  # not the root: only names, shapes and dtypes count
            params = initial_params(self.model, self.seed)
        contract = Contract(self.model, data.n_classes)
        if self._here:
            return predict_alone(contract, params, data, device=self._placement["device"])
        return predict(contract, params, data, **self._placement)

    def _evaluate(self, params: Mapping[str, Any] | None, data: Dataset) -> Evaluation | None:
        predictions = self._predict(params, data)
        if predictions is None:
            return None
        y = data.labels
        return Evaluation(
            float((predictions.labels == y).mean()),
            mean_loss(predictions.probabilities, y),
            confusion_matrix(y, predictions.labels, data.n_classes),
            predictions,
        )

    def _alone(self) -> bool:
        """Tell whether everything happens in this process."""
        return self._placement["comm"] is None and find_launcher() is None

    def _check_given(self, params: object, data: object) -> None:
        """Check what is to be evaluated; between ranks `run` compares the parameters."""
        _check_dataset("data", data)
        if not self._alone():
            return
        if not isinstance(params, Mapping):
            raise ArgumentError(
                f"params: expected a mapping of names to arrays, got {type(params).__name__}"
            )
        expected = {name: np.shape(p) for name, p in initial_params(self.model, self.seed).items()}
        given = {name: np.shape(p) for name, p in params.items()}
        if given != expected:
            raise ArgumentError(
                f"params: expected those of {type(self.model).__name__}, {expected}, got {given}"
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


def _with_averages(optimizer: Any, model: Model) -> Any:
    """Let the servers average what the model observes and does not train."""
    averages = getattr(model, "averages", None)
    if averages is not None and not isinstance(averages, Mapping):
        raise ArgumentError(
            f"model: {type(model).__name__}.averages: expected a dict of names to momenta in "
            f"[0, 1), got {averages!r}"
        )
    if not averages:
        return optimizer
    groups = {glob.escape(name): Average(momentum) for name, momentum in averages.items()}
    return Grouped(optimizer, groups)


def initial_params(model: Model, seed: int) -> dict[str, Any]:
    """Draw a model's initial parameters, a function of the seed.

    Raises:
        ArgumentError: they are not what a server can hold.
    """
    try:
        params = model.init(np.random.default_rng(seed))
    except SystemExit as error:  # it would end this process without a word
        raise ArgumentError(
            f"model: {type(model).__name__}.init called sys.exit({error.code!r})"
        ) from error
    try:
        Layout.of(params)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"model: {type(model).__name__}.init: {error}") from error
    check_parameters(params, f"model: {type(model).__name__}.init")
    return dict(params)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArgumentError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ArgumentError(f"{name}: expected 1 or more, got {value}")


def _check_dataset(name: str, data: object) -> None:
    if not isinstance(data, Dataset):
        raise ArgumentError(f"{name}: expected a psframe.data.Dataset, got {type(data).__name__}")


def _check_data(train: Dataset, validation: Dataset | None, test: Dataset | None) -> None:
    _check_dataset("train", train)
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if part is None:
            continue
        _check_dataset(name, part)
        if len(part) == 0:
            raise ArgumentError(f"{name}: expected at least one sample, got none")
        if part.input_shape != train.input_shape:
            raise ArgumentError(
                f"{name}: has samples of shape {part.input_shape}, expected {train.input_shape} as "
                "in the training part"
            )
