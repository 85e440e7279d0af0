"""The worker's side: requests, slots, releases, and answers that answer nothing."""

from __future__ import annotations

from typing import Any

import pytest

import psframe
from psframe.errors import MessageError
from psframe.events import (
    ALL_REQUESTS,
    COPIED,
    NO_BUFFER,
    RELEASE_COPY,
    RELEASE_HOLD,
    RELEASE_NONE,
    Answer,
    Lease,
    LeaseKind,
    Reason,
    TaskSpec,
)
from psframe.worker import Request, WorkerProtocol

SPEC = TaskSpec(4, 2, 1, False)


def push(protocol: WorkerProtocol, *, want: bool = False) -> tuple[Request, list[Any]]:
    return protocol.push(protocol.slot, True, 1.0, want)


def user(protocol: WorkerProtocol) -> Request | None:
    """Who uses the slot of the next push."""
    return protocol.slot_user(protocol.slot)


def answer(request: Request, buffer: int = NO_BUFFER, **what: Any) -> Answer:
    return Answer(0, request.seq, buffer=buffer, **what)


def test_a_short_story() -> None:
    protocol = WorkerProtocol(0, 2, [True, True])
    request, messages = protocol.pull()
    assert [m.release for m in messages] == [RELEASE_NONE] * 2
    protocol.receive(1, answer(request, 4, version=8))
    assert not request.done, "server 0 has still to answer"
    protocol.receive(0, answer(request, 3, version=7))
    assert request.has_params
    protocol.take_params(request)
    assert [present.version for present in protocol.present] == [7, 8]
    request, messages = push(protocol, want=True)
    assert [m.version for m in messages] == [7, 8]
    assert [m.release for m in messages] == [RELEASE_HOLD] * 2
    protocol.receive(0, answer(request, 1, applied=True, push_version=9, version=9))
    protocol.receive(1, answer(request, COPIED, applied=False, push_version=8, version=8))
    assert request.receipt is not None
    assert (request.receipt.applied, request.receipt.push_version) == (True, 9), "server 0's"
    protocol.take_params(request)
    _, messages = protocol.pull()
    assert [m.release for m in messages] == [RELEASE_NONE] * 2, "they are still in use"
    protocol.drop_params()
    _, messages = protocol.pull()
    assert [m.release for m in messages] == [RELEASE_HOLD, RELEASE_COPY]
    _, messages = protocol.pull()
    assert [m.release for m in messages] == [RELEASE_NONE] * 2, "said once"
    assert protocol.outstanding == 3


def test_the_first_free_slot_is_taken_or_the_one_that_will_be() -> None:
    protocol = WorkerProtocol(0, 1, [True])
    first, messages = push(protocol)
    assert messages[0].slot == 0
    assert user(protocol) is None
    second, messages = push(protocol)
    assert messages[0].slot == 1
    assert user(protocol) is first
    with pytest.raises(AssertionError, match="in use"):
        push(protocol)
    protocol.receive(0, answer(first))
    assert user(protocol) is None
    third, messages = push(protocol)
    assert messages[0].slot == 0
    assert user(protocol) is second, "older than the third, in the other slot"
    protocol.receive(0, answer(second))
    protocol.receive(0, answer(third))
    assert push(protocol)[1][0].slot == 0, "who takes turns needs one slot alone"


def test_a_slot_is_free_when_all_servers_have_answered() -> None:
    protocol = WorkerProtocol(0, 2, [True, True])
    first, _ = push(protocol)
    push(protocol)
    protocol.receive(0, answer(first))
    assert user(protocol) is first
    protocol.receive(1, answer(first))
    assert user(protocol) is None


def test_a_prefetch_keeps_the_present_version_until_it_is_taken() -> None:
    protocol = WorkerProtocol(0, 1, [True])
    now, _ = protocol.pull()
    protocol.receive(0, answer(now, 0, version=3))
    protocol.take_params(now)
    ahead, _ = protocol.pull()
    protocol.receive(0, answer(ahead, COPIED, version=5))
    assert push(protocol)[1][0].version == 3
    protocol.take_params(ahead)
    message = push(protocol)[1][0]
    assert (message.version, message.release) == (5, RELEASE_HOLD)


def test_what_was_sent_is_not_held() -> None:
    protocol = WorkerProtocol(0, 2, [False, True])
    request, _ = protocol.pull()
    for server in (0, 1):
        protocol.receive(server, answer(request, 2))
    protocol.take_params(request)
    protocol.drop_params()
    assert [m.release for m in protocol.pull()[1]] == [RELEASE_NONE, RELEASE_HOLD]


