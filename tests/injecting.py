"""Faults at chosen events of a simulated run: deaths, and messages that are late or come twice.

Whatever arrives at a server or a worker is numbered in the order of arrival; `spread` gives every
fault that there is at any of these events. Over MPI messages from one end to another stay in order,
and so they do here. None comes twice over MPI; a server has to bear it all the same.

Nodes are numbered as the simulator does: the servers first, then the workers.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from psframe.events import Lost
from psframe.transports.simulated import VirtualTime

__all__ = ["Death", "Delay", "Fault", "Injector", "Late", "Seen", "Twice", "drawn", "spread"]

# A message that is to wait for others which never come is handed on after so long.
_PATIENCE_S = 1e6


@dataclass(frozen=True)
class Death:
    """A worker dies.

    Attributes:
        at: the number of the event.
        after: after it, and not before.
        worker: who.
        first: the server that notices first, the others one event later; None: all at once.
        vanish: what it had sent and nobody has got is lost with it, and not just late.
    """

    at: int
    after: bool
    worker: int
    first: int | None = None
    vanish: bool = False


@dataclass(frozen=True)
class Delay:
    """A message, and with it what its sender sends to the same end after it, is overtaken by
    `others` messages of other senders."""

    at: int
    others: int


@dataclass(frozen=True)
class Twice:
    """A worker's message comes a second time, after `others` messages of other senders."""

    at: int
    others: int = 0


@dataclass(frozen=True)
class Late:
    """A worker's message comes when its server has just counted the worker as lost, wrongly."""

    at: int


Fault = Death | Delay | Twice | Late


@dataclass(frozen=True)
class Seen:
    """An event: the node that it is for and the one that has sent it.

    Attributes:
        source: None for what a server's driver tells it.
    """

    target: int
    source: int | None


@dataclass
class _Envelope:
    """A message under way, and which node has sent it."""

    source: int
    event: Any


@dataclass
class _Hold:
    """What one sender has sent to one end and is kept back."""

    others: int
    queue: deque[_Envelope] = field(default_factory=deque)


