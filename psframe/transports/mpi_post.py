"""The messages of `wire` between ranks, in order between any two.

They arrive in a small ring of persistent ANY_SOURCE receives, tested and restarted in the order in
which they were posted, or one peer's messages would change places. They leave through a small ring
of persistent sends a peer, tested before reuse and never waited for.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from psframe.errors import MessageError, RankLost
from psframe.events import (
    Answer,
    End,
    Gone,
    Lease,
    Lost,
    Pin,
    Pull,
    Push,
    Stop,
    Withheld,
)
from psframe.layout import Array
from psframe.transports.bell import Bell
from psframe.transports.faults import fault_tolerant
from psframe.transports.mpi import (  # type: ignore[attr-defined]
    MPI,
    TAG_POST,
    Patience,
    Transfers,
)
from psframe.transports.watch import Unwatched
from psframe.wire import HEADER_BYTES, Delivery, Event, encode, encode_into

__all__ = ["Post", "TooLong", "close", "copy_inline"]

_RECEIVES = 4  # persistent receives posted at once
_SENDS = 2  # persistent sends under way to one peer, in turn
# An array that fits into this together with the header travels inside the message.
_MESSAGE_BYTES = 4096
_INLINE_BYTES_MAX = _MESSAGE_BYTES - HEADER_BYTES
_CLOSE_BOUND_S = 30.0
_TRIES, _ONCE = range(16), range(1)
_BYTE = MPI.BYTE
_STREAMED = Delivery.STREAMED

# Whose requests may still write into their buffers, at the end of the program.
_kept: list[Post] = []

_HEADER_ONLY = frozenset((Answer, End, Gone, Lease, Lost, Pin, Pull, Push, Stop, Withheld))


class Post:
    """Messages of `wire` to and from any rank, in order between any two.

    Args:
        comm: the run's communicator.
        bytes_max: of the longest message without an array that can come.
        watch: is told of calls that fail; what goes to the dead is dropped.
        bells: by rank, where those of this node sleep, who are woken by a message.
        on_ring: called when one of them has been woken.

    Attributes:
        inline_bytes_max: of an array that can travel inside its message.
    """

    def __init__(
        self,
        comm: Any,
        bytes_max: int = 0,
        *,
        watch: Unwatched,
        bells: Mapping[int, Bell] = MappingProxyType({}),
        on_ring: Callable[[], None] | None = None,
    ) -> None:
        self._bells = bells
        self._on_ring = on_ring
        bytes_max = max(bytes_max, _MESSAGE_BYTES)
        self._watch = watch
        # Requests that no call will complete belong to MPI, and their buffers with them.
        self._given_up: list[_Peer] = []
        self.inline_bytes_max = _INLINE_BYTES_MAX
        self._comm = comm
        self._status = MPI.Status()
        self._inboxes = [bytearray(bytes_max) for _ in range(_RECEIVES)]
        self._receives = [
            comm.Recv_init([b, MPI.BYTE], MPI.ANY_SOURCE, TAG_POST) for b in self._inboxes
        ]
        self._tests = [request.Test for request in self._receives]
        self._head = 0
        self._taken = False  # whether the buffer at the head is somebody's
        self._tolerant = fault_tolerant()
        self._reported = -1, 0  # source and bytes, as the last call that failed has told them
        self._peers: dict[int, _Peer] = {}
        self._late: set[int] = set()  # peers with messages that wait for a send buffer
        MPI.Prequest.Startall(self._receives)

    def take(self, *, once: bool = False) -> tuple[int, int, bytearray] | None:
        """Give (source, bytes, buffer) of the next message, good until the next call.

        None if there has been no message for as long as a few tests take, or `once`.

        Raises:
            TooLong: a message was longer than any can be; it is gone, the next can be taken.
        """
        if self._late:
            self._send_late()
        if self._taken:
            self._restart()
        head, status = self._head, self._status
        test = self._tests[head]
        try:
            # Any Python beside the test makes the answer to a message come later.
            for _ in _ONCE if once else _TRIES:
                if test(status):
                    source = status.source
                    if source < 0:
                        return self._recover()
                    self._taken = True
                    return source, status.Get_count(_BYTE), self._inboxes[head]
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_TRUNCATE:
                self._reported = status.source, status.Get_count(_BYTE)
                self._watch.failed(error)
                return None  # the receive goes on, or is found to have ended
            self._taken = True
            raise TooLong(status.source) from error
        return None

    def _recover(self) -> tuple[int, int, bytearray] | None:
        """Give what a receive has taken that is no longer active, as its empty status tells.

        Now and then a receive ends in the very call that tells of a death: what it has taken is
        here then, and no call says so.
        """
        self._taken = True
        if self._inboxes[self._head][0]:
            return *self._reported, self._inboxes[self._head]
        self._restart()
        return None

    def _restart(self) -> None:
        """Receive again into the buffer of the message just taken."""
        self._taken = False
        if self._tolerant:
            self._inboxes[self._head][0] = 0  # which no message begins with
        self._receives[self._head].Start()
        self._head = (self._head + 1) % _RECEIVES

    def header(self, target: int) -> bytearray | None:
        """Give a send buffer of HEADER_BYTES to a rank, to be filled and sent with `start`.

        None if none is free, or messages to it are waiting: then `send` has to queue.
        """
        peer = self._peers.get(target)
        try:
            return None if peer is None else peer.free_header()
        except MPI.Exception as error:
            self._give_up(target, error)
            return None

    def start(self, target: int) -> None:
        """Send what has been written into the buffer that `header` gave."""
        try:
            self._peers[target].start()
        except MPI.Exception as error:
            self._give_up(target, error)

    def send(
        self,
        target: int,
        event: Event,
        delivery: Delivery = Delivery.IN_PLACE,
        array: Array | None = None,
    ) -> None:
        """Send an event; an INLINE array goes with it, a RANGE is announced by its length."""
        peer = self._peers.get(target)
        if peer is None:
            peer = self._peers[target] = self._peer(target)
        try:
            if array is None:
                if peer.send_header(event):
                    return
            elif delivery is _STREAMED and peer.send_header(event, delivery, array.nbytes):
                return
            if array is not None:
                message = encode(event, delivery, array.nbytes)
                if delivery is Delivery.INLINE:
                    message += array.tobytes()
                peer.send(message)
            else:
                peer.send(encode(event))
        except MPI.Exception as error:
            self._give_up(target, error)
        if peer.late:
            self._late.add(target)

    @property
    def waiting(self) -> bool:
        """Whether some message waits for a free buffer."""
        return bool(self._late)

    def flush(self) -> None:
        """Send what waits for a free buffer, as far as possible."""
        self._send_late()

    @property
    def sending(self) -> bool:
        """Whether some message has not left yet, to a rank that is not lost."""
        lost = self._watch.lost
        for target in self._peers.keys() - lost:
            try:
                if self._peers[target].sending:
                    return True
            except MPI.Exception as error:
                self._give_up(target, error)
        return False

    def close(self) -> None:
        """Take the receives back; nothing more is expected."""
        if self._taken:
            self._restart()
        for request in self._receives:
            request.Cancel()
        deadline = time.monotonic() + _CLOSE_BOUND_S
        while not self._cancelled():
            os.sched_yield()
            if time.monotonic() > deadline:  # a long message whose sender has stopped in its middle
                _kept.append(self)
                return
        for request in self._receives:
            request.Free()
        for target in self._peers.keys() - self._watch.lost:
            self._peers[target].close()

    def _cancelled(self) -> bool:
        try:
            return bool(MPI.Request.Testall(self._receives))
        except MPI.Exception as error:
            self._watch.failed(error)
            return False

    def _peer(self, target: int) -> _Peer:
        return _Peer(self._comm, target, self._bells.get(target), self._on_ring)

    def _send_late(self) -> None:
        for target in tuple(self._late):
            try:
                if self._peers[target].send_late():
                    self._late.discard(target)
            except MPI.Exception as error:
                self._give_up(target, error)

    def _give_up(self, target: int, error: Exception) -> None:
        """Send nothing to a rank any more with which MPI has failed.

        Raises:
            Exception: the error itself, if it is none of a lost rank; RankLost.
        """
        self._watch.failed_with(target, error)
        self._late.discard(target)
        self._given_up.append(self._peers[target])
        self._peers[target] = _Nobody(self._comm, target)


class TooLong(MessageError):
    """A message was longer than any can be.

    Attributes:
        source: the rank that sent it.
    """

    def __init__(self, source: int) -> None:
        super().__init__("a message was longer than any of ours")
        self.source = source


class _Peer:
    """What goes to one rank: headers from a ring of persistent sends, longer messages by Isend.

    A message that finds no free buffer waits in `late`, and those after it behind it.
    """

    def __init__(
        self,
        comm: Any,
        target: int,
        bell: Bell | None = None,
        on_ring: Callable[[], None] | None = None,
    ) -> None:
        self._bell = bell
        self._on_ring = on_ring
        self._asleep = None if bell is None else bell.words
        self._comm = comm
        self._target = target
        self._buffers = [bytearray(HEADER_BYTES) for _ in range(_SENDS)]
        self._sends = [comm.Send_init([b, MPI.BYTE], target, TAG_POST) for b in self._buffers]
        self._tests = [request.Test for request in self._sends]
        self._starts = [request.Start for request in self._sends]
        self._next = 0
        self._long: list[tuple[Any, bytes]] = []
        self.late: deque[bytes] = deque()

    def send_header(
        self, event: Event, delivery: Delivery = Delivery.IN_PLACE, payload_bytes: int = 0
    ) -> bool:
        """Send an event that is a header alone; False if it is more, or must wait its turn."""
        if type(event) not in _HEADER_ONLY:
            return False
        buffer = self.free_header()
        if buffer is None:
            return False
        encode_into(event, buffer, delivery, payload_bytes)
        self.start()
        return True

    def free_header(self) -> bytearray | None:
        """Give the next send buffer, if it is free and no message waits."""
        which = self._next
        # True of a request that is not started.
        return None if self.late or not self._tests[which]() else self._buffers[which]

    def start(self) -> None:
        """Send the buffer that is the next."""
        which = self._next
        self._next = 1 - which
        self._starts[which]()
        if self._asleep is not None and self._asleep[0]:
            self._ring()

    def _ring(self) -> None:
        if self._bell is not None and self._bell.wake() and self._on_ring is not None:
            self._on_ring()

    def send(self, message: bytes) -> None:
        """Send a message, or queue it behind those that wait."""
        self.late.append(message)
        self.send_late()

    def send_late(self) -> bool:
        """Send what waits, in order, as far as possible; True if nothing waits any more."""
        while self.late:
            message = self.late[0]
            if len(message) > HEADER_BYTES:
                self._long = [(r, m) for r, m in self._long if not r.Test()]
                request = self._comm.Isend([message, MPI.BYTE], self._target, TAG_POST)
                self._long.append((request, message))
                self._ring()
            else:
                if not self._tests[self._next]():
                    return False
                self._buffers[self._next][:] = message
                self.start()
            self.late.popleft()
        return True

    @property
    def sending(self) -> bool:
        """Whether something has not left yet."""
        self._long = [(r, m) for r, m in self._long if not r.Test()]
        return bool(self.late or self._long) or not all(r.Test() for r in self._sends)

    def close(self) -> None:
        for request in self._sends:
            request.Free()


class _Nobody(_Peer):
    """A lost rank: what goes to it is dropped."""

    def free_header(self) -> None:
        return None

    def send(self, message: bytes) -> None:
        pass

    @property
    def sending(self) -> bool:
        return False


def copy_inline(target: Array, buffer: bytearray | memoryview, n_bytes: int) -> None:
    """Copy the array inside a message to where it belongs."""
    target.view(np.uint8)[:] = np.frombuffer(buffer, np.uint8, n_bytes, HEADER_BYTES)


def close(post: Post, transfers: Transfers, patience: Patience) -> None:
    """Wait until everything has left, and take the receives back.

    Raises:
        RankLost: something has not left in time, or the run cannot go on.
    """
    deadline = time.monotonic() + _CLOSE_BOUND_S
    while post.sending or transfers.busy:
        transfers.progress()
        post.flush()
        if patience.wait() and time.monotonic() > deadline:
            raise RankLost(f"messages have not left this rank within {_CLOSE_BOUND_S:.0f} s")
    post.close()
    transfers.close()
