"""Modes whose pace changes while a run goes on: SSP with a bound that moves, and a warm start.

DynamicSSP  the bound on the clock lag moves between two, as measured speeds advise.
            (Zhao et al., Dynamic Stale Synchronous Parallel Distributed Training for Deep
            Learning, 2019.)
WarmStart   BSP for the first updates, where gradients are largest and staleness hurts most;
            then another mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from psframe.consistency import (
    Async,
    BSPPolicy,
    Mode,
    Policy,
    SSPPolicy,
    Verdict,
    check_count,
)
from psframe.state import Fields

__all__ = ["DynamicSSP", "WarmStart"]

# Further steps that are looked at for the least wait: more are asked for once these are made, and
# what is between two bounds may be a billion.
_FORESEEN = 256


class _DynamicPolicy(SSPPolicy):
    """Lets the fastest worker go on past the lower bound as long as that shortens its wait.

    A credit is one more step past the lower bound. When the fastest worker has gone past it
    without one, its next steps and those of the slowest worker are foreseen from their last
    intervals, and it gets as many as bring it to the end of a step with the least wait.
    """

    timed = True

    def __init__(self, workers: int, low: int, high: int) -> None:
        super().__init__(workers, high)
        self._low, self._high = low, high
        self._fastest = 0
        self._credits = [0] * workers
        self._pushed_s: list[float | None] = [None] * workers
        self._interval_s: list[float | None] = [None] * workers
        self._waited: set[int] = set()  # what their next interval has in it is no computing

    def restore(self, fields: Fields) -> None:
        super().restore(fields)
        self._fastest = max(self.clocks)

    def follow(self) -> None:
        self._low = self._high  # no worker starts before the first server lets it

    def may_start(self, worker: int) -> bool:
        lag = self.clocks[worker] - self._slowest
        if lag <= self._low or (self._credits[worker] and lag <= self._high):
            return True
        self._waited.add(worker)
        return False

    def may_follow(self, worker: int) -> bool:
        return self.clocks[worker] + 1 - self._low <= self._slowest

    def finish(self, worker: int) -> bool:
        now, before = self.time_s, self._pushed_s[worker]
        if before is not None and worker not in self._waited:
            self._interval_s[worker] = now - before
        self._waited.discard(worker)
        self._pushed_s[worker] = now
        if self._credits[worker]:
            self._credits[worker] -= 1
        others = super().finish(worker)
        clock = self.clocks[worker]
        self._fastest = max(self._fastest, clock)
        if clock == self._fastest and not self._credits[worker]:
            lag = clock - self._slowest
            if lag > self._low:
                self._credits[worker] = self._advised(worker, self._high - lag + 1)
        return others

    def rejoin(self, worker: int) -> None:
        super().rejoin(worker)
        self._credits[worker] = 0
        self._pushed_s[worker] = self._interval_s[worker] = None

    def _advised(self, worker: int, most: int) -> int:
        """Give the number of further steps, up to `most`, after which it would wait least."""
        slowest = next(w for w, c in enumerate(self.clocks) if self.live[w] and c == self._slowest)
        own, its = self._interval_s[worker], self._interval_s[slowest]
        pushed = self._pushed_s[slowest]
        if own is None or its is None or pushed is None or its <= 0.0:
            return 0
        most = min(max(0, most), _FORESEEN)
        if not math.isfinite((self.time_s + most * own - pushed) / its):
            return 0  # against this one the slowest takes no time
        waits = []
        for steps in range(most + 1):
            ready = self.time_s + steps * own
            behind = (ready - pushed) / its
            # The slowest one's next push from then on; it owes one at least.
            waits.append((pushed + max(1, -int(-behind // 1)) * its - ready, steps))
        return min(waits)[1]


@dataclass(frozen=True)
class DynamicSSP:
    """SSP whose bound moves with measured speeds, between two.

    To use where speeds change in the course of a run, so that no one bound is right: a fast worker
    that would soon meet the slowest one's push waits for it, and one that would wait for long goes
    on. Against a persistent straggler it does not help more than SSP: all bounds end there.

    Args:
        low: the bound that always holds, >= 0.
        high: how far it may be overstepped, >= low. Where there are several servers, the others
            than the first hold workers to this one.

    Raises:
        ValueError, TypeError: they are no such numbers.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        check_count("DynamicSSP: low", self.low)
        check_count("DynamicSSP: high", self.high, self.low)

    def policy(self, workers: int) -> Policy:
        """Make the bookkeeping for `workers` workers."""
        return _DynamicPolicy(workers, self.low, self.high)


