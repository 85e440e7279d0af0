"""What a run's metrics.jsonl says: the leader's events, gathered into a line an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from psframe.events import EpochDone, Evaluated, Logged
from psframe.history import TIMES, evaluation_metrics
from psframe.rundir import RunDir

__all__ = ["Recorder"]

# Workers begin the next epoch while one is evaluated; a line waits so many epochs for that.
_HELD_MAX = 3


class Recorder:
    """Writes the leader's events as lines of metrics.jsonl; call it with each event.

    A line is written an epoch: at its end or, while evaluations arrive, when its evaluation has
    been merged. Fields that are not known are left out.

    Args:
        run_dir: the folder.
        clock: seconds that only grow; time_s counts from the construction.
        evaluations: True, wait for an epoch's evaluation; False, do not; None, find out from
            the first epochs.

    Attributes:
        test_accuracy: of the latest evaluation, or None.
        updates: the latest version heard of.
    """

    def __init__(
        self,
        run_dir: RunDir,
        clock: Callable[[], float] = time.monotonic,
        *,
        evaluations: bool | None = None,
    ) -> None:
        self.test_accuracy: float | None = None
        self.updates = 0
        self._run_dir = run_dir
        self._clock = clock
        self._waits = evaluations is not False
        self._fixed = evaluations is not None
        self._start = self._epoch_start = clock()
        self._loss_sum = 0.0
        self._loss_count = 0
        self._times: dict[str, float] = {}  # since the last epoch was done, over all workers
        self._epochs = 0
        self._held: list[dict[str, Any]] = []

    def __call__(self, event: Any) -> None:
        """Take one event; events that concern no metric are ignored."""
        if isinstance(event, Logged):
            self._logged(event)
        elif isinstance(event, EpochDone):
            self._epoch_done(event)
        elif isinstance(event, Evaluated):
            self._evaluated(event)

    def close(self) -> None:
        """Write the lines still held back; of a run without epochs, one line in all."""
        self._release()
        if self._loss_count and not self._epochs:
            self._run_dir.metrics(time_s=self._time_s(), update=self.updates, **self._train_loss())
        self._run_dir.close()

    def _logged(self, event: Logged) -> None:
        for key in ("loss", "train_loss"):
            total, count = event.sums.get(key, (0.0, 0))
            self._loss_sum += total
            self._loss_count += count
        for key in TIMES:
            if key in event.sums:
                self._times[key] = self._times.get(key, 0.0) + event.sums[key][0]

    def _epoch_done(self, event: EpochDone) -> None:
        now = self._clock()
        self._epochs += 1
        self.updates = max(self.updates, event.version)
        fields: dict[str, Any] = {"epoch": event.epoch, "update": event.version}
        fields.update(self._train_loss())
        if now > self._epoch_start:
            fields["samples_per_s"] = event.samples / (now - self._epoch_start)
        fields["staleness_mean"] = event.staleness_mean
        fields.update({key: round(seconds, 6) for key, seconds in self._times.items()})
        self._times.clear()
        self._epoch_start = now
        self._held.append(fields)
        if not self._waits:
            self._release()
        elif len(self._held) > _HELD_MAX:
            self._waits = self._fixed  # so many without an evaluation: none are made
            self._release(1 if self._waits else len(self._held))

    def _evaluated(self, event: Evaluated) -> None:
        fields: dict[str, Any] = {"epoch": event.epoch, "update": event.version}
        for held in self._held:
            if held["epoch"] == event.epoch:
                self._held.remove(held)
                fields = held
                break
        metrics = evaluation_metrics(event.sums)
        self.test_accuracy = metrics.get("test_accuracy", self.test_accuracy)
        fields.update(metrics)
        fields["evaluated_update"] = event.version
        self._waits = self._fixed = True
        self._run_dir.metrics(time_s=self._time_s(), **fields)

    def _release(self, count: int = _HELD_MAX) -> None:
        for fields in self._held[:count]:
            self._run_dir.metrics(time_s=self._time_s(), **fields)
        del self._held[:count]

    def _train_loss(self) -> dict[str, float]:
        if not self._loss_count:
            return {}
        mean = self._loss_sum / self._loss_count
        self._loss_sum, self._loss_count = 0.0, 0
        return {"train_loss": mean}

    def _time_s(self) -> float:
        return round(self._clock() - self._start, 6)
