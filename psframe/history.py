"""What the root learns of a training, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from psframe.events import EpochDone, Evaluated, HostEvent, Logged

__all__ = ["TIMES", "EpochSummary", "History", "evaluation_metrics", "score"]

# What workers log of each step, beside loss and samples: seconds computing the gradient, waiting
# for servers, and waiting for the batch.
TIMES = ("compute_s", "servers_s", "data_s")
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


def evaluation_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Turn an evaluation's sums into test_loss, test_accuracy, validation_loss and so on.

    Args:
        sums: `loss`, `correct` and `count` of the test part, and the same behind "validation_".
    """
    metrics: dict[str, float] = {}
    for part, prefix in _PARTS.items():
        count = sums.get(prefix + "count", 0.0)
        for name, key in (("loss", "loss"), ("accuracy", "correct")):
            if count and prefix + key in sums:
                metrics[f"{part}_{name}"] = sums[prefix + key] / count
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
        patience: epochs without a better score after which the run ends; None never.

    Attributes:
        epochs: the complete ones, in the order in which they became so.
        stopped_early: whether patience has run out.
    """

    def __init__(
        self,
        waits: bool,
        callbacks: tuple[Callable[[EpochSummary], Any], ...] = (),
        patience: int | None = None,
    ) -> None:
        self.epochs: list[EpochSummary] = []
        self.stopped_early = False
        self._waits = waits
        self._callbacks = callbacks
        self._patience = patience
        self._worse = 0  # evaluations since the best one
        self._open: dict[int, EpochSummary] = {}
        self._loss = [0.0, 0.0]  # sum and count

    def __call__(self, event: HostEvent) -> bool:
        """Take one event; events that concern no epoch are ignored.

        Returns:
            Whether the run is to end.
        """
        if isinstance(event, Logged):
            total, count = event.sums.get("loss", (0.0, 0))
            self._loss[0] += total
            self._loss[1] += count
        elif isinstance(event, EpochDone):
            loss = self._loss[0] / self._loss[1] if self._loss[1] else None
            self._loss = [0.0, 0.0]
            self._open[event.epoch] = EpochSummary(
                event.epoch, event.version, event.samples, loss, event.staleness_mean
            )
            if not self._waits:
                return self._finish(event.epoch)
        elif isinstance(event, Evaluated) and event.epoch in self._open:
            summary = self._open[event.epoch]
            summary.best, summary.evaluated_version = event.best, event.version
            for name, value in evaluation_metrics(event.sums).items():
                setattr(summary, name, value)
            self._worse = 0 if event.best else self._worse + 1
            return self._finish(event.epoch) | self._impatient()
        return False

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose parameters were kept, if some were."""
        return next((one.epoch for one in reversed(self.epochs) if one.best), None)

    def close(self) -> None:
        """Hand on the epochs whose evaluation never came (the run was stopped)."""
        for epoch in sorted(self._open):
            self._finish(epoch)

    def _impatient(self) -> bool:
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
