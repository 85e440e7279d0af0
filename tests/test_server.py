"""What leader and followers share, as short stories: queues, holds, fences, landing areas."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import Desk, params_of

from psframe import BSP, SSP
from psframe.errors import MessageError
from psframe.events import (
    ALL_REQUESTS,
    COPIED,
    NO_BUFFER,
    RELEASE_COPY,
    RELEASE_HOLD,
    Answer,
    End,
    Leave,
    Lost,
    Pull,
    Push,
    Reason,
    Report,
    Sent,
    Stop,
)


def answers(out: list[Any]) -> list[tuple[int, int]]:
    """(worker, request) of every answer."""
    return [(a.worker, a.seq) for a in out if isinstance(a, Answer)]


def only(out: list[Any]) -> Answer:
    (answer,) = out
    assert isinstance(answer, Answer)
    return answer


def test_a_short_story() -> None:
    """A worker pulls, pushes, sees its own push, and leaves nothing behind."""
    desk = Desk(2)
    first = only(desk.pull(0))
    assert (first.version, first.buffer, params_of(desk, first)) == (0, 0, 0.0)
    receipt = only(desk.push(0, 3.0))
    assert (receipt.applied, receipt.push_version, receipt.staleness) == (True, 1, 0)
    assert receipt.buffer == NO_BUFFER
    assert params_of(desk, first) == 0.0, "the held snapshot is as it was"
    second = only(desk.pull(0))
    assert (second.version, params_of(desk, second)) == (1, -3.0)
    both = only(desk.push(0, 1.0, want=True))
    assert (both.applied, both.version, params_of(desk, both)) == (True, 2, -4.0)
    assert desk.store.held == 1
    assert desk.hears(Leave(0)) == []
    assert desk.store.held == 0
    assert not desk.machine.finished
    desk.hears(Leave(1))
    assert desk.machine.finished


def test_the_old_hold_goes_before_the_new_one_is_taken() -> None:
    """With releases handled late, as many workers as buffers would run out of them."""
    desk = Desk(5)
    for _ in range(4):
        for worker in range(5):
            desk.pull(worker)
            desk.push(worker)
    assert desk.store.held == 5


def test_a_prefetch_is_copied_into_the_landing_area() -> None:
    desk = Desk(1)
    here = only(desk.pull(0))
    desk.push(0)
    ahead = only(desk.pull(0, keep=True))
    assert ahead.buffer == COPIED
    assert ahead.version == 1
    assert params_of(desk, here) == 0.0
    desk.push(0)
    assert params_of(desk, ahead) == -1.0, "a copy does not change either"
    # With both in use a third must wait until one is free.
    assert desk.hears(Pull(0, desk.seq(0), False, 0)) == []
    desk.hears(Pull(0, desk.seq(0), False, RELEASE_HOLD))
    assert desk.machine._hold[0] != NO_BUFFER


def test_a_release_wakes_the_pull_that_waits_for_it() -> None:
    desk = Desk(1)
    for keep in (False, True, True):
        desk.pull(0, keep=keep)
    out = desk.hears(Pull(0, desk.seq(0), False, RELEASE_HOLD | RELEASE_COPY))
    assert answers(out) == [(0, 2), (0, 3)]
    assert [a.buffer for a in out] == [0, COPIED]


def test_a_remote_workers_hold_lasts_until_its_bytes_have_left() -> None:
    desk = Desk(2, in_place=[False, True])
    sent = only(desk.pull(0))
    desk.push(1)
    assert desk.pull(0) == [], "one answer is still leaving"
    assert params_of(desk, sent) == 0.0
    answer = only(desk.hears(Sent(0)))
    assert (answer.version, answer.seq) == (1, 1)
    desk.hears(Sent(0))
    assert desk.store.held == 0
    desk.hears(Sent(0))  # a second one finds nothing to release
    assert desk.store.held == 0


def test_what_is_still_leaving_is_not_overwritten_when_its_worker_leaves() -> None:
    desk = Desk(2, in_place=[False, True])
    sent = only(desk.pull(0))
    desk.hears(Leave(0))
    for _ in range(5):
        desk.push(1)
    assert params_of(desk, sent) == 0.0
    desk.hears(Sent(0))
    assert desk.store.held == 0


def test_requests_of_one_worker_are_handled_in_order() -> None:
    """Behind a push that waits everything waits, and then comes in one go."""
    desk = Desk(2, SSP(0))
    desk.pull(0)
    desk.push(0)
    assert desk.push(0) == []
    assert desk.pull(0) == []
    assert desk.hears(Leave(0)) == []
    assert answers(desk.push(1)) == [(1, 0), (0, 2)], "its pull is one step ahead again"
    assert not desk.machine.gone[0]
    assert answers(desk.hears(Leave(1))) == [(0, 3)]
    assert desk.machine.finished


@pytest.mark.parametrize(
    ("event", "what"),
    [
        (Push(0, 5, 2, 0, True, 1.0, False, 0), "slot 2"),
        (Push(0, 5, -1, 0, True, 1.0, False, 0), "slot -1"),
        (Pull(0, 5, False, RELEASE_COPY), "does not hold"),
        (Pull(0, 0, False, 0), "request 0 after 0"),
        (Pull(1, 5, False, RELEASE_HOLD), "does not hold"),
    ],
)
def test_an_illegal_request_changes_nothing(event: Any, what: str) -> None:
    desk = Desk(2)
    desk.pull(0)
    with pytest.raises(MessageError, match=what):
        desk.hears(event)
    assert desk.leader.ledger.received == 0
    assert desk.store.held == 1
    assert answers(desk.pull(0)) == [(0, 1)]


def test_a_queue_has_a_bound() -> None:
    desk = Desk(2, SSP(0))
    desk.push(0)
    for _ in range(10):
        assert desk.push(0) == []
    with pytest.raises(MessageError, match="more than 10"):
        desk.push(0)
    assert desk.leader.ledger.received == 11


def test_nothing_comes_after_a_leave() -> None:
    desk = Desk(2, SSP(0))
    desk.push(0)
    desk.push(0)
    assert desk.hears(Leave(0)) == []
    with pytest.raises(MessageError, match="after its leave"):
        desk.pull(0)


def test_the_lost_are_fenced() -> None:
    desk = Desk(2)
    desk.pull(0)
    out = desk.hears(Lost(0))
    assert (only(out).seq, only(out).reason) == (ALL_REQUESTS, Reason.LOST)
    assert desk.store.held == 0
    assert desk.hears(Lost(0)) == [], "it can be lost only once"
    for out in (desk.push(0), desk.hears(Pull(0, 9, False, 0)), desk.hears(Leave(0))):
        assert only(out).stopped
        assert only(out).seq == ALL_REQUESTS
    assert desk.store.version == 0
    ledger = desk.leader.ledger.ledger()
    assert (ledger.received, ledger.refused, ledger.reasons) == (1, 1, {"fenced": 1})


def test_the_lost_can_neither_stop_nor_report() -> None:
    desk = Desk(2)
    desk.hears(Lost(0))
    desk.hears(Stop(0))
    desk.hears(Report(0, {"n": 1.0}))
    assert not desk.machine.stopped


def test_a_follower_refuses_what_only_the_leader_serves() -> None:
    desk = Desk(1, follower=True)
    with pytest.raises(MessageError, match="Report to the wrong server"):
        desk.hears(Report(0, {}))
    with pytest.raises(MessageError, match="cannot take Stop"):
        desk.hears(Stop(0))
    with pytest.raises(MessageError, match="cannot take End"):
        Desk(1).hears(End())


@pytest.mark.parametrize("mode", [SSP(0), BSP()])
def test_the_stopped_answer_at_once(mode: Any) -> None:
    desk = Desk(2, mode)
    desk.pull(0)
    desk.push(0)
    desk.pull(0)  # waits for worker 1
    out = desk.hears(Stop(1))
    assert [a.stopped for a in out if isinstance(a, Answer)][-1]
    assert only(desk.pull(1)).stopped
    assert only(desk.push(1)).reason is Reason.STOPPED
    for worker in (0, 1):
        desk.hears(Leave(worker))
    assert desk.machine.finished
    ledger = desk.leader.ledger.ledger()
    assert ledger.received == ledger.applied + ledger.stopped == 2


def test_clipping_scales_by_the_header() -> None:
    desk = Desk(1, clip_norm=1.0)
    desk.slots[0, 0] = 6.0, 8.0
    desk.hears(Push(0, 0, 0, 0, True, 10.0, False, 0))
    assert desk.store.params.tolist() == [-6 * 0.1, -8 * 0.1]
    desk.slots[0, 1] = 0.5, 0.0
    desk.hears(Push(0, 1, 1, 0, True, 0.5, False, 0))
    assert desk.store.params.tolist() == [-6 * 0.1 - 0.5, -8 * 0.1]
