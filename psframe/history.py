"""What the root learns of a training, epoch by epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from psframe.events import EpochDone, Evaluated, HostEvent, Logged
from psframe.state import Fields, plain_number

__all__ = [
    "TIMES",
    "EpochSummary",
    "EpochSums",
    "History",
    "Onlookers",
    "evaluation_metrics",
    "score",
]

# What workers log of each step, beside loss and samples: seconds computing the gradient, waiting
# for servers, and waiting for the batch.
TIMES = ("compute_s", "servers_s", "data_s")
_LOSSES = ("loss", "train_loss")
# What an `EpochSummary` has in numbers that may not be known.
_NUMBERS = (
    *("train_loss", "staleness_mean", "test_loss", "test_accuracy", "validation_loss"),
    *("validation_accuracy", "samples_per_s", *TIMES),
)
_PARTS = {"test": "", "validation": "validation_"}


@dataclass
class EpochSummary:
    """What the root learned about one epoch; None where it is not known.

    Attributes:
        epoch: counted from 0.
        version: updates applied when its last block was completed.
        samples: completed in it.
        train_loss: mean over its batches, each computed on the parameters of its time.
        staleness_mean: over its pushes.
        test_loss, validation_loss: mean over that part.
        test_accuracy, validation_accuracy: on the same, in [0, 1].
        evaluated_version: whose parameters these four are of: `version`, or a later one if
            the evaluation of the epoch before was still under way.
        best: whether no earlier epoch's parameters did as well on the validation part.
        samples_per_s: from the end of the epoch before to its own.
        compute_s, servers_s, data_s: seconds that all workers together spent in it computing
            gradients, waiting for servers, and waiting for data.
        more: what else the model's `evaluate` sums up, by sample: test_NAME, validation_NAME.
    """

    epoch: int
    version: int
    samples: int = 0
    train_loss: float | None = None
    staleness_mean: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    evaluated_version: int | None = None
    best: bool = False
    samples_per_s: float | None = None
    compute_s: float | None = None
    servers_s: float | None = None
    data_s: float | None = None
    more: dict[str, float] = field(default_factory=dict)


class EpochSums:
    """What workers have logged since the last epoch was done.

    Args:
        clock: seconds that only grow.

    Attributes:
        start: by the clock, when the first epoch began.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.start = self._begin = clock()
        # Of an epoch that goes on: how long it had taken, until somebody works on it again.
        self._carried: float | None = None
        self._loss, self._losses = 0.0, 0
        self._times: dict[str, float] = {}

    def add(self, event: Logged) -> None:
        """Add what a worker tells of some of its steps."""
        if self._carried is not None:
            self._begin, self._carried = self._clock() - self._carried, None
        for key in _LOSSES:
            total, count = event.sums.get(key, (0.0, 0))
            self._loss += total
            self._losses += count
        for key in TIMES:
            if key in event.sums:
                self._times[key] = self._times.get(key, 0.0) + event.sums[key][0]

    def loss(self) -> dict[str, float]:
        """Take the mean loss, as train_loss; nothing if none was logged."""
        if not self._losses:
            return {}
        mean = self._loss / self._losses
        self._loss, self._losses = 0.0, 0
        return {"train_loss": mean}

    def state(self) -> dict[str, Any]:
        """Give what has been added and not been taken, as plain data."""
        times = {key: plain_number(value) for key, value in self._times.items()}
        seconds = self._clock() - self._begin if self._carried is None else self._carried
        return {
            "loss": plain_number(self._loss),
            "losses": self._losses,
            "times": times,
            "seconds": plain_number(seconds),
        }

    def restore(self, fields: Fields) -> None:
        """Go on from a state.

        Raises:
            ValueError: a field is wrong.
        """
        self._loss, self._losses = fields.number("loss"), fields.count("losses")
        times = fields.part("times")
        self._times = {key: times.number(key) for key in TIMES if key in times}
        # A checkpoint of before they were told gives no speed for that epoch.
        self._carried = max(fields.number("seconds"), 0.0) if "seconds" in fields else None
        self._begin = math.inf

    def take(self, event: EpochDone) -> dict[str, float]:
        """Take all that is known of an epoch that is done: fields of an `EpochSummary`."""
        now = self._clock()
        fields = self.loss()
        if now > self._begin:
            fields["samples_per_s"] = event.samples / (now - self._begin)
        fields["staleness_mean"] = event.staleness_mean
        fields.update({key: round(seconds, 6) for key, seconds in self._times.items()})
        self._times.clear()
        self._begin, self._carried = now, None
        return fields


