"""A server beside the first: it applies what the leader decided, with the parts that it gets."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import POISON, Desk, params_of
from saving import Arrays

from psframe import BSP, SSP
from psframe.errors import MessageError
from psframe.events import (
    ALL_REQUESTS,
    Answer,
    Decision,
    End,
    Finished,
    Gone,
    Leave,
    Lost,
    Mark,
    Marked,
    Pin,
    Pull,
    Push,
    Reason,
    Saved,
    ShardSaved,
    Withheld,
)


def follower(workers: int, mode: Any = None, **how: Any) -> Desk:
    return Desk(workers, mode, follower=True, **how)


def answered(out: list[Any]) -> list[tuple[int, int, bool]]:
    """(worker, request, applied) of every answer."""
    return [(a.worker, a.seq, a.applied) for a in out if isinstance(a, Answer)]


def test_a_short_story() -> None:
    """Part first or decision first, a push is applied when both are here."""
    desk = follower(2)
    desk.pull(0)
    assert desk.push(0, 3.0) == []
    assert desk.pull(0) == [], "its own push comes first"
    out = desk.hears(Decision([(0, 1)]))
    assert answered(out) == [(0, 1, True), (0, 2, False)]
    assert params_of(desk, out[1]) == -3.0
    assert desk.hears(Decision([(1, 0)])) == []
    assert answered(desk.push(1)) == [(1, 0, True)]
    assert desk.store.version == 2
    for worker in (0, 1):
        desk.hears(Leave(worker))
    assert not desk.machine.finished, "the leader has not said that it is over"
    assert desk.hears(End()) == [Finished(1)]
    assert desk.machine.finished


def test_others_pulls_do_not_wait() -> None:
    desk = follower(2)
    desk.push(0)
    assert answered(desk.pull(1)) == [(1, 0, False)]


def test_parts_are_applied_as_they_come() -> None:
    """Async: who has decision and part is not kept waiting by who has not."""
    desk = follower(2)
    desk.hears(Decision([(0, 0)]))
    desk.hears(Decision([(1, 0)]))
    assert answered(desk.push(1)) == [(1, 0, True)]
    assert answered(desk.push(0)) == [(0, 0, True)]


@pytest.mark.parametrize("reason", [Reason.NON_FINITE, Reason.NON_FINITE_UPDATE, Reason.LATE])
def test_a_verdict_is_followed(reason: Reason) -> None:
    desk = follower(1)
    desk.push(0)
    (answer,) = desk.hears(Decision([(0, 0)], reason))
    assert not answer.applied
    assert answer.reason is reason
    assert desk.store.version == 0


def test_a_round_is_closed_when_its_parts_are_here() -> None:
    desk = follower(3, BSP())
    desk.push(2, 1e16)
    desk.hears(Decision([(0, 0), (1, 0), (2, 0)], round=True))
    desk.push(1, -1e16)
    assert desk.pull(1) == []
    out = desk.push(0, 1.0)
    assert answered(out) == [(0, 0, True), (1, 0, True), (1, 1, False), (2, 0, True)]
    assert desk.store.params[0] == -(((1.0 - 1e16) + 1e16) / 3)


def test_rounds_close_in_the_leaders_order() -> None:
    desk = follower(2, BSP(1))
    desk.hears(Decision([(0, 0)], round=True))
    desk.hears(Decision([(1, 0)], round=True))
    assert desk.push(1, 2.0) == []
    out = desk.push(0, 1.0)
    assert desk.store.version == 2
    assert answered(out) == [(0, 0, True), (1, 0, True)]


def test_a_pull_brings_every_round_that_the_leader_had_closed() -> None:
    """A worker that waited for a lease has skipped rounds: its clock here is behind."""
    desk = follower(2, BSP())
    desk.hears(Decision([(0, 0)], round=True))
    assert desk.pull(1) == []
    out = desk.push(0)
    assert answered(out) == [(0, 0, True), (1, 0, False)]
    assert out[1].version == 1


def test_a_pull_does_not_wait_for_a_round_that_waits_for_what_is_behind_it() -> None:
    """A prefetch: the pull was first, and the leader has long closed the round."""
    desk = follower(2, BSP())
    desk.hears(Decision([(0, 1), (1, 0)], round=True))
    assert answered(desk.pull(0)) == [(0, 0, False)]
    desk.push(1)
    desk.push(0)
    assert desk.store.version == 1


def test_a_round_waits_for_a_refused_part_and_the_pull_before_it() -> None:
    """The leader has answered that pull before the round."""
    desk = follower(2, BSP())
    desk.hears(Decision([(1, 1)], Reason.NON_FINITE))
    desk.hears(Decision([(0, 0)], round=True))
    assert desk.push(0) == []
    assert answered(desk.pull(1)) == [(1, 0, False)]
    assert answered(desk.push(1, finite=False)) == [(1, 1, False), (0, 0, True)]
    assert desk.store.version == 1


def test_a_round_waits_for_no_refused_part_of_the_dead() -> None:
    desk = follower(2, BSP())
    desk.hears(Decision([(1, 1)], Reason.NON_FINITE))
    desk.hears(Decision([(0, 0)], round=True))
    assert desk.push(0) == []
    assert answered(desk.hears(Gone(1))) == [(1, ALL_REQUESTS, False), (0, 0, True)]


def test_the_dropped_join_the_leaders_round_not_the_one_here() -> None:
    desk = follower(3, BSP(1))
    desk.hears(Decision([(0, 0), (1, 0)], round=True))
    desk.hears(Decision([(2, 0)], Reason.LATE))
    assert answered(desk.push(2)) == [(2, 0, False)]
    assert desk.pull(2) == [], "round 0 is not applied here"
    desk.push(0)
    out = desk.push(1)
    assert (2, 1, False) in answered(out)
    assert desk.policy.clocks == [1, 1, 1]


# ---- a worker that is ahead of the leader's records --------------------------------------------


def test_a_pull_waits_for_the_records_that_its_worker_has_seen() -> None:
    """Worker 1 waited for a lease while the leader closed round 0, and is here before the word."""
    desk = follower(2, BSP())
    desk.push(0)
    assert desk.pull(1, log=1) == [], "this shard is still of before round 0"
    out = desk.hears(Decision([(0, 0)], round=True))
    assert answered(out) == [(0, 0, True), (1, 0, False)]
    assert out[1].version == 1


def test_a_push_that_wants_parameters_waits_for_the_records_too() -> None:
    desk = follower(2)
    assert desk.push(0, want=True, log=3) == []
    assert desk.hears(Decision([(0, 0)])) == []
    assert desk.store.version == 1, "the push itself does not wait"
    assert desk.hears(Gone(1))[1:] == []
    (answer,) = desk.hears(Pin(on=True))
    assert (answer.seq, answer.applied, answer.version) == (0, True, 1)


def test_each_goes_on_at_its_own_record() -> None:
    desk = follower(3)
    for worker, log in ((2, 1), (0, 3), (1, 2)):
        assert desk.pull(worker, log=log) == []
    for worker in (2, 1, 0):
        assert answered(desk.hears(Decision([(0, 9)]))) == [(worker, 0, False)]


def test_a_pinned_pull_is_not_of_the_pin_before() -> None:
    desk = follower(2)
    desk.hears(Pin(on=True))
    desk.push(0)
    desk.hears(Decision([(0, 0)]))
    assert desk.pull(0, pinned=True, log=4) == []
    assert desk.hears(Pin(on=False)) == []
    (answer,) = desk.hears(Pin(on=True))
    assert answer.version == 1


def test_what_is_no_record_is_not_counted() -> None:
    desk = follower(3)
    assert desk.pull(0, log=1) == []
    assert desk.hears(Lost(2)) == [Lost(2)]
    with pytest.raises(MessageError, match="cannot take Withheld"):
        desk.hears(Withheld(1, 0, 0, 0))
    assert answered(desk.pull(1)) == [(1, 0, False)]
    assert answered(desk.hears(Pin(on=False))) == [(0, 0, False)]


def test_who_speaks_of_records_that_never_come_is_told_of_the_end() -> None:
    desk = follower(1)
    assert desk.pull(0, log=2**62) == []
    assert desk.push(0, want=True, log=2**62) == []
    assert desk.hears(Leave(0)) == []
    out = desk.hears(End())
    assert [answer.stopped for answer in out[:2]] == [True, True]
    assert out[2:] == [Finished(1)]


# ---- ends and losses ---------------------------------------------------------------------------


def test_after_the_end_what_was_decided_is_still_applied() -> None:
    desk = follower(2)
    desk.push(0)
    desk.hears(Decision([(1, 0)]))
    (answer,) = desk.hears(End())
    assert answer.reason is Reason.STOPPED
    desk.hears(Leave(0))
    assert desk.pull(0)[0].seq == ALL_REQUESTS
    assert answered(desk.push(1)) == [(1, 0, True)]
    assert desk.store.version == 1


def test_a_missing_part_is_withheld() -> None:
    desk = follower(2)
    out = desk.hears(Lost(0))
    assert out == [Lost(0)], "the leader may not know"
    assert desk.hears(Decision([(0, 0)])) == [Withheld(1, 0, 0, 0)]
    assert [type(e) for e in desk.hears(Gone(0))] == [Answer]
    assert desk.store.version == 0
    desk.hears(Leave(1))
    desk.hears(End())
    assert desk.machine.finished


@pytest.mark.parametrize("mode", [SSP(0), BSP()])
@pytest.mark.parametrize("reason", [Reason.NON_FINITE, Reason.LATE])
def test_a_missing_part_of_a_discarded_push_is_no_loss(mode: Any, reason: Reason) -> None:
    desk = follower(2, mode)
    desk.hears(Lost(0))
    assert desk.hears(Decision([(0, 0)], reason)) == []


def test_a_part_that_is_here_is_applied_though_its_worker_is_lost() -> None:
    desk = follower(2)
    desk.push(0)
    desk.push(0)
    assert desk.hears(Lost(0)) == [Lost(0)]
    desk.hears(Decision([(0, 0)]))
    assert Withheld(1, 0, 1, 0) not in desk.hears(Gone(0)), "of the second nothing was decided"
    assert desk.store.version == 1
    assert desk.store.held == 0


def test_a_part_that_comes_after_the_loss_is_not_taken_for_another() -> None:
    """The leader's word of the loss may come later than decisions that it had made before."""
    desk = follower(2)
    desk.hears(Decision([(0, 0)]))
    assert desk.hears(Lost(0)) == [Lost(0), Withheld(1, 0, 0, 0)]
    assert desk.push(0) == []
    assert desk.hears(Decision([(0, 1)])) == [Withheld(1, 0, 1, 0)]
    assert desk.push(0) == []
    assert desk.store.version == 0
    (answer,) = desk.hears(Gone(0))
    assert (answer.seq, answer.reason) == (ALL_REQUESTS, Reason.LOST)


