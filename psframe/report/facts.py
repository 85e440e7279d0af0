"""What is known of a run, from whichever of its files says it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from psframe.report.reading import COUNTS, LARGEST, Floats, Run, number
from psframe.summary import class_accuracies, find_slowest

__all__ = ["Facts", "Worker", "gather"]

# Larger than any run's; a list this long in a summary is somebody's joke.
_WORKERS_MAX = 100_000
_CLASSES_MAX = 4_096
_BINS_MAX = 10_000_000


@dataclass(frozen=True)
class Worker:
    """One worker's totals; NaN where not known."""

    index: int
    rank: str = ""
    pushes: float = math.nan
    samples: float = math.nan
    samples_per_s: float = math.nan
    staleness_mean: float = math.nan
    compute_s: float = math.nan
    servers_s: float = math.nan
    data_s: float = math.nan
    lost: bool = False

    @property
    def accounted_s(self) -> float:
        """Seconds whose use is known: computing and waiting."""
        return self.compute_s + self.servers_s + self.data_s

    def share(self, part: str) -> float:
        """Give the part of the accounted time spent in "compute_s", "servers_s" or "data_s"."""
        total = self.accounted_s
        return float(getattr(self, part)) / total if total > 0 else math.nan


@dataclass
class Facts:
    """What is known of a run as a whole; NaN, None or empty where it is not.

    Attributes:
        staleness: (n,) pushes applied by staleness.
        staleness_mean: over the pushes applied.
        confusion: (C, C) counts, a row for each true class.
        per_class: (C,) accuracy of each class.
        slowest: index into `workers` of the one that is slower than the others, by the rule of
            the summary; None if none is.
        slowest_why: in words; also that there is none, if that is known.
        best_epoch: whose parameters were kept, counted from 0.
    """

    state: str = "unknown"
    reason: str = ""
    accuracy: float = math.nan
    loss: float = math.nan
    seconds: float = math.nan
    updates: float = math.nan
    samples: float = math.nan
    mode: str = ""
    optimizer: str = ""
    model: str = ""
    data: str = ""
    staleness: Floats | None = None
    staleness_mean: float = math.nan
    ledger: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    confusion: Floats | None = None
    per_class: Floats | None = None
    workers: list[Worker] = field(default_factory=list)
    slowest: int | None = None
    slowest_why: str = ""
    best_epoch: int | None = None
    stopped_early: bool = False

    @property
    def samples_per_s(self) -> float:
        """Samples over seconds, of the whole run."""
        return self.samples / self.seconds if self.seconds > 0 else math.nan


def gather(run: Run) -> Facts:
    """Gather the facts; what a file says that it cannot say goes to `run.problems`."""
    summary, status, config = run.summary, run.status, run.config
    facts = Facts()
    facts.state = _text(status.get("state")) or "unknown"
    facts.reason = _text(status.get("reason"))
    times, updates = run.metrics["time_s"], run.metrics["update"]
    latest_s = run.timeline.time_s[-1] if run.timeline is not None else math.nan
    facts.seconds = _first(number(summary.get("seconds")), _largest(np.append(times, latest_s)))
    facts.updates = _first(
        number(summary.get("updates")), _largest(np.append(updates, number(status.get("updates"))))
    )
    facts.accuracy = _first(
        number(summary.get("accuracy")),
        number(status.get("test_accuracy")),
        _last(run.metrics["test_accuracy"]),
    )
    facts.loss = _first(number(summary.get("loss")), _last(run.metrics["test_loss"]))
    for name in ("mode", "optimizer", "model", "data"):
        setattr(facts, name, _text(summary.get(name)) or _text(config.get(name)))
    facts.stopped_early = summary.get("stopped_early") is True
    facts.best_epoch = _index(summary.get("best_epoch"))
    _ledger(facts, summary.get("ledger"))
    facts.workers = _workers(run, facts.seconds)
    facts.samples = _first(
        number(summary.get("samples")), _sum(w.samples for w in facts.workers), _integral(run)
    )
    facts.slowest, facts.slowest_why = _slowest(facts.workers, facts.mode)
    _staleness(run, facts)
    _confusion(run, facts)
    return facts


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _index(value: Any) -> int | None:
    known = number(value)
    return int(known) if known >= 0 else None


def _first(*values: float) -> float:
    return next((value for value in values if not math.isnan(value)), math.nan)


