"""Stand-ins to reason about the machines with: rules without rounding, servers by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from psframe.consistency import Async, Mode
from psframe.events import NO_BUFFER, RELEASE_COPY, RELEASE_HOLD, Answer, Pull, Push
from psframe.follower import Follower
from psframe.layout import Array, Layout
from psframe.leader import Leader
from psframe.server import Server, ServerMemory
from psframe.store import HeapBuffers, Store, buffer_count
from psframe.transports.streams import STREAM_BYTES, Progress

# A gradient with this number in it makes an update that its shard refuses.
POISON = 7777.0


class ExactSGD:
    """p - lr g. With lr a power of two and small integers for gradients no sum is ever rounded,
    so that the order of updates cannot be seen in their result."""

    def __init__(self, lr: float = 0.5) -> None:
        self.lr = lr
        self.rules: list[ExactRule] = []

    def updater(self, layout: Layout, begin: int, end: int) -> ExactRule:
        self.rules.append(ExactRule(self.lr))
        return self.rules[-1]


class ExactRule:
    """Attributes:
    history: the bytes of every version that it made, from version 1 on.
    guard: called with each target before it is written.
    """

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.history: list[bytes] = []
        self.guard: Callable[[Array], None] = lambda out: None
        self.marks = 0

    def update(self, step: int, params: Array, grad: Array, out: Array, scale: float = 1.0) -> bool:
        self.guard(out)
        if (grad == POISON).any() or not np.isfinite(grad).all():
            out.fill(np.nan)  # a refused target holds garbage
            return False
        assert step == len(self.history), "an update numbered like another one"
        out[:] = params - self.lr * scale * grad
        self.history.append(out.tobytes())
        return True

    def begin(self, step: int, params: Array, scale: float = 1.0) -> None:
        assert step == len(self.history), "an update numbered like another one"
        assert scale == 1.0
        self.written: Array | None = None
        self.at = 0

    def extend(self, params: Array, grad: Array, out: Array, begin: int, end: int) -> bool:
        if begin == 0:
            self.guard(out)
        assert begin == self.at, "the parts follow one another"
        assert begin == 0 or out is self.written
        self.written, self.at = out, end
        part = grad[begin:end]
        out[begin:end] = np.where(part == POISON, np.nan, params[begin:end] - self.lr * part)
        return bool(np.isfinite(out[begin:end]).all())

    def follow(
        self, params: Array, grad: Array, out: Array, begin: int, limit: int, words: Array
    ) -> tuple[int, bool]:
        end = min(int(words[0]), limit)
        if end <= begin:
            return begin, True
        return end, self.extend(params, grad, out, begin, end)

    def finish(self) -> None:
        assert self.written is not None
        assert self.at == len(self.written), "a part is missing"
        self.history.append(self.written.tobytes())

    slot_names: tuple[str, ...] = ()

    @property
    def slots(self) -> dict[str, Array]:
        return {}

    def mark(self) -> None:
        self.marks += 1
        assert self.marks == 1

    def unmark(self) -> None:
        self.marks -= 1
        assert not self.marks

    def load(self, params: Array, fill: Callable[[str, Array], None]) -> None:
        raise AssertionError("it has no slots")


class Desk:
    """One server with two parameters, all of whose events are written by hand.

    Gradients lie in `slots[worker][slot]`; the rule is p - g, so that one application shows.
    """

    def __init__(
        self,
        workers: int,
        mode: Mode | None = None,
        *,
        follower: bool = False,
        in_place: Sequence[bool] | None = None,
        clip_norm: float | None = None,
        **leader: Any,
    ) -> None:
        self.rule = ExactRule(1.0)
        buffers = HeapBuffers(buffer_count(workers), 2, np.dtype(np.float64))
        policy = (mode or Async()).policy(workers)
        batch = policy.batch(2, np.dtype(np.float64))
        self.store = Store(buffers, np.zeros(2), self.rule, batch=batch)
        self.slots = np.zeros((workers, 2, 2))
        self.landing = np.full((workers, 2), np.nan)
        # How far gradients are that arrive, where that can be seen.
        self.progress: dict[tuple[int, int], Progress] = {}
        memory = ServerMemory(
            gradient=lambda worker, slot: self.slots[worker, slot],
            landing=lambda worker: self.landing[worker],
            in_place=[True] * workers if in_place is None else in_place,
            progress=lambda worker, slot: self.progress.get((worker, slot)),
        )
        arguments = (workers, self.store, policy, memory)
        self.machine: Server
        if follower:
            self.machine = Follower(1, *arguments)
        else:
            self.machine = Leader(*arguments, clip_norm=clip_norm, **leader)
        self.policy = policy
        self._seq = [-1] * workers
        self._slot = [1] * workers
        self._release = [0] * workers

    @property
    def leader(self) -> Leader:
        assert isinstance(self.machine, Leader)
        return self.machine

    def hears(self, event: Any) -> list[Any]:
        """The machine's outputs; what a worker was answered, it releases with its next request."""
        out = self.machine.handle(event)
        for answer in out:
            if isinstance(answer, Answer) and answer.buffer != NO_BUFFER:
                copied = answer.buffer < 0
                self._release[answer.worker] |= RELEASE_COPY if copied else RELEASE_HOLD
        return out

    def begins_anew(self, worker: int) -> None:
        """Another one sends the worker's requests from now on."""
        self._seq[worker], self._slot[worker], self._release[worker] = -1, 1, 0

    def seq(self, worker: int) -> int:
        self._seq[worker] += 1
        return self._seq[worker]

    def push(
        self,
        worker: int,
        value: float = 1.0,
        *,
        version: int | None = None,
        finite: bool = True,
        want: bool = False,
        log: int = 0,
    ) -> list[Any]:
        """The worker pushes the gradient (value, 2 value), by default on the current version."""
        slot = self._slot[worker] = 1 - self._slot[worker]
        self.slots[worker, slot] = value, 2 * value
        read = self.store.version if version is None else version
        norm = float(np.hypot(value, 2 * value))
        release = self._take(worker) if want else 0
        seq = self.seq(worker)
        return self.hears(Push(worker, seq, slot, read, finite, norm, want, release, log))

    def pull(
        self, worker: int, *, pinned: bool = False, keep: bool = False, log: int = 0
    ) -> list[Any]:
        """The worker pulls; unless `keep`, it uses its present parameters no longer."""
        in_place = self.machine.memory.in_place[worker]
        release = self._take(worker) if in_place and not keep else 0
        return self.hears(Pull(worker, self.seq(worker), pinned, release, log))

    def streams(self, worker: int, slot: int) -> Progress:
        """Where the worker tells how far the gradient in a slot is; now nothing of it is there."""
        progress = self.progress[worker, slot] = Progress(memoryview(bytearray(STREAM_BYTES)), 2)
        return progress

    def _take(self, worker: int) -> int:
        release, self._release[worker] = self._release[worker], 0
        return release


def params_of(desk: Desk, answer: Answer) -> float:
    """The first parameter that the answer brought."""
    if answer.buffer < 0:
        return float(desk.landing[answer.worker, 0])
    return float(desk.store.buffer(answer.buffer)[0])
