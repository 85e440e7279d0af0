"""What the root knows of a training while it goes on: rates, waiting, staleness, time left.

A monitor is called in the server's loop for every push, so that what it does there is bounded by
a constant; what costs a look at every worker is done twice a second, or when somebody asks.
"""

from __future__ import annotations

import math
import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from psframe.events import EpochDone, Evaluated, HostEvent, Logged, PushHandled
from psframe.statistics import Statistics, WorkerStatistics

__all__ = ["Monitor"]

# "Recent" is over so many frames of so many seconds each; with very many workers, of more, since
# a frame costs some ns a worker.
_FRAMES = 20
_FRAME_S = 0.5
_FRAME_S_PER_WORKER = 1e-4
# A worker that should have pushed less often than this in all frames is judged by its whole run.
_RECENT_PUSHES_MIN = 4.0
# Marks of progress, from which the time left is estimated; every other one goes when it is full.
_MARKS_MAX = 64
# Progress is observed so long before the time left is told.
_ESTIMATE_S = 1.0
# Staleness beyond this is counted as this: a histogram must not outgrow the run.
_STALENESS_MAX = 1 << 16
# An epoch's end is told when its last block is done, and by then others have begun the next one;
# more than such a part of it is no lead but a miscount (samples pushed twice, a resumed run).
_LEAD_MAX = 0.25

# A worker's numbers in the table: cumulative.
_PUSHES, _SAMPLES, _STALENESS, _COMPUTE_S, _SERVERS_S, _DATA_S = range(6)
_COLUMNS = 6
_TIMES = (("compute_s", _COMPUTE_S), ("servers_s", _SERVERS_S), ("data_s", _DATA_S))


class _Frame(NamedTuple):
    """The totals at one moment."""

    time_s: float
    updates: int
    pushes: int
    applied: int
    staleness: int
    samples: float
    loss: float
    losses: int
    bad_losses: int
    table: array[float]