def _last(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else math.nan


def _largest(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.max()) if known.size else math.nan


def _sum(values: Any) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(sum(known)) if known else math.nan


def _integral(run: Run) -> float:
    """Sum the samples of an older run, which wrote rates only: each over its own epoch."""
    rate, time_s = run.metrics["samples_per_s"], run.metrics["time_s"]
    known = np.isfinite(rate) & np.isfinite(time_s)
    if not known.any():
        return math.nan
    return float(np.sum(rate[known] * np.diff(time_s[known], prepend=0.0)))


def _ledger(facts: Facts, value: Any) -> None:
    for key, count in value.items() if isinstance(value, dict) else ():
        if isinstance(count, dict):
            facts.reasons = {k: int(number(n)) for k, n in count.items() if number(n) > 0}
        elif number(count) >= 0:
            facts.ledger[key] = int(number(count))


def _workers(run: Run, seconds: float) -> list[Worker]:
    listed, lost = run.summary.get("workers"), _lost(run)
    if isinstance(listed, list) and 0 < len(listed) <= _WORKERS_MAX:
        rows = [row if isinstance(row, dict) else {} for row in listed]
        return [_worker(row, i, lost) for i, row in enumerate(rows)]
    if run.timeline is None:
        return []
    workers = []
    for i, row in enumerate(run.timeline.counts[-1].tolist()):
        known = dict(zip(COUNTS, row, strict=True))
        pushes, stale = known["pushes"], known.pop("staleness_sum")
        rate = known["samples"] / seconds if seconds > 0 else math.nan
        mean = stale / pushes if pushes > 0 else math.nan
        workers.append(Worker(i, samples_per_s=rate, staleness_mean=mean, lost=i in lost, **known))
    return workers


def _lost(run: Run) -> set[int]:
    """Find the workers that were lost; of a run that has left no summary, in its status."""
    for table in (run.summary, run.status):
        listed = table.get("lost")
        if isinstance(listed, list):
            found = map(_index, listed[:_WORKERS_MAX])
            return {index for index in found if index is not None}
    return set()


def _worker(row: dict[str, Any], position: int, lost: set[int]) -> Worker:
    names = ["pushes", "samples", "samples_per_s", "staleness_mean"]
    names += ["compute_s", "servers_s", "data_s"]
    index, rank = _index(row.get("worker")), _index(row.get("rank"))
    index = index if index is not None and index < _WORKERS_MAX else position
    return Worker(
        index,
        lost=index in lost,
        rank="" if rank is None else str(rank),
        **{name: value for name in names if (value := number(row.get(name))) >= 0},
    )


def _slowest(workers: list[Worker], mode: str) -> tuple[int | None, str]:
    known = [
        {
            "worker": position,
            "pushes": worker.pushes,
            "samples_per_s": worker.samples_per_s,
            "compute_s": worker.compute_s,
            "servers_s": worker.servers_s,
            "data_s": worker.data_s,
        }
        for position, worker in enumerate(workers)
        if worker.pushes > 0 and not math.isnan(worker.accounted_s) and not worker.lost
    ]
    return find_slowest(known, mode)


def _staleness(run: Run, facts: Facts) -> None:
    counts = _array(run.summary.get("staleness"), 1, _BINS_MAX)
    if counts is not None and counts.sum() > 0:
        facts.staleness = counts
        facts.staleness_mean = float(counts @ np.arange(len(counts)) / counts.sum())
        return
    if run.summary.get("staleness") and counts is None:
        run.problems.append("summary.json: its staleness is not a list of counts")
    known = [w for w in facts.workers if w.pushes > 0 and not math.isnan(w.staleness_mean)]
    means = run.metrics["staleness_mean"]
    if known:
        total = sum(w.pushes for w in known)
        facts.staleness_mean = sum(w.pushes * w.staleness_mean for w in known) / total
    elif np.isfinite(means).any():
        facts.staleness_mean = float(np.nanmean(means))


def _confusion(run: Run, facts: Facts) -> None:
    summary = run.summary
    listed = summary.get("classes")
    confusion = _array(summary.get("confusion"), 2, _CLASSES_MAX)
    if confusion is not None and confusion.shape[0] == confusion.shape[1]:
        facts.confusion = confusion
    elif summary.get("confusion") is not None:
        run.problems.append("summary.json: its confusion is not a square table of counts")
    facts.per_class = _array(summary.get("per_class"), 1, _CLASSES_MAX)
    if facts.per_class is None and facts.confusion is not None:
        facts.per_class = np.array(class_accuracies(facts.confusion), np.float64)
    size = 0 if facts.per_class is None else len(facts.per_class)
    if facts.confusion is not None and len(facts.confusion) != size:
        facts.per_class, size = None, len(facts.confusion)
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    facts.classes = names if len(names) == size else [str(i) for i in range(size)]


def _array(value: Any, dimensions: int, length_max: int) -> Floats | None:
    """Give a JSON list as an array of numbers that are not negative; a null becomes NaN."""
    if not isinstance(value, list) or not 0 < len(value) <= length_max:
        return None
    try:
        found = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    if found.ndim != dimensions or not found.size or (np.abs(found) > LARGEST).any():
        return None
    if (found < 0).any() or (dimensions == 2 and np.isnan(found).any()):
        return None
    return found