class Injector:
    """Puts faults into a simulated run that has not begun.

    Args:
        virtual: the run's; what others have put in between stays between this and the servers.
        faults: which.

    Attributes:
        seen: the events so far, in the order in which they arrived.
    """

    def __init__(self, virtual: VirtualTime, faults: Sequence[Fault] = ()) -> None:
        self.seen: list[Seen] = []
        self._virtual = virtual
        self._servers = virtual.servers
        self._faults: dict[int, list[Fault]] = {}
        for fault in faults:
            self._faults.setdefault(fault.at, []).append(fault)
        self._dead: set[int] = set()
        self._vanished: set[int] = set()  # the nodes whose messages get nowhere any more
        self._holds: dict[tuple[int, int], _Hold] = {}  # by source and target
        self._due: list[tuple[int, int]] = []  # (server, worker): losses to be noticed
        self._deliver = list(virtual.deliver)
        self._take_in = [endpoint.take_in for endpoint in virtual.endpoints]
        self._send: Callable[..., None] = virtual.to_server
        virtual.to_server = self._to_server  # type: ignore[method-assign]
        for server in range(self._servers):
            virtual.deliver[server] = partial(self._arrive, server)
        for worker, endpoint in enumerate(virtual.endpoints):
            endpoint.take_in = partial(self._answer, worker)  # type: ignore[method-assign]

    def close(self) -> None:
        """End the workers that have died; for the collector of garbage they would wait for ever."""
        for endpoint in self._virtual.endpoints:
            if endpoint._greenlet:
                endpoint._greenlet.throw()

    def _to_server(self, server: int, worker: int, event: Any, *, source: int) -> None:
        if worker in self._dead:
            raise self._virtual.endpoints[worker]._exit  # the dead send nothing
        self._send(server, worker, _Envelope(source, event), source=source)

    def _arrive(self, target: int, message: Any) -> None:
        """A message arrives, or a server's driver tells it something."""
        source = message.source if isinstance(message, _Envelope) else None
        if source in self._vanished:
            return
        faults, worker = self._faults.get(len(self.seen), ()), self._worker(source)
        self.seen.append(Seen(target, source))
        for fault in faults:
            if isinstance(fault, Death) and not fault.after:
                self._kill(fault)
            elif isinstance(fault, Late) and worker is not None:
                self._deliver[target](Lost(worker))
        due, self._due = self._due, []
        if source is None:
            self._deliver[target](message)
        elif source not in self._vanished:
            self._pass_on(target, message, faults)
        self._notice(due)
        for fault in faults:
            if isinstance(fault, Death) and fault.after:
                self._kill(fault)

    def _answer(self, worker: int, server: int, answer: Any) -> None:
        self._arrive(self._servers + worker, _Envelope(server, answer))

    def _pass_on(self, target: int, message: _Envelope, faults: Sequence[Fault]) -> None:
        link = (message.source, target)
        again = [
            (fault.others, _Envelope(message.source, dataclasses.replace(message.event)))
            for fault in faults
            if isinstance(fault, Twice) and self._worker(message.source) is not None
        ]
        for fault in faults:
            if isinstance(fault, Delay):
                self._hold(link, fault.others)
        self._queue(target, message)
        for others, copy in again:
            if others:
                self._hold(link, others)
            self._queue(target, copy)

    def _queue(self, target: int, message: _Envelope) -> None:
        hold = self._holds.get((message.source, target))
        if hold is None:
            self._hand_over(target, message)
        else:
            hold.queue.append(message)

    def _hand_over(self, target: int, message: _Envelope) -> None:
        """Give a message to whom it is for, and then those that have waited for it."""
        if target < self._servers:
            self._deliver[target](message.event)
        else:
            self._take_in[target - self._servers](message.source, message.event)
        for link, hold in list(self._holds.items()):
            if link[1] == target and link[0] != message.source:
                hold.others -= 1
                if not hold.others:
                    self._let_go(link, hold)

    def _hold(self, link: tuple[int, int], others: int) -> None:
        if link not in self._holds:
            hold = self._holds[link] = _Hold(others)
            virtual = self._virtual
            virtual.at(virtual.now + _PATIENCE_S, -1, self._let_go, link, hold)

    def _let_go(self, link: tuple[int, int], hold: _Hold) -> None:
        if self._holds.get(link) is not hold:
            return
        del self._holds[link]
        for message in hold.queue:
            if message.source not in self._vanished:
                self._hand_over(link[1], message)

    def _worker(self, source: int | None) -> int | None:
        return None if source is None or source < self._servers else source - self._servers

    def _kill(self, death: Death) -> None:
        worker = death.worker
        if worker in self._dead:
            return
        self._dead.add(worker)
        self._virtual.endpoints[worker].bury()
        if death.vanish:
            self._vanished.add(self._servers + worker)
        servers = list(range(self._servers))
        if death.first is None:
            self._notice([(server, worker) for server in servers])
            return
        servers.remove(death.first)
        self._notice([(death.first, worker)])
        self._due = due = [*self._due, *((server, worker) for server in servers)]
        self._virtual.at(self._virtual.now + _PATIENCE_S, -1, self._notice_at_last, due)

    def _notice(self, losses: list[tuple[int, int]]) -> None:
        for server, worker in losses:
            self._deliver[server](Lost(worker))

    def _notice_at_last(self, due: list[tuple[int, int]]) -> None:
        if self._due is due:
            self._due = []
            self._notice(due)


def spread(seen: Sequence[Seen], workers: int, servers: int) -> Iterator[Fault]:
    """Give every single fault that there can be in a run in which these events were seen.

    Args:
        seen: of the run without faults.
        workers, servers: W and S.
    """
    firsts = [None, *range(servers)] if servers > 1 else [None]
    for at, event in enumerate(seen):
        if event.target >= servers:  # who sends to a worker are servers
            yield from (Delay(at, others) for others in range(1, servers))
            continue
        for worker, first in itertools.product(range(workers), firsts):
            for after, vanish in itertools.product((False, True), repeat=2):
                yield Death(at, after, worker, first, vanish)
        if event.source is not None:
            yield from (Delay(at, others) for others in (1, 2, 3))
            if event.source >= servers:
                yield Late(at)
                yield from (Twice(at, others) for others in (0, 1, 2))


def drawn(rng: random.Random, workers: int, servers: int) -> list[Fault]:
    """Draw some faults of all kinds, most of them early in the run."""
    faults: list[Fault] = []
    for _ in range(rng.randrange(1, 6)):
        at = int(rng.expovariate(1 / 50))
        kind = rng.choice(["death", "delay", "delay", "twice", "late"])
        if kind == "death":
            first = rng.choice([None, *range(servers)])
            after, vanish = rng.random() < 0.5, rng.random() < 0.5
            faults.append(Death(at, after, rng.randrange(workers), first, vanish))
        elif kind == "delay":
            faults.append(Delay(at, rng.randint(1, 12)))
        else:
            faults.append(Late(at) if kind == "late" else Twice(at, rng.randrange(4)))
    return faults
