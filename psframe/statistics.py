"""What is known of a training at one moment, for displays and summaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Statistics", "WorkerStatistics"]


@dataclass(frozen=True)
class WorkerStatistics:
    """One worker at one moment; None where it is not known.

    Attributes:
        worker: its index.
        pushes, samples: so far.
        pushes_per_s, samples_per_s: recently.
        mean_samples_per_s: from the run's first push to this worker's last sign of life.
        staleness: mean over its pushes, recently.
        staleness_mean: over all of them.
        compute_s, servers_s, data_s: spent so far computing gradients, waiting for servers, and
            waiting for the next batch.
        compute, servers, data: the parts of its time that recently went there; they add up to 1.
        seen_s: seconds since it was last heard of.
    """

    worker: int
    pushes: int
    samples: int
    pushes_per_s: float
    samples_per_s: float | None
    mean_samples_per_s: float | None
    staleness: float | None
    staleness_mean: float | None
    compute_s: float
    servers_s: float
    data_s: float
    compute: float | None
    servers: float | None
    data: float | None
    seen_s: float | None


@dataclass(frozen=True)
class Statistics:
    """A training at one moment; None where it is not known. "Recently" is the last ten seconds.

    Attributes:
        time_s: since the monitor was made.
        epoch: the one that is going on, counted from 0; `epochs` once all are done.
        epochs: in all.
        fraction: of the present epoch, in [0, 1].
        updates, pushes: so far.
        samples: so far, as the workers logged them.
        updates_per_s, samples_per_s: recently.
        loss: mean of what the workers logged recently, but not before the epoch that was completed
            last; NaN if that was not finite.
        accuracy, evaluation_loss, evaluated_epoch: of the last evaluation.
        best_accuracy, best_epoch: the best evaluation so far.
        staleness: mean over the pushes applied recently.
        staleness_mean: over all of them.
        staleness_counts: staleness -> pushes applied with it.
        left_s: seconds that the remaining epochs will take.
        workers: one entry a worker.
        updates_before: those of `updates` that were made before a run that goes on was resumed.
    """

    time_s: float
    epoch: int
    epochs: int
    fraction: float
    updates: int
    pushes: int
    samples: int
    updates_per_s: float
    samples_per_s: float | None
    loss: float | None
    accuracy: float | None
    evaluation_loss: float | None
    evaluated_epoch: int | None
    best_accuracy: float | None
    best_epoch: int | None
    staleness: float | None
    staleness_mean: float | None
    staleness_counts: Mapping[int, int]
    left_s: float | None
    workers: tuple[WorkerStatistics, ...]
    updates_before: int = 0
