"""Which samples next: every sample of an epoch is completed exactly once.

The leader owns the work. It hands out blocks of an epoch's order, takes back the blocks of
workers that are lost, and counts an epoch done when its last block is completed, whoever did
it. After an epoch it may lease an evaluation of one pinned snapshot in the same way and merge
the results in block order, so that they do not depend on who computed what.

Blocks are numbers here; which indices they mean is a function of the seed that every worker
computes for itself. Each call of `leases` by a worker belongs to one *plan*: the k-th call of
every worker is the same plan and must ask for the same thing.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from psframe.blocks import (
    Evaluation,
    evaluation_state,
    plan_state,
    read_evaluation,
    read_plans,
    read_wanted,
)
from psframe.events import Evaluated, Lease, LeaseKind, TaskSpec
from psframe.state import Fields
from psframe.waves import PlanBook, Waves

__all__ = ["LeaseBook"]


@dataclass(slots=True)
class _Hand:
    """A block that a worker holds."""

    seq: int  # of the request that brought it
    plan: int
    kind: LeaseKind
    block: int  # training: epoch * blocks an epoch + block; evaluation: block
    begun: bool = True  # False: leased ahead of time, and no push is about it yet


class LeaseBook:
    """Hands out blocks and knows what became of each.

    Args:
        workers: W.
        live: whether each worker is live, kept by the policy.
        waves: assign the blocks of a round in worker order (BSP).
    """

    def __init__(self, workers: int, live: Sequence[bool], *, waves: bool) -> None:
        self._plans: dict[int, PlanBook] = {}
        self._waves = Waves(self._plans, live) if waves else None
        # The plan of each worker's last request and whether it might start then; how many live
        # workers are in each plan, and how many of them are ready to work on it.
        self._latest = [(-1, False)] * workers
        self._in_plan = Counter({-1: workers})
        self._ready: Counter[int] = Counter()
        # Oldest first: the one in work, and perhaps one whose data is being fetched.
        self._hands: list[list[_Hand]] = [[] for _ in range(workers)]
        self._evaluation: Evaluation | None = None
        self._wanted: deque[tuple[int, int]] = deque()  # (plan, epoch) to be evaluated

    # ---- checkpoints -----------------------------------------------------------------------

    def state(self, *, pinned: bool) -> dict[str, Any]:
        """Give what a checkpoint is to have of it.

        Args:
            pinned: whether the snapshot of the evaluation under way is in it; if not, that
                evaluation is to begin again.
        """
        in_hand: dict[int, list[int]] = {plan: [] for plan in self._plans}
        evaluated: list[int] = []
        for hand in (hand for hands in self._hands for hand in hands):
            (in_hand[hand.plan] if hand.kind is LeaseKind.TRAIN else evaluated).append(hand.block)
        for plan, block in self._waves.reserved() if self._waves is not None else ():
            in_hand[plan].append(block)
        wanted, evaluation = [list(task) for task in self._wanted], self._evaluation
        if evaluation is not None and not pinned:
            wanted.insert(0, [evaluation.plan, evaluation.epoch])
            evaluation = None
        return {
            "plans": [plan_state(p, book, in_hand[p]) for p, book in self._plans.items()],
            "wanted": wanted,
            "evaluation": evaluation and evaluation_state(evaluation, evaluated),
        }

    def restore(self, fields: Fields, version: int) -> int | None:
        """Go on from a state; no worker has asked for anything yet.

        Args:
            fields: the state.
            version: the run's.

        Returns:
            The version that is pinned for an evaluation under way, if there is one.

        Raises:
            ValueError: a field is wrong.
        """
        plans = read_plans(fields)
        wanted = read_wanted(fields, plans)
        evaluation = fields.part_or_none("evaluation")
        if evaluation is not None:
            self._evaluation = read_evaluation(evaluation, plans, version)
            if (self._evaluation.plan, self._evaluation.epoch) in wanted:
                raise evaluation.bad("epoch", "one that is not wanted as well")
        self._plans.update(plans)  # which the waves know as well
        self._wanted.extend(wanted)
        return None if self._evaluation is None else self._evaluation.version

    # ---- training --------------------------------------------------------------------------

    @property
    def opened(self) -> bool:
        """Whether anybody has asked for leases."""
        return bool(self._plans)

    @property
    def evaluating(self) -> bool:
        """Whether a snapshot is pinned for an evaluation."""
        return self._evaluation is not None

    def stirred(self) -> bool:
        """Tell, once, whether a request has freed or reserved a block for others that wait."""
        waves = self._waves
        if waves is None or not waves.stirred:
            return False
        waves.stirred = False
        return True

    def open(self, plan: int, spec: TaskSpec) -> bool:
        """Make sure that the plan is there; False if another worker asked for other leases."""
        book = self._plans.get(plan)
        if book is None:
            book = self._plans[plan] = PlanBook(spec)
        return book.spec == spec

    def request(
        self, worker: int, seq: int, plan: int, *, clock: int, may_start: bool
    ) -> Lease | None:
        """Give the worker its next block; None if it must wait for one.

        Args:
            worker: who asks; what it held must have been completed or returned before.
            seq: the request's number, repeated in the lease.
            plan: an open plan.
            clock: steps that the worker has finished.
            may_start: whether it may start its next step; a block is given only then, so that
                nobody holds a block and has to wait for workers that wait for that block.
        """
        book = self._plans[plan]
        if self._waves is not None:
            self._waves.waits(worker, None)
        self._leave_plan(worker)
        self._latest[worker] = plan, may_start
        self._in_plan[plan] += 1
        self._ready[plan] += may_start
        if book.finished:
            return Lease(worker, seq, LeaseKind.EXHAUSTED)
        lease = None
        if may_start:
            lease = self._evaluate(worker, seq, plan) or self._train(worker, seq, plan, clock)
        if lease is None and self._waves is not None:
            self._waves.waits(worker, plan)
        return lease

    def request_ahead(self, worker: int, seq: int, plan: int, *, clock: int) -> Lease:
        """Give the worker a training block beside the one in its hand, or LATER.

        Args:
            worker, seq, plan: as for `request`; it has one block in hand, which it has begun.
            clock: steps that it will have finished when it begins the new one. It must be allowed
                to begin then, whatever others do: see `request`.
        """
        evaluation = self._evaluation
        # An evaluation goes first.
        wanted = evaluation is not None and evaluation.plan == plan and evaluation.has_blocks
        lease = None if wanted else self._train(worker, seq, plan, clock)
        if lease is None:
            return Lease(worker, seq, LeaseKind.LATER)
        self._hands[worker][-1].begun = False
        return lease

    def ahead(self, worker: int) -> bool:
        """Tell whether the worker holds a block that it has not begun."""
        hands = self._hands[worker]
        return bool(hands) and not hands[-1].begun

    def begin(self, worker: int) -> bool:
        """Let the worker begin the block that it has in hand; False if there is none or more.

        What it had begun before must have been completed.
        """
        hands = self._hands[worker]
        if len(hands) != 1:
            return False
        hands[0].begun = True
        return True

    def complete(self, worker: int) -> tuple[int, int] | None:
        """Complete the training block that the worker has begun, if it has one.

        Returns:
            (epoch, its samples) if that was the epoch's last block, else None.
        """
        hands = self._hands[worker]
        if not hands or hands[0].kind is not LeaseKind.TRAIN or not hands[0].begun:
            return None
        hand = hands.pop(0)
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
        there = (task for task in self._wanted if self._ready[task[0]])
        plan, epoch = task = next(there, self._wanted[0])
        self._wanted.remove(task)
        spec = self._plans[plan].spec
        blocks = -(-spec.eval_samples // spec.eval_batch_size)
        self._evaluation = Evaluation(plan, epoch, pin(), blocks)
        return True

    def report(self, worker: int, sums: dict[str, float]) -> Evaluated | None:
        """Complete the evaluation block in the worker's hand; the merged sums after the last."""
        hands = self._hands[worker]
        evaluation = self._evaluation
        if not hands or hands[0].kind is not LeaseKind.EVALUATE or evaluation is None:
            return None
        hand = hands.pop(0)
        evaluation.results[hand.block] = sums
        if len(evaluation.results) < evaluation.blocks:
            return None
        merged: dict[str, float] = {}
        for block in range(evaluation.blocks):
            for name, value in evaluation.results[block].items():
                merged[name] = merged.get(name, 0.0) + value
        self._end_evaluation(evaluation)
        return Evaluated(evaluation.epoch, evaluation.version, merged)

    def abandon(self) -> bool:
        """Put the evaluation off, or drop it, if no worker is ready for it.

        Workers may turn to their next plan, or leave, before they were told that the present one
        is exhausted. An evaluation put off for another that has workers begins again, with a new
        snapshot; one that all workers have left behind is dropped, and has no result.
        """
        evaluation = self._evaluation
        if evaluation is None or self._ready[evaluation.plan]:
            return False
        if not any(plan <= evaluation.plan for plan in +self._in_plan):
            self._end_evaluation(evaluation)
            return True
        if not any(self._ready[plan] for plan, _ in self._wanted):
            return False
        self._wanted.append((evaluation.plan, evaluation.epoch))
        self._evaluation = None
        return True

    def _end_evaluation(self, evaluation: Evaluation) -> None:
        self._plans[evaluation.plan].evaluations -= 1
        self._evaluation = None

    def _evaluate(self, worker: int, seq: int, plan: int) -> Lease | None:
        evaluation = self._evaluation
        block = None
        if evaluation is not None and evaluation.plan == plan:
            block = evaluation.take()
        if evaluation is None or block is None:
            return None
        self._hands[worker].append(_Hand(seq, plan, LeaseKind.EVALUATE, block))
        spec = self._plans[plan].spec
        begin = block * spec.eval_batch_size
        end = min(begin + spec.eval_batch_size, spec.eval_samples)
        return Lease(worker, seq, LeaseKind.EVALUATE, evaluation.epoch, begin, end)

    def _train(self, worker: int, seq: int, plan: int, clock: int) -> Lease | None:
        book = self._plans[plan]
        waves = self._waves
        taken = book.take() if waves is None else waves.take(worker, plan, clock)
        if taken is None:
            return None
        book.outstanding += 1
        self._hands[worker].append(_Hand(seq, plan, LeaseKind.TRAIN, taken))
        epoch, block = divmod(taken, book.blocks)
        begin = block * book.spec.batch_size
        end = min(begin + book.spec.batch_size, book.spec.n_samples)
        return Lease(worker, seq, LeaseKind.TRAIN, epoch, begin, end)

    def hold_up(self, worker: int) -> None:
        """Note that the worker has finished a step and must wait for others before its next one.

        Until it asks again nobody waits for it to work on its plan: those that it waits for may be
        waiting for a block themselves, and that of an evaluation which is to come after this one.
        """
        plan, ready = self._latest[worker]
        self._latest[worker] = plan, False
        self._ready[plan] -= ready

    def expire(self, worker: int, clock: int) -> bool:
        """Take back what was reserved for steps that the worker has finished otherwise."""
        return self._waves is not None and self._waves.expire(worker, clock)

    def give_back(self, worker: int) -> bool:
        """Return what a worker that has left or is lost holds; True if there was anything."""
        self._leave_plan(worker)
        hands, self._hands[worker] = self._hands[worker], []
        for hand in hands:
            self._return(hand)
        return (self._waves is not None and self._waves.give_up(worker)) or bool(hands)

    def rejoin(self, worker: int) -> None:
        """Expect requests again of a worker whose blocks have been given back, from its first."""
        self._latest[worker] = -1, False
        self._in_plan[-1] += 1
        if self._waves is not None:
            self._waves.rejoin(worker)

    def give_back_ahead(self, worker: int, seq: int | None = None) -> bool:
        """Return the block that the worker has not begun; True if there was one.

        Args:
            worker: whose.
            seq: only if this request brought it.
        """
        hands = self._hands[worker]
        if not hands or hands[-1].begun or seq not in (None, hands[-1].seq):
            return False
        self._return(hands.pop())
        return True

    def _return(self, hand: _Hand) -> None:
        if hand.kind is LeaseKind.TRAIN:
            self._plans[hand.plan].outstanding -= 1
            heapq.heappush(self._plans[hand.plan].returned, hand.block)
        elif self._evaluation is not None:
            heapq.heappush(self._evaluation.returned, hand.block)

    def _leave_plan(self, worker: int) -> None:
        plan, ready = self._latest[worker]
        self._in_plan[plan] -= 1
        self._ready[plan] -= ready
