"""Blocks of samples: each is completed once, returned when lost, and in waves in worker order."""

from __future__ import annotations

import random
from typing import Any

import pytest

from psframe.events import Lease, LeaseKind, TaskSpec
from psframe.leases import LeaseBook

TRAIN, EVALUATE, EXHAUSTED = LeaseKind.TRAIN, LeaseKind.EVALUATE, LeaseKind.EXHAUSTED


class Office:
    """A LeaseBook, with what its caller must do for it."""

    def __init__(self, workers: int, *, waves: bool = False, **spec: Any) -> None:
        self.live = [True] * workers
        self.book = LeaseBook(workers, self.live, waves=waves)
        self.spec = TaskSpec(
            **{"n_samples": 7, "batch_size": 3, "epochs": 1, "shuffle": False, **spec}
        )
        self.pins: list[int] = []

    def ask(
        self, worker: int, *, plan: int = 0, clock: int = 0, may_start: bool = True
    ) -> Lease | None:
        assert self.book.open(plan, self.spec)
        self.book.complete(worker)
        self.book.report(worker, {})
        return self.book.request(worker, 0, plan, clock=clock, may_start=may_start)

    def block(self, worker: int, **how: Any) -> tuple[int, int, int]:
        lease = self.ask(worker, **how)
        assert lease is not None
        assert lease.kind is TRAIN
        return lease.epoch, lease.begin, lease.end

    def evaluate(self) -> bool:
        return self.book.start_evaluation(lambda: self.pins.append(5) or 5)

    def lose(self, worker: int) -> None:
        self.book.give_back(worker)
        self.live[worker] = False


def test_an_epochs_last_block_is_short() -> None:
    office = Office(1, epochs=2)
    blocks = [office.block(0) for _ in range(6)]
    assert blocks == [(0, 0, 3), (0, 3, 6), (0, 6, 7), (1, 0, 3), (1, 3, 6), (1, 6, 7)]
    lease = office.ask(0)
    assert lease is not None
    assert lease.kind is EXHAUSTED


def test_no_epochs_are_exhausted_at_once() -> None:
    lease = Office(1, epochs=0).ask(0)
    assert lease is not None
    assert lease.kind is EXHAUSTED


def test_nobody_is_told_exhausted_before_all_is_complete() -> None:
    office = Office(2, n_samples=2, batch_size=1)
    office.block(0)
    office.block(1)
    assert office.ask(0) is None, "worker 1 may still lose its block"
    office.lose(1)
    assert office.block(0) == (0, 1, 2), "the lost worker's block"
    assert office.book.complete(0) == (0, 2)
    lease = office.ask(0)
    assert lease is not None
    assert lease.kind is EXHAUSTED


def test_returned_blocks_come_first_and_lowest_first() -> None:
    office = Office(3, n_samples=5, batch_size=1)
    for worker in (0, 1, 2):
        office.block(worker)
    office.lose(2)
    office.lose(0)
    assert [office.block(1)[1] for _ in range(4)] == [0, 2, 3, 4]


def test_a_block_completes_once() -> None:
    office = Office(1)
    office.block(0)
    assert office.book.complete(0) is None
    assert office.book.complete(0) is None
    office.block(0)
    office.block(0)
    assert office.book.complete(0) == (0, 7)
    assert not office.book.give_back(0), "nothing is left in its hand"


def test_who_may_not_start_gets_no_block() -> None:
    office = Office(1)
    assert office.ask(0, may_start=False) is None
    assert office.block(0) == (0, 0, 3)


def test_all_workers_must_ask_for_the_same() -> None:
    office = Office(2)
    office.ask(0)
    assert not office.book.open(0, TaskSpec(7, 2, 1, False))
    assert office.book.open(2, TaskSpec(7, 2, 1, False)), "a plan that nobody has opened"
    assert office.book.open(1, office.spec)


# ---- waves -------------------------------------------------------------------------------------


def test_a_rounds_blocks_are_in_worker_order_whoever_asks_first() -> None:
    office = Office(3, waves=True, n_samples=9, batch_size=1)
    assert [office.block(w)[1] for w in (2, 0, 1)] == [2, 0, 1]
    assert [office.block(w, clock=1)[1] for w in (1, 2, 0)] == [4, 5, 3]


def test_a_wave_of_fewer_blocks_than_workers() -> None:
    office = Office(3, waves=True, n_samples=2, batch_size=1)
    assert office.ask(2) is None
    assert office.block(1)[1] == 1
    assert office.block(0)[1] == 0


def test_a_reservation_expires_with_its_step() -> None:
    office = Office(2, waves=True, n_samples=4, batch_size=1)
    assert office.block(1)[1] == 1
    assert not office.book.expire(0, 0)
    assert office.book.expire(0, 1), "it has finished that step without a block"
    assert office.block(1, clock=1)[1] == 2, "block 0 is worker 0's in this wave"
    assert office.block(0, clock=1)[1] == 0


