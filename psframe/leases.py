"""Which samples next: every sample of an epoch is completed exactly once.

The leader owns the work. It hands out blocks of an epoch's order, takes back the blocks of
workers that are lost, and counts an epoch done when its last block is completed, whoever did
it. After an epoch it may lease an evaluation of one pinned snapshot in the same way and merge
the results in block order, so that they do not depend on who computed what.

Blocks are numbers here; which indices they mean is a function of the seed that every worker
computes for itself. Each call of `leases` by a worker belongs to one *plan*: the k-th call of
every worker is the same plan and must ask for the same thing.

In BSP a round's blocks are assigned in worker order: the first request of a round reserves a
block for every live worker (a *wave*), so that who is fast does not matter.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from psframe.events import Evaluated, Lease, LeaseKind, TaskSpec

__all__ = ["LeaseBook"]


@dataclass(slots=True)
class _Hand:
    """The block that a worker holds."""

    plan: int
    kind: LeaseKind
    block: int  # training: epoch * blocks an epoch + block; evaluation: block


@dataclass(slots=True)
class _Plan:
    spec: TaskSpec
    next_block: int = 0
    returned: list[int] = field(default_factory=list)  # a heap
    reserved: int = 0  # blocks reserved for a worker that has not asked yet
    outstanding: int = 0  # training blocks in some worker's hand
    done: dict[int, int] = field(default_factory=dict)  # epoch -> blocks completed, until done
    evaluations: int = 0  # evaluations asked for and not finished

    @property
    def blocks(self) -> int:
        return -(-self.spec.n_samples // self.spec.batch_size)

    def take(self) -> int | None:
        if self.returned:
            return heapq.heappop(self.returned)
        if self.next_block < self.blocks * self.spec.epochs:
            self.next_block += 1
            return self.next_block - 1
        return None

    @property
    def finished(self) -> bool:
        exhausted = not self.returned and self.next_block >= self.blocks * self.spec.epochs
        return exhausted and not (self.outstanding or self.reserved or self.evaluations)


@dataclass(slots=True)
class _Evaluation:
    """The evaluation under way: one snapshot is pinned for it."""

    plan: int
    epoch: int
    version: int
    blocks: int
    next_block: int = 0
    returned: list[int] = field(default_factory=list)  # a heap
    results: dict[int, dict[str, float]] = field(default_factory=dict)

    def take(self) -> int | None:
        if self.returned:
            return heapq.heappop(self.returned)
        if self.next_block < self.blocks:
            self.next_block += 1
            return self.next_block - 1
        return None


class LeaseBook:
    """Hands out blocks and knows what became of each.

    Args:
        workers: W.
        live: whether each worker is live, kept by the policy.
        waves: assign the blocks of a round in worker order (BSP).
    """

    def __init__(self, workers: int, live: Sequence[bool], *, waves: bool) -> None:
        self._live = live
        self._waves = waves
        self._plans: list[_Plan] = []
        self._hand: list[_Hand | None] = [None] * workers
        self._evaluation: _Evaluation | None = None
        self._wanted: deque[tuple[int, int]] = deque()  # (plan, epoch) to be evaluated
        # Of each worker: (plan, clock, count of requests at that clock), its reservations.
        self._asks: list[tuple[int, int, int]] = [(0, -1, 0)] * workers
        self._reserved: list[deque[tuple[tuple[int, int, int], int]]] = [
            deque() for _ in range(workers)
        ]

    @property
    def evaluating(self) -> bool:
        """Whether a snapshot is pinned for an evaluation."""
        return self._evaluation is not None

    def open(self, plan: int, spec: TaskSpec) -> bool:
        """Make sure that the plan is there; False if another worker asked for other leases."""
        if plan == len(self._plans):
            self._plans.append(_Plan(spec))
        return plan < len(self._plans) and self._plans[plan].spec == spec

    def request(
        self, worker: int, seq: int, plan: int, *, clock: int, may_start: bool
    ) -> Lease | None:
        """Give the worker its next block; None if it must wait for one.

        Args:
            worker: who asks; what it held must have been completed before.
            seq: the request's number, repeated in the lease.
            plan: an open plan.
            clock: steps that the worker has finished.
            may_start: whether it may start its next step; a block is given only then, so that
                nobody holds a block that it is not allowed to compute.
        """
        book = self._plans[plan]
        evaluation = self._evaluation
        block = None
        if evaluation is not None and evaluation.plan == plan:
            block = evaluation.take()
        if evaluation is not None and block is not None:
            self._hand[worker] = _Hand(plan, LeaseKind.EVALUATE, block)
            begin = block * book.spec.eval_batch_size
            end = min(begin + book.spec.eval_batch_size, book.spec.eval_samples)
            return Lease(worker, seq, LeaseKind.EVALUATE, evaluation.epoch, begin, end)
        if book.finished:
            return Lease(worker, seq, LeaseKind.EXHAUSTED)
        if not may_start:
            return None
        taken = self._take_in_wave(worker, plan, clock) if self._waves else book.take()
        if taken is None:
            return None
        book.outstanding += 1
        self._hand[worker] = _Hand(plan, LeaseKind.TRAIN, taken)
        epoch, number = divmod(taken, book.blocks)
        begin = number * book.spec.batch_size
        end = min(begin + book.spec.batch_size, book.spec.n_samples)
        return Lease(worker, seq, LeaseKind.TRAIN, epoch, begin, end)

    def has_block(self, plan: int) -> bool:
        """Whether some training block of the plan waits in the queue to be handed out."""
        book = self._plans[plan]
        return bool(book.returned) or book.next_block < book.blocks * book.spec.epochs

    def complete(self, worker: int) -> tuple[int, int] | None:
        """Complete the training block in the worker's hand, if it has one.

        Returns:
            (epoch, its samples) if that was the epoch's last block, else None.
        """
        hand = self._hand[worker]
        if hand is None or hand.kind is not LeaseKind.TRAIN:
            return None
        self._hand[worker] = None
        book = self._plans[hand.plan]
        book.outstanding -= 1
        epoch = hand.block // book.blocks
        done = book.done.get(epoch, 0) + 1
        if done < book.blocks:
            book.done[epoch] = done
            return None
        book.done.pop(epoch, None)
        if book.spec.eval_samples:
            book.evaluations += 1
            self._wanted.append((hand.plan, epoch))
        return epoch, book.spec.n_samples

    def start_evaluation(self, pin: Callable[[], int]) -> bool:
        """Start the evaluation that is wanted next, unless one is under way.

        Args:
            pin: pins the current snapshot and returns its version; called only if one starts.
        """
        if self._evaluation is not None or not self._wanted:
            return False
        plan, epoch = self._wanted.popleft()
        spec = self._plans[plan].spec
        blocks = -(-spec.eval_samples // spec.eval_batch_size)
        self._evaluation = _Evaluation(plan, epoch, pin(), blocks)
        return True

    def report(self, worker: int, sums: dict[str, float]) -> Evaluated | None:
        """Complete the evaluation block in the worker's hand; the merged sums after the last."""
        hand = self._hand[worker]
        evaluation = self._evaluation
        if hand is None or hand.kind is not LeaseKind.EVALUATE or evaluation is None:
            return None
        self._hand[worker] = None
        evaluation.results[hand.block] = sums
        if len(evaluation.results) < evaluation.blocks:
            return None
        merged: dict[str, float] = {}
        for block in range(evaluation.blocks):
            for name, value in evaluation.results[block].items():
                merged[name] = merged.get(name, 0.0) + value
        self._plans[evaluation.plan].evaluations -= 1
        self._evaluation = None
        return Evaluated(evaluation.epoch, evaluation.version, merged)

    def expire(self, worker: int, clock: int) -> bool:
        """Take back what was reserved for steps that the worker has finished otherwise."""
        mine = self._reserved[worker]
        before = len(mine)
        while mine and mine[0][0][1] < clock:
            self._unreserve(mine.popleft())
        return len(mine) < before

    def give_back(self, worker: int) -> bool:
        """Return what a worker that has left or is lost holds; True if there was anything."""
        hand = self._hand[worker]
        self._hand[worker] = None
        mine = self._reserved[worker]
        anything = hand is not None or bool(mine)
        while mine:
            self._unreserve(mine.popleft())
        if hand is not None and hand.kind is LeaseKind.TRAIN:
            self._plans[hand.plan].outstanding -= 1
            heapq.heappush(self._plans[hand.plan].returned, hand.block)
        elif hand is not None and self._evaluation is not None:
            heapq.heappush(self._evaluation.returned, hand.block)
        return anything

    def _unreserve(self, reservation: tuple[tuple[int, int, int], int]) -> None:
        (plan, _, _), block = reservation
        self._plans[plan].reserved -= 1
        heapq.heappush(self._plans[plan].returned, block)

    def _take_in_wave(self, worker: int, plan: int, clock: int) -> int | None:
        key = self._next_ask(worker, plan, clock)
        mine = self._reserved[worker]
        while mine and mine[0][0] < key:
            self._unreserve(mine.popleft())
        if not mine or mine[0][0] != key:
            self._reserve_wave(plan, key)
        if not mine or mine[0][0] != key:
            return None
        self._asks[worker] = key
        self._plans[plan].reserved -= 1
        return mine.popleft()[1]

    def _next_ask(self, worker: int, plan: int, clock: int) -> tuple[int, int, int]:
        last_plan, last_clock, count = self._asks[worker]
        again = (last_plan, last_clock) == (plan, clock)
        return plan, clock, count + 1 if again else 0

    def _reserve_wave(self, plan: int, key: tuple[int, int, int]) -> None:
        book = self._plans[plan]
        for other, mine in enumerate(self._reserved):
            if not self._live[other] or self._asks[other] >= key:
                continue
            if any(reserved == key for reserved, _ in mine):
                continue
            block = book.take()
            if block is None:
                return
            book.reserved += 1
            mine.append((key, block))
