"""What the root learns of a training, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from psframe.events import EpochDone, Evaluated, HostEvent, Logged

__all__ = ["EpochSummary", "History"]


@dataclass
class EpochSummary:
    """What the root learned about one epoch; None where it is not known.

    Attributes:
        epoch: counted from 0.
        version: updates applied when its last block was completed.
        samples: completed in it.
        train_loss: mean over its batches, each computed on the parameters of its time.
        staleness_mean: over its pushes.
        test_loss: mean over the test part, on the parameters of `version`.
        test_accuracy: on the same, in [0, 1].
    """

    epoch: int
    version: int
    samples: int = 0
    train_loss: float | None = None
    staleness_mean: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None


class History:
    """Gathers the leader's events on the root into one `EpochSummary` an epoch.

    Args:
        waits: whether each epoch is evaluated; then it is complete when that has been merged.
        observer: called with each epoch once it is complete.

    Attributes:
        epochs: the complete ones, in the order in which they became so.
    """

    def __init__(self, waits: bool, observer: Callable[[EpochSummary], None] | None) -> None:
        self.epochs: list[EpochSummary] = []
        self._waits = waits
        self._observer = observer
        self._open: dict[int, EpochSummary] = {}
        self._loss = [0.0, 0.0]  # sum and count

    def __call__(self, event: HostEvent) -> None:
        """Take one event; events that concern no epoch are ignored."""
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
                self._finish(event.epoch)
        elif isinstance(event, Evaluated) and event.epoch in self._open:
            summary, sums = self._open[event.epoch], event.sums
            if sums.get("count"):
                summary.test_loss = sums["loss"] / sums["count"] if "loss" in sums else None
                correct = sums.get("correct")
                summary.test_accuracy = None if correct is None else correct / sums["count"]
            self._finish(event.epoch)

    def close(self) -> None:
        """Hand on the epochs whose evaluation never came (the run was stopped)."""
        for epoch in sorted(self._open):
            self._finish(epoch)

    def _finish(self, epoch: int) -> None:
        summary = self._open.pop(epoch)
        self.epochs.append(summary)
        if self._observer is not None:
            self._observer(summary)
