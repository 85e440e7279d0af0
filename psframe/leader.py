"""Server 0: it serves its shard, decides what becomes of every push, and owns the work.

How it decides is in `deciding`; here is who comes and goes, and how a run ends.
"""

from __future__ import annotations

from psframe.consistency import Policy
from psframe.deciding import DecidingServer
from psframe.errors import MessageError
from psframe.events import (
    NOBODY,
    Answer,
    Arrived,
    End,
    Finished,
    Forget,
    GiveBack,
    Gone,
    Joined,
    Lease,
    LeaseRequest,
    Leave,
    Log,
    Logged,
    Lost,
    Missing,
    Output,
    Pull,
    Push,
    RandomState,
    Record,
    Report,
    Saved,
    ShardSaved,
    Spans,
    Stop,
    ToServer,
    Withheld,
)
from psframe.marking import Marks
from psframe.reads import Correcting
from psframe.server import Queued, ServerMemory
from psframe.stale import Rule
from psframe.store import Store
from psframe.work import Score

__all__ = ["Leader", "Score"]


class Leader(DecidingServer):
    """The first server.

    Args:
        workers, store, policy, memory, correcting, stale, servers, clip_norm, max_updates, trace,
            score, marks: as for `DecidingServer`.
        respawn: lost workers that may be replaced, in all; 0 with several servers.

    Attributes:
        losses: the workers that have been lost, replaced or not.
        replaced: those of them in whose place another has joined.
        vacant: those of them that wait for a replacement, which the driver is to bring: `Joined` or
            `Missing` says what has come of it.
    """

    def __init__(
        self,
        workers: int,
        store: Store,
        policy: Policy,
        memory: ServerMemory,
        *,
        correcting: Correcting | None = None,
        stale: Rule | None = None,
        servers: int = 1,
        clip_norm: float | None = None,
        max_updates: int | None = None,
        trace: bool = False,
        score: Score | None = None,
        marks: Marks | None = None,
        respawn: int = 0,
    ) -> None:
        assert not (respawn and servers > 1), "followers do not readmit workers"
        super().__init__(
            workers,
            store,
            policy,
            memory,
            correcting=correcting,
            stale=stale,
            servers=servers,
            clip_norm=clip_norm,
            max_updates=max_updates,
            trace=trace,
            score=score,
            marks=marks,
        )
        self._numbers = servers > 1
        self._unfinished = set(range(1, servers))
        self._log_max = 0
        self._ended = False
        self._respawn = respawn
        self.losses: set[int] = set()
        self.replaced: set[int] = set()
        self.vacant: dict[int, int] = {}
        self._replacements = 0
        if max_updates == 0:
            self._stop()

    _kinds = (Push, Pull, LeaseRequest, GiveBack, Report, RandomState, Leave)

    @property
    def finished(self) -> bool:
        """Whether every worker has left or is lost, the followers have told all they had to, and
        no mark is under way."""
        if not (self.stopped and self._n_gone == self.workers):
            return False
        # Nobody waits for the checkpoints of a run that has failed.
        return not (self._unfinished or self._unsaved) or (self._broken and not self._followers)

    # ---- events --------------------------------------------------------------------------

    def _number(self, out: list[Output]) -> list[Output]:
        for event in out:
            if isinstance(event, (Answer, Lease)):
                event.log = self.position
            elif isinstance(event, Record):
                self.position += 1
        self._log_max = self.position
        return out

    def _serve(self, event: Queued) -> bool:
        if isinstance(event, Push):
            return self._serve_push(event)
        if isinstance(event, Pull):
            return self._serve_pull(event)
        if isinstance(event, LeaseRequest):
            return self._serve_lease(event)
        if isinstance(event, GiveBack):
            self._wake |= self._book.give_back_ahead(event.worker, event.seq)
            return True
        if isinstance(event, Report):
            self._report(event.worker, event.sums)
            return True
        if isinstance(event, RandomState):
            self._tell(event)
            return True
        if event.failure is not None and self.failure is None:
            self.failure = (event.worker, event.failure)
            self._stop()
        self._depart(event.worker)
        return True

    def _other(self, event: ToServer) -> None:
        if isinstance(event, (Log, Spans, Stop)):
            if event.worker != NOBODY and self.gone[event.worker]:
                return  # nothing more of it is believed
            if isinstance(event, Log):
                self._out.append(Logged(event.worker, event.sums))
            elif isinstance(event, Spans):
                self._out.append(event)
            else:
                self._stop()
        elif isinstance(event, Arrived):
            self._arrive(event)
        elif isinstance(event, Lost):
            self._lose(event.worker)
        elif isinstance(event, Joined):
            self._join(event.worker)
        elif isinstance(event, Missing):
            self._miss(event.worker)
        elif isinstance(event, Withheld):
            self.ledger.count_partial(event.worker, event.seq)
            self._diverge_at(event.in_a_row)
        elif isinstance(event, Saved):
            self._saved(event)
        elif isinstance(event, ShardSaved):
            self._shard_saved(event)
        elif isinstance(event, Finished):
            if not self._ended or event.server not in self._unfinished:
                raise MessageError(f"server {event.server} has finished before the end, or twice")
            self._unfinished.remove(event.server)
        else:
            raise MessageError(f"the first server cannot take {type(event).__name__}")

    def _settle_all(self) -> None:
        if self._wake:
            super()._settle_all()
        while self.policy.aggregates and not self.stopped:
            members = self.policy.due()
            if members is None:
                break
            self._close_round(members)
            super()._settle_all()
        # Where nobody is left who has done its work, that is the replacements' to do.
        if self.all_gone and not (self.vacant and all(self.lost)):
            self._stop()

    def end(self) -> list[Output]:
        """End the run from outside, as if a worker had called stop."""
        self._stop()
        self._settle_all()
        return self._take_out()

    # ---- the end -------------------------------------------------------------------------

    def _stop(self) -> None:
        if not self._ended:
            self._apply_pending()
        if self._ended:
            return
        self._ended = self.stopped = self._wake = True
        self._forget_early()
        self.vacant.clear()
        owed = self._mark_end()
        if not owed:
            self._unpin()
        if self._followers:
            self._out.append(End(owed))

    def _depart(self, worker: int) -> None:
        self._give_back_leases(worker)
        if self.policy.forgets and not self.gone[worker]:
            self.store.forget(worker)
            if self._followers:
                self._out.append(Forget(worker))
        super()._depart(worker)
        if not self.stopped:
            self._abandon_evaluation()

    def _lose(self, worker: int) -> None:
        if self.gone[worker]:
            # It had said good-bye here, but a follower may wait for a good-bye that never comes.
            if self._followers and not self.lost[worker]:
                self._out.append(Gone(worker))
            return
        self.lost[worker] = True
        self._lose_pushes(worker)
        self._draws.settle(worker, self._is_handled)
        self._inbox[worker].clear()
        self._blocked.discard(worker)
        if self._followers:
            self._out.append(Gone(worker))
        self._depart(worker)
        self._dismiss(worker)
        self.losses.add(worker)
        self._vacate(worker)

    # ---- replacements --------------------------------------------------------------------

    @property
    def may_respawn(self) -> bool:
        """Whether workers that are lost may be replaced."""
        return self._respawn > 0

    def _vacate(self, worker: int) -> None:
        """Have a lost worker replaced, if there may be one more replacement."""
        if self._respawn and not self.stopped:
            self._respawn -= 1
            self._replacements += 1
            self.vacant[worker] = self._replacements

    def _join(self, worker: int) -> None:
        if self.stopped:
            self._dismiss(worker)  # it has come too late
            return
        self._check_vacant(worker)
        del self.vacant[worker]
        self.replaced.add(worker)
        self._readmit(worker)
        self._book.rejoin(worker)

    def _miss(self, worker: int) -> None:
        if self.stopped:
            return
        self._check_vacant(worker)
        del self.vacant[worker]
        self._vacate(worker)
        self._wake = True  # there may be nobody left

    def _check_vacant(self, worker: int) -> None:
        if worker not in self.vacant:
            raise MessageError(f"nobody is expected in place of worker {worker}")
