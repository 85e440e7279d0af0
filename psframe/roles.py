"""The two loops of a run, whatever moves the bytes: serve, and take part as a worker."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from psframe.client import Worker
from psframe.devices import Device
from psframe.errors import MessageError, RankLost, Stopped
from psframe.events import (
    NOBODY,
    Answer,
    EpochDone,
    Evaluated,
    Failure,
    Finished,
    HostEvent,
    Lease,
    Leave,
    Logged,
    Lost,
    Marked,
    Output,
    PushHandled,
    ShardSaved,
    ShardsSaved,
    SpanKind,
    Spans,
    ToServer,
    Withheld,
)
from psframe.exchange import Endpoint
from psframe.host import Host
from psframe.interrupts import Interrupts
from psframe.leader import Leader
from psframe.plan import Observer, Plan
from psframe.saving import Saver
from psframe.server import Server

__all__ = [
    "open_worker",
    "Grace",
    "Outgoing",
    "Overdue",
    "ServerPort",
    "describe",
    "handle",
    "keeping_errors",
    "no_host_event",
    "route",
    "serve",
    "serve_first",
    "take_part",
]

# A server looks up from its queue this often, so that no wait is without a bound.
_POLL_S = 0.5
# Once the run has failed or was interrupted, workers have this long to come back from what they
# compute.
_GRACE_S = 2.0

# Between two ticks at least: it costs as much as a tenth of a small push.
_TICK_S = 5e-3
# A server's spans in one message.
_SPANS_EVERY = 64
# Of an exception's message; some print whole arrays.
_MESSAGE_CHARS_MAX = 1000
# At either end of a traceback.
_LINES_MAX = 300

_log = logging.getLogger("psframe")

_ANSWERS = (Answer, Lease)
_MARKS = (Marked, ShardsSaved)
_HOST_EVENTS = (Logged, EpochDone, Evaluated, PushHandled, Spans, Marked, ShardsSaved)


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
    if isinstance(out, _ANSWERS):
        port.to_worker(out)
    elif isinstance(out, _HOST_EVENTS):
        observe(out)
    elif isinstance(out, (Withheld, Lost, ShardSaved, Finished)):
        port.to_leader(out)
    else:
        port.to_followers(out)


def serve(
    machine: Server,
    port: ServerPort,
    observe: Observer,
    tick: Callable[[], None] | None = None,
    *,
    spans: Callable[[Spans], Any] | None = None,
    saver: Saver | None = None,
) -> None:
    """Serve until every worker has left and, on every server, all is decided.

    Args:
        machine: the leader or a follower.
        port: its end of the transport.
        observe: takes the leader's host events.
        tick: called between events, some hundred times a second while there are any and at least
            every half second; may raise to end the loop.
        spans: takes this server's spans, each of one update, some at a time; None for none.
        saver: writes what the machine marks.

    Raises:
        MessageError: a follower's or the leader's message made no sense (a worker's makes that
            worker count as lost).
    """
    noted: list[tuple[int, float, float]] = []
    due = 0.0
    while not machine.finished:
        if time.monotonic() >= due:
            if tick is not None:
                tick()
            saved = None if saver is None else saver.poll()
            due = time.monotonic() + _TICK_S
            if saved is not None:
                for out in machine.handle(saved):
                    route(out, port, observe)
                continue
        event = port.receive(_POLL_S if saver is None or not saver.busy else _TICK_S)
        if event is None:
            continue
        outs = handle(machine, event) if spans is None else _measured(machine, event, noted, spans)
        for out in outs:
            if isinstance(out, _ANSWERS):
                port.to_worker(out)
            else:
                route(out, port, observe)


def _measured(
    machine: Server,
    event: ToServer,
    noted: list[tuple[int, float, float]],
    spans: Callable[[Spans], Any],
) -> list[Output]:
    """As `handle`; notes how long an update took, and tells of some notes at a time."""
    version, begin = machine.store.version, time.monotonic()
    outs = handle(machine, event)
    end = time.monotonic()
    if machine.store.version != version:
        noted.append((SpanKind.APPLY, begin, end))
    # What a follower says last is that it has finished.
    if len(noted) >= _SPANS_EVERY or (noted and machine.stopped):
        spans(Spans(NOBODY, end, noted.copy(), machine.index))
        noted.clear()
    return outs


def handle(
    machine: Server, event: ToServer, clock: Callable[[], float] = time.monotonic
) -> list[Output]:
    """Let a machine handle an event; a worker that sends an illegal one counts as lost.

    Args:
        machine, event: which.
        clock: gives seconds; asked where the mode measures speeds.

    Raises:
        MessageError: another server sent it.
    """
    if machine.policy.timed:
        machine.policy.time_s = clock()
    try:
        return machine.handle(event)
    except MessageError:
        worker = getattr(event, "worker", None)
        if worker is None or isinstance(event, (Lost, Withheld)):
            raise
        # Nothing more of this worker can be believed; the others go on.
        return machine.handle(Lost(worker))


class Overdue(RankLost):
    """Some workers have not come back although the run has failed or was interrupted.

    Attributes:
        interrupted: whether it was interrupted.
    """

    def __init__(self, message: str, *, interrupted: bool) -> None:
        super().__init__(message)
        self.interrupted = interrupted


class Grace:
    """The check that a run which has failed ends in time; its `check` is a `tick` for `serve`.

    Args:
        leader: the machine that knows.
        interrupts: whose signals are held; the check lets them through.
        look: called with each check; may raise to end the run.

    Attributes:
        leader, interrupts: as given.
        interrupt: what has interrupted the run, to be set by whoever catches it; else None.
        request: the signal that asked for an end in good order, and got it; else empty.
        saved: the version of the last checkpoint, or None.
    """

    def __init__(
        self,
        leader: Leader,
        interrupts: Interrupts,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self._look = look
        self.leader = leader
        self.interrupts = interrupts
        self.interrupt: KeyboardInterrupt | None = None
        self.request = ""
        self.saved: int | None = None
        self._deadline: float | None = None

    def check(self) -> None:
        """Raise once the workers have had their time.

        Raises:
            KeyboardInterrupt: the run has been interrupted just now.
            Overdue: some workers did not come back.
        """
        self._look()
        leader, interrupts = self.leader, self.interrupts
        if interrupts.pending:
            interrupts.check()
        if leader.failure is None and not leader.diverged and self.interrupt is None:
            return
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + _GRACE_S
        elif now > self._deadline:
            busy = [worker for worker, gone in enumerate(leader.gone) if not gone]
            if self._interrupted and leader.marking and not busy:
                return  # what it has learned is worth the wait, if the launcher waits
            others = "a checkpoint" if leader.marking else "the other servers"
            who = f"workers {busy}" if busy else others
            raise Overdue(
                f"{who} did not come back within {_GRACE_S:.0f} s after the run had"
                f" ended: {self._why()}",
                interrupted=self._interrupted,
            )

    @property
    def _interrupted(self) -> bool:
        failure = self.leader.failure
        return self.interrupt is not None or (failure is not None and failure[1].interrupted)

    def _why(self) -> str:
        if self.leader.failure is not None:
            worker, failure = self.leader.failure
            return f"worker {worker} failed with {failure.type}: {failure.message}"
        return "it had diverged" if self.leader.diverged else "it was interrupted"


def serve_first(grace: Grace, port: ServerPort, host: Host, plan: Plan) -> None:
    """Serve as server 0; once interrupted, to the end of what the workers are at.

    Args:
        grace: of the leader; it says afterwards how the run was ended before its time, if it was.
        port: the leader's end of the transport.
        host: takes its events, until an interrupt.
        plan: of the run.

    Raises:
        Overdue, MessageError: as `Grace.check` and `serve`.
    """
    leader, interrupts = grace.leader, grace.interrupts
    host.watch(lambda: leader.store.version, lambda: (leader.losses, leader.replaced))
    saver = host.saver(plan, leader)
    if saver is not None:
        leader.mark_interrupt()
    marks = [time.monotonic() + plan.every_s] if plan.every_s is not None else []

    def observe(event: HostEvent) -> None:
        if not isinstance(event, _MARKS):
            host(event)
        elif saver is not None:
            saver.observe(event)

    def marks_only(event: HostEvent) -> None:
        if isinstance(event, _MARKS) and saver is not None:
            saver.observe(event)

    def end(observe: Observer, *, mark: bool = False) -> None:
        if mark and saver is not None and not leader.stopped:
            leader.mark_end()
        for out in leader.end():
            route(out, port, observe)

    def tick() -> None:
        grace.check()
        host.tick()
        if leader.stopped:
            return
        if interrupts.asked:
            grace.request = interrupts.asked
            end(observe, mark=True)
        elif host.ending:
            end(observe)
        elif marks and time.monotonic() >= marks[0] and not leader.marking:
            assert plan.every_s is not None, "or there would be none"
            marks[0] = time.monotonic() + plan.every_s
            for out in leader.mark():
                route(out, port, observe)

    with interrupts.held():
        try:
            serve(leader, port, observe, tick, spans=host if plan.spans else None, saver=saver)
            interrupts.check()
        except KeyboardInterrupt as error:
            grace.interrupt = error
            end(marks_only, mark=True)
            serve(leader, port, marks_only, grace.check, saver=saver)
    if saver is not None:
        grace.saved = saver.version


def keeping_errors(
    work: Callable[[Worker], Any], errors: list[BaseException | None]
) -> Callable[[Worker], None]:
    """Wrap `work` so that what it raises is in `errors`, by worker, before anybody hears of it."""

    def kept(worker: Worker) -> None:
        try:
            work(worker)
        except Stopped:
            raise  # the run is over; that is no error of this worker's
        except BaseException as error:
            errors[worker.index] = error
            raise

    return kept


def open_worker(
    endpoint: Endpoint, open_device: Callable[[], Device], build: Callable[[Device], Worker]
) -> tuple[Worker, Device]:
    """Open a worker's device and make the worker, or leave as one that could not begin.

    Raises:
        Exception: why it could not; its GPU has no room, say. The device is closed.
    """
    try:
        with contextlib.ExitStack() as undone:
            device = open_device()
            undone.callback(device.close)
            worker = build(device)
            undone.pop_all()
    except Exception as error:  # CuPy's are many
        for server in range(endpoint.servers):
            failure = describe(error) if server == 0 else None
            endpoint.send(server, Leave(endpoint.index, failure))
        raise
    return worker, device


def take_part(
    work: Callable[[Worker], Any], worker: Worker, device: Device
) -> BaseException | None:
    """Run `work`, leave, close the device, and return what `work` raised (but not Stopped).

    Raises:
        Exception: the device has failed, and `work` has not heard of it.
    """
    error: BaseException | None = None
    try:
        work(worker)
    except Stopped:
        pass  # the run is over; that is no error of this worker's
    except BaseException as raised:  # whatever it is, the others hear of it and it is raised again
        error = raised
    worker.leave(None if error is None else describe(error))
    try:
        device.close()
    except Exception as raised:  # after a kernel that fails every call does, and this is no news
        if error is None:
            raise
        _log.debug("worker %d: closing its device: %s", worker.index, raised)
    return error


def describe(error: BaseException) -> Failure:
    """Put an exception into words, whatever its own `__str__` does."""
    try:
        message = str(error)
    except Exception as raised:
        message = f"(its __str__ raised {type(raised).__name__})"
    text = "".join(traceback.format_exception(error))
    if len(message) > _MESSAGE_CHARS_MAX:  # or the stack would be cut off for its sake
        short = f"{message[:_MESSAGE_CHARS_MAX]}... ({len(message)} characters)"
        text, message = text.replace(message, short), short
    lines = text.splitlines(keepends=True)
    if len(lines) > 2 * _LINES_MAX:
        left_out = f"... ({len(lines) - 2 * _LINES_MAX} lines)\n"
        lines = [*lines[:_LINES_MAX], left_out, *lines[-_LINES_MAX:]]
    # Its causes may be as talkative.
    cut = [
        one if len(one) <= 2 * _MESSAGE_CHARS_MAX else one[:_MESSAGE_CHARS_MAX] + "...\n"
        for one in lines
    ]
    return Failure(type(error).__name__, message, "".join(cut))


def no_host_event(event: HostEvent) -> None:
    """Observe nothing."""
