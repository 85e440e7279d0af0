"""Signs of life: a counter in shared memory, and a small message now and then where there is none.

They come from a thread of their own, so that a rank that computes for minutes is not silent, and
one that is stopped is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["BEAT_LINE", "Beats", "Messages"]

# The line of a segment's first page in which its maker counts.
BEAT_LINE = 31
_MESSAGE_BYTES = 8


class Messages:
    """Signs that are sent and received.

    Args:
        comm: an mpi4py communicator.
        peers: the ranks that are shown that this one lives.
        source: the rank that this one hears, or MPI's "any".
        status: an mpi4py Status.
        tag: of the messages.

    Attributes:
        heard: by rank, how many have come.
    """

    def __init__(self, comm: Any, peers: Iterable[int], source: int, status: Any, tag: int) -> None:
        self.heard: dict[int, int] = {}
        self._status = status
        self._of_one = source >= 0
        self._sends = {r: comm.Send_init(bytearray(_MESSAGE_BYTES), r, tag) for r in peers}
        self._receive: Any = comm.Recv_init(bytearray(_MESSAGE_BYTES), source, tag)
        self._receive.Start()

    def send(self) -> None:
        """Send one to each peer that has received the last."""
        for rank, request in tuple(self._sends.items()):
            try:
                if request.Test():
                    request.Start()
            except RuntimeError:  # MPI's: it is dead, which the calls that matter will notice
                del self._sends[rank]

    def receive(self) -> None:
        """Take those that have come.

        Raises:
            RuntimeError: MPI's, if some rank is dead, once for those who hear any.
        """
        while self._receive is not None:
            try:
                if not self._receive.Test(self._status):
                    return
            except RuntimeError:
                if not self._of_one:
                    raise
                self._receive = None  # nothing comes any more
                return
            source = self._status.source
            self.heard[source] = self.heard.get(source, 0) + 1
            self._receive.Start()

    def close(self, lost: Iterable[int]) -> None:
        """Give the requests back, but for those to ranks that may never complete."""
        # MPI's errors are of ranks that have died meanwhile, and nobody waits for them any more.
        with contextlib.suppress(RuntimeError):
            self.receive()
            if self._receive is not None:
                self._receive.Cancel()
                self._receive.Wait()  # for nobody: what has been cancelled, or come, is complete
                self._receive.Free()
        for rank in self._sends.keys() - set(lost):
            with contextlib.suppress(RuntimeError):
                self._sends[rank].Free()


class Beats:
    """How this rank shows that it lives, and how often others have.

    Args:
        own: this rank's line of shared memory, None if it has none.
        lines: by rank, the lines of those whose memory this rank has opened.
        messages: for the others; None if there are none, or no way to send while others do.
    """

    def __init__(
        self, own: memoryview | None, lines: Mapping[int, memoryview], messages: Messages | None
    ) -> None:
        self._own = None if own is None else own.cast("q")
        self._counts = {rank: line.cast("q") for rank, line in lines.items()}
        self.messages = messages

    def beat(self) -> None:
        """Show that this rank lives."""
        if self._own is not None:
            self._own[0] += 1
        if self.messages is not None:
            self.messages.send()

    def count(self, rank: int) -> int:
        """How often a rank has shown that it lives; a number that grows."""
        words = self._counts.get(rank)
        if words is not None:
            count: int = words[0]
            return count
        return 0 if self.messages is None else self.messages.heard.get(rank, 0)
