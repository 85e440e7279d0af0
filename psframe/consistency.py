"""Who may go on, and which pushes make an update: asynchronous, SSP and BSP.

A *clock* counts the steps that a worker has finished. "Live" workers are those not lost whose
`work` has not returned. A policy is pure bookkeeping over clocks; it never sees a gradient.

    Async   nobody waits.
    SSP     a worker that has finished c steps may start its next one only when every live
            worker has finished at least c - s. Just after a step the gap is at most s + 1.
            (Ho et al., More Effective Distributed ML via a Stale Synchronous Parallel
            Parameter Server, 2013.)
    BSP     rounds: one push of each worker, applied as their mean. With b backup workers a
            round closes b pushes early and the laggards' pushes are dropped.
            (Chen et al., Revisiting Distributed Synchronous SGD, 2016.)
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from psframe.layout import Array
from psframe.state import WORKERS_MAX, Fields

__all__ = [
    "BSP",
    "SSP",
    "Async",
    "BSPPolicy",
    "Batch",
    "Mode",
    "Policy",
    "SSPPolicy",
    "Verdict",
    "check_count",
]


class Verdict(enum.Enum):
    """What a policy says of the push at the head of a worker's queue."""

    WAIT = "wait"
    TAKE = "take"
    LATE = "late"
    STALE = "stale"


_TAKE = Verdict.TAKE  # not looked up in the enum for every push


class Batch(Protocol):
    """Gradients of one shard that make one update together.

    Attributes:
        pending: how many have been taken in that no update has in it.
    """

    pending: int

    @property
    def empty(self) -> bool:
        """Whether there is nothing to make an update with."""

    def add(self, worker: int, grad: Array) -> None:
        """Take a gradient in; it is copied."""

    def mean(self) -> Array:
        """Give what the update is to be made with; valid until the next call."""

    def refused(self) -> None:
        """Note that the update with the last gradient was not finite, and has not been made."""

    def forget(self, worker: int) -> None:
        """Note that a worker gives no more."""