class _WarmPolicy(Policy):
    """BSP's policy until so many rounds are closed; then another on the same clocks."""

    def __init__(self, workers: int, rounds: int, then: Policy) -> None:
        super().__init__(workers)
        self._warm = BSPPolicy(workers, 0)
        self._then = then
        self._now: Policy = self._warm
        self._last = rounds
        for policy in (self._warm, then):
            policy.clocks, policy.live = self.clocks, self.live
        self._turn()

    @property
    def aggregates(self) -> bool:  # type: ignore[override]
        return self._now.aggregates

    @property
    def timed(self) -> bool:  # type: ignore[override]
        return self._then.timed

    @property
    def rounds(self) -> int:
        return self._warm.rounds

    def _turn(self) -> None:
        if self._now is self._warm and self._warm.rounds >= self._last:
            self._now = self._then
            for worker, live in enumerate(self.live):
                if live:  # some may have sat out a round
                    # On a follower it may have made a step of what comes after already.
                    self.clocks[worker] = max(self.clocks[worker], self._warm.rounds)
            if isinstance(self._then, SSPPolicy):
                self._then.count()

    def restore(self, fields: Fields) -> None:
        self._warm.restore(fields)
        self._turn()
        if self._now is self._then:
            self._then.restore(fields)

    def follow(self) -> None:
        self._then.follow()

    def may_start(self, worker: int) -> bool:
        return self._now.may_start(worker)

    def may_follow(self, worker: int) -> bool:
        return self._now.may_follow(worker)

    def offer(self, worker: int, *, current: bool = True) -> Verdict:
        return self._now.offer(worker, current=current)

    def finish(self, worker: int) -> bool:
        if self._now is self._warm:  # here; the first server has turned, and the worker died since
            return Policy.finish(self, worker)
        self._now.time_s = self.time_s
        return self._now.finish(worker)

    def refuse(self, worker: int) -> bool:
        self._then.time_s = self.time_s
        return self._now.refuse(worker)

    def join(self, worker: int, round: int | None = None) -> None:
        self._now.join(worker, round)

    def due(self) -> list[int] | None:
        members = self._now.due()
        self._turn()
        return members

    def close(self, members: list[int]) -> None:
        self._now.close(members)
        self._turn()

    def leave(self, worker: int) -> bool:
        return self._now.leave(worker)

    def rejoin(self, worker: int) -> None:
        self._now.rejoin(worker)

    def park(self, worker: int) -> None:
        self._now.park(worker)

    def unpark(self, worker: int) -> None:
        self._now.unpark(worker)


@dataclass(frozen=True)
class WarmStart:
    """BSP for the first rounds, then another mode.

    To use where asynchronous training diverges or stalls in its first steps and does well later.

    Args:
        rounds: of BSP, >= 0; each is an update.
        then: Async() or SSP(...) or DynamicSSP(...).

    Raises:
        ValueError, TypeError: they are no such things.
    """

    rounds: int
    then: Mode = field(default_factory=Async)

    def __post_init__(self) -> None:
        check_count("WarmStart: rounds", self.rounds)
        made = getattr(self.then, "policy", None)
        if not callable(made) or isinstance(self.then, type):
            raise TypeError(f"WarmStart: then is {self.then!r}, expected a mode such as Async()")
        after = made(1)
        if after.aggregates or after.gathers:
            raise ValueError(
                f"WarmStart: then is {self.then!r}, expected Async(), SSP(...) or DynamicSSP(...)"
            )

    def policy(self, workers: int) -> Policy:
        """Make the bookkeeping for `workers` workers."""
        return _WarmPolicy(workers, self.rounds, self.then.policy(workers))