def test_a_worker_that_leaves_without_a_part_keeps_nobody_waiting() -> None:
    desk = follower(1)
    desk.hears(Decision([(0, 0)]))
    assert desk.hears(Leave(0)) == [Withheld(1, 0, 0, 0)]
    assert desk.hears(End()) == [Finished(1)]


def test_no_pull_of_the_lost_is_waited_for() -> None:
    desk = follower(2, SSP(0))
    desk.push(0)
    desk.hears(Decision([(0, 0)]))
    assert desk.pull(0) == [], "worker 1's step is not here yet"
    desk.push(0)
    desk.hears(Decision([(0, 2)]))
    assert desk.store.version == 1
    out = desk.hears(Gone(0))
    assert desk.store.version == 2
    assert not any(isinstance(event, Withheld) for event in out)


def test_a_round_goes_on_without_the_part_of_the_lost() -> None:
    desk = follower(3, BSP())
    desk.push(0, 2.0)
    desk.push(2, 4.0)
    desk.hears(Decision([(0, 0), (1, 0), (2, 0)], round=True))
    out = desk.hears(Gone(1))
    assert Withheld(1, 1, 0, 0) in out
    assert desk.store.params[0] == -3.0, "the mean of what there is"
    assert answered(out)[1:] == [(0, 0, True), (2, 0, True)]