def evaluation_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Turn an evaluation's sums into test_loss, test_accuracy, validation_loss and so on.

    Args:
        sums: `loss`, `correct` and `count` of the test part, and the same behind "validation_";
            other sums are divided by the count too, and keep their names.
    """
    metrics: dict[str, float] = {}
    for key, total in sums.items():
        part = "validation" if key.startswith(_PARTS["validation"]) else "test"
        name, count = key[len(_PARTS[part]) :], sums.get(_PARTS[part] + "count", 0.0)
        if count and name not in ("count", "accuracy"):
            metrics[f"{part}_{'accuracy' if name == 'correct' else name}"] = total / count
    return metrics


def score(sums: Mapping[str, float]) -> float:
    """Score an evaluation of the validation part: its accuracy, and among equals its loss."""
    count = sums.get("validation_count", 0.0)
    loss = sums.get("validation_loss", 0.0) / count if count else 0.0
    # One more correct sample outweighs any loss.
    return sums.get("validation_correct", 0.0) + 0.5 / (1.0 + max(loss, 0.0))


class History:
    """Gathers the leader's events on the root into one `EpochSummary` an epoch.

    Args:
        waits: whether each epoch is evaluated; then it is complete when that has been merged.
        callbacks: called with each epoch once it is complete; one that returns True ends the run.
        patience: epochs without a better validation accuracy after which the run ends; None never.
            A loss that still falls does not count.
        clock: seconds that only grow.

    Attributes:
        epochs: the complete ones, in the order in which they became so.
        stopped_early: whether patience has run out.
    """

    def __init__(
        self,
        waits: bool,
        callbacks: tuple[Callable[[EpochSummary], Any], ...] = (),
        patience: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epochs: list[EpochSummary] = []
        self.stopped_early = False
        self._waits = waits
        self._callbacks = callbacks
        self._patience = patience
        self._highest = -1.0  # validation accuracy so far
        self._worse = 0  # evaluations since that one
        self._open: dict[int, EpochSummary] = {}
        self._sums = EpochSums(clock)

    def __call__(self, event: HostEvent) -> bool:
        """Take one event; events that concern no epoch are ignored.

        Returns:
            Whether the run is to end.
        """
        if isinstance(event, Logged):
            self._sums.add(event)
        elif isinstance(event, EpochDone):
            summary = EpochSummary(event.epoch, event.version, event.samples)
            _fill(summary, self._sums.take(event))
            self._open[event.epoch] = summary
            if not self._waits:
                return self._finish(event.epoch)
        elif isinstance(event, Evaluated) and event.epoch in self._open:
            summary = self._open[event.epoch]
            summary.best, summary.evaluated_version = event.best, event.version
            _fill(summary, evaluation_metrics(event.sums))
            impatient = self._impatient(summary)
            return self._finish(event.epoch) | impatient
        return False

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose parameters were kept, if some were."""
        return next((one.epoch for one in reversed(self.epochs) if one.best), None)

    def accuracy(self, version: int) -> float | None:
        """Find the accuracy on the test part of the parameters of a version, if it was seen."""
        found = (one for one in reversed(self.epochs) if one.evaluated_version == version)
        return next((one.test_accuracy for one in found), None)

    def close(self) -> None:
        """Hand on the epochs whose evaluation never came (the run was stopped)."""
        for epoch in sorted(self._open):
            self._finish(epoch)

    def state(self) -> dict[str, Any]:
        """Give all that later events may depend on, as plain data."""
        return {
            "highest": plain_number(self._highest),
            "worse": self._worse,
            "epochs": [_plain(one) for one in self.epochs],
            "open": [_plain(one) for _, one in sorted(self._open.items())],
            "sums": self._sums.state(),
        }

    def restore(self, fields: Fields) -> None:
        """Go on from a state; callbacks are not called again.

        Raises:
            ValueError: a field is wrong.
        """
        self._highest, self._worse = fields.number("highest"), fields.count("worse")
        self.epochs = [_summary(one) for one in fields.parts("epochs")]
        self._open = {one.epoch: one for one in map(_summary, fields.parts("open"))}
        self._sums.restore(fields.part("sums"))

    def _impatient(self, summary: EpochSummary) -> bool:
        accuracy = summary.validation_accuracy
        better = summary.best if accuracy is None else accuracy > self._highest
        self._highest = max(self._highest, accuracy or 0.0)
        self._worse = 0 if better else self._worse + 1
        if self._patience is None or self._worse < self._patience:
            return False
        self.stopped_early = True
        return True

    def _finish(self, epoch: int) -> bool:
        summary = self._open.pop(epoch)
        self.epochs.append(summary)
        asked = False
        for callback in self._callbacks:  # all of them, whatever the first one says
            asked |= callback(summary) is True
        return asked


class Onlookers:
    """Hands each event of a run to the history and to the caller's own observer."""

    def __init__(self, history: History, other: Callable[[HostEvent], Any] | None) -> None:
        self._history = history
        self._other = other
        self.tick: Callable[[], None] = getattr(other, "tick", lambda: None)
        self.opened: Callable[[Path], None] = getattr(other, "opened", lambda folder: None)
        self.goes_on: Callable[[int], None] = getattr(other, "goes_on", lambda version: None)

    def state(self) -> dict[str, Any]:
        """Give the history's state, for a checkpoint."""
        return self._history.state()

    def restore(self, fields: Fields) -> None:
        """Let the history go on from a state."""
        self._history.restore(fields)

    def __call__(self, event: HostEvent) -> bool:
        """Take one event; say whether either of them wants the run to end."""
        asked = self._other is not None and self._other(event) is True
        return self._history(event) or asked


def _plain(summary: EpochSummary) -> dict[str, Any]:
    values = {**vars(summary), "more": {k: plain_number(v) for k, v in summary.more.items()}}
    return {k: plain_number(v) if isinstance(v, float) else v for k, v in values.items()}


def _summary(fields: Fields) -> EpochSummary:
    """Read what `_plain` gives."""
    summary = EpochSummary(fields.count("epoch"), fields.count("version"), fields.count("samples"))
    summary.best = fields.flag("best")
    summary.evaluated_version = fields.count_or_none("evaluated_version")
    for name in _NUMBERS:
        setattr(summary, name, fields.number_or_none(name))
    more = fields.part("more")
    summary.more = {name: more.number(name) for name in more}
    return summary


def _fill(summary: EpochSummary, values: Mapping[str, float]) -> None:
    known = {one.name for one in fields(summary)}
    for name, value in values.items():
        if name in known:
            setattr(summary, name, value)
        else:
            summary.more[name] = value
