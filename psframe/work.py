"""What server 0 does as the owner of the work: it leases blocks of samples, and evaluations.

A lease is completed by its worker's next push, or by asking for the next. When all of an epoch are,
the snapshot is pinned and its evaluation leased in the same way; the results are merged here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from psframe.consistency import Policy
from psframe.events import EpochDone, Lease, LeaseKind, LeaseRequest, Pin
from psframe.leases import LeaseBook
from psframe.reads import Correcting
from psframe.server import Server, ServerMemory
from psframe.store import Store

__all__ = ["Score", "WorkServer"]

Score = Callable[[Mapping[str, float]], float]


class WorkServer(Server):
    """A server that owns the work.

    Args:
        workers, store, policy, memory: as for `Server`.
        score: of an evaluation's sums, higher is better; every server keeps the parameters of the
            best one. Without it none are kept.
        followers: whether other servers are to be told of pins.

    Attributes:
        kept_version: the version of the parameters that are kept.
    """

    def __init__(
        self,
        workers: int,
        store: Store,
        policy: Policy,
        memory: ServerMemory,
        score: Score | None,
        correcting: Correcting | None = None,
        *,
        followers: bool,
    ) -> None:
        super().__init__(workers, store, policy, memory, correcting)
        self._followers = followers
        self._score = score
        self._best = -math.inf
        self.kept_version: int | None = None
        self._book = LeaseBook(workers, policy.live, waves=policy.in_waves)
        # Staleness since the last epoch was done: sum and count.
        self._epoch_staleness = [0, 0]

    def _step_done(self, worker: int, staleness: int | None) -> None:
        """Count a step for the leases: its push has been handled, and applied with a staleness."""
        if staleness is not None:
            self._epoch_staleness[0] += staleness
            self._epoch_staleness[1] += 1
        waits = not self._may_start(worker)
        if waits:
            self._book.hold_up(worker)
        self._lease_done(worker)
        if self._book.evaluating:
            self._report(worker, {})
            if waits:
                self._abandon_evaluation()
        if self._book.expire(worker, self.policy.clocks[worker]):
            self._wake = True

    def _give_back_leases(self, worker: int) -> None:
        """Take back what a worker that goes has in hand."""
        if self._book.give_back(worker):
            self._wake = True

    def _serve_lease(self, event: LeaseRequest) -> bool:
        worker, seq = event.worker, event.seq
        if self.stopped:
            self._out.append(Lease(worker, seq, LeaseKind.STOPPED))
            return True
        if not self._book.open(event.plan, event.spec):
            self._out.append(Lease(worker, seq, LeaseKind.CONFLICT))
            return True
        if event.ahead:
            self._serve_ahead(event)
            return True
        self._lease_done(worker)
        self._wake |= self._book.give_back_ahead(worker)
        self._report(worker, {})
        self.policy.unpark(worker)
        may_start = self.policy.may_start(worker)
        lease = self._book.request(
            worker, seq, event.plan, clock=self.policy.clocks[worker], may_start=may_start
        )
        self._abandon_evaluation()
        self._wake |= self._book.stirred()
        if lease is None:
            if may_start:
                self.policy.park(worker)
            return False
        self._out.append(lease)
        return True

    def _serve_ahead(self, event: LeaseRequest) -> None:
        """Give a block beside the one in hand, if the worker may begin it whatever others do."""
        worker = event.worker
        if self._book.ahead(worker):  # it begins that one now
            self._lease_done(worker)
        lease = Lease(worker, event.seq, LeaseKind.LATER)
        if self._book.begin(worker) and self.policy.may_follow(worker):
            clock = self.policy.clocks[worker] + 1
            lease = self._book.request_ahead(worker, event.seq, event.plan, clock=clock)
            self._wake |= self._book.stirred()
        self._out.append(lease)

    def _lease_done(self, worker: int) -> None:
        done = self._book.complete(worker)
        if done is not None:
            epoch, samples = done
            total, count = self._epoch_staleness
            self._epoch_staleness = [0, 0]
            mean = total / count if count else 0.0
            self._out.append(EpochDone(epoch, self.store.version, samples, mean))
            self._start_evaluation()
            self._wake = True  # who waits for a lease may have one, or be done

    def _report(self, worker: int, sums: dict[str, float]) -> None:
        evaluated = self._book.report(worker, sums)
        if evaluated is None:
            return
        if self._score is not None and not self.stopped:  # or the parameters are not pinned now
            score = self._score(evaluated.sums)
            if score > self._best:
                self._best, self.kept_version = score, evaluated.version
                evaluated.best = True
        self._out.append(evaluated)
        self._next_evaluation(keep=evaluated.best)

    def _abandon_evaluation(self) -> None:
        while self._book.abandon():
            self._next_evaluation()

    def _next_evaluation(self, *, keep: bool = False) -> None:
        if self.stopped:
            return
        self._unpin(keep=keep)
        if self._followers:
            self._out.append(Pin(on=False, keep=keep))
        self._start_evaluation()
        self._wake = True

    def _start_evaluation(self) -> None:
        if self.stopped:
            return
        if self._book.start_evaluation(self._pin) and self._followers:
            self._out.append(Pin(on=True))