def test_a_round_of_the_lost_alone_changes_nothing() -> None:
    desk = follower(2, BSP())
    desk.hears(Decision([(1, 0)], round=True))
    desk.hears(Gone(1))
    assert desk.store.version == 0
    assert answered(desk.pull(0)) == [(0, 0, False)]


def test_what_a_shard_cannot_apply_is_told_to_the_leader() -> None:
    desk = follower(1)
    for k in range(3):
        desk.push(0, POISON)
        out = desk.hears(Decision([(0, k)]))
        assert out[0] == Withheld(1, 0, k, k + 1), "so many in a row"
        assert out[1].reason is Reason.NON_FINITE_UPDATE
    desk.push(0)
    desk.hears(Decision([(0, 3)]))
    desk.push(0, POISON)
    assert desk.hears(Decision([(0, 4)]))[0] == Withheld(1, 0, 4, 1)


def test_a_worker_that_left_is_not_lost() -> None:
    desk = follower(1)
    desk.hears(Leave(0))
    assert desk.hears(Lost(0)) == []
    assert desk.hears(Gone(0)) == []


def test_its_last_word_comes_after_everything_else_and_once() -> None:
    desk = follower(2)
    desk.hears(Decision([(0, 0)]))
    desk.hears(End())
    assert desk.hears(Leave(1)) == []
    out = desk.hears(Gone(0))
    assert out[1:] == [Withheld(1, 0, 0, 0), Finished(1)]
    assert desk.hears(Gone(1)) == desk.hears(Lost(0)) == []