class Policy:
    """The asynchronous policy, and the bookkeeping that all policies share.

    Attributes:
        clocks: steps finished, by worker.
        live: whether each worker is live.
        aggregates: whether the pushes of a round make one update (then `due` says which).
        in_waves: whether a round's blocks of samples are assigned in worker order.
        gathers: whether pushes are taken into a batch (then `gathered` says when it is complete).
        forgets: whether a batch is told of workers that leave.
        time_s: seconds, where `timed`; the driver says it before each event.
    """

    aggregates = False
    in_waves = False
    gathers = False
    forgets = False
    timed = False
    time_s = 0.0

    def __init__(self, workers: int) -> None:
        self.clocks = [0] * workers
        self.live = [True] * workers

    @property
    def rounds(self) -> int:
        """Rounds that have been closed; 0 where there are none."""
        return 0

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint is to have of it."""
        return {"clocks": list(self.clocks), "live": list(self.live), "round": self.rounds}

    def restore(self, fields: Fields) -> None:
        """Go on from a state, perhaps another policy's, with all workers live again.

        Workers keep their clocks if they are as many as then and none was gone. Else all begin at
        the least clock of those that were live.

        Raises:
            ValueError: a field is wrong.
        """
        clocks, live = fields.counts("clocks", items=WORKERS_MAX), fields.flags("live")
        if not clocks or len(live) != len(clocks):
            raise fields.bad("live", f"as many as there are clocks, {len(clocks)}")
        if len(clocks) == len(self.clocks) and all(live):
            self.clocks[:] = clocks
            return
        least = min((c for c, alive in zip(clocks, live, strict=True) if alive), default=None)
        self.clocks[:] = [min(clocks) if least is None else least] * len(self.clocks)

    def may_start(self, worker: int) -> bool:
        """Say whether the worker may start its next step (be answered a pull)."""
        return True

    def may_follow(self, worker: int) -> bool:
        """Say whether it may start the step after its next one, whatever other workers do."""
        return True

    def offer(self, worker: int, *, current: bool = True) -> Verdict:
        """Judge the push at the head of the worker's queue; TAKE makes it part of a round.

        Args:
            worker: whose.
            current: whether it was computed on the current version.
        """
        return _TAKE

    def finish(self, worker: int) -> bool:
        """Count a finished step; True if others may be able to go on for it."""
        self.clocks[worker] += 1
        return False

    def refuse(self, worker: int) -> bool:
        """Count a step whose push was refused; True if others may be able to go on."""
        return self.finish(worker)

    def join(self, worker: int, round: int | None = None) -> None:
        """Bring a worker to a round, by default the current one (BSP)."""

    def gathered(self, worker: int) -> bool:
        """Count a push that is taken into the batch; True if it completes it."""
        return False

    def ungathered(self) -> None:
        """Take the last count back: that push is not in the batch."""

    def batch(self, size: int, dtype: np.dtype[Any]) -> Batch | None:
        """Make the batch of a shard of `size` elements; None if pushes are not gathered."""
        return None

    def due(self) -> list[int] | None:
        """Close the round if it is complete: its members in worker order, else None."""
        return None

    def close(self, members: list[int]) -> None:
        """Close a round as another server decided it (BSP followers)."""

    def leave(self, worker: int) -> bool:
        """Count the worker no longer; True if others may be able to go on for it."""
        self.live[worker] = False
        return False

    def rejoin(self, worker: int) -> None:
        """Count a worker again that had left, as if it had kept pace with the slowest."""
        self.live[worker] = True

    def follow(self) -> None:
        """Leave to the first server what depends on time; called once, at the beginning."""

    def park(self, worker: int) -> None:
        """Note that the worker waits for a lease and cannot push before it has one."""

    def unpark(self, worker: int) -> None:
        """Note that the worker asks again, for a step of the current round."""


class SSPPolicy(Policy):
    """The bookkeeping of SSP; what is slowest is known without a look at all workers."""

    def __init__(self, workers: int, staleness: int) -> None:
        super().__init__(workers)
        self._staleness = staleness
        self._slowest = 0
        self._at_clock = {0: workers}  # live workers by clock: the minimum in O(1) a step

    def restore(self, fields: Fields) -> None:
        super().restore(fields)
        clocks, slowest = self.clocks, min(self.clocks)
        if max(clocks) > slowest + self._staleness + 1:  # of a mode that bounds them less
            clocks[:] = [slowest] * len(clocks)
        self.count()

    def count(self) -> None:
        """Take clocks and live workers as they are now, however they have come to be so."""
        clocks = [clock for clock, live in zip(self.clocks, self.live, strict=True) if live]
        self._at_clock = dict(Counter(clocks))
        self._slowest = min(clocks, default=0)

    def may_start(self, worker: int) -> bool:
        return self.clocks[worker] - self._staleness <= self._slowest

    def may_follow(self, worker: int) -> bool:
        return self.clocks[worker] + 1 - self._staleness <= self._slowest

    def offer(self, worker: int, *, current: bool = True) -> Verdict:
        return Verdict.TAKE if self.may_start(worker) else Verdict.WAIT

    def finish(self, worker: int) -> bool:
        clock = self.clocks[worker]
        self.clocks[worker] = clock + 1
        self._at_clock[clock + 1] = self._at_clock.get(clock + 1, 0) + 1
        return self._remove(clock)

    def leave(self, worker: int) -> bool:
        if not self.live[worker]:
            return False
        self.live[worker] = False
        return self._remove(self.clocks[worker])

    def rejoin(self, worker: int) -> None:
        super().rejoin(worker)
        if not self._at_clock:
            self._slowest = self.clocks[worker]
        self.clocks[worker] = self._slowest
        self._at_clock[self._slowest] = self._at_clock.get(self._slowest, 0) + 1

    def _remove(self, clock: int) -> bool:
        self._at_clock[clock] -= 1
        if self._at_clock[clock]:
            return False
        del self._at_clock[clock]
        if clock != self._slowest or not self._at_clock:
            return False
        # Clocks of live workers lie within s + 1 of each other, so this walk is short.
        while self._slowest not in self._at_clock:
            self._slowest += 1
        return True


class BSPPolicy(Policy):
    """The bookkeeping of BSP: who is in the present round, and when it is complete."""

    aggregates = True
    in_waves = True

    def __init__(self, workers: int, backup: int) -> None:
        super().__init__(workers)
        self._quorum = max(1, workers - backup)  # pushes that close a round
        self._round = 0
        self._taken: set[int] = set()
        self._refused: set[int] = set()
        self._parked: set[int] = set()
        self._sat_out: set[int] = set()  # parked while a round closed; no push since
        self._n_live = workers

    @property
    def rounds(self) -> int:
        return self._round

    def restore(self, fields: Fields) -> None:
        super().restore(fields)
        self._round = fields.count("round")
        # What was pushed for earlier rounds has not been kept: all take part in the present one.
        self.clocks[:] = [self._round] * len(self.clocks)

    def may_start(self, worker: int) -> bool:
        return self.clocks[worker] <= self._round

    def offer(self, worker: int, *, current: bool = True) -> Verdict:
        clock = self.clocks[worker]
        if clock < self._round:
            return Verdict.LATE
        if clock > self._round or worker in self._taken:
            return Verdict.WAIT
        if worker in self._sat_out:
            self._sat_out.discard(worker)
            if not current:
                return Verdict.LATE  # a gradient for the round that it has sat out
        self._taken.add(worker)
        return Verdict.TAKE

    def finish(self, worker: int) -> bool:
        raise AssertionError("a BSP step finishes when its round closes")

    def refuse(self, worker: int) -> bool:
        self._taken.discard(worker)
        self._refused.add(worker)
        self.clocks[worker] += 1
        return True

    def join(self, worker: int, round: int | None = None) -> None:
        self.clocks[worker] = self._round if round is None else round

    def due(self) -> list[int] | None:
        done = len(self._taken) + len(self._refused)
        # Those that cannot push are missing already: they use up the backups.
        if not done or done < min(self._quorum, self._n_live - len(self._parked)):
            return None
        members = sorted(self._taken)
        self.close(members)
        return members

    def close(self, members: list[int]) -> None:
        self._round += 1
        for worker in members:
            self.clocks[worker] = self._round
        self._taken.clear()
        self._refused.clear()

    def leave(self, worker: int) -> bool:
        if not self.live[worker]:
            return False
        self.live[worker] = False
        self._n_live -= 1
        self._taken.discard(worker)
        self._refused.discard(worker)
        self._parked.discard(worker)
        return True

    def rejoin(self, worker: int) -> None:
        super().rejoin(worker)
        self._n_live += 1
        self._sat_out.discard(worker)
        self.clocks[worker] = self._round

    def park(self, worker: int) -> None:
        # It has no block and cannot push, and the others' blocks are completed by pushes:
        # waiting for it would be for ever.
        self._parked.add(worker)

    def unpark(self, worker: int) -> None:
        if worker in self._parked:
            self._parked.discard(worker)
            if self.clocks[worker] < self._round:
                self.clocks[worker] = self._round
                self._sat_out.add(worker)


class Mode(Protocol):
    """What `run(mode=...)` takes."""

    def policy(self, workers: int) -> Policy:
        """Make the bookkeeping for so many workers."""


@dataclass(frozen=True)
class Async:
    """Apply every gradient the moment it arrives; nobody waits for anybody."""

    def policy(self, workers: int) -> Policy:
        """Make the bookkeeping for `workers` workers."""
        return Policy(workers)


@dataclass(frozen=True)
class SSP:
    """Stale synchronous parallel: bound how far workers' clocks may lie apart.

    Args:
        staleness: s >= 0. A worker starts a step only when every live worker has finished at
            least its own count of steps minus s. 0 keeps the pace of BSP.

    Raises:
        ValueError: staleness is negative.
        TypeError: it is not an integer.
    """

    staleness: int

    def __post_init__(self) -> None:
        check_count("SSP: staleness", self.staleness)

    def policy(self, workers: int) -> Policy:
        """Make the bookkeeping for `workers` workers."""
        return SSPPolicy(workers, self.staleness)


@dataclass(frozen=True)
class BSP:
    """Bulk synchronous parallel: one update a round, the mean of its pushes.

    Args:
        backup: b >= 0. A round closes at W - b pushes, or with those of all live workers if they
            are fewer; a later one is dropped and its worker joins the round that is current then.
            At least one push makes a round.

    A worker that waits for a block of `leases` takes no part in rounds meanwhile. Should it then
    push a gradient of parameters that it had pulled before, that is late as well.

    Costs one more array as large as the parameters, for the mean of two pushes or more.

    Raises:
        ValueError: backup is negative.
        TypeError: it is not an integer.
    """

    backup: int = 0

    def __post_init__(self) -> None:
        check_count("BSP: backup", self.backup)

    def policy(self, workers: int) -> Policy:
        """Make the bookkeeping for `workers` workers."""
        return BSPPolicy(workers, self.backup)


def check_count(what: str, value: object, least: int = 0) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{what}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{what}: expected {least} or more, got {value}")
