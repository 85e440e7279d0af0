"""A run's timeline on one clock: when the work began, and what was done in which span of time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from psframe.report.reading import COUNTS, Floats, Run, Timeline

__all__ = ["Spans", "on_one_clock", "spans_of_times", "spans_of_work", "started_s"]

_PUSHES, _SAMPLES = COUNTS.index("pushes"), COUNTS.index("samples")
_FIRST_PART = COUNTS.index("compute_s")
# More spans than this cannot be told apart; with fewer pushes of a worker in one, a rate is noise.
_SPANS_MAX = 120
_PUSHES_MIN = 12
_FIRST_PUSHES_MAX = 2


@dataclass(frozen=True)
class Spans:
    """A timeline in N spans of equal length.

    Attributes:
        edges_s: (N + 1,) since the command was started.
        done: (N, W, k) what each worker did in each span.
    """

    edges_s: Floats
    done: Floats

    @property
    def lengths_s(self) -> Floats:
        """(N,) seconds."""
        return np.asarray(np.diff(self.edges_s))

    @property
    def rates(self) -> Floats:
        """(N, W) samples per second, where `done` is in the order of `COUNTS`."""
        return np.asarray(self.done[:, :, _SAMPLES] / self.lengths_s[:, None])


def on_one_clock(run: Run) -> None:
    """Let metrics.jsonl's times count from the start of the command, as timeline.jsonl's do.

    They count from the opening of the run directory. The first line of the timeline was written
    at that moment; it has no pushes, or there was no such line.
    """
    timeline = run.timeline
    if timeline is not None and not timeline.counts[0].any():
        run.metrics["time_s"] = run.metrics["time_s"] + timeline.time_s[0]


def _first(timeline: Timeline) -> int:
    """Find the line with which the work began: that of the first push, or the one before it."""
    pushes = timeline.counts[:, :, _PUSHES]
    first = int(np.argmax(pushes.sum(axis=1) > 0))
    # While nothing happens lines are rare; that with the very first pushes comes just after them.
    return first if pushes[first].max() <= _FIRST_PUSHES_MAX else max(first - 1, 0)


def started_s(timeline: Timeline | None) -> float:
    """Say how long the start-up took, until the first push; NaN if there was none."""
    if timeline is None or timeline.counts[0, :, _PUSHES].any():
        return math.nan
    return float(timeline.time_s[_first(timeline)]) if timeline.counts[-1].any() else math.nan


def spans_of_work(timeline: Timeline | None) -> Spans | None:
    """Divide the time from the first push to the last, by what was counted by when."""
    if timeline is None:
        return None
    begin, end = _range(timeline)
    time_s, counts = _distinct(timeline.time_s[begin:end], timeline.counts[begin:end])
    if len(time_s) < 2:
        return None
    few = float(np.median(counts[-1, :, _PUSHES])) / _PUSHES_MIN
    number = int(max(1, min(len(time_s) - 1, _SPANS_MAX, few)))
    return _divided(time_s, counts, np.linspace(time_s[0], time_s[-1], number + 1))


def spans_of_times(timeline: Timeline | None) -> Spans | None:
    """Divide the same time by how it was spent: `done` has compute_s, servers_s and data_s.

    A wait is booked when it is over, which may be several lines after it began. What a line has
    gained beyond the time since the line before was spent before that, and is put there.
    """
    if timeline is None:
        return None
    begin, end = _range(timeline)
    zero = np.zeros((1, *timeline.counts.shape[1:]))
    time_s = np.concatenate([[0.0], timeline.time_s])
    time_s, counts = _distinct(time_s, np.concatenate([zero, timeline.counts]))
    first_s, last_s = float(timeline.time_s[begin]), float(timeline.time_s[end - 1])
    if len(time_s) < 2 or not last_s > first_s:
        return None
    gained = np.diff(counts[:, :, _FIRST_PART:], axis=0)
    carried = np.zeros(gained.shape[1:])
    for i, length_s in reversed(list(enumerate(np.diff(time_s)))):
        amount = gained[i] + carried
        total = amount.sum(axis=1)
        kept = np.divide(length_s, total, np.ones_like(total), where=total > length_s)
        gained[i] = amount * kept[:, None]
        carried = amount - gained[i]
    sums = np.concatenate([np.zeros((1, *carried.shape)), np.cumsum(gained, axis=0)])
    lines = int(np.count_nonzero((time_s > first_s) & (time_s <= last_s)))
    number = max(1, min(lines, _SPANS_MAX))
    return _divided(time_s, sums, np.linspace(first_s, last_s, number + 1))


def _range(timeline: Timeline) -> tuple[int, int]:
    """Find the lines [begin, end) from the first push to the last."""
    pushes = timeline.counts[:, :, _PUSHES].sum(axis=1)
    return _first(timeline), int(np.searchsorted(pushes, pushes[-1])) + 1


def _distinct(time_s: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Keep, of lines at one time, the last."""
    keep = np.append(np.diff(time_s) > 0, True)
    return time_s[keep], counts[keep]


def _divided(time_s: Floats, sums: Floats, edges: Floats) -> Spans | None:
    """Read cumulative sums off between the times at which they are known."""
    if not np.all(np.diff(edges) > 0):  # a run too short for its clock
        return None
    after = np.clip(np.searchsorted(time_s, edges), 1, len(time_s) - 1)
    part = (edges - time_s[after - 1]) / (time_s[after] - time_s[after - 1])
    part = np.clip(part, 0.0, 1.0)[:, None, None]
    at = sums[after - 1] * (1 - part) + sums[after] * part
    return Spans(edges, np.maximum(np.diff(at, axis=0), 0.0))