# ---- pins --------------------------------------------------------------------------------------


def test_a_pin_holds_the_snapshot() -> None:
    desk = follower(1)
    assert desk.pull(0, pinned=True) == []
    (answer,) = desk.hears(Pin(on=True))
    desk.hears(Decision([(0, 1)]))
    desk.push(0)
    (again,) = desk.pull(0, pinned=True)
    assert again.version == answer.version == 0
    desk.hears(Pin(on=False))
    desk.hears(Leave(0))
    assert desk.store.held == 0


def test_a_pin_is_of_the_leaders_round() -> None:
    """Its decision comes before the parts of the round that it comes after."""
    desk = follower(2, BSP())
    desk.hears(Decision([(0, 0), (1, 0)], round=True))
    desk.hears(Pin(on=True))
    desk.hears(Decision([(0, 1), (1, 2)], round=True))
    desk.push(0)
    desk.push(0)
    assert desk.push(1) != []
    assert desk.pull(1, pinned=True)[0].version == 1
    desk.push(1)
    assert desk.store.version == 2
    assert desk.store.held == 1


def test_a_pin_waits_for_the_parts_of_what_was_decided_before() -> None:
    desk = follower(2)
    desk.hears(Decision([(1, 0)]))
    desk.hears(Pin(on=True))
    assert desk.pull(0, pinned=True) == []
    (of_push, of_pull) = desk.push(1)
    assert (of_push.worker, of_pull.worker, of_pull.version) == (1, 0, 1)


def test_a_pin_does_not_wait_for_the_dead() -> None:
    desk = follower(2)
    desk.hears(Decision([(1, 0)]))
    desk.hears(Pin(on=True))
    assert desk.pull(0, pinned=True) == []
    assert answered([a for a in desk.hears(Lost(1)) if isinstance(a, Answer)]) == [(0, 0, False)]


def test_a_pin_taken_back_before_its_round_never_holds() -> None:
    desk = follower(1, BSP())
    desk.hears(Decision([(0, 0)], round=True))
    desk.hears(Pin(on=True))
    desk.hears(Pin(on=False))
    desk.push(0)
    assert desk.store.held == 0


def test_the_end_unpins() -> None:
    desk = follower(1)
    desk.hears(Pin(on=True))
    desk.hears(End())
    assert desk.store.held == 0


# ---- what it must not take ---------------------------------------------------------------------


def test_it_checks_like_any_server() -> None:
    desk = follower(1)
    with pytest.raises(MessageError, match="slot 7"):
        desk.hears(Push(0, 0, 7, 0, True, 1.0, False, 0))
    with pytest.raises(MessageError, match="does not hold"):
        desk.hears(Pull(0, 0, False, 3))
    with pytest.raises(MessageError, match="cannot take Withheld"):
        desk.hears(Withheld(1, 0, 0, 0))


# ---- marks -------------------------------------------------------------------------------------


def marked(out: list[Any]) -> list[Marked]:
    return [event for event in out if isinstance(event, Marked)]


def test_a_mark_has_in_it_what_was_decided_before_it_and_nothing_else() -> None:
    desk = follower(3)
    desk.hears(Decision([(0, 0)]))
    assert marked(desk.hears(Mark(0))) == [], "a part is missing"
    desk.hears(Decision([(1, 0)]))
    assert answered(desk.push(1, 2.0)) == [], "decided later, it is held back"
    desk.push(2, 4.0)
    out = desk.hears(Decision([(2, 0)]))
    assert answered(out) == []
    out = desk.push(0, 1.0)
    assert marked(out) == [Marked(0, 1, {"version": 1})]
    assert answered(out) == [(0, 0, True), (1, 0, True), (2, 0, True)]
    assert desk.store.params[0] == -7.0
    assert desk.machine.marked["params"].tolist() == [-1.0, -2.0]
    assert desk.machine.position == 4
    assert desk.hears(Saved(0, "entry")) == [ShardSaved(1, 0, "entry")]
    assert desk.machine.marked == {}
    assert desk.store.held == 0


