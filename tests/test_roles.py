"""The loop of a server, the grace of a run that has failed, and exceptions in words."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from psframe import Async, optim, roles
from psframe.errors import MessageError
from psframe.events import (
    Decision,
    End,
    Failure,
    Finished,
    Gone,
    Lease,
    Leave,
    Log,
    Logged,
    Lost,
    Pull,
    Push,
    ToServer,
)
from psframe.follower import Follower
from psframe.interrupts import Interrupts
from psframe.leader import Leader
from psframe.plan import Plan
from psframe.roles import (
    Grace,
    Overdue,
    describe,
    handle,
    no_host_event,
    open_worker,
    serve,
)
from psframe.store import HeapBuffers, buffer_count
from psframe.transports.threads import ThreadHub, ThreadPort

PLAN = Plan.check(print, {"w": np.zeros(4)}, optimizer=optim.SGD(1.0), mode=Async(), servers=2)


def make(server: int = 0, workers: int = 2) -> Any:
    port = ThreadPort(ThreadHub(PLAN.layout, 2, workers), server)
    begin, end = PLAN.layout.shards(2)[server]
    buffers = HeapBuffers(buffer_count(workers), end - begin, PLAN.layout.dtype)
    return PLAN.build_server(server, workers, buffers, port.memory)


class Port:
    """Gives the events of a list, then nothing."""

    def __init__(self, *events: ToServer) -> None:
        self.events = deque(events)
        self.sent: list[Any] = []

    def receive(self, timeout_s: float) -> ToServer | None:
        return self.events.popleft() if self.events else None

    def to_worker(self, answer: Any) -> None:
        self.sent.append(("worker", answer))

    def to_leader(self, event: Any) -> None:
        self.sent.append(("leader", event))

    def to_followers(self, event: Any) -> None:
        self.sent.append(("followers", event))


def test_serve_ends_when_everyone_has_left() -> None:
    port, heard = Port(Log(0, {"loss": (1.0, 1)}), Leave(0), Leave(1), Finished(1)), []
    serve(make(), port, heard.append)
    assert heard == [Logged(0, {"loss": (1.0, 1)})]
    assert [to for to, _ in port.sent] == ["followers"]  # the end


def test_a_tick_that_raises_loses_no_event() -> None:
    """The event that comes next is still there for whoever serves on."""
    port = Port(Leave(0), Leave(1), Finished(1))
    ticks = iter([KeyboardInterrupt()])

    def tick() -> None:
        error = next(ticks, None)
        if error is not None:
            raise error

    leader = make()
    with pytest.raises(KeyboardInterrupt):
        serve(leader, port, no_host_event, tick)
    assert not leader.finished
    serve(leader, port, no_host_event, tick)
    assert leader.finished


def test_a_worker_that_breaks_the_protocol_counts_as_lost() -> None:
    leader = make()
    handle(leader, Pull(0, 0, False, 0))
    assert handle(leader, Pull(0, 0, False, 0))  # the same number again
    assert leader.lost == [True, False]


def test_a_server_that_breaks_the_protocol_is_an_error() -> None:
    with pytest.raises(MessageError):
        handle(make(), Decision([]))


# ---- grace -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ValueError", "KeyboardInterrupt"])
def test_grace_ends(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(roles.time, "monotonic", lambda: now[0])
    leader = make()
    assert isinstance(leader, Leader)
    grace = Grace(leader, Interrupts(print))
    now[0] = 1e6
    grace.check()  # nothing has failed
    handle(leader, Leave(1, Failure(kind, "boom", "")))
    grace.check()
    now[0] += roles._GRACE_S
    grace.check()
    now[0] += 0.01
    with pytest.raises(Overdue, match=rf"workers \[0\] .* worker 1 failed with {kind}: boom") as at:
        grace.check()
    assert at.value.interrupted == (kind == "KeyboardInterrupt")


def test_an_interrupt_is_let_through_and_has_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(roles.time, "monotonic", lambda: now[0])
    interrupts = Interrupts(print)
    grace = Grace(make(), interrupts)
    interrupts.pending = "SIGINT"
    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        grace.check()
    grace.interrupt = KeyboardInterrupt("SIGINT")
    grace.check()
    now[0] += roles._GRACE_S + 0.01
    with pytest.raises(Overdue, match=r"workers \[0, 1\] .* it was interrupted"):
        grace.check()


def test_a_checkpoint_of_an_interrupted_run_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher may wait, or not; of a worker that does not come back that is no matter."""
    now = [0.0]
    monkeypatch.setattr(roles.time, "monotonic", lambda: now[0])
    leader = make()
    assert isinstance(leader, Leader)
    leader.mark_interrupt()
    grace = Grace(leader, Interrupts(print))
    leader.store.version = 1  # since it began
    for worker in range(2):
        handle(leader, Leave(worker, Failure("KeyboardInterrupt", "SIGTERM", "")))
    assert leader.marking
    for _ in range(3):
        now[0] += 10 * roles._GRACE_S
        grace.check()


# ---- words -----------------------------------------------------------------------------------


def caught(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as raised:
        return raised


def test_an_exception_in_words() -> None:
    what = describe(caught(ValueError("boom")))
    assert (what.type, what.message) == ("ValueError", "boom")
    assert "in caught" in what.traceback
    assert what.traceback.endswith("ValueError: boom\n")


def test_a_long_message_does_not_hide_the_stack() -> None:
    what = describe(caught(ValueError("x" * 10**6)))
    assert what.message.endswith("... (1000000 characters)")
    assert len(what.traceback) < 3000
    assert "in caught" in what.traceback


@pytest.mark.parametrize("long", ["x" * 10**6, "x\n" * 10**6], ids=["wide", "high"])
def test_nor_does_the_message_of_a_cause(long: str) -> None:
    error = caught(ValueError("boom"))
    error.__cause__ = caught(KeyError(long) if "\n" not in long else ValueError(long))
    what = describe(error)
    assert len(what.traceback) < 10_000
    assert what.traceback.endswith("ValueError: boom\n")


def test_an_exception_without_words() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    what = describe(caught(Odd()))
    assert (what.type, what.message) == ("Odd", "(its __str__ raised RuntimeError)")
    assert "in caught" in what.traceback


def test_what_a_follower_says_goes_to_the_leader() -> None:
    follower = make(server=1)
    assert isinstance(follower, Follower)
    port = Port()
    for out in handle(follower, Lost(0)):
        roles.route(out, port, no_host_event)
    for event in (Leave(1), End(), Gone(0)):
        for out in handle(follower, event):
            roles.route(out, port, no_host_event)
    assert [event for to, event in port.sent if to == "leader"] == [Lost(0), Finished(1)]
    assert not [event for _, event in port.sent if isinstance(event, (Lease, Push))]


class Opened:
    """A device that says whether it has been closed."""

    open = True

    def close(self) -> None:
        self.open = False


def test_a_worker_that_cannot_be_made_leaves_and_closes_its_device() -> None:
    sent: list[tuple[int, Any]] = []
    endpoint: Any = SimpleNamespace(servers=2, index=1, send=lambda *what: sent.append(what))
    device: Any = Opened()

    def build(opened: Any) -> Any:
        assert opened.open
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        open_worker(endpoint, lambda: device, build)
    assert not device.open
    (_, first), second = sent
    assert first.failure.type == "MemoryError"
    assert second == (1, Leave(1, None))