def test_a_reservation_is_returned_by_the_lost() -> None:
    office = Office(2, waves=True, n_samples=2, batch_size=1)
    office.block(1)
    office.lose(0)
    assert office.block(1)[1] == 0


def test_who_waits_elsewhere_keeps_nobody_waiting() -> None:
    office = Office(2, waves=True, n_samples=2, batch_size=1)
    assert office.block(0)[1] == 0  # reserves block 1 of plan 0 for worker 1
    assert office.block(1, plan=1)[1] == 1  # reserves block 0 of plan 1 for worker 0
    assert office.ask(0, clock=1) is None
    assert office.book.stirred(), "what worker 0 had in plan 1 is free for those who wait"
    assert office.block(1, plan=1, clock=1)[1] == 0
    assert office.ask(1, plan=1, clock=2) is not None, "plan 1 is exhausted"


def test_reserving_for_a_waiting_worker_stirs_it() -> None:
    office = Office(3, waves=True, n_samples=3, batch_size=1)
    for worker in (0, 1, 2):
        office.block(worker)
    assert office.ask(1, clock=1) is None
    office.lose(0)
    office.lose(2)
    office.live[0] = True
    assert not office.book.stirred()
    assert office.ask(0, clock=1) is not None
    assert office.book.stirred()
    assert not office.book.stirred(), "it is told once"
    assert office.block(1, clock=1)[1] == 2


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("waves", [False, True])
def test_every_sample_once_whoever_is_lost(seed: int, waves: bool) -> None:
    rng = random.Random(seed)
    workers = rng.randrange(1, 6)
    n, batch, epochs = rng.randrange(1, 20), rng.randrange(1, 4), rng.randrange(1, 4)
    office = Office(workers, waves=waves, n_samples=n, batch_size=batch, epochs=epochs)
    hands: dict[int, tuple[int, int, int]] = {}
    completed: list[tuple[int, int]] = []
    clocks = [0] * workers

    def finish(worker: int) -> None:
        if worker in hands:
            epoch, begin, end = hands.pop(worker)
            completed.extend((epoch, sample) for sample in range(begin, end))

    for _ in range(2000):
        alive = [w for w in range(workers) if office.live[w]]
        worker = rng.choice(alive)
        act = rng.random()
        if act < 0.02 and len(alive) > 1:
            office.lose(worker)
            hands.pop(worker, None)
        elif act < 0.5:
            finish(worker)
            office.book.complete(worker)
            clocks[worker] += 1
            office.book.expire(worker, clocks[worker])
        else:
            finish(worker)
            lease = office.ask(worker, clock=clocks[worker])
            if lease is not None and lease.kind is EXHAUSTED:
                break
            if lease is not None:
                hands[worker] = (lease.epoch, lease.begin, lease.end)
    else:
        raise AssertionError("never exhausted")
    assert sorted(completed) == [(e, s) for e in range(epochs) for s in range(n)]


# ---- evaluations -------------------------------------------------------------------------------


def evaluating(workers: int, **spec: Any) -> Office:
    """An office that has just begun an evaluation of five samples in blocks of two."""
    office = Office(workers, n_samples=1, batch_size=1, eval_samples=5, eval_batch_size=2, **spec)
    office.block(0)
    assert office.book.complete(0) == (0, 1)
    assert office.evaluate()
    assert office.pins == [5]
    return office


def test_an_evaluation_is_merged_in_block_order() -> None:
    office = evaluating(3)
    leases = [office.ask(worker) for worker in (2, 0, 1)]
    assert [(x.kind, x.begin, x.end) for x in leases if x] == [
        (EVALUATE, 0, 2),
        (EVALUATE, 2, 4),
        (EVALUATE, 4, 5),
    ]
    sums = {2: 1.0, 0: 1e16, 1: -1e16}
    assert office.book.report(1, {"loss": sums[1], "n": 1.0}) is None
    assert office.book.report(0, {"loss": sums[0]}) is None
    assert office.book.report(0, {"loss": 99.0}) is None, "nothing in its hand"
    merged = office.book.report(2, {"loss": sums[2], "n": 2.0})
    assert merged is not None
    assert merged.sums == {"loss": (1.0 + 1e16) - 1e16, "n": 3.0}
    assert merged.version == 5
    assert not office.book.evaluating


def test_an_evaluation_block_goes_back_when_lost() -> None:
    office = evaluating(2)
    for worker in (0, 1):
        office.ask(worker)
    office.lose(0)
    office.book.report(1, {"n": 2.0})
    lease = office.ask(1)
    assert lease is not None
    assert (lease.kind, lease.begin) == (EVALUATE, 0)
    assert office.book.report(1, {"n": 2.0}) is None, "two blocks of three"
    lease = office.ask(1)
    assert lease is not None
    assert (lease.kind, lease.begin, lease.end) == (EVALUATE, 4, 5)


def test_exhausted_only_after_the_evaluation() -> None:
    office = evaluating(1)
    kinds = []
    for _ in range(4):
        lease = office.ask(0)
        assert lease is not None
        kinds.append(lease.kind)
    assert kinds == [EVALUATE, EVALUATE, EVALUATE, EXHAUSTED]


