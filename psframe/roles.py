"""The two loops of a run, whatever moves the bytes: serve, and take part as a worker."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, Protocol

from psframe.client import Worker
from psframe.errors import MessageError, Stopped
from psframe.events import (
    Answer,
    EpochDone,
    Evaluated,
    Failure,
    HostEvent,
    Lease,
    Logged,
    Lost,
    Output,
    PushHandled,
    ToServer,
    Withheld,
)
from psframe.plan import Observer
from psframe.server import Server

__all__ = ["Outgoing", "ServerPort", "handle", "no_host_event", "route", "serve", "take_part"]

# A server looks up from its queue this often, so that no wait is without a bound.
_POLL_S = 0.5

_HOST_EVENTS = (Logged, EpochDone, Evaluated, PushHandled)


class Outgoing(Protocol):
    """Where a server's outputs go."""

    def to_worker(self, answer: Answer | Lease) -> None:
        """Send an answer to the worker that it names."""

    def to_leader(self, event: Output) -> None:
        """Send to server 0."""

    def to_followers(self, event: Output) -> None:
        """Send to every server but server 0."""


class ServerPort(Outgoing, Protocol):
    """A server's end of a transport."""

    def receive(self, timeout_s: float) -> ToServer | None:
        """Take the next event; None after `timeout_s` seconds without one."""


def route(out: Output, port: Outgoing, observe: Observer) -> None:
    """Deliver one output of a server's machine."""
    if isinstance(out, (Answer, Lease)):
        port.to_worker(out)
    elif isinstance(out, _HOST_EVENTS):
        observe(out)
    elif isinstance(out, (Withheld, Lost)):
        port.to_leader(out)
    else:
        port.to_followers(out)


def serve(
    machine: Server,
    port: ServerPort,
    observe: Observer,
    tick: Callable[[], None] | None = None,
) -> None:
    """Serve until every worker has left and all is decided.

    Args:
        machine: the leader or a follower.
        port: its end of the transport.
        observe: takes the leader's host events.
        tick: called now and then; may raise to end the loop.

    Raises:
        MessageError: a follower's or the leader's message made no sense (a worker's makes that
            worker count as lost).
    """
    while not machine.finished:
        event = port.receive(_POLL_S)
        if tick is not None:
            tick()
        if event is not None:
            for out in handle(machine, event):
                route(out, port, observe)


def handle(machine: Server, event: ToServer) -> list[Output]:
    """Let a machine handle an event; a worker that sends an illegal one counts as lost.

    Raises:
        MessageError: another server sent it.
    """
    try:
        return machine.handle(event)
    except MessageError:
        worker = getattr(event, "worker", None)
        if worker is None or isinstance(event, (Lost, Withheld)):
            raise
        # Nothing more of this worker can be believed; the others go on.
        return machine.handle(Lost(worker))


def take_part(work: Callable[[Worker], Any], worker: Worker) -> BaseException | None:
    """Run `work`, leave, and return what it raised (but not Stopped)."""
    error: BaseException | None = None
    failure: Failure | None = None
    try:
        work(worker)
    except Stopped:
        pass  # the run is over; that is no error of this worker's
    except BaseException as raised:
        error = raised
        text = "".join(traceback.format_exception(raised))
        failure = Failure(type(raised).__name__, str(raised), text)
    worker.leave(failure)
    return error


def no_host_event(event: HostEvent) -> None:
    """Observe nothing."""
