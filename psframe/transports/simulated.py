"""Servers and workers in virtual time: one heap of events, one greenlet a worker.

An event is (time, worker, order of issue, action); ties are broken in that order, with the
servers' talk among themselves before any worker's. A message leaves its sender's link when the
link is free, travels for the latency, and is taken in when the receiver's link is free.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psframe.events import NO_BUFFER, Answer, FromWorker, Lease, Lost, Output, Push, ToServer
from psframe.layout import Array, Layout
from psframe.server import ServerMemory
from psframe.transports.threads import ProcessMemory
from psframe.wire import HEADER_BYTES

__all__ = ["ComputeTime", "Network", "SimulatedEndpoint", "SimulatedPort", "VirtualTime"]

# A name of NumPy's would import all of its random module with psframe.
ComputeTime = Callable[["np.random.Generator", int, int], float]

# Looks at an empty inbox after which a worker lets the next thing happen: a loop that polls
# `done` would otherwise stop the time that it waits for.
_POLLS_MAX = 100
# (time, worker, order of issue, action, its arguments)
_Event = tuple[float, int, int, Callable[..., None], tuple[Any, ...]]


@dataclass(frozen=True)
class Network:
    """What connects the nodes; every server and every worker is a node with one link.

    Args:
        latency_s: seconds from the end of sending to the beginning of receiving.
        bandwidth_bytes_per_s: of each link, each way.

    Raises:
        ValueError: a negative latency, or a bandwidth that is not above 0.
    """

    latency_s: float = 0.0
    bandwidth_bytes_per_s: float = float("inf")

    def __post_init__(self) -> None:
        if not self.latency_s >= 0:
            raise ValueError(f"Network: latency_s: expected 0 or more, got {self.latency_s}")
        if not self.bandwidth_bytes_per_s > 0:
            raise ValueError(
                "Network: bandwidth_bytes_per_s: expected more than 0,"
                f" got {self.bandwidth_bytes_per_s}"
            )


class VirtualTime:
    """The clock, the events to come, the links, and the memory that the nodes share.

    Args:
        layout: the parameters.
        servers, workers: S and W.
        network: latency and bandwidth.
        compute_time_s: (rng, worker, steps finished) -> seconds.
        seed: of the generators given to compute_time_s, one a worker.
        deaths: worker -> number of messages after which it is dead (for tests).
    """

    def __init__(
        self,
        layout: Layout,
        servers: int,
        workers: int,
        *,
        network: Network,
        compute_time_s: ComputeTime,
        seed: int,
        deaths: Mapping[int, int] | None = None,
    ) -> None:
        self.now = 0.0
        self.servers = servers
        self.workers = workers
        self.memory = ProcessMemory(layout, servers, workers)
        self.deaths = dict(deaths or {})
        self._latency_s = network.latency_s
        self._bandwidth_bytes_per_s = network.bandwidth_bytes_per_s
        self._unlimited = network.bandwidth_bytes_per_s == float("inf")
        self._compute_time_s = compute_time_s
        self._seed = seed
        # The events to come: a heap, and one event beside it. What an action causes is mostly
        # what comes next, and then it never enters the heap.
        self._heap: list[_Event] = []
        self._beside: _Event | None = None
        self._order = itertools.count()
        self._afterwards: list[Callable[[], None]] = []
        self._broken: Exception | None = None
        nodes = servers + workers
        self._egress = [0.0] * nodes
        self._ingress = [0.0] * nodes
        self._shard_bytes = [
            (end - begin) * layout.dtype.itemsize for begin, end in layout.shards(servers)
        ]
        self.deliver: list[Callable[[ToServer], None]] = []
        self.endpoints: list[SimulatedEndpoint] = [
            SimulatedEndpoint(self, index) for index in range(workers)
        ]

    def at(self, time: float, worker: int, action: Callable[..., None], *args: Any) -> None:
        """Let something happen at a time."""
        event = (time, worker, next(self._order), action, args)
        if self._beside is None:
            self._beside = event
        else:
            heapq.heappush(self._heap, event)

    def after_the_next(self, action: Callable[[], None]) -> None:
        """Let something happen after the next thing that is to come, whatever that is."""
        self._afterwards.append(action)

    def abandon(self, error: Exception) -> None:
        """Let nothing more happen; `run` raises the error."""
        self._broken = error
        self._heap.clear()
        self._beside = None

    def run(self) -> None:
        """Let one thing after the other happen until nothing is to come.

        Raises:
            Exception: what compute_time_s raised, or a ValueError for what it returned.
        """
        try:
            self._run()
        finally:
            for endpoint in self.endpoints:
                endpoint.bury()  # those that still wait do so no more
        if self._broken is not None:
            raise self._broken

    def _run(self) -> None:
        heap, pop, push_and_pop = self._heap, heapq.heappop, heapq.heappushpop
        while True:
            beside = self._beside
            if beside is not None:
                self._beside = None
                event = push_and_pop(heap, beside)
            elif heap:
                event = pop(heap)
            else:
                return
            self.now = event[0]
            event[3](*event[4])
            if self._afterwards:
                actions, self._afterwards = self._afterwards, []
                for action in actions:
                    action()

    def compute_time_s(self, worker: int, clock: int, rng: np.random.Generator) -> float:
        """Ask the user how long the worker computes.

        Raises:
            ValueError: it is negative or not a number.
        """
        seconds = float(self._compute_time_s(rng, worker, clock))
        if not seconds >= 0:
            raise ValueError(
                f"compute_time_s: expected 0 or more for worker {worker}, got {seconds}"
            )
        return seconds

    def compute_rng(self, worker: int) -> np.random.Generator:
        """The generator given to compute_time_s for this worker; not `worker.rng`."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=(2, worker))
        return np.random.Generator(np.random.PCG64(sequence))

    def to_server(self, server: int, worker: int, event: Any, *, source: int) -> None:
        """Send an event to a server; worker is -1 if a server sends it."""
        if self._unlimited:
            time = self.now + self._latency_s
        else:
            gradient = 0
            if isinstance(event, Push):
                coded = event.coded
                gradient = self._shard_bytes[server] if coded is None else len(coded)
            time = self._arrival(source, server, HEADER_BYTES + gradient)
        self.at(time, worker, self.deliver[server], event)

    def to_worker(self, server: int, answer: Answer | Lease) -> None:
        """Send an answer to a worker."""
        worker = answer.worker
        if self._unlimited:
            time = self.now + self._latency_s
        else:
            params = self._shard_bytes[server] if _brings_params(answer) else 0
            if isinstance(answer, Answer) and answer.coded is not None:
                params = len(answer.coded)
            time = self._arrival(server, self.servers + worker, HEADER_BYTES + params)
        self.at(time, worker, self.endpoints[worker].take_in, server, answer)

    def server_memory(self, server: int) -> ServerMemory:
        """What a server sees of the memory, its part of each slot looked up once."""
        memory = self.memory.server(server)
        look_up = memory.gradient
        slots: dict[tuple[int, int], Array] = {}

        def gradient(worker: int, slot: int) -> Array:
            array = slots.get((worker, slot))
            if array is None:
                array = slots[worker, slot] = look_up(worker, slot)
            return array

        return ServerMemory(gradient, memory.landing, memory.in_place)

    def _arrival(self, source: int, target: int, n_bytes: int) -> float:
        """Book both links for a message sent now and say when it has been taken in."""
        seconds = n_bytes / self._bandwidth_bytes_per_s
        start = max(self.now, self._egress[source])
        self._egress[source] = start + seconds
        begin = max(start + self._latency_s, self._ingress[target])
        self._ingress[target] = begin + seconds
        return begin + seconds