class Monitor:
    """Watches a training through the root's events; call it with each.

    Args:
        workers: W; more rows are made for workers beyond it.
        epochs: in all.
        samples_per_epoch: 0 if not known; the first epoch's end tells.
        clock: seconds that only grow.

    Attributes:
        updates: the latest version heard of.
    """

    def __init__(
        self,
        workers: int,
        epochs: int,
        samples_per_epoch: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.updates = 0
        self._updates_before = 0
        self._epochs = epochs
        self._samples_per_epoch = samples_per_epoch
        self._clock = clock
        self._start = clock()
        self._first: float | None = None  # when the first push had been handled
        self._table = array("d", bytes(8 * _COLUMNS * workers))
        self._seen = array("d", [math.nan]) * workers
        self._pushes = self._applied = self._staleness = 0
        self._counts: dict[int, int] = {}
        self._samples, self._batches = 0.0, 0
        self._loss, self._losses, self._bad_losses = 0.0, 0, 0
        # The three at the end of the last epoch but one, and of the last one.
        self._loss_marks = deque([(0.0, 0, 0)], maxlen=2)
        self._done = 0
        self._base = 0  # pushes when the present epoch began
        self._lead = 0.0  # the part of it that was done by then
        self._accuracy: float | None = None
        self._evaluation_loss: float | None = None
        self._evaluated_epoch: int | None = None
        self._best: tuple[float | None, int] | None = None
        self._scored = False
        self._marks: list[tuple[float, float]] = []  # time and position, in epochs
        self._mark_every = self._frames_made = 0
        self._frames: deque[_Frame] = deque(maxlen=_FRAMES)
        self._frame_due = 0.0
        self._take_frame(self._start)

    def __call__(self, event: HostEvent) -> None:
        """Take one event."""
        now = self._clock()
        if type(event) is PushHandled:
            self._push(event, now)
        elif isinstance(event, Logged):
            self._logged(event, now)
        elif isinstance(event, EpochDone):
            self._epoch_done(event, now)
        elif isinstance(event, Evaluated):
            self._evaluated(event)
        if now >= self._frame_due:
            self._take_frame(now)

    def goes_on(self, version: int) -> None:
        """Learn that the run goes on from this version, before its first event."""
        self.updates = self._updates_before = version
        self._frames.clear()
        self._take_frame(self._clock())

    @property
    def workers(self) -> int:
        """The number of workers."""
        return len(self._seen)

    def now_s(self) -> float:
        """Give the seconds since the monitor was made."""
        return self._clock() - self._start

    def rows(self) -> list[list[float]]:
        """Give, per worker, pushes, samples, staleness_sum, compute_s, servers_s, data_s so far."""
        cells = [
            int(cell) if i % _COLUMNS < _COMPUTE_S else round(cell, 4)
            for i, cell in enumerate(self._table)
        ]
        return [cells[i : i + _COLUMNS] for i in range(0, len(cells), _COLUMNS)]

    def statistics(self) -> Statistics:
        """Say how the training stands; takes some microseconds a worker."""
        now = self._clock()
        then = self._frames[0]
        first = now if self._first is None else self._first
        span = max(now - max(then.time_s, first), _FRAME_S)
        position = self._position()
        applied = self._applied - then.applied
        best_accuracy, best_epoch = self._best or (None, None)
        per_push = self._per_push()
        return Statistics(
            time_s=now - self._start,
            epoch=min(self._done, self._epochs),
            epochs=self._epochs,
            fraction=position - self._done,
            updates=self.updates,
            pushes=self._pushes,
            samples=int(self._samples or self._pushes * (per_push or 0.0)),
            updates_per_s=(self.updates - then.updates) / span,
            samples_per_s=(self._pushes - then.pushes) * per_push / span if per_push else None,
            loss=self._recent_loss(then),
            accuracy=self._accuracy,
            evaluation_loss=self._evaluation_loss,
            evaluated_epoch=self._evaluated_epoch,
            best_accuracy=best_accuracy,
            best_epoch=best_epoch,
            staleness=(self._staleness - then.staleness) / applied if applied else None,
            staleness_mean=self._staleness / self._applied if self._applied else None,
            staleness_counts=dict(sorted(self._counts.items())),
            left_s=self._left_s(now, position),
            workers=tuple(self._worker(i, now, then, span) for i in range(len(self._seen))),
            updates_before=self._updates_before,
        )

    # ---- events ----------------------------------------------------------------------------

    def _push(self, event: PushHandled, now: float) -> None:
        worker = event.worker
        if worker >= len(self._seen):
            self._grow(worker)
        if self._first is None:
            self._first = now
        row = worker * _COLUMNS
        table = self._table
        table[row] += 1.0
        self._seen[worker] = now
        self._pushes += 1
        if event.version_applied > self.updates:
            self.updates = event.version_applied
        if event.applied:
            staleness = event.staleness
            table[row + _STALENESS] += staleness
            self._applied += 1
            self._staleness += staleness
            if staleness > _STALENESS_MAX:
                staleness = _STALENESS_MAX
            counts = self._counts
            counts[staleness] = counts.get(staleness, 0) + 1

    def _logged(self, event: Logged, now: float) -> None:
        worker, sums = event.worker, event.sums
        if worker >= len(self._seen):
            self._grow(worker)
        self._seen[worker] = now
        row, table = worker * _COLUMNS, self._table
        for name, column in _TIMES:
            if name in sums:
                table[row + column] += sums[name][0]
        if "samples" in sums:
            samples, batches = sums["samples"]
            table[row + _SAMPLES] += samples
            self._samples += samples
            self._batches += batches
        if "loss" in sums:
            loss, losses = sums["loss"]
            if math.isfinite(loss):
                self._loss += loss
                self._losses += losses
            else:
                self._bad_losses += losses

    def _grow(self, worker: int) -> None:
        more = worker + 1 - len(self._seen)
        self._seen.extend([math.nan] * more)
        self._table.extend([0.0] * (more * _COLUMNS))

    def _epoch_done(self, event: EpochDone, now: float) -> None:
        lead = self._part() - 1.0
        self._lead = lead if 0.0 < lead < _LEAD_MAX else 0.0
        self._samples_per_epoch = self._samples_per_epoch or event.samples
        self._base = self._pushes
        self._loss_marks.append((self._loss, self._losses, self._bad_losses))
        self._done = max(self._done, event.epoch + 1)
        self.updates = max(self.updates, event.version)
        self._mark(now)

    def _evaluated(self, event: Evaluated) -> None:
        count = event.sums.get("count", 0.0)
        if not count:
            return
        self._evaluated_epoch = event.epoch
        loss, correct = event.sums.get("loss"), event.sums.get("correct")
        self._evaluation_loss = None if loss is None else loss / count
        self._accuracy = accuracy = None if correct is None else correct / count
        self._scored |= event.best
        best = self._best
        if event.best or (
            not self._scored
            and accuracy is not None
            and (best is None or best[0] is None or accuracy > best[0])
        ):
            self._best = (accuracy, event.epoch)

    # ---- frames and marks --------------------------------------------------------------------

    def _take_frame(self, now: float) -> None:
        self._frames.append(
            _Frame(
                now,
                self.updates,
                self._pushes,
                self._applied,
                self._staleness,
                self._samples,
                self._loss,
                self._losses,
                self._bad_losses,
                self._table[:],
            )
        )
        self._frame_due = now + max(_FRAME_S, _FRAME_S_PER_WORKER * len(self._seen))
        self._frames_made += 1
        if self._frames_made > self._mark_every:
            self._mark(now)

    def _mark(self, now: float) -> None:
        if self._first is None:
            return  # what comes before is start-up
        self._frames_made = 0
        self._marks.append((now, self._position()))
        if len(self._marks) > _MARKS_MAX:
            del self._marks[1::2]
            self._mark_every = 2 * self._mark_every + 1

    # ---- what follows from them ----------------------------------------------------------------

    def _per_push(self) -> float | None:
        """Samples in a push, on average."""
        if self._batches:
            return self._samples / self._batches
        if self._base and self._samples_per_epoch:
            return self._samples_per_epoch * self._done / self._base
        return None

    def _part(self) -> float:
        """The part of the present epoch that is done; more than 1 if the next one was begun."""
        per_push, samples = self._per_push(), self._samples_per_epoch
        if per_push is None or not samples:
            return 0.0
        return self._lead + (self._pushes - self._base) * per_push / samples

    def _position(self) -> float:
        """Epochs done, with the part of the present one."""
        if self._done >= self._epochs:
            return float(self._done)
        return self._done + min(max(self._part(), 0.0), 1.0)

    def _left_s(self, now: float, position: float) -> float | None:
        """Estimate from the last half of the way, evaluations and all."""
        if position >= self._epochs:
            return 0.0
        if not self._marks:
            return None
        half = (self._marks[0][0] + now) / 2
        at = min(bisect_left(self._marks, (half, 0.0)), len(self._marks) - 1)
        while at and now - self._marks[at][0] < _ESTIMATE_S:
            at -= 1
        then, was = self._marks[at]
        if now - then < _ESTIMATE_S or position <= was:
            return None
        return (self._epochs - position) * (now - then) / (position - was)

    def _recent_loss(self, then: _Frame) -> float | None:
        """Take the mean of the last seconds or, if that is less, of the last epoch and this one."""
        loss, count, bad = self._loss_marks[0]
        if then.losses + then.bad_losses > count + bad:
            loss, count, bad = then.loss, then.losses, then.bad_losses
        if self._losses > count:
            return (self._loss - loss) / (self._losses - count)
        if self._bad_losses > bad:
            return math.nan
        return self._loss / self._losses if self._losses else None

    def _worker(self, worker: int, now: float, then: _Frame, span: float) -> WorkerStatistics:
        begin, end = worker * _COLUMNS, (worker + 1) * _COLUMNS
        total = self._table[begin:end]
        before = then.table[begin:end] or array("d", bytes(8 * _COLUMNS))
        seen, first = self._seen[worker], self._start if self._first is None else self._first
        whole = max(now - first, _FRAME_S)
        if total[_PUSHES] * span < _RECENT_PUSHES_MIN * whole:
            before, span = array("d", bytes(8 * _COLUMNS)), whole
        recent = [a - b for a, b in zip(total, before, strict=True)]
        alive = seen - first if seen > first else whole
        waited = sum(recent[_COMPUTE_S:])
        shares = [part / waited if waited > 0 else None for part in recent[_COMPUTE_S:]]
        pushes, samples = total[_PUSHES], total[_SAMPLES]
        per_s = recent[_PUSHES] / span
        per_push = samples / pushes if samples and pushes else self._per_push()
        return WorkerStatistics(
            worker=worker,
            pushes=int(pushes),
            samples=int(samples),
            pushes_per_s=per_s,
            samples_per_s=None if per_push is None else per_s * per_push,
            mean_samples_per_s=None if per_push is None else pushes * per_push / alive,
            staleness=recent[_STALENESS] / recent[_PUSHES] if recent[_PUSHES] > 0 else None,
            staleness_mean=total[_STALENESS] / pushes if pushes else None,
            compute_s=total[_COMPUTE_S],
            servers_s=total[_SERVERS_S],
            data_s=total[_DATA_S],
            compute=shares[0],
            servers=shares[1],
            data=shares[2],
            seen_s=None if math.isnan(seen) else now - seen,
        )
