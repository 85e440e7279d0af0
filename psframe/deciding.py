"""What becomes of every push: server 0 judges it, applies it, and puts it into the account."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from psframe.consistency import Policy, Verdict
from psframe.events import (
    NO_BUFFER,
    RELEASE_HOLD,
    RELEASE_NONE,
    Answer,
    Arrived,
    Decision,
    Output,
    Push,
    PushHandled,
    Reason,
    ToServer,
)
from psframe.marking import MarkingServer, Marks
from psframe.reads import Correcting
from psframe.server import SLOTS, ServerMemory
from psframe.stale import Rule, Stale, checked_factor
from psframe.store import Store
from psframe.work import Score

__all__ = ["DecidingServer"]

# Not looked up in the enums for every push.
_NONE, _TAKE = Reason.NONE, Verdict.TAKE

# Refused pushes in a row, as a multiple of W, after which the run has diverged.
_REFUSALS_PER_WORKER = 10


def _scales(pushes: Sequence[Push]) -> list[float]:
    """List the factors on gradients for a decision; none if all are 1."""
    scales = [push.scale for push in pushes]
    return [] if all(scale == 1.0 for scale in scales) else scales


class DecidingServer(MarkingServer):
    """A server that decides what becomes of pushes, its followers' too.

    Args:
        workers, store, policy, memory, correcting: as for `Server`.
        stale: judges stale gradients; None if all are applied as they are.
        servers: S; decisions are made for followers only if there are some.
        clip_norm: a push whose gradient has a larger norm is scaled down to it.
        max_updates, marks: as for `MarkingServer`.
        trace: make a `PushHandled` for every push.
        score: as for `WorkServer`.
    """

    def __init__(
        self,
        workers: int,
        store: Store,
        policy: Policy,
        memory: ServerMemory,
        *,
        correcting: Correcting | None,
        stale: Rule | None,
        servers: int,
        clip_norm: float | None,
        max_updates: int | None,
        trace: bool,
        score: Score | None,
        marks: Marks | None,
    ) -> None:
        super().__init__(
            workers,
            store,
            policy,
            memory,
            score,
            correcting,
            servers=servers,
            max_updates=max_updates,
            marks=marks,
        )
        self._trace = trace
        self._round: dict[int, Push] = {}
        # Pushes whose gradients are still arriving, by worker and slot, and which of them is being
        # applied already.
        self._arriving: dict[tuple[int, int], Push] = {}
        self._early: Push | None = None
        self._restless = policy.aggregates
        self._stale = stale
        self._clip_norm = clip_norm
        as_it_is = clip_norm is None and stale is None and correcting is None
        as_it_is = as_it_is and not store.per_worker
        self._in_parts = as_it_is and not (policy.aggregates or policy.gathers)
        self._plain = as_it_is and type(policy) is Policy and servers == 1

    def lend_snapshots(self, workers: Iterable[int]) -> None:
        """Have these read parameters on the store's device; see `Server`."""
        super().lend_snapshots(workers)
        self._plain = False  # in one go a snapshot is held for the host

    # ---- in one go -----------------------------------------------------------------------

    def handle(self, event: ToServer) -> list[Output]:
        """Take one event and return what follows from it; see `Server.handle`."""
        if (
            self._plain
            and type(event) is Push
            and event.want_params
            and event.finite
            and event.release == RELEASE_HOLD
            and not event.log
        ):
            out = self.push_pull(event.worker, event.seq, event.slot, event.version, event.arriving)
            if out is not None:
                if isinstance(out, list):
                    return out
                staleness, index, version = out
                worker, seq = event.worker, event.seq
                return [Answer(worker, seq, False, True, _NONE, version, staleness, index, version)]
        return super().handle(event)

    def push_pull(
        self, worker: int, seq: int, slot: int, version_read: int, arriving: bool
    ) -> tuple[int, int, int] | list[Output] | None:
        """Handle a push_pull as most are, in one go: Python is most of a small one's time.

        Of a push whose gradient is finite and in its slot, or still `arriving` there, and which
        gives back the snapshot that its worker holds. It comes to what the steps of the general way
        come to, in an asynchronous run of one server without leases, if nothing of its worker
        waits.

        Returns:
            If it was applied and nobody else is to hear of it, what it is answered with: its
            staleness, the snapshot's buffer, and the version; else what `handle` gives. None if it
            has to go the general way: then nothing has happened.
        """
        store, holds = self.store, self._hold
        version, held = store.version, holds[worker]
        if (
            held == NO_BUFFER  # also of one that has left, or is lost
            or self._inbox[worker]
            or seq <= self._last_seq[worker]
            or not 0 <= version_read <= version
            or not 0 <= slot < SLOTS
            or not self._plain
            or self.coder is not None
            or version + 1 == self._max_updates
            or self.stopped
            or self._early is not None
            or self._book.opened
        ):
            return None
        memory = self.memory
        if not arriving:
            index = store.replace(held, memory.gradient(worker, slot))
        else:
            there, grad = memory.progress(worker, slot), memory.gradient(worker, slot)
            if there is None:
                return None
            store.release(held)
            holds[worker] = NO_BUFFER
            store.begin()
            if store.follow(grad, there.words) < len(grad) or not there.good:
                push = Push(worker, seq, slot, version_read, True, 0.0, True, RELEASE_NONE, 0, True)
                self._early = push
                return super().handle(push)
            there.verdict()
            index = store.commit_and_hold()
        self._last_seq[worker] = seq
        self.ledger.received += 1
        clocks = self.policy.clocks
        clock = clocks[worker]
        clocks[worker] = clock + 1
        holds[worker] = index
        if index == NO_BUFFER:
            push = Push(worker, seq, slot, version_read, True, 0.0, True, RELEASE_NONE)
            self._refuse(push, self._blame(push), clock)
            self._serve_wanted(push)
            return self._finish()
        staleness = version - version_read
        version += 1
        self.ledger.count(_NONE)
        self._refusals = 0
        counts = self.staleness
        counts[staleness] = counts.get(staleness, 0) + 1
        if self._trace:
            handled = PushHandled(worker, clock, version_read, version, staleness, True)
            answer = Answer(worker, seq, False, True, _NONE, version, staleness, index, version)
            return [handled, answer]
        return staleness, index, version

    # ---- the general way -----------------------------------------------------------------

    def _received(self, push: Push, *, fenced: bool) -> None:
        if fenced:
            self.ledger.count_fenced()
            return
        self.ledger.received += 1
        if push.arriving:
            self._arriving[push.worker, push.slot] = push

    def _arrive(self, event: Arrived) -> None:
        """Apply what is there of a gradient; with its last part the push can be served.

        Nobody waits for it: what another worker's push publishes meanwhile makes the part in vain,
        and it is done again.
        """
        worker = event.worker
        push = self._arriving.get((worker, event.slot))
        if push is None:
            return  # the worker is gone
        inbox = self._inbox[worker]
        if inbox and inbox[0] is push and self._begin(push):
            self.store.extend(self.memory.gradient(worker, push.slot), event.end)
        if event.whole:
            self._complete(push, event.finite, event.norm)
            self._advance(worker)

    def _begin(self, push: Push) -> bool:
        """Begin to apply a push that is arriving, if it can be: alone, and as it is."""
        if self._early is None and self._in_parts and not self.stopped:
            self.store.begin()
            self._early = push
        return self._early is push

    def _complete(self, push: Push, finite: bool, norm: float) -> None:
        del self._arriving[push.worker, push.slot]
        push.arriving, push.finite, push.norm = False, finite, norm

    def _follow(self, push: Push) -> bool:
        """Apply what is there of a push that is arriving, where that can be seen; True if all is.

        As if `Arrived` had come with it. If the other side pauses, it is left to later ones.
        """
        there = self.memory.progress(push.worker, push.slot)
        if there is None or not self._begin(push):
            return False
        grad = self.memory.gradient(push.worker, push.slot)
        if self.store.follow(grad, there.words) < len(grad):
            return False
        self._complete(push, *there.verdict())
        return True

    def _serve_push(self, push: Push) -> bool:
        worker = push.worker
        if push.receipt is not None:
            return self._serve_wanted(push)
        if push.arriving and not self._follow(push):
            return False
        clock = self.policy.clocks[worker]
        if self.stopped:
            self._round.pop(worker, None)
            self._settle(push, Reason.STOPPED, clock)
            return self._serve_wanted(push)
        verdict = self.policy.offer(worker, current=push.version >= self.store.version)
        if verdict is not _TAKE:
            if verdict is Verdict.WAIT:
                return False
            self.policy.join(worker)
            if verdict is Verdict.LATE:
                self._refuse(push, Reason.LATE, clock)
                return self._serve_wanted(push)
        reason = self._judge(push) if verdict is _TAKE else Reason.STALE
        if reason is not _NONE:
            if self._early is push:
                self._forget_early()
            self._wake |= self.policy.refuse(worker)
            self._refuse(push, reason, clock)
            return self._serve_wanted(push)
        if self.policy.aggregates:
            self._round[worker] = push
            return False  # until the round closes
        self._apply(push, clock)
        return self._serve_wanted(push)

    def _judge(self, push: Push) -> Reason:
        """Say whether a push is to be applied, and find the factor on its gradient."""
        if not push.finite:
            return Reason.NON_FINITE
        staleness = self.store.version - push.version
        if not 0 <= staleness <= self.store.version:
            return Reason.BAD_VERSION
        clip, norm = self._clip_norm, push.norm
        if clip is not None and norm > clip:
            push.scale, norm = clip / norm, clip
        if self._stale is not None:
            norm = norm if self._stale.needs_norm else math.nan
            found = Stale(push.worker, self.workers, staleness, norm)
            factor = checked_factor(self._stale, found)
            if factor is None:
                return Reason.STALE
            push.scale *= factor
        return _NONE

    def _apply(self, push: Push, clock: int) -> None:
        worker, version = push.worker, self.store.version
        gather, gathered = self.policy.gathers, self.store.pending
        step = not gather or self.policy.gathered(worker)
        if self._early is push:
            good = self.store.commit()
        else:
            good = self._update(push, gather=gather, step=step)
        self._early = None
        if not good:
            left_out = gather and self.store.pending == gathered
            if left_out:
                self.policy.ungathered()  # its correction has made it useless: it is not in it
            self._wake |= self.policy.refuse(worker)
            self._refuse(push, self._blame(push), clock, step=not left_out)
            return
        if self._followers:
            self._out.append(Decision([(worker, push.seq)], step=step, scales=_scales([push])))
        self._wake |= self.policy.finish(worker)
        self._settle(push, _NONE, clock, version - push.version)
        if step:
            self._updated()

    def _blame(self, push: Push) -> Reason:
        """Say why an update is not finite: where workers do not judge, for its gradient perhaps."""
        grad = self.memory.gradient(push.worker, push.slot)
        return Reason.NON_FINITE_UPDATE if self.store.is_finite(grad) else Reason.NON_FINITE

    def _close_round(self, members: list[int]) -> None:
        pushes = [self._round.pop(worker) for worker in members]
        version = self.store.version
        reason = Reason.NONE
        if pushes:
            grads = [self.memory.gradient(p.worker, p.slot) for p in pushes]
            if not self.store.update_mean(grads, [p.scale for p in pushes]):
                reason = Reason.NON_FINITE_UPDATE
        if self._followers:
            decided = [(p.worker, p.seq) for p in pushes]
            self._out.append(Decision(decided, reason, round=True, scales=_scales(pushes)))
        for push in pushes:
            # The policy has closed the round: a member had one step fewer before it.
            clock = self.policy.clocks[push.worker] - 1
            if reason is not Reason.NONE:
                self._count_refusal(reason)
            self._settle(push, reason, clock, version - push.version)
        self._wake = True
        if self.store.version != version:
            self._updated()

    def _refuse(self, push: Push, reason: Reason, clock: int, *, step: bool = True) -> None:
        """Settle a push alone that makes no update, and tell the followers.

        With `step` what has been gathered before it is lost with it.
        """
        if self._followers:
            self._out.append(Decision([(push.worker, push.seq)], reason, step=step))
        self._count_refusal(reason)
        self._settle(push, reason, clock, self.store.version - push.version)

    def _count_refusal(self, reason: Reason) -> None:
        if reason is not Reason.LATE and reason is not Reason.STALE:
            self._refusals += 1
            self._diverge_at(self._refusals)

    def _diverge_at(self, refusals: int) -> None:
        if refusals >= _REFUSALS_PER_WORKER * self.workers:
            self.diverged = True
            self._stop()

    def _settle(self, push: Push, reason: Reason, clock: int, staleness: int = 0) -> None:
        """Put what became of a push into the ledger and into its receipt."""
        worker = push.worker
        applied = reason is _NONE
        version = self.store.version
        self.ledger.count(reason)
        if applied:
            self._refusals = 0
            self.staleness[staleness] = self.staleness.get(staleness, 0) + 1
        push.receipt = Answer(worker, push.seq, False, applied, reason, version, staleness)
        if self._trace and reason is not Reason.STOPPED:
            self._out.append(PushHandled(worker, clock, push.version, version, staleness, applied))
        if self._book.opened and reason is not Reason.STOPPED:
            self._step_done(worker, staleness if applied else None)

    def _apply_pending(self) -> None:
        """Make an update with what has been gathered, so that what counts as applied is."""
        if not self.store.pending or self._broken:
            return
        good = self.store.step()
        if self._followers:
            self._out.append(Decision([], _NONE if good else Reason.NON_FINITE_UPDATE))
        if good:
            self._updated()

    def _forget_early(self) -> None:
        self.store.abandon()
        self._early = None

    def _lose_pushes(self, worker: int) -> None:
        """Drop what a worker that is lost has pushed and was not applied."""
        self._round.pop(worker, None)
        for event in self._inbox[worker]:
            if isinstance(event, Push) and event.receipt is None:
                self.ledger.count(Reason.LOST)
        if self._early is not None and self._early.worker == worker:
            self._forget_early()
        for key in [key for key in self._arriving if key[0] == worker]:
            push = self._arriving.pop(key)
            if not any(event is push for event in self._inbox[worker]):
                self.ledger.count(Reason.LOST)  # the worker is lost because of this very push
