"""Signs of life: a counter in shared memory, and a small message now and then where there is none.

With them goes what a rank has been asked for by a signal, which is rank 0's to grant. They come
from a thread of their own, so that a rank that computes for minutes is not silent, and one that is
stopped is.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["BEAT_LINE", "Beats", "Messages"]

# The line of a segment's first page in which its maker counts.
BEAT_LINE = 31
_MESSAGE_BYTES = 8
# Words of the line.
_COUNT, _ASKED = 0, 1
# Bytes of a message: the signal, and whether it is the last.
_SIGNAL, _LAST = 0, 1
_LAST_WORDS = (signal.SIGTERM, signal.SIGINT)  # nothing that comes after them replaces them


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
        asked: by rank, the number of the signal that they told of last.
        asks: the number of the signal that this rank tells of; 0 for none.
    """

    def __init__(self, comm: Any, peers: Iterable[int], source: int, status: Any, tag: int) -> None:
        self.heard: dict[int, int] = {}
        self._status = status
        self._of_one = source >= 0
        self.asked: dict[int, int] = {}
        self.asks = 0
        self._outboxes = {rank: bytearray(_MESSAGE_BYTES) for rank in peers}
        self._sends = {r: comm.Send_init(box, r, tag) for r, box in self._outboxes.items()}
        self._inbox = bytearray(_MESSAGE_BYTES)
        self._receive: Any = comm.Recv_init(self._inbox, source, tag)
        self._receive.Start()
        self._left: set[int] = set()  # the peers that have been sent the last sign,
        self._gone: set[int] = set()  # and those whose last sign has come

    def send(self) -> None:
        """Send one to each peer that has received the last."""
        for rank, request in tuple(self._sends.items()):
            try:
                if request.Test():
                    self._outboxes[rank][_SIGNAL] = self.asks
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
            self.asked[source] = self._inbox[_SIGNAL]
            if self._inbox[_LAST]:
                self._gone.add(source)
            self._receive.Start()

    def take_leave(self) -> bool:
        """Send each peer a last sign, after which there is none; True once theirs have come.

        Messages do not overtake each other: none is under way then.

        Raises:
            RuntimeError: MPI's, if some rank is dead.
        """
        self.receive()
        for rank, request in self._sends.items():
            if rank not in self._left and request.Test():
                self._outboxes[rank][_LAST] = 1
                request.Start()
                self._left.add(rank)
        everyone = self._outboxes.keys()
        return everyone <= self._left & self._gone and all(r.Test() for r in self._sends.values())

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
        self._asks = 0

    def beat(self) -> None:
        """Show that this rank lives."""
        if self._own is not None:
            self._own[_COUNT] += 1
        if self.messages is not None:
            self.messages.send()

    def count(self, rank: int) -> int:
        """How often a rank has shown that it lives; a number that grows."""
        words = self._counts.get(rank)
        if words is not None:
            count: int = words[_COUNT]
            return count
        return 0 if self.messages is None else self.messages.heard.get(rank, 0)

    def ask(self, number: int) -> None:
        """Tell of a signal from now on, with every sign; it may be called in its handler."""
        if self._asks in _LAST_WORDS:
            return
        self._asks = number
        if self._own is not None:
            self._own[_ASKED] = number
        if self.messages is not None:
            self.messages.asks = number

    def asked(self, rank: int) -> int:
        """Give the number of the signal that a rank tells of; 0 for none."""
        words = self._counts.get(rank)
        if words is not None:
            number: int = words[_ASKED]
            return number
        return 0 if self.messages is None else self.messages.asked.get(rank, 0)