def test_only_one_evaluation_at_a_time() -> None:
    office = evaluating(1, epochs=2)
    assert not office.evaluate(), "none is wanted"
    for _ in range(3):
        office.ask(0)
    office.book.report(0, {})
    office.block(0)
    office.book.complete(0)
    assert office.evaluate()
    assert not office.evaluate()
    assert office.pins == [5, 5]


def test_an_evaluation_that_all_have_left_behind_is_dropped() -> None:
    office = evaluating(2)
    office.ask(0)
    assert not office.book.abandon(), "worker 0 is at it"
    office.ask(0, plan=1)
    assert not office.book.abandon(), "worker 1 may still come"
    office.ask(1, plan=1)
    assert office.book.abandon()
    assert not office.book.evaluating


def test_an_evaluation_without_workers_makes_way() -> None:
    office = Office(2, n_samples=1, batch_size=1, eval_samples=2, eval_batch_size=1)
    office.block(1, plan=1)
    office.book.complete(1)
    assert office.evaluate()
    office.lose(1)
    assert not office.book.abandon(), "no other is wanted"
    office.block(0)
    office.book.complete(0)
    assert office.book.abandon(), "put off for the one that has a worker"
    assert office.evaluate()
    for kind in (EVALUATE, EVALUATE, EXHAUSTED):
        lease = office.ask(0)
        assert lease is not None
        assert lease.kind is kind
    assert office.evaluate()
    lease = office.ask(0, plan=1)
    assert lease is not None
    assert lease.kind is EVALUATE


def test_an_evaluation_whose_worker_must_wait_makes_way() -> None:
    """It waits for the step of one that waits for an evaluation behind this one."""
    office = Office(2, n_samples=1, batch_size=1, eval_samples=2, eval_batch_size=1)
    office.block(1, plan=1)
    office.book.complete(1)
    assert office.evaluate()
    office.block(0)
    office.book.complete(0)
    assert office.ask(0) is None
    assert not office.book.abandon(), "worker 1 is ready for the next block"
    office.book.hold_up(1)
    assert office.book.abandon()
    assert office.evaluate()
    lease = office.ask(0)
    assert lease is not None
    assert lease.kind is EVALUATE


# ---- ahead of time -----------------------------------------------------------------------------


def ahead(office: Office, worker: int, *, clock: int = 1, plan: int = 0) -> Lease:
    """What a worker does that begins the block in its hand and wants one more."""
    book = office.book
    if book.ahead(worker):
        book.complete(worker)
    assert book.begin(worker)
    return book.request_ahead(worker, 7, plan, clock=clock)


def test_a_push_does_not_complete_a_block_that_was_not_begun() -> None:
    office = Office(1, n_samples=2, batch_size=1)
    office.block(0)
    assert ahead(office, 0).begin == 1
    assert office.book.complete(0) is None, "the first block"
    assert office.book.complete(0) is None, "a second push about it"
    assert ahead(office, 0).kind is LeaseKind.LATER, "the second has begun; there is no third"
    assert office.book.complete(0) == (0, 2)


def test_nobody_holds_more_than_one_block_ahead() -> None:
    office = Office(1, n_samples=4, batch_size=1)
    office.block(0)
    ahead(office, 0)
    assert not office.book.begin(0), "the first is still in work"


def test_a_block_ahead_goes_back_when_asked_for_by_its_number() -> None:
    office = Office(2, n_samples=2, batch_size=1)
    office.block(0)
    assert ahead(office, 0).begin == 1
    assert not office.book.give_back_ahead(0, 6), "another request's"
    assert office.book.give_back_ahead(0, 7)
    assert not office.book.give_back_ahead(0, 7)
    assert office.block(1) == (0, 1, 2)


def test_both_blocks_of_a_lost_worker_go_back() -> None:
    office = Office(2, n_samples=2, batch_size=1)
    office.block(0)
    ahead(office, 0)
    office.lose(0)
    assert office.block(1) == (0, 0, 1)
    assert office.block(1) == (0, 1, 2)


def test_an_evaluation_goes_before_a_block_ahead() -> None:
    office = Office(2, n_samples=2, batch_size=1, epochs=2, eval_samples=1)
    office.block(0)
    office.block(1)
    office.block(0)
    assert office.book.complete(1) == (0, 2)
    assert office.evaluate()
    assert ahead(office, 0).kind is LeaseKind.LATER
    lease = office.ask(0)
    assert lease is not None
    assert lease.kind is EVALUATE
    office.block(1)
    assert ahead(office, 1).kind is LeaseKind.LATER, "no block is left"


def test_blocks_ahead_are_taken_in_waves() -> None:
    """Worker 2 is first to ask for its next round's block; it gets the third of that round's."""
    office = Office(3, waves=True, n_samples=6, batch_size=1)
    assert [office.block(worker)[1] for worker in (2, 0, 1)] == [2, 0, 1]
    assert [ahead(office, worker).begin for worker in (2, 0, 1)] == [5, 3, 4]
