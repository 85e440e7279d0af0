"""A run as TensorBoard sees it: event files, written by the `tensorboard` package itself."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from psframe.errors import ArgumentError

__all__ = ["EventFiles"]

# The names under which an epoch's fields are shown; TensorBoard groups by what is before the slash.
_NAMES = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "test_loss": "loss/test",
    "validation_accuracy": "accuracy/validation",
    "test_accuracy": "accuracy/test",
    "staleness_mean": "staleness/mean",
    "samples_per_s": "speed/samples_per_s",
    "compute_s": "time/compute_s",
    "servers_s": "time/servers_s",
    "data_s": "time/data_s",
}
# A histogram has at most so many buckets; beyond, neighbours share one.
_BUCKETS_MAX = 500
_FLUSH_S = 10

_log = logging.getLogger("psframe")


class EventFiles:
    """Writes a run's numbers into event files; look with ``tensorboard --logdir FOLDER``.

    A run is worth more than its event files: should the disk refuse them, that is warned of once,
    and what follows is dropped.

    Args:
        folder: for the event files; made if need be.

    Attributes:
        failed: whether writing was given up.

    Raises:
        ArgumentError: the `tensorboard` package is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ArgumentError(
                "--tensorboard needs the tensorboard package: pip install 'tensorboard>=2.16' (or "
                "psframe's extra 'tensorboard')"
            ) from error
        self.failed = False
        self._folder = Path(folder)
        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        self._histogram = summary_pb2.HistogramProto
        self._writer: Any = None
        with self._writing():
            self._writer = EventFileWriter(str(folder), flush_secs=_FLUSH_S)

    def epoch(self, fields: Mapping[str, Any]) -> None:
        """Write an epoch's numbers at its update.

        Args:
            fields: as of a line of metrics.jsonl or of an `EpochSummary`; what is not known, None
                or unknown to this class is left out.
        """
        step = fields.get("update", fields.get("version", fields.get("epoch", 0)))
        values = {_NAMES[key]: value for key, value in fields.items() if key in _NAMES}
        if "epoch" in fields:
            values["epoch"] = fields["epoch"]
        self.scalars(int(step), values)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers at a step; None, NaN, infinities and what is no number are left out."""
        known = {
            name: number for name, value in values.items() if (number := _real(value)) is not None
        }
        if known:
            made = [self._summary.Value(tag=tag, simple_value=v) for tag, v in known.items()]
            self._add(step, made)

    def histogram(self, step: int, name: str, counts: Sequence[int]) -> None:
        """Write a histogram of integers at a step.

        Args:
            step: on the horizontal axis.
            name: of the histogram.
            counts: entry i counts the value i; those of `Result.staleness`, say.
        """
        numbers = [max(0.0, _real(count) or 0.0) for count in counts]
        seen = [i for i, count in enumerate(numbers) if count]
        if not seen:
            return
        # Bucket k holds the integers up to its limit; it begins at the limit of the one before.
        width = -(-(seen[-1] + 1) // _BUCKETS_MAX)
        starts = range(0, seen[-1] + 1, width)
        made = self._histogram(
            min=seen[0],
            max=seen[-1],
            num=sum(numbers),
            sum=sum(i * numbers[i] for i in seen),
            sum_squares=sum(i * i * numbers[i] for i in seen),
            bucket_limit=[start + width - 0.5 for start in starts],
            bucket=[sum(numbers[start : start + width]) for start in starts],
        )
        self._add(step, [self._summary.Value(tag=name, histo=made)])

    def close(self) -> None:
        """Write what is held back and close the files; again, it does nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._writing():
                writer.close()

    def _add(self, step: int, values: list[Any]) -> None:
        if self._writer is None or self.failed:
            return
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        with self._writing():
            self._writer.add_event(event)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn the disk's refusal into one warning."""
        try:
            yield
        except OSError as error:
            if not self.failed:
                _log.warning(
                    "tensorboard: %s cannot be written: %s; the run goes on without",
                    self._folder,
                    error.strerror or error,
                )
            self.failed = True


def _real(value: Any) -> float | None:
    """Give a finite number as a float, NumPy's too; None for all else."""
    if value is None or isinstance(value, (str, bytes, bool)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
