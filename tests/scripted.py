"""A server at a worker's other end that overwrites whatever it is told is no longer used."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable

import numpy as np

from psframe.events import RELEASE_HOLD, Answer, Pull, Push
from psframe.layout import Layout

__all__ = ["Followed", "Script"]

_BOUND_S = 20.0


class Followed:
    """What the server sees of a gradient that arrives: only what it has been told is there."""

    from_any_thread = True

    def __init__(self, slot: np.ndarray, closed: Callable[[bool, float], None]) -> None:
        self.slot, self.closed = slot, closed
        self.ends: list[int] = []
        self.wrong: list[int] = []

    def open(self) -> None:
        self.ends = []
        self.slot[:] = np.nan

    def advance(self, end: int) -> None:
        self.ends.append(end)
        if np.isnan(self.slot[:end]).any():
            self.wrong.append(end)

    def close(self, finite: bool, norm: float) -> None:
        self.closed(finite, norm)


class Script:
    """A worker's end of a transport, and all of its only server.

    Version v of the parameters is `value(v)` everywhere. A buffer that is released is NaN at once.

    Attributes:
        pushed: the gradients, as they were in the slot when their push was handled.
        verdicts: finite and norm of each.
    """

    def __init__(self, layout: Layout, *, follows: bool = False) -> None:
        self.index, self.workers, self.servers = 0, 1, 1
        self.in_place, self.virtual_time, self.direct = [True], False, None
        self.slots = [np.empty(layout.size, layout.dtype) for _ in range(2)]
        self.buffers = [np.full(layout.size, np.nan, layout.dtype) for _ in range(5)]
        self.held: deque[int] = deque()
        self.version = 0
        self.pushed: list[np.ndarray] = []
        self.verdicts: list[tuple[bool, float]] = []
        self.follows = follows
        self.followed: dict[int, Followed] = {}
        self._answers: queue.Queue[Answer] = queue.Queue()
        self._arriving: deque[Push] = deque()

    @staticmethod
    def value(version: int) -> float:
        return 1.0 + version / 4

    def send(self, server: int, message: object) -> None:
        if not isinstance(message, (Push, Pull)):
            return
        if message.release & RELEASE_HOLD:
            self.buffers[self.held.popleft()][:] = np.nan
        if isinstance(message, Pull):
            self._answers.put(self._with_params(Answer(0, message.seq)))
        elif message.arriving:
            self._arriving.append(message)
        else:
            self._handle(message, message.finite, message.norm)

    def receive(self, timeout_s: float | None) -> tuple[int, Answer] | None:
        try:
            return 0, self._answers.get(timeout=_BOUND_S if timeout_s is None else timeout_s)
        except queue.Empty:
            assert timeout_s is not None, "no answer comes"
            return None

    def now(self) -> float:
        return 0.0

    def slot(self, index: int) -> np.ndarray:
        return self.slots[index]

    def progress(self, slot: int, *, judges: bool) -> Followed | None:
        if not self.follows:
            return None
        self.followed[slot] = Followed(self.slots[slot], self._closed)
        return self.followed[slot]

    def snapshot(self, server: int, buffer: int) -> np.ndarray:
        return self.buffers[buffer]

    def _closed(self, finite: bool, norm: float) -> None:
        self._handle(self._arriving.popleft(), finite, norm)

    def _handle(self, push: Push, finite: bool, norm: float) -> None:
        self.pushed.append(self.slots[push.slot].copy())
        self.verdicts.append((finite, norm))
        self.version += 1
        answer = Answer(0, push.seq, False, True, push_version=self.version)
        self._answers.put(self._with_params(answer) if push.want_params else answer)

    def _with_params(self, answer: Answer) -> Answer:
        free = next(b for b in range(len(self.buffers)) if b not in self.held)
        self.held.append(free)
        self.buffers[free][:] = self.value(self.version)
        answer.buffer, answer.version = free, self.version
        return answer
