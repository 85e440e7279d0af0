"""The end of a process that has taken a lost worker's place; server 0's is in `replacements`."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from psframe.errors import RankLost
from psframe.events import Answer, FromWorker, Lease
from psframe.launcher import Place
from psframe.layout import Array, Layout
from psframe.store import buffer_count
from psframe.transports.faults import NoFaults
from psframe.transports.frames import Frames
from psframe.transports.heartbeat import BEAT_LINE, Beats
from psframe.transports.meeting import LANDING, WORKER_ARRAYS
from psframe.transports.processes import Processes
from psframe.transports.shared_memory import Segment
from psframe.transports.watch import Watch
from psframe.wire import Delivery, Limits, Link, decode, encode

__all__ = ["StandIn"]

_SERVER_GONE = "server 0 (rank 0) is lost, and with it the run"
# A welcome is short; so is every message to a worker.
_MESSAGE_BYTES_MAX = 1 << 16
# Server 0 answers between two events.
_WELCOME_BOUND_S = 60.0


class StandIn:
    """A worker's end; see `psframe.exchange.Endpoint`. It joins the run when it is made.

    Args:
        place: where it belongs.
        layout: the parameters.
        digests: of the arguments of `psframe.run`.
        timeout_s: server 0 counts as lost if it is silent for so long.

    Attributes:
        local_worker: how many workers of this node come before it.
        ranks_here: ranks of the run on this node.
        watch: over server 0.

    Raises:
        RankLost: the run is over, or server 0 will not have this process.
    """

    def __init__(
        self, place: Place, layout: Layout, digests: Mapping[str, bytes], timeout_s: float
    ) -> None:
        self._frames = Frames(socket.socket(fileno=place.socket), _MESSAGE_BYTES_MAX)
        server = os.getppid()  # before it is asked: if it is dead by then, no answer comes
        hello = {"digests": {name: digest.hex() for name, digest in digests.items()}}
        self._frames.send(json.dumps(hello).encode())
        welcome = json.loads(self._take(self._frames))
        self.index: int = welcome["index"]
        self.workers: int = welcome["workers"]
        self.local_worker: int = welcome["local_worker"]
        self.ranks_here: int = welcome["ranks_here"]
        self.servers = 1
        self.virtual_time = False
        self.weighs_codecs = False  # the run has begun
        self.direct = None
        self.in_place: Sequence[bool] = [True]
        self._own = _open(place.own, welcome["own"], WORKER_ARRAYS, layout)
        count = buffer_count(self.workers)
        self._server = _open(place.server, welcome["server"], count, layout)
        self._limits = Limits(
            Link.SERVER_TO_WORKER,
            self.workers,
            shard_bytes=layout.size * layout.dtype.itemsize,
            worker=self.index,
            server=0,
            deliveries=frozenset({Delivery.IN_PLACE}),
        )
        self.watch = Watch(
            NoFaults(),
            (0,),
            Beats(self._own.words(BEAT_LINE), {0: self._server.words(BEAT_LINE)}, None),
            [0],
            Processes({0: server}),
            timeout_s,
            paced=True,
            pulsed=True,
        )
        self.watch.tell(lambda rank, why: self.watch.give_up(rank, "server 0"))
        self.watch.start()

    def send(self, server: int, message: FromWorker) -> None:
        """Send a message; a gradient is in shared memory."""
        self._frames.send(encode(message))

    def receive(self, timeout_s: float | None) -> tuple[int, Answer | Lease] | None:
        """Take the next answer; None after `timeout_s` seconds without one.

        Raises:
            RankLost: server 0 is lost.
        """
        frames = self._frames
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := frames.take()) is None:
            if frames.ended:
                raise RankLost(_SERVER_GONE)
            self.watch.tick()
            left_s = self.watch.every_s
            if deadline is not None:
                left_s = min(left_s, deadline - time.monotonic())
                if left_s <= 0.0:
                    return None
            frames.wait(left_s)
        answer, _, _ = decode(message, len(message), self._limits)
        assert isinstance(answer, (Answer, Lease)), "the limits of the link allow no other"
        return 0, answer

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def slot(self, index: int) -> Array:
        """The worker's gradient slot."""
        return self._own.array(index)

    def progress(self, slot: int, *, judges: bool) -> None:
        """Give nothing: gradients are whole when they are announced."""

    def snapshot(self, server: int, buffer: int) -> Array:
        """The server's snapshot, or the landing area."""
        return self._own.array(LANDING) if buffer < 0 else self._server.array(buffer)

    def close(self) -> None:
        """Wait until everything has left.

        Raises:
            RankLost: server 0 is lost.
        """
        while not self._frames.flush():
            self.watch.tick()
            self._frames.wait(self.watch.every_s)
        self.watch.close()
        self._frames.close()

    @staticmethod
    def _take(frames: Frames) -> Any:
        """Wait for the welcome; where there will be none, the other end is closed."""
        deadline = time.monotonic() + _WELCOME_BOUND_S
        while (message := frames.take()) is None:
            if frames.ended:
                raise RankLost("the run is over, or does without this process")
            if time.monotonic() > deadline:
                raise RankLost(f"server 0 has not answered within {_WELCOME_BOUND_S:.0f} s")
            frames.wait(1.0)
        return message


def _open(fd: int, nonce: str, count: int, layout: Layout) -> Segment:
    segment = Segment.open(os.getpid(), fd, bytes.fromhex(nonce), count, layout.size, layout.dtype)
    os.close(fd)
    if segment is None:
        raise RankLost("this process cannot open the memory that it has been given")
    return segment