def test_a_lease_is_asked_of_server_0_alone() -> None:
    protocol = WorkerProtocol(0, 3, [True] * 3)
    request, message = protocol.ask_lease(2, SPEC)
    assert (message.plan, message.spec) == (2, SPEC)
    lease = Lease(0, request.seq, LeaseKind.TRAIN, 0, 0, 2)
    protocol.receive(0, lease)
    assert request.lease is lease
    assert request.done
    assert not request.has_params


@pytest.mark.parametrize("stopped", ["pull", "lease"])
def test_a_stopped_answer_ends_the_worker(stopped: str) -> None:
    protocol = WorkerProtocol(0, 1, [True])
    if stopped == "pull":
        request, _ = protocol.pull()
        protocol.receive(0, answer(request, stopped=True))
    else:
        request, _ = protocol.ask_lease(0, SPEC)
        protocol.receive(0, Lease(0, request.seq, LeaseKind.STOPPED))
    assert request.stopped
    assert protocol.stopped
    assert not request.has_params


def test_the_fenced_are_told_of_all_requests_at_once() -> None:
    protocol = WorkerProtocol(0, 2, [True, True])
    requests = [push(protocol)[0], protocol.pull()[0], protocol.ask_lease(0, SPEC)[0]]
    protocol.receive(1, answer(requests[0]))
    protocol.receive(0, Answer(0, ALL_REQUESTS, stopped=True, reason=Reason.LOST))
    assert protocol.outstanding == 0
    assert all(request.done and request.stopped for request in requests)
    # What the other server had answered before it heard of the end comes later, and again.
    protocol.receive(1, answer(requests[1], 0))
    protocol.receive(1, Answer(0, ALL_REQUESTS, stopped=True, reason=Reason.LOST))
    assert requests[1].answers == [None] * 2


def test_requests_carry_the_largest_position_seen() -> None:
    protocol = WorkerProtocol(0, 2, [True, True])
    lease, _ = protocol.ask_lease(0, SPEC)
    first, messages = protocol.pull()
    assert [m.log for m in messages] == [0, 0]
    protocol.receive(0, Lease(0, lease.seq, LeaseKind.TRAIN, 0, 0, 2, log=5))
    protocol.receive(1, answer(first, 0))
    assert [m.log for m in protocol.pull()[1]] == [5, 5]
    protocol.receive(0, answer(first, 0, log=3))
    assert [m.log for m in push(protocol, want=True)[1]] == [5, 5], "it does not go back"


def test_answers_to_nothing() -> None:
    protocol = WorkerProtocol(0, 1, [True])
    request, _ = protocol.pull()
    with pytest.raises(MessageError, match="for worker 1"):
        protocol.receive(0, Answer(1, request.seq))
    with pytest.raises(MessageError, match="no request: 7"):
        protocol.receive(0, Answer(0, 7))
    protocol.receive(0, answer(request, 0))
    with pytest.raises(MessageError, match="no request: 0"):
        protocol.receive(0, answer(request, 0))


def test_answers_that_are_not_what_was_asked_for() -> None:
    protocol = WorkerProtocol(0, 2, [True, True])
    pull, _ = protocol.pull()
    bare, _ = push(protocol)
    lease, _ = protocol.ask_lease(0, SPEC)
    block = Lease(0, lease.seq, LeaseKind.TRAIN, 0, 0, 2)
    protocol.receive(0, answer(pull, 1))
    for server, wrong in (
        (0, answer(pull, 2)),  # again, while server 1 has still to answer
        (1, answer(pull)),  # without what was asked for
        (1, Lease(0, pull.seq, LeaseKind.EXHAUSTED)),
        (0, answer(bare, 3)),  # parameters that may land on others
        (0, Lease(0, bare.seq, LeaseKind.TRAIN, 0, 0, 2)),
        (0, answer(lease)),
        (0, answer(lease, stopped=True)),
        (1, block),  # of a server that was not asked
    ):
        with pytest.raises(MessageError, match=f"server {server} .* request {wrong.seq}"):
            protocol.receive(server, wrong)
    assert protocol.outstanding == 3
    assert not any((protocol.stopped, pull.done, bare.done, lease.done)), "they changed nothing"
    protocol.receive(1, answer(pull, stopped=True))
    protocol.receive(0, block)
    assert pull.done
    assert lease.lease is block


def test_the_package_has_no_other_worker() -> None:
    assert psframe.Worker.__module__ == "psframe.client"
