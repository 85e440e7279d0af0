"""Servers and workers as threads of one process: queues for messages, shared arrays for bytes.

Events are handed over as they are; nothing is encoded and nothing is copied but what the
protocol copies.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from psframe.errors import RankLost
from psframe.events import Answer, FromWorker, Lease, Output, ToServer
from psframe.layout import Array, Layout
from psframe.server import ServerMemory
from psframe.store import HeapBuffers, buffer_count

__all__ = ["ProcessMemory", "ThreadEndpoint", "ThreadHub", "ThreadPort"]

# How often a waiting worker looks whether the run has broken down.
_CHECK_S = 0.5


class ProcessMemory:
    """The slots, landing areas and snapshots of servers and workers that share a process.

    Each array is allocated when it is first used.

    Args:
        layout: the parameters.
        servers: S.
        workers: W.
    """

    def __init__(self, layout: Layout, servers: int, workers: int) -> None:
        self._layout = layout
        self._shards = layout.shards(servers)
        self._lock = threading.Lock()
        self._flat: dict[tuple[str, int, int], Array] = {}
        self._workers = workers
        count = buffer_count(workers)
        self.buffers = [
            HeapBuffers(count, end - begin, layout.dtype) for begin, end in self._shards
        ]

    def slot(self, worker: int, index: int) -> Array:
        """The worker's whole gradient slot 0 or 1."""
        return self._get("slot", worker, index)

    def landing(self, worker: int, server: int) -> Array:
        """The server's part of the worker's landing area."""
        begin, end = self._shards[server]
        return self._get("landing", worker, 0)[begin:end]

    def server(self, index: int) -> ServerMemory:
        """What server `index` sees of it."""
        begin, end = self._shards[index]
        return ServerMemory(
            gradient=lambda worker, slot: self.slot(worker, slot)[begin:end],
            landing=lambda worker: self.landing(worker, index),
            in_place=[True] * self._workers,
        )

    def _get(self, kind: str, worker: int, index: int) -> Array:
        key = (kind, worker, index)
        array = self._flat.get(key)
        if array is None:
            with self._lock:  # two servers may be the first to look
                array = self._flat.setdefault(key, np.empty(self._layout.size, self._layout.dtype))
        return array


class ThreadHub:
    """The queues of one run, and the first error of a server thread.

    Args:
        layout: the parameters.
        servers: S.
        workers: W.
    """

    def __init__(self, layout: Layout, servers: int, workers: int) -> None:
        self.memory = ProcessMemory(layout, servers, workers)
        self.servers = servers
        self.workers = workers
        # No SimpleQueue: its `get` may wait for ever when a signal's handler runs past the bound.
        self.to_server: list[queue.Queue[ToServer]] = [queue.Queue() for _ in range(servers)]
        self.to_worker: list[queue.SimpleQueue[tuple[int, Answer | Lease]]] = [
            queue.SimpleQueue() for _ in range(workers)
        ]
        self.broken: BaseException | None = None


class ThreadPort:
    """A server's end."""

    def __init__(self, hub: ThreadHub, index: int) -> None:
        self._hub = hub
        self._index = index
        self.buffers = hub.memory.buffers[index]
        self.memory = hub.memory.server(index)

    def receive(self, timeout_s: float) -> ToServer | None:
        """Take the next event; None after `timeout_s` seconds without one.

        Raises:
            RankLost: another server thread has broken down.
        """
        try:
            return self._hub.to_server[self._index].get(timeout=timeout_s)
        except queue.Empty:
            if self._hub.broken is not None:
                raise RankLost("another server thread has broken down") from self._hub.broken
            return None

    def to_worker(self, answer: Answer | Lease) -> None:
        """Send an answer."""
        self._hub.to_worker[answer.worker].put((self._index, answer))

    def to_leader(self, event: Output) -> None:
        """Send to server 0."""
        self._put(0, event)

    def to_followers(self, event: Output) -> None:
        """Send to every server but server 0."""
        for server in range(1, self._hub.servers):
            self._put(server, event)

    def _put(self, server: int, event: Any) -> None:
        self._hub.to_server[server].put(event)


class ThreadEndpoint:
    """A worker's end; see `psframe.exchange.Endpoint`."""

    def __init__(self, hub: ThreadHub, index: int, clock: Callable[[], float] = time.monotonic):
        self._hub = hub
        self.index = index
        self.workers = hub.workers
        self.servers = hub.servers
        self.virtual_time = False
        self.weighs_codecs = index == 0
        self.direct = None
        self.in_place: Sequence[bool] = [True] * hub.servers
        self.now = clock

    def send(self, server: int, message: FromWorker) -> None:
        """Put a message into the server's queue."""
        self._hub.to_server[server].put(message)

    def receive(self, timeout_s: float | None) -> tuple[int, Answer | Lease] | None:
        """Take the next answer; None after `timeout_s` seconds without one.

        Raises:
            RankLost: a server thread has broken down.
        """
        inbox = self._hub.to_worker[self.index]
        while True:
            try:
                return inbox.get(timeout=_CHECK_S if timeout_s is None else timeout_s)
            except queue.Empty:
                if self._hub.broken is not None:
                    raise RankLost("a server thread has broken down") from self._hub.broken
                if timeout_s is not None:
                    return None

    def slot(self, index: int) -> Array:
        """The worker's gradient slot."""
        return self._hub.memory.slot(self.index, index)

    def progress(self, slot: int, *, judges: bool) -> None:
        """Give nothing: gradients are whole when they are announced."""

    def snapshot(self, server: int, buffer: int) -> Array:
        """The server's snapshot buffer, or its part of the landing area."""
        if buffer < 0:
            return self._hub.memory.landing(self.index, server)
        return self._hub.memory.buffers[server][buffer]
