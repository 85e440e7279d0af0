"""What a worker does in a training: batches, gradients, and evaluations, each measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from psframe.data import Dataset
from psframe.events import SpanKind
from psframe.models.base import Model

__all__ = ["Stepper"]

# Samples in a leased block of an evaluation: large enough for one matrix product to be worth a
# message, small enough to be shared among workers.
_EVAL_BATCH_MAX = 1024
_EVAL_BATCH_MIN = 64


class Stepper:
    """Makes the `work` of a training.

    Args:
        model: the model.
        train: what is trained on.
        held_out: parts that are evaluated after each epoch, by the prefix of their sums' names.
        batch_size, epochs: of the training part.
        prefetch: whether a thread prepares the next batch meanwhile.
        spans: whether to note for a timeline when the worker was at what.
        takes_out, takes_rng: whether the model's gradients take these arguments.
    """

    def __init__(
        self,
        model: Model,
        train: Dataset,
        held_out: Mapping[str, Dataset | None],
        *,
        batch_size: int,
        epochs: int,
        prefetch: bool,
        spans: bool,
        takes_out: bool,
        takes_rng: bool,
    ) -> None:
        self._model = model
        self._train = train
        self._batch_size = batch_size
        self._epochs = epochs
        self._prefetch = prefetch
        self._spans = spans
        self._takes_out = takes_out
        self._takes_rng = takes_rng
        # The held-out parts lie one after the other in the range that is leased.
        self._held_out: list[tuple[str, Dataset, int]] = []
        begin = 0
        for prefix, part in held_out.items():
            if part is not None:
                self._held_out.append((prefix, part, begin))
                begin += len(part)
        self._plan = None if begin == 0 else (begin, _eval_batch(begin))

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate after an epoch."""
        return self._plan is not None

    def work(self, worker: Any) -> None:
        """Train as one worker until the leases are exhausted."""
        # A diverging model overflows; the servers refuse what is not finite, and say so.
        with np.errstate(over="ignore", invalid="ignore"):
            self._loop(worker)

    def _loop(self, worker: Any) -> None:
        now = worker.now
        prepare = self._batch if self._prefetch else None
        tasks = worker.tasks(
            len(self._train),
            self._batch_size,
            epochs=self._epochs,
            evaluate=self._plan,
            prepare=prepare,
        )
        params = None
        waits = _Waits()
        idle_since = now()
        for task in tasks:
            begin = now()
            self._note(worker, SpanKind.LEASE, idle_since, begin - task.data_wait_s)
            self._note(worker, SpanKind.DATA, begin - task.data_wait_s, begin)
            if task.kind == "evaluate":
                params = None  # they are valid until task.params()
                self._evaluate(worker, task)
                idle_since = now()
                self._note(worker, SpanKind.EVALUATE, begin, idle_since)
                continue
            waits.add(begin - idle_since - task.data_wait_s)
            if params is None:
                params = worker.pull()
                pulled = now()
                self._note(worker, SpanKind.PULL, begin, pulled)
                waits.add(pulled - begin)
                begin = pulled
            data_s = task.data_wait_s
            batch = task.prepared
            if batch is None:
                batch = self._batch(task)
                loaded = now()
                self._note(worker, SpanKind.DATA, begin, loaded)
                data_s += loaded - begin
                begin = loaded
            loss, grads = self._gradients(worker, params, batch, task.rng)
            computed = now()
            worker.log(
                loss=loss,
                samples=len(task.indices),
                compute_s=computed - begin,
                servers_s=waits.take(),
                data_s=data_s if waits.started else 0.0,
            )
            _send_log(worker)
            params = worker.push_pull(grads)
            idle_since = now()
            self._note(worker, SpanKind.COMPUTE, begin, computed)
            self._note(worker, SpanKind.PUSH_PULL, computed, idle_since)
            waits.answered(idle_since - computed)
        worker.log(servers_s=waits.take())

    def _batch(self, task: Any) -> tuple[Any, Any]:
        """Prepare a batch on the host; another thread than the worker's may do it."""
        return self._train.batch(task.indices, task.rng)

    def _gradients(
        self, worker: Any, params: Any, batch: tuple[Any, Any], rng: np.random.Generator
    ) -> tuple[float, Any]:
        """Compute a batch's loss and what is to be pushed."""
        x, y = (worker.xp.asarray(array) for array in batch)
        extra: dict[str, Any] = {"rng": rng} if self._takes_rng else {}
        if not self._takes_out:
            return self._model.loss_and_gradients(params, x, y, **extra)
        out = worker.gradients()
        loss, _ = self._model.loss_and_gradients(params, x, y, out=out, **extra)
        return loss, None

    def _evaluate(self, worker: Any, task: Any) -> None:
        """Evaluate the block's share of each held-out part."""
        params = task.params()
        begin, end = int(task.indices[0]), int(task.indices[-1]) + 1
        sums: dict[str, float] = {}
        for prefix, part, offset in self._held_out:
            b, e = max(begin - offset, 0), min(end - offset, len(part))
            if b < e:
                x, y = (worker.xp.asarray(array) for array in part.batch(slice(b, e)))
                found = self._model.evaluate(params, x, y)
                sums.update({prefix + name: value for name, value in found.items()})
        task.report(**sums)

    def _note(self, worker: Any, kind: SpanKind, begin: float, end: float) -> None:
        if self._spans and end > begin:
            worker.span(kind, begin, end)


class _Waits:
    """Seconds that a worker has waited for servers and has not logged yet.

    Nothing counts until its first push is answered: until then servers start, and load or compile
    what they compute with, and so does what prepares the batches.

    Attributes:
        started: whether it counts.
    """

    def __init__(self) -> None:
        self.started = False
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        if self.started:
            self._seconds += seconds

    def answered(self, seconds: float) -> None:
        """A push has been answered after so long."""
        self.add(seconds)
        self.started = True

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _send_log(worker: Any) -> None:
    """Send what is logged before the push that it is about.

    The push may complete an epoch, and what is told of an epoch is what has come by then. (It costs
    no message: the next request for a block would send it, and has nothing to send now.)
    """
    worker._notes.flush_log()


def _eval_batch(n: int) -> int:
    """Divide small parts into about eight blocks, so that several workers share them."""
    return min(_EVAL_BATCH_MAX, max(_EVAL_BATCH_MIN, -(-n // 8)))