def _brings_params(answer: Answer | Lease) -> bool:
    return isinstance(answer, Answer) and answer.buffer != NO_BUFFER


class SimulatedPort:
    """A server's end."""

    def __init__(self, virtual: VirtualTime, index: int) -> None:
        self._virtual = virtual
        self._index = index

    def to_worker(self, answer: Answer | Lease) -> None:
        """Send an answer."""
        self._virtual.to_worker(self._index, answer)

    def to_leader(self, event: Output) -> None:
        """Send to server 0."""
        self._virtual.to_server(0, -1, event, source=self._index)

    def to_followers(self, event: Output) -> None:
        """Send to every server but server 0."""
        for server in range(1, self._virtual.servers):
            self._virtual.to_server(server, -1, event, source=self._index)


class SimulatedEndpoint:
    """A worker's end; see `psframe.exchange.Endpoint`. Used inside the worker's greenlet."""

    def __init__(self, virtual: VirtualTime, index: int) -> None:
        self._virtual = virtual
        self.index = index
        self.workers = virtual.workers
        self.servers = virtual.servers
        self.virtual_time = True
        self.weighs_codecs = False  # coding takes no virtual time
        self.direct = None
        self.in_place: Sequence[bool] = [True] * virtual.servers
        self._inbox: deque[tuple[int, Answer | Lease]] = deque()
        self._slots: list[Array | None] = [None, None]
        self._waiting = False
        self._wait_number = 0
        self._polls = 0
        self._greenlet: Any = None
        self._exit: type[BaseException] = BaseException
        self._dead = False
        self._messages = 0
        self._clock = 0
        self._last_push = -1
        self._answered_at: float | None = None
        self._rng: np.random.Generator | None = None

    def start(self, body: Callable[[], None]) -> None:
        """Run the worker from its beginning until it first waits."""
        import greenlet  # here, so that importing psframe stays quick

        self._exit = greenlet.GreenletExit
        self._greenlet = greenlet.greenlet(body)
        self._greenlet.switch()

    def now(self) -> float:
        """Virtual seconds."""
        return self._virtual.now

    def send(self, server: int, message: FromWorker) -> None:
        """Send; before the first push after an answer, compute for as long as that takes."""
        if self._dead:
            raise self._exit  # the dead neither clean up nor say good-bye
        virtual, index = self._virtual, self.index
        if type(message) is Push and message.seq != self._last_push:
            self._last_push = message.seq
            if self._answered_at is not None:
                self._compute(self._answered_at)
            self._clock += 1
        virtual.to_server(server, index, message, source=virtual.servers + index)
        if virtual.deaths:
            self._messages += 1
            if self._messages == virtual.deaths.get(index):
                self._die()

    def receive(self, timeout_s: float | None) -> tuple[int, Answer | Lease] | None:
        """Take the next answer; None after `timeout_s` virtual seconds without one."""
        if self._dead:
            raise self._exit
        inbox = self._inbox
        if not inbox and (timeout_s != 0 or self._has_polled_enough()):
            self._wait(timeout_s)
        return inbox.popleft() if inbox else None

    def slot(self, index: int) -> Array:
        """The worker's gradient slot."""
        slot = self._slots[index]
        if slot is None:
            slot = self._slots[index] = self._virtual.memory.slot(self.index, index)
        return slot

    def progress(self, slot: int, *, judges: bool) -> None:
        """Give nothing: gradients are whole when they are announced."""

    def snapshot(self, server: int, buffer: int) -> Array:
        """The server's snapshot buffer, or its part of the landing area."""
        if buffer < 0:
            return self._virtual.memory.landing(self.index, server)
        return self._virtual.memory.buffers[server][buffer]

    def take_in(self, server: int, answer: Answer | Lease) -> None:
        """An answer has arrived (called outside the greenlet)."""
        if self._dead:
            return
        self._inbox.append((server, answer))
        if _brings_params(answer):
            self._answered_at = self._virtual.now
        if self._waiting:
            self._waiting = False
            self._greenlet.switch()

    def bury(self) -> None:
        """Make an end of the worker, should its greenlet still wait for something."""
        self._dead = True

    def _has_polled_enough(self) -> bool:
        """Count a look at an empty inbox; after many, a loop of them must let time pass."""
        self._polls += 1
        return self._polls % _POLLS_MAX == 0

    def _wait(self, timeout_s: float | None) -> None:
        """Let others go on until an answer has arrived or the time is over.

        A time of 0 is over when the next thing has happened, whatever it is.
        """
        virtual = self._virtual
        self._waiting = True
        number = self._wait_number = self._wait_number + 1
        if timeout_s == 0:
            virtual.after_the_next(lambda: self._time_out(number))
        elif timeout_s is not None:
            virtual.at(virtual.now + timeout_s, self.index, self._time_out, number)
        self._greenlet.parent.switch()

    def _compute(self, answered_at: float) -> None:
        if self._rng is None:
            self._rng = self._virtual.compute_rng(self.index)
        try:
            seconds = self._virtual.compute_time_s(self.index, self._clock, self._rng)
        except Exception as error:
            self._virtual.abandon(error)
            self._dead = True
            raise self._exit from error
        until = answered_at + seconds
        self._answered_at = None
        if until > self._virtual.now:
            self._virtual.at(until, self.index, self._greenlet.switch)
            self._greenlet.parent.switch()

    def _time_out(self, wait_number: int) -> None:
        if self._waiting and wait_number == self._wait_number and not self._dead:
            self._waiting = False
            self._greenlet.switch()

    def _die(self) -> None:
        self._dead = True
        virtual = self._virtual
        for server in range(virtual.servers):
            source = virtual.servers + self.index
            virtual.to_server(server, self.index, Lost(self.index), source=source)
        raise self._exit
