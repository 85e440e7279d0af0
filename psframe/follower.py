"""The servers beside the first: each serves its shard and follows the leader's decisions.

A push is applied when its part is here and the leader's word of it; a pull waits only for the
worker's own earlier pushes and for what the mode asks of this shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from psframe.consistency import Policy
from psframe.errors import MessageError
from psframe.events import (
    Answer,
    Decision,
    End,
    Finished,
    Forget,
    Gone,
    Leave,
    Lost,
    Mark,
    Output,
    Pin,
    Pull,
    Push,
    Reason,
    Record,
    Saved,
    ShardSaved,
    ToServer,
    Withheld,
)
from psframe.reads import Correcting
from psframe.server import Queued, Server, ServerMemory
from psframe.state import Arrays
from psframe.store import Store

__all__ = ["Follower"]


@dataclass(slots=True)
class _Pending:
    """A decision whose parts have not all arrived.

    Attributes:
        decision: the leader's.
        round: rounds that it had closed before, in BSP.
        waiting: parts that have still to arrive.
        parts: the others, by worker.
        open: whether it has still to be carried out.
        missing: whether its part never comes.
    """

    decision: Decision
    round: int
    waiting: int
    parts: dict[int, Push] = field(default_factory=dict)
    open: bool = True
    missing: bool = False


class Follower(Server):
    """Server `index` > 0.

    Args:
        index: which server this is.
        workers, store, policy, memory, correcting: as for `Server`.
    """

    def __init__(
        self,
        index: int,
        workers: int,
        store: Store,
        policy: Policy,
        memory: ServerMemory,
        correcting: Correcting | None = None,
    ) -> None:
        super().__init__(workers, store, policy, memory, correcting)
        policy.follow()
        self.index = index
        self._may_start = self._may_start_here
        self._verdicts: list[deque[_Pending]] = [deque() for _ in range(workers)]
        self._rounds: deque[_Pending] = deque()  # closed in the leader's order
        self._closed = 0  # rounds, here
        # Where pushes are gathered, what is in a batch hangs on the order: the leader's.
        self._ordered: deque[_Pending | Forget] = deque()
        # What is to be carried out before the snapshot is pinned that the leader has pinned.
        self._pin_after: list[_Pending] | None = None
        # As for a mark, with its number; and the records after it, which must not be in it: they
        # wait for parts that are on their way, while each worker has two pushes under way at most.
        self._mark_after: list[_Pending] | None = None
        self._mark_number = 0
        self._later: deque[Record] = deque()
        self._awaits_mark = False  # the leader makes one more, after the end
        self._dead: set[int] = set()  # no part of theirs comes any more
        self._refusals = 0
        self._told = False  # that it has finished

    @property
    def finished(self) -> bool:
        """Whether the run is over, every worker has left and every decision is carried out."""
        saved = self._keeper.number is None and not self._awaits_mark
        done = not (any(self._verdicts) or self._ordered)
        return self.stopped and self.all_gone and done and saved

    def restore(self, state: Mapping[str, Any], arrays: Arrays, begin: int) -> None:
        """Go on from a checkpoint; see `Server.restore`."""
        super().restore(state, arrays, begin)
        self._closed = self.policy.rounds

    # ---- events --------------------------------------------------------------------------

    def _queue(self, event: Queued) -> None:
        worker = event.worker
        if worker in self._dead and not self.gone[worker]:
            # Decisions whose parts were not here have been given up, and this part would be taken
            # for that of another one. The leader's word of the loss is on its way.
            return
        super()._queue(event)

    def _received(self, push: Push, *, fenced: bool) -> None:
        """The leader keeps the ledger."""

    def _serve(self, event: Queued) -> bool:
        if isinstance(event, Push):
            return self._serve_push(event)
        if isinstance(event, Pull):
            return event.worker in self._dead or self._serve_pull(event)
        if isinstance(event, Leave):
            self._depart(event.worker)
            self._mourn(event.worker)  # should it have kept a part back
            return True
        raise MessageError(f"server {self.index} cannot take {type(event).__name__}")

    def _number(self, out: list[Output]) -> list[Output]:
        return out  # none follow this one

    def _other(self, event: ToServer) -> None:
        if isinstance(event, Lost):
            if not self.gone[event.worker]:
                self._out.append(event)  # the leader may not have noticed
                self._mourn(event.worker)
        elif isinstance(event, Record):
            if self._mark_after is None:
                self._record(event)
                return
            # As if it were still on its way, but that a worker counts as dead.
            self._later.append(event)
            if isinstance(event, Gone):
                self._mourn(event.worker)
        elif isinstance(event, Saved):
            self._keeper.let_go(event.number)
            self._out.append(ShardSaved(self.index, event.number, event.entry))
        else:
            raise MessageError(f"server {self.index} cannot take {type(event).__name__}")

    def _record(self, event: Record) -> None:
        """Handle the next record of the leader, and let those go on who wait for it."""
        self.position += 1
        if self._awaited is not None and self._awaited <= self.position:
            self._awaited = None
            self._wake = True
        if isinstance(event, Decision):
            self._decide(event)
        elif isinstance(event, Forget):
            self._ordered.append(event)
        elif isinstance(event, End):
            self.stopped = self._wake = True
            self._awaits_mark = event.mark
            if not event.mark:
                self._pin_after = None
                self._unpin()
        elif isinstance(event, Pin):
            self._pin_after = self._undone() if event.on else None
            if not event.on:
                self._unpin(keep=event.keep)
        elif isinstance(event, Mark):
            self._mark_number = event.number
            self._mark_after = self._undone()
        else:
            self._lose(event.worker)

    def _settle_all(self) -> None:
        super()._settle_all()
        while (
            self._give_up()
            or self._take_ordered()
            or self._pin_now()
            or self._mark_now()
            or self._close_round()
        ):
            super()._settle_all()
        if self.finished and not self._told:
            self._told = True
            self._out.append(Finished(self.index))

    @property
    def _decided(self) -> int:
        """Rounds that the leader has closed, as far as this server has heard."""
        return self._closed + len(self._rounds)

    def _may_start_here(self, worker: int) -> bool:
        # The leader may have moved the worker's clock for its own reasons (a lease that it waited
        # for). What it has closed before this pull is applied first, so that the pull brings
        # the same round of every shard; a round that the worker takes part in later is not
        # waited for, because its part may be queued behind this very pull.
        verdicts = self._verdicts[worker]
        before = verdicts[0].round if verdicts else self._decided
        return self._closed >= before and self.policy.may_start(worker)

    def _undone(self) -> list[_Pending]:
        """List the decisions that have still to be carried out."""
        ordered = (p for p in self._ordered if isinstance(p, _Pending))
        return [*self._rounds, *ordered, *(p for verdicts in self._verdicts for p in verdicts)]

    def _pin_now(self) -> bool:
        """Pin the snapshot once it has in it whatever the leader's has.

        In BSP it is that very round; otherwise a few later pushes may be in it as well.
        """
        if self._pin_after is None or any(pending.open for pending in self._pin_after):
            return False
        self._pin_after = None
        self._pin()
        return True

    def _mark_now(self) -> bool:
        """Keep the shard once it has in it whatever the leader's mark has; then go on.

        It has nothing else in it: what the leader decided later is not known here before.
        """
        if self._mark_after is None or any(pending.open for pending in self._mark_after):
            return False
        self._mark_after = None
        self._awaits_mark = False
        self._out.append(self._keep(self._mark_number, {"version": self.store.version}))
        if self.stopped:
            self._unpin()
        while self._later and self._mark_after is None:
            self._record(self._later.popleft())
        return True

    # ---- pushes --------------------------------------------------------------------------

    def _decide(self, decision: Decision) -> None:
        pending = _Pending(decision, self._decided, waiting=len(decision.members))
        if decision.round:
            self._rounds.append(pending)
        elif self.policy.gathers:
            self._ordered.append(pending)
        for worker, _ in decision.members:
            self._verdicts[worker].append(pending)
            if worker in self._blocked:
                self._wake = True

    def _serve_push(self, push: Push) -> bool:
        worker = push.worker
        if push.receipt is not None:
            return worker in self._dead or self._serve_wanted(push)
        if not self._verdicts[worker]:
            if not self.stopped:
                return False
            self._settle(push, Reason.STOPPED)
            return self._serve_wanted(push)
        pending = self._verdicts[worker][0]
        if worker in pending.parts:
            return False  # until the round closes
        if self._ordered and self._ordered[0] is not pending:
            return False
        pending.parts[worker] = push
        pending.waiting -= 1
        decision = pending.decision
        if decision.round:
            return False
        self._verdicts[worker].popleft()
        pending.open = False
        if self._ordered:
            self._ordered.popleft()
            self._wake = True
        self._apply(push, pending, decision)
        return self._serve_wanted(push)

    def _apply(self, push: Push, pending: _Pending, decision: Decision) -> None:
        worker = push.worker
        reason = decision.reason
        if reason is not Reason.NONE:
            self._discard(worker, pending)
            if reason is Reason.NON_FINITE_UPDATE and decision.step:
                self.store.drop_batch()
        else:
            push.scale = decision.scales[0] if decision.scales else 1.0
            if not self._update(push, gather=self.policy.gathers, step=decision.step):
                reason = Reason.NON_FINITE_UPDATE
                if decision.step and self.store.pending:
                    self.store.step()  # of the others in its batch
            self._note(push, reason)
            self._wake |= self.policy.finish(worker)
        self._settle(push, reason)

    def _discard(self, worker: int, pending: _Pending) -> None:
        """Count a step whose push the leader has not applied."""
        if pending.decision.reason is Reason.LATE:
            self.policy.join(worker, pending.round)
        else:
            self._wake |= self.policy.refuse(worker)
            # In BSP it belongs to the leader's round of that moment, which may be ahead of ours.
            self.policy.join(worker, pending.round + 1)

    def _take_ordered(self) -> bool:
        """Carry out what is next in the leader's order, if it waits for no part."""
        first = self._ordered[0] if self._ordered else None
        if isinstance(first, Forget):
            self.store.forget(first.worker)
        elif first is not None and (first.missing or not first.decision.members):
            first.open = False
            if first.decision.reason is Reason.NON_FINITE_UPDATE:
                self.store.drop_batch()
            elif first.decision.reason is Reason.NONE and first.decision.step:
                self.store.step()
        else:
            return False
        self._ordered.popleft()
        self._wake = True
        return True

    def _close_round(self) -> bool:
        """Carry out the leader's next round if all of its parts are here or given up."""
        if not self._rounds or self._rounds[0].waiting or self._awaits_refused():
            return False
        pending = self._rounds.popleft()
        pending.open = False
        self._closed += 1
        reason = pending.decision.reason
        members = [worker for worker, _ in pending.decision.members]
        pushes = [pending.parts[w] for w in members if w in pending.parts]
        if pushes and reason is Reason.NONE:
            grads = [self.memory.gradient(p.worker, p.slot) for p in pushes]
            scales = dict(zip(members, pending.decision.scales, strict=False))
            if not self.store.update_mean(grads, [scales.get(p.worker, 1.0) for p in pushes]):
                reason = Reason.NON_FINITE_UPDATE
            for push in pushes:
                self._note(push, reason)
        self.policy.close(members)
        for push in pushes:
            self._verdicts[push.worker].popleft()
            self._settle(push, reason)
        self._wake = True
        return True

    def _awaits_refused(self) -> bool:
        """Whether a push that the leader has refused before its next round has still to come.

        A pull of that worker's may come before it, which the leader has answered before the round.
        """
        for verdicts in self._verdicts:
            if verdicts and verdicts[0].round == self._closed:
                decision = verdicts[0].decision
                if not decision.round and decision.reason is not Reason.LATE:
                    return True
        return False

    def _note(self, push: Push, reason: Reason) -> None:
        """Tell the leader of a part that could not be applied here."""
        if reason is Reason.NONE:
            self._refusals = 0
        else:
            self._refusals += 1
            self._out.append(Withheld(self.index, push.worker, push.seq, self._refusals))

    def _settle(self, push: Push, reason: Reason) -> None:
        push.receipt = Answer(
            push.worker,
            push.seq,
            applied=reason is Reason.NONE,
            reason=reason,
            push_version=self.store.version,
        )

    # ---- losses --------------------------------------------------------------------------

    def _mourn(self, worker: int) -> None:
        """Note that nothing more will come of the worker."""
        self._dead.add(worker)
        self._wake = True

    def _give_up(self) -> bool:
        """Carry out, without their parts, the decisions whose parts will never come."""
        found = False
        for worker in sorted(self._dead):
            verdicts = self._verdicts[worker]
            while verdicts and not self._inbox[worker] and worker not in verdicts[0].parts:
                found = True
                pending = verdicts.popleft()
                pending.waiting -= 1
                seq = dict(pending.decision.members)[worker]
                if pending.decision.reason is Reason.NONE:
                    self._out.append(Withheld(self.index, worker, seq, 0))
                if pending.decision.round:
                    continue
                if self.policy.gathers:
                    pending.missing = True  # and carried out when it is its turn
                else:
                    pending.open = False
                if not self.policy.live[worker]:
                    continue
                if pending.decision.reason is Reason.NONE:
                    self._wake |= self.policy.finish(worker)
                else:
                    self._discard(worker, pending)
        return found

    def _lose(self, worker: int) -> None:
        if self.gone[worker]:
            return
        self.lost[worker] = True
        self._mourn(worker)
        # What the leader decided of it is carried out with the parts that are here; what it
        # did not decide is discarded, and what is decided of it without a part is given up.
        self._advance(worker)
        self._inbox[worker].clear()
        self._blocked.discard(worker)
        self._depart(worker)
        self._dismiss(worker)
