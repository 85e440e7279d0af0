"""What a run's files say while it goes on: a line of metrics an epoch, and how far it has come."""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from psframe.events import EpochDone, Evaluated, Logged
from psframe.history import EpochSums, evaluation_metrics
from psframe.rundir import RunDir
from psframe.state import Fields, plain_number

__all__ = ["Recorder"]

# Workers begin the next epoch while one is evaluated; a line waits so many epochs for that.
_HELD_MAX = 3
# Of lines that a checkpoint has: in the moments between a signal and the end of the run as many
# more epochs may end.
_HELD_STATE_MAX = 1 << 16
# Between two writings of the status: each waits for the disk, and an epoch may take milliseconds.
_STATUS_S = 1.0
# Of a line's fields those that are integers.
_COUNTS = ("epoch", "update", "evaluated_update")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Recorder:
    """Writes the leader's events as lines of metrics.jsonl; call it with each event.

    A line is written an epoch: at its end or, while evaluations arrive, when its evaluation has
    been merged. Fields that are not known are left out. With a line status.json, too, learns of
    the updates and the accuracy so far, at most once a second.

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
        self._sums = EpochSums(clock)
        self._start = self._sums.start
        self._status_due = self._start
        self._closed = False
        self._epochs = 0
        self._held: list[dict[str, Any]] = []
        self._bytes_before_close = 0

    def __call__(self, event: Any) -> None:
        """Take one event; events that concern no metric are ignored.

        Once it is closed no more lines are written, but the state goes on: a run that a signal has
        interrupted is closed at once, and its last checkpoint comes a moment later.
        """
        if isinstance(event, Logged):
            self._sums.add(event)
        elif isinstance(event, EpochDone):
            with _undisturbed():
                self._epoch_done(event)
        elif isinstance(event, Evaluated):
            with _undisturbed():
                self._evaluated(event)

    def state(self) -> dict[str, Any]:
        """Give all that later lines may depend on, as plain data.

        What has been written when it was closed counts as held: a run that goes on writes it again,
        complete.
        """
        run_dir, closed = self._run_dir, self._closed
        return {
            "time_s": self._time_s(),
            "updates": self.updates,
            "test_accuracy": None
            if self.test_accuracy is None
            else plain_number(self.test_accuracy),
            "epochs": self._epochs,
            "waits": self._waits,
            "fixed": self._fixed,
            "held": [{k: _plain(v) for k, v in line.items()} for line in self._held],
            "sums": self._sums.state(),
            "metrics_bytes": self._bytes_before_close if closed else run_dir.metrics_bytes,
        }

    def restore(self, fields: Fields) -> int:
        """Go on from a state; the lines that were written after it are to be taken back.

        Returns:
            The length that metrics.jsonl had.

        Raises:
            ValueError: a field is wrong.
        """
        self._start -= fields.number("time_s")
        self.updates, self._epochs = fields.count("updates"), fields.count("epochs")
        self.test_accuracy = fields.number_or_none("test_accuracy")
        self._waits, self._fixed = fields.flag("waits"), fields.flag("fixed")
        held = fields.parts("held", _HELD_STATE_MAX)
        self._held = [{name: _number(line, name) for name in line} for line in held]
        self._sums.restore(fields.part("sums"))
        return fields.count("metrics_bytes")

    def close(self) -> None:
        """Write the lines still held back; of a run without epochs, one line in all.

        The status is left to the verdict, which comes next.
        """
        if self._closed:
            return
        self._closed = True
        self._bytes_before_close = self._run_dir.metrics_bytes
        for fields in self._held:
            self._run_dir.metrics(time_s=self._time_s(), **fields)
        loss = {} if self._epochs else copy.copy(self._sums).loss()
        if loss:
            self._run_dir.metrics(time_s=self._time_s(), update=self.updates, **loss)
        self._run_dir.close()

    def _epoch_done(self, event: EpochDone) -> None:
        self._epochs += 1
        self.updates = max(self.updates, event.version)
        fields: dict[str, Any] = {"epoch": event.epoch, "update": event.version}
        fields.update(self._sums.take(event))
        self._held.append(fields)
        if self._closed:
            return
        self._release_complete()
        if not self._waits:
            self._release()
        elif len(self._held) > _HELD_MAX:
            self._waits = self._fixed  # so many without an evaluation: none are made
            self._release(1 if self._waits else len(self._held))

    def _evaluated(self, event: Evaluated) -> None:
        fields: dict[str, Any] = {"epoch": event.epoch, "update": event.version}
        for held in self._held:
            if held["epoch"] == event.epoch:
                fields = held
                break
        else:
            self._held.append(fields)
        metrics = evaluation_metrics(event.sums)
        self.test_accuracy = metrics.get("test_accuracy", self.test_accuracy)
        fields.update(metrics)
        fields["evaluated_update"] = event.version
        self._waits = self._fixed = True
        if not self._closed:
            self._release_complete()

    def _release_complete(self) -> None:
        """Write the lines that have their evaluation; some may, of a run that goes on."""
        for fields in [held for held in self._held if "evaluated_update" in held]:
            self._held.remove(fields)
            self._line(fields)

    def _release(self, count: int = _HELD_MAX) -> None:
        for fields in self._held[:count]:
            self._line(fields)
        del self._held[:count]

    def _line(self, fields: dict[str, Any]) -> None:
        time_s = self._time_s()
        self._run_dir.metrics(time_s=time_s, **fields)
        if self._start + time_s < self._status_due:
            return
        self._status_due = self._start + time_s + _STATUS_S
        with _undisturbed():
            if not self._closed and not self._run_dir.status(
                "running", updates=self.updates, test_accuracy=self.test_accuracy
            ):
                self._status_due = math.inf  # the disk refuses it, and that has been said

    def _time_s(self) -> float:
        return round(self._clock() - self._start, 6)


def _plain(value: Any) -> Any:
    return plain_number(value) if isinstance(value, float) else value


def _number(line: Fields, name: str) -> float | int:
    return line.count(name) if name in _COUNTS else line.number(name)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let signals wait: their handler writes a verdict, which this status would replace."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only, and a run there
        return
    came: list[int] = []
    before = {
        number: handler
        for number in _SIGNALS
        # None: a handler that C code has set, and that only C code could set again.
        if (handler := signal.getsignal(number)) is not None
    }
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
