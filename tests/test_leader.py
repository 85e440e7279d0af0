"""What server 0 decides: staleness, rounds, refusals, ends, and the work."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from fakes import POISON, Desk, params_of

from psframe import BSP, SSP
from psframe.errors import MessageError
from psframe.events import (
    Answer,
    Arrived,
    Decision,
    End,
    EpochDone,
    Evaluated,
    Failure,
    Finished,
    Gone,
    Joined,
    Lease,
    LeaseKind,
    LeaseRequest,
    Leave,
    Log,
    Logged,
    Lost,
    Mark,
    Marked,
    Missing,
    Pin,
    Pull,
    Push,
    PushHandled,
    RandomState,
    Reason,
    Report,
    Saved,
    ShardSaved,
    ShardsSaved,
    Stop,
    TaskSpec,
    Withheld,
)
from psframe.marking import Marks


def kinds(out: list[Any]) -> list[str]:
    return [type(event).__name__ for event in out]


def receipts(out: list[Any]) -> dict[int, Answer]:
    return {a.worker: a for a in out if isinstance(a, Answer)}


def one(out: list[Any], kind: type) -> Any:
    (event,) = [event for event in out if isinstance(event, kind)]
    return event


# ---- pushes ------------------------------------------------------------------------------------


def test_staleness_is_the_version_before_minus_the_version_read() -> None:
    desk = Desk(3, trace=True)
    for worker, staleness in ((0, 0), (1, 1), (2, 2)):
        out = desk.push(worker, version=0)
        assert receipts(out)[worker].staleness == staleness
    assert one(out, PushHandled) == PushHandled(2, 0, 0, 3, 2, True)
    assert desk.leader.staleness == {0: 1, 1: 1, 2: 1}


def test_a_push_of_an_unknown_version_is_refused() -> None:
    desk = Desk(1)
    for version in (-1, 1):
        receipt = receipts(desk.push(0, version=version))[0]
        assert not receipt.applied
        assert receipt.reason is Reason.BAD_VERSION
    assert desk.store.version == 0


def test_refused_pushes_tick_the_clock() -> None:
    desk = Desk(2, SSP(0), servers=2)
    out = desk.push(0, finite=False)
    assert one(out, Decision) == Decision([(0, 0)], Reason.NON_FINITE)
    out = desk.push(1, POISON)
    assert one(out, Decision) == Decision([(1, 0)], Reason.NON_FINITE_UPDATE)
    assert desk.policy.clocks == [1, 1]
    assert desk.store.version == 0
    assert desk.leader.ledger.ledger().refused == 2


def test_ten_refusals_a_worker_in_a_row_diverge() -> None:
    desk = Desk(2)
    for _ in range(19):
        desk.push(0, finite=False)
    desk.push(1)
    for _ in range(19):
        desk.push(0, POISON)
    assert not desk.leader.diverged
    desk.push(1, finite=False)
    assert desk.leader.diverged
    assert desk.machine.stopped


def test_late_pushes_do_not_diverge() -> None:
    desk = Desk(2, BSP(1))
    for _ in range(40):
        desk.push(0)
        assert receipts(desk.push(1))[1].reason is Reason.LATE
    assert not desk.leader.diverged
    assert desk.leader.ledger.ledger().dropped == 40


def test_refusals_of_a_follower_count_for_divergence() -> None:
    desk = Desk(1, servers=2)
    desk.push(0)
    desk.hears(Withheld(1, 0, 0, 9))
    assert not desk.leader.diverged
    desk.hears(Withheld(1, 0, 0, 10))
    assert desk.leader.diverged
    assert desk.leader.ledger.ledger().partial == 1


# ---- rounds ------------------------------------------------------------------------------------


def test_a_round_is_the_mean_in_worker_order() -> None:
    desk = Desk(3, BSP(), servers=2, trace=True)
    assert desk.push(2, 1e16) == []
    assert desk.push(0, 1.0) == []
    out = desk.push(1, -1e16)
    assert one(out, Decision) == Decision([(0, 0), (1, 0), (2, 0)], round=True)
    assert [r.worker for r in out if isinstance(r, PushHandled)] == [0, 1, 2]
    assert [a.worker for a in out if isinstance(a, Answer)] == [0, 1, 2]
    assert desk.store.params[0] == -(((1.0 - 1e16) + 1e16) / 3)
    assert desk.store.version == 1
    assert all(a.staleness == 0 for a in receipts(out).values())


def test_a_round_tells_the_staleness_that_it_had() -> None:
    """Two pushes of one pull: the second is one version behind, in BSP too."""
    desk = Desk(1, BSP(), trace=True)
    desk.push(0, version=0)
    assert one(desk.push(0, version=0), PushHandled) == PushHandled(0, 1, 0, 2, 1, True)


def test_a_pull_waits_for_the_round() -> None:
    desk = Desk(2, BSP())
    desk.push(0)
    assert desk.pull(0) == []
    assert receipts(desk.pull(1))[1].version == 0, "this one has not pushed"
    out = desk.push(1)
    assert [(a.worker, a.version) for a in out if a.buffer >= 0] == [(0, 1)]


def test_a_poisoned_round_is_refused_whole() -> None:
    desk = Desk(2, BSP(), servers=2)
    desk.push(0, POISON)
    desk.slots[0, 0] *= 2  # the mean with zero is poison again
    out = desk.push(1, 0.0)
    assert one(out, Decision).reason is Reason.NON_FINITE_UPDATE
    assert [r.reason for r in receipts(out).values()] == [Reason.NON_FINITE_UPDATE] * 2
    assert desk.policy.clocks == [1, 1]


def test_an_empty_round_tells_the_followers() -> None:
    desk = Desk(1, BSP(), servers=2)
    out = desk.push(0, finite=False)
    decisions = [event for event in out if isinstance(event, Decision)]
    assert decisions == [Decision([(0, 0)], Reason.NON_FINITE), Decision([], round=True)]


def test_a_round_goes_on_without_the_lost() -> None:
    desk = Desk(3, BSP(), servers=2)
    desk.push(0, 2.0)
    desk.push(1, 8.0)
    desk.hears(Lost(1))
    out = desk.push(2, 4.0)
    assert one(out, Decision).members == [(0, 0), (2, 0)]
    assert desk.store.params[0] == -3.0
    ledger = desk.leader.ledger.ledger()
    assert (ledger.lost, ledger.applied) == (1, 2)


# ---- replacements ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, SSP(1), BSP()], ids=repr)
def test_another_takes_the_place_of_a_lost_worker_and_begins_anew(mode: Any) -> None:
    desk = Desk(2, mode, respawn=1)
    for _ in range(3):
        desk.pull(0), desk.pull(1)
        desk.push(0), desk.push(1)
    version = desk.store.version
    desk.hears(Lost(1))
    assert (desk.leader.vacant, desk.leader.lost) == ({1: 1}, [False, True])
    assert desk.hears(Joined(1)) == []
    assert (desk.leader.vacant, desk.leader.lost, desk.leader.losses) == ({}, [False] * 2, {1})
    assert desk.leader.replaced == {1}
    desk.begins_anew(1)
    assert one(desk.pull(1), Answer).version == version
    desk.pull(0), desk.push(0)
    out = desk.push(1)
    assert one([a for a in out if a.worker == 1], Answer).applied
    desk.hears(Leave(0)), desk.hears(Leave(1))
    assert desk.leader.finished
    assert desk.store.held == 0


def test_who_has_opened_a_device_s_memory_reads_there_but_not_its_successor() -> None:
    desk = Desk(2, respawn=1)
    desk.leader.lend_snapshots([1])
    holds: list[bool] = []
    hold = desk.store.hold

    def noted(on_host: bool = True) -> int | None:
        holds.append(on_host)
        return hold(on_host)

    desk.store.hold = noted  # type: ignore[method-assign]
    desk.pull(0), desk.pull(1)
    desk.push(1)
    desk.hears(Lost(1)), desk.hears(Joined(1))
    desk.begins_anew(1)
    desk.pull(1)
    assert holds == [True, False, True]


def test_no_more_workers_are_replaced_than_may_be() -> None:
    desk = Desk(3, respawn=2)
    desk.hears(Lost(1)), desk.hears(Lost(2))
    assert desk.leader.vacant == {1: 1, 2: 2}
    desk.hears(Joined(2))
    desk.hears(Lost(2)), desk.hears(Missing(1))
    assert desk.leader.vacant == {}
    assert desk.leader.gone == [False, True, True]


def test_one_that_does_not_come_is_replaced_as_well() -> None:
    desk = Desk(2, respawn=2)
    desk.hears(Lost(1))
    desk.hears(Missing(1))
    assert desk.leader.vacant == {1: 2}


def test_the_run_waits_for_a_replacement_only_where_nobody_has_done_the_work() -> None:
    desk = Desk(2, respawn=2)
    desk.hears(Lost(0)), desk.hears(Lost(1))
    assert not desk.leader.stopped
    desk.hears(Missing(0))
    assert not desk.leader.stopped
    desk.hears(Missing(1))
    assert desk.leader.finished, "nobody comes any more"

    desk = Desk(2, respawn=2)
    desk.hears(Lost(0)), desk.hears(Leave(1))
    assert desk.leader.finished


def test_who_comes_after_the_end_is_told_to_end() -> None:
    desk = Desk(2, respawn=1)
    desk.hears(Lost(0)), desk.hears(Stop(1))
    assert desk.leader.vacant == {}
    answer = one(desk.hears(Joined(0)), Answer)
    assert (answer.worker, answer.stopped) == (0, True)
    assert desk.hears(Missing(0)) == []


@pytest.mark.parametrize("event", [Joined(1), Missing(1)])
def test_nobody_comes_in_the_place_of_one_who_is_there_or_has_left(event: Any) -> None:
    desk = Desk(2, respawn=1)
    with pytest.raises(MessageError, match="nobody is expected in place of worker 1"):
        desk.hears(event)
    desk.hears(Leave(1))
    with pytest.raises(MessageError, match="nobody is expected in place of worker 1"):
        desk.hears(event)


def test_what_has_still_to_arrive_of_a_lost_gradient_is_not_its_replacements() -> None:
    desk = Desk(1, respawn=1)
    desk.hears(Pull(0, 0, False, 0))
    desk.hears(Push(0, 1, 0, 0, True, 0.0, False, 0, 0, True))
    desk.hears(Lost(0)), desk.hears(Joined(0))
    desk.begins_anew(0)
    assert desk.hears(Arrived(0, 0, 2, True, True, 1.0)) == []
    assert desk.store.version == 0
    assert desk.leader.ledger.ledger().lost == 1


# ---- ends --------------------------------------------------------------------------------------


def test_max_updates_is_exact() -> None:
    desk = Desk(2, servers=2, max_updates=2)
    desk.push(0)
    out = desk.push(1)
    assert kinds(out) == ["Decision", "End", "Answer"]
    assert receipts(out)[1].applied
    assert receipts(desk.push(0))[0].reason is Reason.STOPPED
    assert desk.store.version == 2


def test_max_updates_0_is_over_before_it_begins() -> None:
    desk = Desk(1, servers=2, max_updates=0)
    out = desk.pull(0)
    assert kinds(out) == ["End", "Answer"]
    assert receipts(out)[0].stopped


def test_a_failure_ends_the_run_and_the_first_counts() -> None:
    desk = Desk(2)
    failure = Failure("Oops", "no", "...")
    desk.hears(Leave(1, failure))
    desk.hears(Leave(0, Failure("Later", "", "")))
    assert desk.leader.failure == (1, failure)
    assert desk.machine.finished


def test_ending_from_outside() -> None:
    desk = Desk(2, BSP(), servers=2)
    desk.push(0)
    assert kinds(desk.leader.end()) == ["End", "Answer"]
    assert desk.leader.end() == []
    assert desk.leader.ledger.ledger().stopped == 1


def test_the_loss_of_a_worker_that_has_left_is_passed_on() -> None:
    """A follower may wait for a good-bye of it that died on its way."""
    desk = Desk(2, servers=2)
    desk.hears(Leave(0))
    assert desk.hears(Lost(0)) == [Gone(0)]
    assert Desk(1).hears(Leave(0)) == []


def test_it_waits_for_what_the_followers_have_still_to_tell() -> None:
    """The last worker dies, and a follower withholds its part after everyone has left."""
    desk = Desk(1, servers=3)
    desk.push(0)
    assert kinds(desk.hears(Lost(0))) == ["Gone", "Answer", "End"]
    desk.hears(Finished(2))
    assert not desk.machine.finished
    desk.hears(Withheld(1, 0, 0, 0))
    desk.hears(Finished(1))
    assert desk.machine.finished
    assert desk.leader.ledger.ledger().partial == 1


def test_a_follower_does_not_finish_before_the_end_or_twice() -> None:
    desk = Desk(2, servers=2)
    with pytest.raises(MessageError, match="server 1 has finished before the end, or twice"):
        desk.hears(Finished(1))
    desk.leader.end()
    desk.hears(Finished(1))
    with pytest.raises(MessageError, match="server 1 has finished"):
        desk.hears(Finished(1))
    assert not desk.machine.finished, "its workers have not left"
    for worker in (0, 1):
        desk.hears(Leave(worker))
    assert desk.machine.finished


def test_logs_are_passed_on() -> None:
    desk = Desk(1)
    assert desk.hears(Log(0, {"loss": (2.0, 4)})) == [Logged(0, {"loss": (2.0, 4)})]


# ---- the log -----------------------------------------------------------------------------------


def logs(out: list[Any]) -> list[int]:
    """The position in every answer."""
    return [event.log for event in out if isinstance(event, (Answer, Lease))]


def test_an_answer_says_how_many_records_came_before_it() -> None:
    desk = Desk(2, servers=2)
    assert logs(desk.pull(0)) == [0]
    assert logs(desk.push(0)) == [1], "the decision"
    assert logs(desk.pull(1)) == [1]
    assert logs(desk.push(1, finite=False)) == [2]
    assert logs(desk.hears(Lost(1))) == [3], "that it is gone"
    assert logs(desk.hears(Stop(0)) + desk.pull(0)) == [4], "the end"


def test_a_lease_says_it_too() -> None:
    desk = Desk(2, BSP(), servers=2)
    spec = TaskSpec(2, 2, 1, False)
    ask(desk, 0, spec)
    assert ask(desk, 1, spec) == []
    out = desk.push(0)
    assert kinds(out) == ["Decision", "EpochDone", "Answer", "Lease"]
    assert logs(out) == [1, 1]


def test_a_lease_of_an_evaluation_comes_after_its_pin() -> None:
    desk = Desk(1, servers=2)
    ask(desk, 0, EVALUATING)
    assert logs(desk.push(0)) == [2], "the decision and the pin"
    assert logs(ask(desk, 0, EVALUATING)) == [2]


def test_without_followers_there_is_no_log() -> None:
    desk = Desk(1)
    assert logs(desk.push(0) + desk.pull(0) + desk.hears(Lost(0))) == [0, 0, 0]


def test_who_ends_the_run_from_outside_is_in_the_log() -> None:
    desk = Desk(2, BSP(), servers=2)
    desk.push(0)
    assert logs(desk.leader.end()) == [1]
    assert logs(desk.pull(1)) == [1]


@pytest.mark.parametrize("want", [False, True])
def test_nobody_has_seen_a_record_that_is_not_there(want: bool) -> None:
    desk = Desk(2, servers=2)
    desk.push(0)
    with pytest.raises(MessageError, match="worker 1 has seen 2 records, of 1"):
        desk.push(1, want=want, log=2)
    with pytest.raises(MessageError, match="worker 1 has seen 2 records, of 1"):
        desk.pull(1, log=2)
    assert desk.leader.ledger.received == 1
    assert receipts(desk.push(1, want=want, log=1))[1].applied


# ---- leases ------------------------------------------------------------------------------------

SPEC = TaskSpec(4, 2, 1, False)
EVALUATING = TaskSpec(2, 2, 2, False, eval_samples=3, eval_batch_size=2)


def ask(desk: Desk, worker: int, spec: TaskSpec = SPEC, plan: int = 0) -> list[Any]:
    return desk.hears(LeaseRequest(worker, desk.seq(worker), plan, spec))


def lease(out: list[Any]) -> Lease:
    found = one(out, Lease)
    assert isinstance(found, Lease)
    return found


def test_a_push_completes_the_lease() -> None:
    desk = Desk(1)
    ask(desk, 0)
    assert [e for e in desk.push(0) if isinstance(e, EpochDone)] == []
    ask(desk, 0)
    assert one(desk.push(0, version=0), EpochDone) == EpochDone(0, 2, 4, 0.5)
    assert lease(ask(desk, 0)).kind is LeaseKind.EXHAUSTED


def test_asking_for_the_next_completes_the_lease() -> None:
    desk = Desk(1)
    ask(desk, 0)
    ask(desk, 0)
    out = ask(desk, 0)
    assert kinds(out) == ["EpochDone", "Lease"]
    assert lease(out).kind is LeaseKind.EXHAUSTED


def test_a_lost_workers_block_goes_to_who_waits() -> None:
    desk = Desk(2)
    for worker in (0, 1):
        ask(desk, worker)
    desk.push(1)
    assert ask(desk, 1) == [], "all is handed out"
    out = desk.hears(Lost(0))
    assert (lease(out).worker, lease(out).begin) == (1, 0)


def test_who_asks_for_something_else_is_told_so() -> None:
    desk = Desk(2)
    ask(desk, 0)
    assert lease(ask(desk, 1, TaskSpec(5, 2, 1, False))).kind is LeaseKind.CONFLICT
    assert lease(ask(desk, 1)).kind is LeaseKind.TRAIN


def test_the_end_answers_who_waits_for_a_lease() -> None:
    desk = Desk(2)
    for worker in (0, 1):
        ask(desk, worker)
    desk.push(1)
    ask(desk, 1)
    out = desk.hears(Stop(0))
    assert lease(out).kind is LeaseKind.STOPPED
    assert lease(ask(desk, 0)).kind is LeaseKind.STOPPED


def test_an_evaluation_is_of_one_pinned_snapshot() -> None:
    desk = Desk(2, servers=2)
    ask(desk, 0, EVALUATING)
    out = desk.push(0)
    assert kinds(out) == ["Decision", "EpochDone", "Pin", "Answer"]
    assert lease(ask(desk, 0, EVALUATING)).kind is LeaseKind.EVALUATE
    assert lease(ask(desk, 1, EVALUATING)).begin == 2
    desk.push(1)  # the clock goes on, and completes the block without numbers
    out = desk.pull(0, pinned=True)
    assert receipts(out)[0].version == 1
    assert params_of(desk, receipts(out)[0]) == -1.0
    out = desk.hears(Report(0, {"n": 2.0}))
    assert out == [Evaluated(0, 1, {"n": 2.0}), Pin(on=False)]
    assert desk.store.held == 1, "worker 0's hold of it"


def test_an_evaluation_that_ends_after_the_run_keeps_nothing() -> None:
    """Its snapshot is pinned no longer, and the last one is another."""
    desk = Desk(2, score=lambda sums: sums["n"], max_updates=2)
    ask(desk, 0, EVALUATING)
    desk.push(0)
    assert lease(ask(desk, 0, EVALUATING)).kind is LeaseKind.EVALUATE
    assert lease(ask(desk, 1, EVALUATING)).kind is LeaseKind.EVALUATE
    desk.hears(Report(0, {"n": 2.0}))
    desk.push(0)
    assert desk.machine.stopped
    out = desk.hears(Report(1, {"n": 1.0}))
    assert out == [Evaluated(0, 1, {"n": 3.0}, best=False)]
    assert desk.machine.kept is None
    assert desk.leader.kept_version is None


def test_a_pinned_pull_waits_for_the_pin() -> None:
    desk = Desk(2)
    ask(desk, 0, EVALUATING)
    assert desk.pull(1, pinned=True) == []
    out = desk.push(0)
    assert receipts(out)[1].version == 1
    assert desk.store._holds[receipts(out)[1].buffer] == 2


def test_bsp_does_not_wait_for_who_waits_for_a_lease() -> None:
    desk = Desk(2, BSP())
    spec = TaskSpec(2, 2, 1, False)
    assert lease(ask(desk, 0, spec)).kind is LeaseKind.TRAIN
    assert ask(desk, 1, spec) == []
    out = desk.push(0)
    assert receipts(out)[0].applied
    assert lease(out).kind is LeaseKind.EXHAUSTED


@pytest.mark.parametrize("mode", [SSP(0), BSP()])
def test_nobody_ahead_is_given_an_evaluation(mode: Any) -> None:
    """It would wait for workers that wait for that evaluation."""
    desk = Desk(2, mode)
    spec = TaskSpec(2, 1, 1, False, eval_samples=1)
    for worker in (0, 1):
        ask(desk, worker, spec)
    desk.push(0, finite=False)  # a refused step is finished at once, in BSP too
    ask(desk, 0, spec)
    assert ask(desk, 0, spec) == []
    out = ask(desk, 1, spec)
    assert lease(out).worker == 1
    assert lease(out).kind is LeaseKind.EVALUATE


def test_who_has_to_wait_in_bsp_frees_what_others_wait_for() -> None:
    desk = Desk(3, BSP())
    spec = TaskSpec(3, 1, 1, False)
    assert lease(ask(desk, 2, spec)).begin == 2, "reserves 0 and 1 for the others"
    assert lease(ask(desk, 1, spec, plan=1)).begin == 1, "and here 0 and 2"
    assert ask(desk, 1, spec, plan=1) == []
    assert [lease(ask(desk, 0, spec)).begin for _ in range(2)] == [0, 1]
    out = ask(desk, 0, spec)
    assert (lease(out).worker, lease(out).begin) == (1, 0)


def test_bsp_waves_over_a_loss() -> None:
    desk = Desk(3, BSP())
    spec = TaskSpec(6, 1, 1, False)
    assert [lease(ask(desk, w, spec)).begin for w in (2, 0, 1)] == [2, 0, 1]
    desk.push(0)
    desk.push(2)
    desk.hears(Lost(1))
    assert desk.store.version == 1, "the round has closed without it"
    assert lease(ask(desk, 2, spec)).begin == 3, "the second of the free blocks 1, 3, 4, 5"
    assert lease(ask(desk, 0, spec)).begin == 1


# ---- one way and the other -------------------------------------------------------------------


def state(desk: Desk) -> dict[str, Any]:
    """All that a later event may depend on."""
    leader, store = desk.leader, desk.store
    own = ("gone", "lost", "staleness", "diverged", "_hold", "_landed", "_last_seq", "_refusals")
    return {
        **{name: getattr(leader, name) for name in own},
        "ledger": leader.ledger.ledger(),
        "clocks": desk.policy.clocks,
        "queues": [[told(event) for event in inbox] for inbox in leader._inbox],
        "store": (store.version, store.current, store.held, sorted(store._free), store._holds),
        "params": store.params.tolist(),
    }


def told(event: Any) -> Any:
    """A queued request without what it has said already, or does not know yet."""
    if isinstance(event, Push):
        return replace(event, release=0, norm=0.0 if event.arriving else event.norm)
    return replace(event, release=0) if isinstance(event, Pull) else event


def act(desk: Desk, rng: random.Random) -> list[Any]:
    """Something that a worker does, mostly what it should."""
    worker = rng.randrange(desk.machine.workers)
    if rng.random() < 0.1:
        return desk.pull(worker, keep=rng.random() < 0.5)
    if rng.random() < 0.005:
        return desk.hears(Leave(worker))
    if desk.leader._arriving and rng.random() < 0.5:
        return arrive(desk, rng)
    arriving = rng.random() < 0.3
    push = Push(
        worker,
        desk.seq(worker) if rng.random() < 0.97 else 0,
        rng.randrange(2) if rng.random() < 0.98 else 2,
        max(-1, desk.store.version - rng.choice([0, 0, 1, 3, -1])),
        rng.random() < 0.95,
        1.0,
        rng.random() < 0.8,
        desk._release[worker] if rng.random() < 0.97 else rng.randrange(4),
        rng.choice([0] * 20 + [1]),
        arriving,
    )
    if arriving and (worker, push.slot) in desk.leader._arriving:
        return []  # who writes into a slot in use is no worker of ours
    desk.slots[worker] = rng.choice([1.0, 2.0, -1.0, POISON if rng.random() < 0.2 else 4.0])
    if arriving:
        push.finite = True
        progress = desk.streams(worker, push.slot)
        progress.advance(rng.randrange(2))
        if rng.random() < 0.6:
            progress.close(*rng.choice([(True, 0.0)] * 5 + [(False, 0.0)]))
    owed = desk._take(worker)
    try:
        return desk.hears(push)
    except MessageError:
        desk._release[worker] = owed
        raise


def arrive(desk: Desk, rng: random.Random) -> list[Any]:
    """More of a gradient arrives."""
    worker, slot = rng.choice(sorted(desk.leader._arriving))
    progress = desk.progress[worker, slot]
    if rng.random() < 0.3:
        progress.advance(1)
        return desk.hears(Arrived(worker, slot, 1))
    finite = rng.random() < 0.8
    progress.close(finite, 0.0)
    return desk.hears(Arrived(worker, slot, 2, True, finite, 0.0))


def at_once(seed: int) -> int:
    """Two leaders hear the same, one of them without its short cut; counts what took that."""
    workers, taken = 1 + seed % 3, 0
    desks = [Desk(workers, trace=seed % 2 == 0, max_updates=60) for _ in range(2)]
    desks[1].leader._plain = False
    quick = desks[0].leader.push_pull

    def counted(*push: int) -> Any:
        nonlocal taken
        out = quick(*push)
        taken += out is not None
        return out

    desks[0].leader.push_pull = counted  # type: ignore[method-assign]
    for step in range(150):
        outcomes = []
        for desk in desks:
            try:
                outcomes.append(act(desk, random.Random(f"{seed} {step}")))
            except MessageError as error:
                outcomes.append([str(error)])
        assert outcomes[0] == outcomes[1], step
        assert state(desks[0]) == state(desks[1]), step
    return taken


@pytest.mark.parametrize("seeds", [range(first, first + 10) for first in range(0, 80, 10)])
def test_what_is_handled_at_once_comes_to_the_same(seeds: range) -> None:
    assert sum(at_once(seed) for seed in seeds) > 60


# ---- marks -------------------------------------------------------------------------------------


def marks(out: list[Any]) -> list[tuple[int, int]]:
    """(number, version) of every mark."""
    return [(event.number, event.version) for event in out if isinstance(event, Marked)]


def test_a_run_marks_itself_every_so_many_updates() -> None:
    desk = Desk(2, marks=Marks(every=2), max_updates=6)
    desk.pull(0)
    made = []
    for _ in range(6):
        for out in (desk.push(0, want=True), desk.push(0, finite=False)):
            made += marks(out)
            if marks(out):
                assert desk.machine.marked["params"][0] == -desk.store.version
                assert desk.leader.marking
                desk.hears(Saved(made[-1][0]))
    assert made == [(0, 2), (1, 4), (2, 6)]
    assert desk.machine.stopped
    assert desk.leader.marks_skipped == 0


def test_the_short_way_of_a_push_does_not_pass_a_mark_by() -> None:
    desk = Desk(1, marks=Marks(every=3))
    desk.pull(0)
    quick = desk.leader.push_pull
    ways = []

    def counted(*push: int) -> Any:
        out = quick(*push)
        ways.append(out is not None)
        return out

    desk.leader.push_pull = counted  # type: ignore[method-assign]
    made = [marks(desk.push(0, want=True)) for _ in range(7)]
    assert made == [[], [], [(0, 3)], [], [], [], []]
    assert ways == [True, True, False, True, True, False, True]
    assert desk.leader.marks_skipped == 1, "the first one was not saved"


def test_followers_are_told_and_tell_what_they_have_saved() -> None:
    desk = Desk(2, servers=3, marks=Marks())
    desk.push(0)
    out = desk.leader.mark()
    assert kinds(out) == ["Mark", "Marked"]
    assert logs(desk.pull(1)) == [2], "the decision and the mark"
    assert desk.leader.mark() == []
    assert desk.leader.marks_skipped == 1
    assert desk.hears(ShardSaved(2, 0, "two")) == []
    assert desk.hears(Saved(0)) == []
    with pytest.raises(MessageError, match="server 2 has saved mark 0"):
        desk.hears(ShardSaved(2, 0, "two"))
    with pytest.raises(MessageError, match="server 1 has saved mark 1"):
        desk.hears(ShardSaved(1, 1, "one"))
    assert desk.leader.marking
    assert desk.hears(ShardSaved(1, 0, "one")) == [ShardsSaved(0, ["one", "two"])]
    assert not desk.leader.marking
    assert desk.leader.mark()[0] == Mark(1)


@pytest.mark.parametrize("servers", [1, 2])
def test_a_run_that_ends_marks_itself_before(servers: int) -> None:
    desk = Desk(1, servers=servers, marks=Marks(at_end=True))
    desk.push(0)
    out = desk.hears(Stop(0))
    assert marks(out) == [(0, 1)]
    assert kinds(out) == (["Marked"] if servers == 1 else ["Mark", "Marked", "End"])
    assert desk.leader.mark() == [], "it is over"
    desk.hears(Leave(0))
    for server in range(1, servers):
        desk.hears(ShardSaved(server, 0, ""))
        desk.hears(Finished(server))
    assert not desk.machine.finished
    desk.hears(Saved(0))
    assert desk.machine.finished


def test_the_mark_at_the_end_is_made_when_another_is_saved() -> None:
    desk = Desk(1, servers=2, marks=Marks(every=1, at_end=True), max_updates=2)
    assert marks(desk.push(0)) == [(0, 1)]
    out = desk.push(0)
    assert one(out, End) == End(mark=True)
    assert not marks(out)
    desk.hears(Leave(0))
    desk.hears(ShardSaved(1, 0, ""))
    out = desk.hears(Saved(0))
    assert kinds(out) == ["Mark", "Marked"]
    assert marks(out) == [(1, 2)]
    assert desk.leader.marks_skipped == 0


def test_a_run_that_fails_or_diverges_does_not_mark_its_end() -> None:
    for last in (Leave(0, Failure("E", "", "")), None):
        desk = Desk(1, marks=Marks(at_end=True))
        desk.push(0)
        out = desk.hears(last) if last else []
        for _ in range(0 if last else 10):
            out += desk.push(0, finite=False)
        assert desk.machine.stopped
        assert not marks(out)


def test_a_run_that_is_interrupted_waits_for_its_mark() -> None:
    desk = Desk(2, marks=Marks(at_interrupt=True))
    desk.push(0)
    out = [*desk.hears(Leave(0, Failure("KeyboardInterrupt", "SIGTERM", "")))]
    out += desk.hears(Leave(1, Failure("KeyboardInterrupt", "SIGTERM", "")))
    assert marks(out) == [(0, 1)]
    assert not desk.leader.finished
    desk.hears(Saved(0))
    assert desk.leader.finished


def drawn(number: int) -> tuple[int, int, int, int]:
    return number, 1, 0, 0


def random_states(desk: Desk) -> dict[int, int]:
    return {row[0]: int(row[1], 16) for row in desk.leader.state()["random"]}


def test_random_states_are_those_of_the_last_push_that_was_handled() -> None:
    desk = Desk(2, SSP(0))
    desk.hears(RandomState(0, 0, drawn(1)))
    assert random_states(desk) == {}, "its push has not come"
    desk.push(0)
    assert random_states(desk) == {0: 1}
    desk.hears(RandomState(0, 1, drawn(2)))
    assert desk.push(0) == [], "it waits for the other worker"
    assert random_states(desk) == {0: 1}
    desk.hears(RandomState(0, 2, drawn(3)))
    desk.push(1)
    assert random_states(desk) == {0: 2}
    desk.hears(Lost(0))
    assert random_states(desk) == {0: 2}


def test_the_random_state_of_a_push_that_is_lost_is_not_kept() -> None:
    desk = Desk(2, SSP(0))
    desk.push(0)
    desk.hears(RandomState(0, 1, drawn(2)))
    desk.push(0)
    desk.hears(Lost(0))
    assert random_states(desk) == {}


def test_a_round_that_was_refused_is_no_update() -> None:
    desk = Desk(1, BSP(), marks=Marks(every=1))
    desk.push(0)
    desk.hears(Saved(0))
    assert not marks(desk.push(0, POISON))
    assert marks(desk.push(0)) == [(1, 2)]
