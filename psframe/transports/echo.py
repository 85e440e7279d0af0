"""A bare MPI echo through persistent requests, which applies nothing: the yardstick of `bench`.

Each worker sends every server its part of the payload and receives as much back; a server sends
what came from the buffer in which it came. Both sides wait as the transport of `run` does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from psframe.layout import Array
from psframe.transports.mpi import MPI, Patience  # type: ignore[attr-defined]

__all__ = ["Echo", "EchoLine"]

_TAG = 1


class Echo:
    """The ranks of an echo: [0, servers) echo, the others send.

    Args:
        servers: S.

    Attributes:
        crowded: whether the node has more ranks than cores that this process may use.
    """

    def __init__(self, servers: int) -> None:
        world = MPI.COMM_WORLD
        self._servers = servers
        self._comm = world.Dup()
        self._peers = world.Split(world.rank < servers, world.rank)
        node = world.Split_type(MPI.COMM_TYPE_SHARED)
        self.crowded = node.size > len(os.sched_getaffinity(0))
        node.Free()

    def meet(self) -> None:
        """Wait for the other workers (for the other servers, on a server)."""
        request = self._peers.Ibarrier()
        patience = Patience(self.crowded)
        while not request.Test():
            patience.wait()

    def serve(self, arrays: Sequence[Array], trips: int) -> None:
        """Echo `trips` payloads of every worker.

        Args:
            arrays: one for each worker, of this server's part of the payload.
            trips: round trips that each worker makes.
        """
        assert trips > 0, "a receive that is never answered would be left behind"
        comm, first = self._comm, self._servers
        receives = [comm.Recv_init([a, MPI.BYTE], first + w, _TAG) for w, a in enumerate(arrays)]
        sends = [comm.Send_init([a, MPI.BYTE], first + w, _TAG) for w, a in enumerate(arrays)]
        # Of each worker one request is active: its receive or, while it is answered, its send.
        tests = [request.Test for request in receives]
        answering = [False] * len(arrays)
        left = [trips] * len(arrays)
        MPI.Prequest.Startall(receives)
        patience = Patience(self.crowded)
        busy = len(arrays)
        while busy:
            came = False
            for w, test in enumerate(tests):
                if not left[w] or not test():
                    continue
                came = True
                if not answering[w]:
                    answering[w] = True
                    request = sends[w]
                else:
                    answering[w] = False
                    left[w] -= 1
                    if not left[w]:
                        busy -= 1
                        continue
                    request = receives[w]
                request.Start()
                tests[w] = request.Test
            if came:
                patience.reset()
            else:
                patience.wait()
        for request in (*receives, *sends):
            request.Free()

    def line(self, payloads: Sequence[Sequence[Array]], back: Sequence[Array]) -> EchoLine:
        """Open a worker's end.

        Args:
            payloads: what to send, in turn; each a part for every server.
            back: where each server's answer goes.
        """
        return EchoLine(self._comm, payloads, back, self.crowded)

    def close(self) -> None:
        """Give the communicators back; every rank does."""
        self._comm.Free()
        self._peers.Free()


class EchoLine:
    """A worker's persistent requests."""

    def __init__(
        self,
        comm: Any,
        payloads: Sequence[Sequence[Array]],
        back: Sequence[Array],
        crowded: bool,
    ) -> None:
        self._receives = [comm.Recv_init([a, MPI.BYTE], s, _TAG) for s, a in enumerate(back)]
        self._sends = [
            [comm.Send_init([a, MPI.BYTE], s, _TAG) for s, a in enumerate(parts)]
            for parts in payloads
        ]
        self._starts = [(*self._receives, *sends) for sends in self._sends]
        self._tests = [[request.Test for request in requests] for requests in self._starts]
        self._patience = Patience(crowded)

    def trip(self, which: int) -> None:
        """Send payload `which` to every server and wait until all of it has come back."""
        for request in self._starts[which]:
            request.Start()
        patience = self._patience
        patience.reset()
        for test in self._tests[which]:
            while not test():
                patience.wait()

    def close(self) -> None:
        """Free the requests."""
        for request in [*self._receives, *(r for sends in self._sends for r in sends)]:
            request.Free()
