"""A server as a state machine without I/O: events in, events out.

What leader and followers share: one queue a worker, so that a worker's requests are handled in
the order in which it made them; pulls, and the holds that they take; fencing. A driver (MPI,
threads, the simulator) calls `handle` with each event and delivers what it returns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from psframe.coding import PullCoder, Traffic
from psframe.consistency import Policy
from psframe.errors import MessageError
from psframe.events import (
    ALL_REQUESTS,
    COPIED,
    NO_BUFFER,
    RELEASE_COPY,
    RELEASE_HOLD,
    Answer,
    GiveBack,
    LeaseRequest,
    Leave,
    Marked,
    Output,
    Pull,
    Push,
    RandomState,
    Reason,
    Report,
    Sent,
    ToServer,
)
from psframe.keeping import SLOT, Keeper
from psframe.layout import Array
from psframe.reads import Correcting
from psframe.state import Arrays, Fields
from psframe.store import Store, is_finite

__all__ = ["SLOTS", "Queued", "Server", "ServerMemory"]

# A worker has at most two pushes, each with a random state, two pulls and a lease request under
# way; a report, a block that it gives back, and its leave behind them; more is no worker of ours.
_QUEUE_MAX = 10
SLOTS = 2

Queued = Push | Pull | LeaseRequest | GiveBack | Report | RandomState | Leave
# Tuples made once, for `isinstance`.
_QUEUED = (Push, Pull, LeaseRequest, GiveBack, Report, RandomState, Leave)
_NUMBERED, _RELEASING = (Push, Pull, LeaseRequest), (Push, Pull)


class Progress(Protocol):
    """How far a gradient is that is still being written into its slot.

    Attributes:
        words: int64; the first is the number of elements that are there.
    """

    words: Array

    @property
    def good(self) -> bool:
        """Whether `verdict`, once it is all there, says that it is finite."""

    def verdict(self) -> tuple[bool, float]:
        """Take (finite, norm) of a gradient that is all there; it is followed no longer.

        Raises:
            MessageError: they are none.
        """


class ServerMemory:
    """Where the machine finds the bytes that events speak of.

    Attributes:
        gradient: (worker, slot) -> this shard's part of the gradient in that slot.
        landing: worker -> this shard's part of the worker's landing area, for copied pulls.
        in_place: by worker, whether it computes on snapshots in place (else its answers are
            sent, and a `Sent` gives the hold back).
        progress: (worker, slot) -> how far an arriving gradient is in that slot, if that can be
            seen there; None where `Arrived` alone tells.
    """

    def __init__(
        self,
        gradient: Callable[[int, int], Array],
        landing: Callable[[int], Array],
        in_place: Sequence[bool],
        progress: Callable[[int, int], Progress | None] = lambda worker, slot: None,
    ) -> None:
        self.progress = progress
        self.gradient = gradient
        self.landing = landing
        self.in_place = in_place


class Server(ABC):
    """The part of a server that leader and followers share.

    Args:
        workers: W.
        store: the snapshots of this shard.
        policy: who may go on.
        memory: where gradients lie and copied pulls go.
        correcting: corrects stale gradients, if any rule does.

    Attributes:
        coder: codes parameters on their way to workers; None if they go as they are.
        pushed: bytes of what has stood for gradients, and of themselves.
    """

    def __init__(
        self,
        workers: int,
        store: Store,
        policy: Policy,
        memory: ServerMemory,
        correcting: Correcting | None = None,
    ) -> None:
        self.workers = workers
        self.store = store
        self.policy = policy
        self._may_start: Callable[[int], bool] = policy.may_start  # with the next step
        self.memory = memory
        self._correcting = correcting
        self.coder: PullCoder | None = None
        # By worker, whether parameters that it is given must be in the host's memory.
        self._needs_host = [True] * workers
        self.pushed = [0, 0]
        self.stopped = False
        self.gone = [False] * workers  # left or lost
        self.lost = [False] * workers
        self._n_gone = 0
        self._leaving = [False] * workers  # a leave has arrived, and is the last request
        self._inbox: list[deque[Queued]] = [deque() for _ in range(workers)]
        self._blocked: set[int] = set()  # workers whose first request must wait
        self._wake = False  # whether some of them may be able to go on, or all have gone
        self._numbers = False  # whether there are followers, whose records are numbered
        self._restless = True  # whether any event may have such consequences
        self._last_seq = [-1] * workers
        self._hold = [NO_BUFFER] * workers
        self._landed = [False] * workers
        self._pinned = NO_BUFFER
        self._pinned_version = 0
        self.kept: Array | None = None
        self._keeper = Keeper(store, workers)
        # The leader's records: how many it has made, or this follower has handled.
        self.position = 0
        self._log_max: float = math.inf  # that a worker can have seen
        self._awaited: int | None = None  # the least position that a blocked request waits for
        self._out: list[Output] = []

    index = 0  # which server it is

    # The requests that this kind of server serves.
    _kinds: tuple[type, ...] = (Push, Pull, Leave)

    @property
    def all_gone(self) -> bool:
        """Whether every worker has left or is lost."""
        return self._n_gone == self.workers

    @property
    def outcome(self) -> Array:
        """What the run leaves of this shard: the parameters that are kept, or the last."""
        return self.store.params if self.kept is None else self.kept

    @property
    def traffic(self) -> Traffic:
        """Bytes that have gone between this server and the workers, as far as codecs had them."""
        pulled = Traffic() if self.coder is None else self.coder.traffic
        pushed, dense = self.pushed
        return Traffic(pushed, dense, pulled.pulled, pulled.pulled_dense)

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether nothing more is to come."""

    def last_request(self, worker: int) -> int:
        """The number of a worker's last request; -1 before any."""
        return self._last_seq[worker]

    @property
    def reads_gradients(self) -> bool:
        """Whether gradients are read on the host, also where the store is on a device."""
        correcting = self._correcting
        return self.policy.gathers or (correcting is not None and correcting.on_host)

    def send_from_device(self) -> None:
        """Have parameters stay on the store's device until somebody reads them in place.

        The driver sends the others from there. There is no coder.
        """
        assert self.coder is None, "it reads them on the host"
        self._needs_host = list(self.memory.in_place)

    def lend_snapshots(self, workers: Iterable[int]) -> None:
        """Have these read parameters in place on the store's device: its memory is open to them."""
        assert self.coder is None, "it reads them on the host"
        for worker in workers:
            self._needs_host[worker] = False

    def handle(self, event: ToServer) -> list[Output]:
        """Take one event and return what follows from it, in order.

        Raises:
            MessageError: the event is not legal now; nothing has been changed by it.
        """
        if isinstance(event, _QUEUED):
            self._queue(event)
        elif isinstance(event, Sent):
            self._release(event.worker, RELEASE_HOLD)
        else:
            self._other(event)
        return self._finish()

    def _finish(self) -> list[Output]:
        """Let those go on who can, and give what has come of the event."""
        if self._wake or self._restless:
            self._settle_all()
        out, self._out = self._out, []
        return self._number(out) if self._numbers else out

    # ---- for leader and follower to fill in ----------------------------------------------

    @abstractmethod
    def _serve(self, event: Queued) -> bool:
        """Handle the first request of its worker; False if it must wait."""

    @abstractmethod
    def _number(self, out: list[Output]) -> list[Output]:
        """Write into each answer how many records for the followers come before it.

        Called where `_numbers` is set: on a leader of several servers.
        """

    @abstractmethod
    def _other(self, event: ToServer) -> None:
        """Handle an event that does not queue."""

    @abstractmethod
    def _received(self, push: Push, *, fenced: bool) -> None:
        """Note that a push has arrived; fenced if its worker has left or is lost."""

    # ---- queues --------------------------------------------------------------------------

    def _queue(self, event: Queued) -> None:
        worker = event.worker
        if self.gone[worker]:
            if isinstance(event, Push):
                self._received(event, fenced=True)
            self._dismiss(worker)
            return
        inbox = self._inbox[worker]
        if self._leaving[worker] or len(inbox) >= _QUEUE_MAX or not isinstance(event, self._kinds):
            raise self._misplaced(event)
        if isinstance(event, _NUMBERED):
            if event.seq <= self._last_seq[worker]:
                seq = self._last_seq[worker]
                raise MessageError(f"worker {worker} sent request {event.seq} after {seq}")
            if isinstance(event, _RELEASING):
                self._check(event)
                if event.release:
                    # Released on arrival, not on handling: a waiting pull holds nothing up.
                    self._release(worker, event.release)
                if isinstance(event, Push):
                    self._received(event, fenced=False)
                    if event.coded is not None:
                        self.pushed[0] += len(event.coded)
                        self.pushed[1] += self.store.n_bytes
            self._last_seq[worker] = event.seq
        elif isinstance(event, Leave):
            self._leaving[worker] = True
        if inbox:
            inbox.append(event)
        elif not self._serve(event):
            inbox.append(event)
            self._blocked.add(worker)

    def _misplaced(self, event: Queued) -> MessageError:
        worker, kind = event.worker, type(event).__name__
        if not isinstance(event, self._kinds):
            return MessageError(f"worker {worker} sent {kind} to the wrong server")
        if self._leaving[worker]:
            return MessageError(f"worker {worker} sent {kind} after its leave")
        return MessageError(f"worker {worker} has more than {_QUEUE_MAX} requests under way")

    def _check(self, event: Push | Pull) -> None:
        worker, release = event.worker, event.release
        if event.log > self._log_max:
            # A follower would make it wait for what may never be.
            raise MessageError(f"worker {worker} has seen {event.log} records, of {self._log_max}")
        if (release & RELEASE_HOLD and self._hold[worker] == NO_BUFFER) or (
            release & RELEASE_COPY and not self._landed[worker]
        ):
            raise MessageError(f"worker {worker} releases what it does not hold")
        if isinstance(event, Push) and not 0 <= event.slot < SLOTS:
            raise MessageError(f"push from worker {worker}: slot {event.slot} is not 0 or 1")

    def _settle_all(self) -> None:
        while self._wake:
            self._wake = False
            for worker in sorted(self._blocked):
                self._advance(worker)

    def _advance(self, worker: int) -> None:
        inbox = self._inbox[worker]
        while inbox and self._serve(inbox[0]):
            inbox.popleft()
        if not inbox:
            self._blocked.discard(worker)

    def _update(self, push: Push, *, gather: bool = False, step: bool = True) -> bool:
        """Apply a push's gradient, or take it into the batch and perhaps make the update of that.

        Returns:
            False if a result is not finite: then nothing has been published.
        """
        grad = self.memory.gradient(push.worker, push.slot)
        correcting = self._correcting
        if correcting is not None:
            grad = correcting.correct(push.worker, push.version, grad)
        if gather:
            good = correcting is None or is_finite(grad)  # or it would spoil the others'
            if good:
                self.store.gather(push.worker, grad, push.scale)
                good = not step or self.store.step()
        else:
            good = self.store.update(grad, push.scale, push.worker)
        if correcting is not None:
            correcting.settled(good=good)
        return good

    # ---- pulls and holds -----------------------------------------------------------------

    def _serve_pull(self, event: Pull) -> bool:
        answer = Answer(event.worker, event.seq)
        if self.stopped:
            answer.stopped = True
            self._out.append(answer)
            return True
        return self._grant(answer, event.log, pinned=event.pinned)

    def _serve_wanted(self, event: Push) -> bool:
        """Answer a push that has its receipt, with the parameters if it wants them."""
        receipt = event.receipt
        assert receipt is not None
        if event.want_params and not self.stopped:
            return self._grant(receipt, event.log, after_push=True)
        receipt.stopped = self.stopped
        self._out.append(receipt)
        return True

    def _grant(
        self, answer: Answer, log: int, *, pinned: bool = False, after_push: bool = False
    ) -> bool:
        """Answer with the parameters; False if the worker may not have them yet.

        Args:
            answer: what is answered.
            log: the position that the worker has seen; the parameters are not of before it.
            pinned: give the pinned ones.
            after_push: it is a push that asks for them.
        """
        if log > self.position:
            self._awaited = log if self._awaited is None else min(self._awaited, log)
            return False
        worker = answer.worker
        if pinned and self._pinned == NO_BUFFER:
            return False
        if not (pinned or self._may_start(worker)):
            return False
        free = self._hold[worker] == NO_BUFFER
        if not free and (self._landed[worker] or not self.memory.in_place[worker]):
            # Both are in use: it releases one first; or what it was answered before has not left.
            return False
        answer.version = self._pinned_version if pinned else self.store.version
        mirror: Array | None = None
        if self.coder is not None:
            mirror = self._code(answer, self._source(pinned), pinned=pinned)
        if not free:
            # It still computes on a snapshot in place (a prefetch): one hold a worker.
            source = self._source(pinned) if mirror is None else mirror
            self.memory.landing(worker)[:] = source
            self._landed[worker] = True
            answer.buffer = COPIED
        else:
            index: int | None
            if mirror is not None:
                index = self.store.hold_copy(lambda out: np.copyto(out, mirror))
            else:
                on_host, store = self._needs_host[worker], self.store
                index = store.hold_again(self._pinned, on_host) if pinned else store.hold(on_host)
            assert index is not None, "a buffer a worker, two for updates and one for a pin"
            self._hold[worker] = answer.buffer = index
        if self._correcting is not None and not pinned:
            self._note_read(worker, answer.buffer, mirror, alone=after_push)
        self._out.append(answer)
        return True

    def _source(self, pinned: bool) -> Array:
        return self.store.buffer(self._pinned) if pinned else self.store.params

    def _note_read(self, worker: int, buffer: int, mirror: Array | None, *, alone: bool) -> None:
        """Have what the worker is given kept for the rule that compares it with what comes."""
        correcting, store = self._correcting, self.store
        assert correcting is not None, "there is such a rule"
        if mirror is None or buffer != COPIED:
            correcting.granted(worker, alone=alone, copied=None if mirror is None else buffer)
            return
        index = store.hold_copy(lambda out: np.copyto(out, mirror))
        correcting.granted(worker, alone=alone, copied=index)
        store.release(index)

    def _code(self, answer: Answer, params: Array, *, pinned: bool) -> Array | None:
        """Code parameters for a worker; what it decodes, or None if they go as they are."""
        coder, worker = self.coder, answer.worker
        assert coder is not None, "there is a codec"
        found = None if pinned else coder.encode(worker, params)
        if found is None:
            coder.dense(worker, params)
            return None
        answer.coded, mirror = found
        return mirror

    def _release(self, worker: int, release: int) -> None:
        if release & RELEASE_COPY:
            self._landed[worker] = False
        if release & RELEASE_HOLD and self._hold[worker] != NO_BUFFER:
            self.store.release(self._hold[worker])
            self._hold[worker] = NO_BUFFER
        if worker in self._blocked:
            self._wake = True

    def _pin(self) -> int:
        index = self.store.hold()
        assert index is not None, "one buffer is there for a pin"
        self._pinned = index
        self._pinned_version = self.store.version
        self._wake = True
        return self._pinned_version

    def _unpin(self, *, keep: bool = False) -> None:
        if keep:
            pinned = self._pinned != NO_BUFFER
            source = self.store.buffer(self._pinned) if pinned else self.store.params
            if self.kept is None or self._keeper.has(self.kept):
                self.kept = source.copy()
            else:
                self.kept[:] = source
        if self._pinned != NO_BUFFER:
            self.store.release(self._pinned)
            self._pinned = NO_BUFFER

    # ---- checkpoints ---------------------------------------------------------------------

    @property
    def marked(self) -> Mapping[str, Any]:
        """The arrays of the mark that is to be saved, by name.

        "params", "slot." and a name, "pinned", "kept": those that there are. All are as long as the
        shard, and written by nobody before the machine is given `Saved`.
        """
        return self._keeper.arrays

    def _keep(self, number: int, state: Mapping[str, Any]) -> Marked:
        self._keeper.keep(number, self._pinned, self.kept)
        return Marked(number, self.store.version, state)

    def restore(self, state: Mapping[str, Any], arrays: Arrays, begin: int) -> None:
        """Go on from a checkpoint, perhaps one of other numbers of servers and workers.

        Args:
            state: the leader's of then, whichever server this is.
            arrays: of all shards, joined.
            begin: where this shard begins.

        Raises:
            ValueError: a field is wrong, or an array is missing; this machine is of no use.
        """
        fields = Fields(state)
        version, names, end = fields.count("version"), arrays.names, begin + len(self.store.params)
        kept = fields.count_or_none("kept_version", version) is not None
        evaluation = fields.part("leases").part_or_none("evaluation")
        for name, there in (("params", True), ("kept", kept), ("pinned", evaluation is not None)):
            if (name in names) != there:
                which = "among them" if there else "not to be"
                raise ValueError(f"arrays are {sorted(names)}, expected {name!r} {which}")
        self.policy.restore(fields.part("policy"))

        def fill(name: str, out: Array) -> None:
            arrays.read(name if name == "params" else SLOT + name, begin, end, out)

        slots = [name.removeprefix(SLOT) for name in names if name.startswith(SLOT)]
        self.store.restore(version, slots, fill)
        if kept:
            self.kept = self.store.params.copy()
            arrays.read("kept", begin, end, self.kept)
        if evaluation is not None:
            self._pinned_version = evaluation.count("version", version)
            self._pinned = self.store.hold_copy(lambda out: arrays.read("pinned", begin, end, out))

    # ---- leaving -------------------------------------------------------------------------

    def _depart(self, worker: int) -> None:
        """Count the worker no longer, and give back what it holds."""
        if self.gone[worker]:
            return
        self.gone[worker] = True
        self._n_gone += 1
        # What is still being sent to one who leaves in order stays as it is, until a `Sent`.
        leaves_early = not self.memory.in_place[worker] and not self.lost[worker]
        self._release(worker, RELEASE_COPY if leaves_early else RELEASE_HOLD | RELEASE_COPY)
        if self._correcting is not None:
            self._correcting.forget(worker)
        if self.coder is not None:
            self.coder.forget(worker)
        self.policy.leave(worker)
        self._wake = True

    def _readmit(self, worker: int) -> None:
        """Count a worker that was lost as live again: somebody else, whose requests begin anew."""
        self.gone[worker] = self.lost[worker] = self._leaving[worker] = False
        self._n_gone -= 1
        self._last_seq[worker] = -1
        self._needs_host[worker] = True
        self.policy.rejoin(worker)

    def _dismiss(self, worker: int) -> None:
        """Tell a worker that counts as lost to end."""
        reason = Reason.LOST if self.lost[worker] else Reason.STOPPED
        self._out.append(Answer(worker, ALL_REQUESTS, stopped=True, reason=reason))
