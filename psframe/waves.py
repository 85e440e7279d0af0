"""Blocks in worker order: in BSP a round's samples do not depend on who is fast.

The first request of a round reserves a block for every live worker, in worker order: a *wave*. A
worker then takes what is reserved for it; what is not claimed goes back.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from psframe.events import TaskSpec

__all__ = ["PlanBook", "Waves"]

# A request in waves: plan, steps that the worker has finished, count of requests at that clock.
_Ask = tuple[int, int, int]


@dataclass(slots=True)
class PlanBook:
    """One call of `leases` by every worker: how far it has got.

    Attributes:
        spec: what was asked for.
        next_block: the next block that nobody has had.
        returned: a heap of blocks that came back.
        reserved: blocks reserved for a worker that has not asked yet.
        outstanding: training blocks in some worker's hand.
        done: epoch -> blocks completed, until the epoch is done.
        evaluations: evaluations asked for and not finished.
    """

    spec: TaskSpec
    next_block: int = 0
    returned: list[int] = field(default_factory=list)
    reserved: int = 0
    outstanding: int = 0
    done: dict[int, int] = field(default_factory=dict)
    evaluations: int = 0

    @property
    def blocks(self) -> int:
        """Count the blocks of an epoch."""
        return -(-self.spec.n_samples // self.spec.batch_size)

    def take(self) -> int | None:
        """Take the next block: one that came back, the lowest first, or a new one."""
        if self.returned:
            return heapq.heappop(self.returned)
        if self.next_block < self.blocks * self.spec.epochs:
            self.next_block += 1
            return self.next_block - 1
        return None

    @property
    def finished(self) -> bool:
        """Whether every block and every evaluation is completed."""
        exhausted = not self.returned and self.next_block >= self.blocks * self.spec.epochs
        return exhausted and not (self.outstanding or self.reserved or self.evaluations)


class Waves:
    """Who has a block reserved for which of its requests.

    Args:
        plans: the plans that are open, by number.
        live: whether each worker is live, kept by the policy.

    Attributes:
        stirred: a request has freed a block, or reserved one for another worker that waits; the
            caller lets those that wait ask again, and clears it.
    """

    def __init__(self, plans: Mapping[int, PlanBook], live: Sequence[bool]) -> None:
        self.stirred = False
        self._plans = plans
        self._live = live
        workers = len(live)
        # Of each worker: its last request, the plan in which it waits for a block, and the blocks
        # that are reserved for requests that it has not made yet.
        self._asks: list[_Ask] = [(0, -1, 0)] * workers
        self._waits_in: list[int | None] = [None] * workers
        self._reserved: list[dict[_Ask, int]] = [{} for _ in range(workers)]

    def waits(self, worker: int, plan: int | None) -> None:
        """Note in which plan the worker waits for a block."""
        self._waits_in[worker] = plan

    def take(self, worker: int, plan: int, clock: int) -> int | None:
        """Take the block that is reserved for the worker's request, reserving a wave if need be."""
        last_plan, last_clock, count = self._asks[worker]
        if plan == last_plan and clock <= last_clock:  # asked ahead of time, it is less
            ask = plan, last_clock, count + 1
        else:
            ask = plan, clock, 0
        mine = self._reserved[worker]
        self.stirred |= self._give_up(worker, lambda other: other[0] == plan and other < ask)
        if ask not in mine:
            self._reserve(plan, ask)
        found = min((other for other in mine if other[0] == plan), default=None)
        if found is None:
            # Who has to wait must not keep the others waiting for what it does not ask for.
            self.stirred |= self.give_up(worker)
            return None
        self._asks[worker] = ask
        self._plans[plan].reserved -= 1
        return mine.pop(found)

    def reserved(self) -> Iterator[tuple[int, int]]:
        """Give (plan, block) of all that are reserved."""
        for mine in self._reserved:
            for ask, block in mine.items():
                yield ask[0], block

    def expire(self, worker: int, clock: int) -> bool:
        """Take back what was reserved for steps that the worker has finished otherwise."""
        return self._give_up(worker, lambda ask: ask[1] < clock)

    def give_up(self, worker: int) -> bool:
        """Take back all that was reserved for the worker; True if there was anything."""
        return self._give_up(worker, lambda ask: True)

    def rejoin(self, worker: int) -> None:
        """Forget what a worker had asked for; another process begins in its place."""
        self._asks[worker] = 0, -1, 0
        self._waits_in[worker] = None

    def _give_up(self, worker: int, which: Callable[[_Ask], bool]) -> bool:
        """Return the blocks reserved for some requests of the worker; True if there were any."""
        mine = self._reserved[worker]
        asks = [ask for ask in mine if which(ask)] if mine else []
        for ask in asks:
            book = self._plans[ask[0]]
            book.reserved -= 1
            heapq.heappush(book.returned, mine.pop(ask))
        return bool(asks)

    def _reserve(self, plan: int, ask: _Ask) -> None:
        """Reserve a block for every live worker that has still to make the request `ask`."""
        book = self._plans[plan]
        for other, mine in enumerate(self._reserved):
            elsewhere = self._waits_in[other] not in (None, plan)
            if not self._live[other] or elsewhere or self._asks[other] >= ask or ask in mine:
                continue
            block = book.take()
            if block is None:
                return
            book.reserved += 1
            mine[ask] = block
            self.stirred |= self._waits_in[other] == plan
