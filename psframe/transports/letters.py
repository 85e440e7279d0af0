"""Plain push_pulls and their answers in memory that a worker and the only server share.

A letter is a header of `wire` in the worker's first page, and a number which tells that it is
there: who writes it changes that last. The numbers of all workers' pushes lie side by side in the
server's memory, so that one look tells whether any has come. On x86 plain stores are seen in their
order (Intel SDM vol. 3, 9.2); elsewhere there are no letters.

All else goes through MPI, which knows nothing of letters. So that all is handled in its order, a
worker writes one only when the server has taken what it had sent otherwise, which the answer to a
push_pull tells, and who takes a message looks for a letter first, which was sent before it. The
answer to a letter is a letter, whatever it says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from psframe.transports.bell import Bell
from psframe.transports.shared_memory import Segment
from psframe.transports.streams import STORES_IN_ORDER
from psframe.wire import HEADER_BYTES

__all__ = ["Desk", "Letters", "can_write"]

# In a worker's first page: its push, and the answer with its number behind it; in the server's, the
# numbers of the pushes.
_PUSH_LINE, _ANSWER_LINE, _LETTER_LINES = 40, 42, 2
_BOARD_LINE, _BOARD_LINES = 40, 16
_WORKERS_MAX = 8 * _BOARD_LINES
_NUMBER = slice(HEADER_BYTES, HEADER_BYTES + 8)

# Looks in one go, of some 100 ns each, so that it takes a little longer than an answer; where ranks
# exceed cores each follows a yield. Then other messages are looked for, as they are after so many
# letters one after the other.
_LOOKS, _LOOKS_CROWDED, _NONE = range(200), range(10), range(0)
_IN_A_ROW = 8


def can_write(servers: int, worker: int) -> bool:
    """Say whether a worker that shares memory with server 0 may write letters."""
    return STORES_IN_ORDER and servers == 1 and worker < _WORKERS_MAX


class Letters:
    """A worker's end.

    Args:
        own, server: the memory of the worker, and of the server.
        worker: which.
        crowded: whether the node has more ranks than cores.
        bell: where the server sleeps, if it sleeps at one.
        on_ring: called when it has been woken.

    Attributes:
        push, answer: HEADER_BYTES, to be written before `send`, and to be read after `take`.
        awaited: whether a push has been sent whose answer has not been taken.
    """

    def __init__(
        self,
        own: Segment,
        server: Segment,
        worker: int,
        *,
        crowded: bool,
        bell: Bell | None,
        on_ring: Callable[[], None],
    ) -> None:
        self.push = own.words(_PUSH_LINE, _LETTER_LINES)[:HEADER_BYTES]
        answer = own.words(_ANSWER_LINE, _LETTER_LINES)
        self.answer = answer[:HEADER_BYTES]
        self.awaited = False
        self._came = answer[_NUMBER].cast("q")
        self._board = server.words(_BOARD_LINE, _BOARD_LINES).cast("q")
        self._worker = worker
        self._sent = 0  # pushes
        self._before = 0  # the number of the answer that was last
        self._looks = _LOOKS_CROWDED if crowded else _LOOKS
        self._crowded = crowded
        self._bell = bell
        self._on_ring = on_ring

    def send(self) -> None:
        """Send what has been written to `push`."""
        self.awaited = True
        self._before = self._came[0]
        self._sent = self._board[self._worker] = self._sent + 1
        if self._bell is not None and self._bell.wake():
            self._on_ring()

    def take(self, *, once: bool = False) -> bool:
        """Wait a little for the awaited answer, or look `once`; True if it is in `answer` now.

        It is good until the next `send`.
        """
        came, before, crowded = self._came, self._before, self._crowded
        if came[0] == before:
            for _ in _NONE if once else self._looks:
                if crowded:
                    os.sched_yield()
                if came[0] != before:
                    break
            else:
                return False
        self.awaited = False
        return True


class Desk:
    """The server's end.

    Args:
        own: the server's memory.
        segments: by worker, the memory of those who may write letters; at least one.
        bells: by worker, where they sleep, if they sleep at one.
        alone: whether all workers have letters.
        crowded, on_ring: as for `Letters`.

    Attributes:
        pushes, answers: by worker, HEADER_BYTES: what `take` has found, and what `send` sends.
        busy: whether letters are what comes, so that it pays to wait for one; the caller's.
        alone: as given; the caller's.
    """

    def __init__(
        self,
        own: Segment,
        segments: Mapping[int, Segment],
        *,
        bells: Mapping[int, Bell],
        alone: bool,
        crowded: bool,
        on_ring: Callable[[], None],
    ) -> None:
        top = max(segments) + 1
        self.pushes: dict[int, memoryview] = {}
        self.answers: dict[int, memoryview] = {}
        self._numbers: dict[int, memoryview[int]] = {}
        for worker, segment in segments.items():
            self.pushes[worker] = segment.words(_PUSH_LINE, _LETTER_LINES)[:HEADER_BYTES]
            answer = segment.words(_ANSWER_LINE, _LETTER_LINES)
            self.answers[worker] = answer[:HEADER_BYTES]
            self._numbers[worker] = answer[_NUMBER].cast("q")
        self.busy = False
        self._board = own.words(_BOARD_LINE, _BOARD_LINES).cast("q")[:top]
        self._taken = memoryview(bytearray(8 * top)).cast("q")
        self._sent = 0  # answers
        self._asked: dict[int, int] = {}  # by worker, the request whose answer will be a letter
        self._bells = bells
        self._on_ring = on_ring
        # A look at many numbers takes longer.
        self._looks = _LOOKS_CROWDED if crowded else _LOOKS[: len(_LOOKS) // (1 + top // 16)]
        self._crowded = crowded
        self.alone = alone
        self._in_a_row = 0
        self._next = 0  # whose turn it is

    def take(self) -> int:
        """Give a worker whose push has come, each in turn; -1 if it is other messages' turn."""
        if self._in_a_row < (_IN_A_ROW if self.alone else 1):
            board, taken, crowded = self._board, self._taken, self._crowded
            if board != taken:
                self._in_a_row += 1
                return self._pick()
            # Who has got an answer needs a while for the next: first a look at other messages.
            if self.busy and (crowded or not self._in_a_row):
                for _ in self._looks:
                    if crowded:
                        os.sched_yield()
                    if board != taken:
                        self._in_a_row += 1
                        return self._pick()
        self._in_a_row = 0
        return -1

    def _pick(self) -> int:
        worker, workers = self._next, len(self._board)
        for _ in range(workers):
            if self.take_from(worker):
                self._next = (worker + 1) % workers
                return worker
            worker = (worker + 1) % workers
        for worker in set(range(workers)) - self.pushes.keys():  # nobody's numbers
            self._taken[worker] = self._board[worker]
        return -1

    def take_from(self, worker: int) -> bool:
        """Take a push from this worker, if there is one: true if it is in `pushes`."""
        if worker not in self.pushes:
            return False
        number, taken = self._board[worker], self._taken
        if number == taken[worker]:
            return False
        taken[worker] = number
        return True

    def expect(self, worker: int, seq: int) -> None:
        """Note that the answer to this request will be a letter."""
        self._asked[worker] = seq

    def expects(self, worker: int, seq: int) -> bool:
        """Whether the answer to this request is to be a letter."""
        return self._asked.get(worker) == seq

    def send(self, worker: int) -> None:
        """Send what has been written to the worker's answer."""
        del self._asked[worker]
        self._sent = self._numbers[worker][0] = self._sent + 1
        bell = self._bells.get(worker)
        if bell is not None and bell.wake():
            self._on_ring()