def test_a_mark_falls_between_rounds() -> None:
    desk = follower(2, BSP())
    desk.hears(Decision([(0, 0), (1, 0)], round=True))
    desk.hears(Mark(0))
    desk.hears(Decision([(0, 1), (1, 1)], round=True))
    desk.push(0, 1.0)
    desk.push(0, 10.0)
    (mark,) = marked(desk.push(1, 3.0))
    assert mark.version == 1
    desk.push(1, 10.0)
    assert desk.store.version == 2
    assert desk.machine.marked["params"].tolist() == [-2.0, -4.0]


def test_a_mark_does_not_wait_for_the_dead() -> None:
    """What tells of the death is behind the mark, and is not held back like the rest."""
    desk = follower(2)
    desk.hears(Decision([(0, 0)]))
    desk.hears(Mark(0))
    desk.push(1, 2.0)
    desk.hears(Decision([(1, 0)]))
    out = desk.hears(Gone(0))
    assert Withheld(1, 0, 0, 0) in out
    assert marked(out) == [Marked(0, 0, {"version": 0})]
    assert desk.store.params[0] == -2.0, "what was held back"
    assert desk.machine.gone[0]


def test_a_mark_has_the_pin_that_is_before_it() -> None:
    desk = follower(2)
    desk.hears(Decision([(0, 0)]))
    desk.hears(Pin(True))
    desk.hears(Mark(0))
    desk.hears(Pin(False, keep=True))
    desk.hears(Decision([(1, 0)]))
    desk.push(1, 2.0)
    desk.push(0, 1.0)
    assert desk.machine.marked["pinned"].tolist() == [-1.0, -2.0]
    assert "kept" not in desk.machine.marked
    desk.hears(Saved(0))
    desk.hears(Mark(1))
    kept = desk.machine.marked["kept"]
    assert kept.tolist() == [-1.0, -2.0]
    assert "pinned" not in desk.machine.marked
    desk.hears(Pin(True))
    desk.hears(Pin(False, keep=True))
    assert kept.tolist() == [-1.0, -2.0], "it is being written"
    assert desk.machine.outcome.tolist() == [-3.0, -6.0]
    desk.hears(Saved(1))
    assert desk.store.held == 0


def test_the_end_waits_for_what_is_being_saved() -> None:
    desk = follower(1)
    desk.hears(Mark(0))
    desk.hears(Leave(0))
    assert desk.hears(End()) == []
    assert not desk.machine.finished
    assert desk.hears(Saved(0)) == [ShardSaved(1, 0, ""), Finished(1)]


def test_the_end_waits_for_a_mark_that_is_to_come() -> None:
    desk = follower(1)
    desk.hears(Mark(0))
    desk.hears(Leave(0))
    assert desk.hears(End(mark=True)) == []
    assert desk.hears(Saved(0)) == [ShardSaved(1, 0, "")]
    assert not desk.machine.finished
    assert len(marked(desk.hears(Mark(1)))) == 1
    assert desk.hears(Saved(1)) == [ShardSaved(1, 1, ""), Finished(1)]


def test_rounds_go_on_where_the_checkpoint_was() -> None:
    first = Desk(2, BSP())
    for _ in range(5):
        first.push(0)
        first.push(1)
    leader = first.leader
    desk = follower(2, BSP())
    desk.rule.history = [b""] * 5
    desk.machine.restore(leader.state(), Arrays({"params": first.store.params}), 0)
    assert desk.store.version == 5
    assert desk.store.params.tolist() == [-5.0, -10.0]
    assert desk.policy.clocks == [5, 5]
    desk.hears(Decision([(0, 0)], Reason.NON_FINITE))
    desk.push(0)
    assert desk.policy.clocks == [6, 5]
    assert desk.pull(0) == [], "the round that it has no part in comes first"
    desk.hears(Decision([(1, 0)], round=True))
    assert answered(desk.push(1)) == [(0, 1, False), (1, 0, True)]
    assert desk.store.version == 6
