"""What server 0 does about checkpoints: when to make one, and what is in it.

A *mark* is a cut through the run: all that has been decided before it is in it, and nothing else.
Every server keeps its shard as it is there while updates go on, and its driver writes it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from psframe.consistency import Policy
from psframe.draws import Draws, read_draws
from psframe.errors import MessageError
from psframe.events import (
    NO_BUFFER,
    Failure,
    Mark,
    Output,
    Push,
    RandomState,
    Saved,
    ShardSaved,
    ShardsSaved,
)
from psframe.ledger import LedgerBook
from psframe.reads import Correcting
from psframe.server import ServerMemory
from psframe.state import Arrays, Fields, plain_number
from psframe.store import Store
from psframe.work import Score, WorkServer

__all__ = ["MarkingServer", "Marks"]


@dataclass(frozen=True)
class Marks:
    """When a run marks itself for checkpoints, beside when its driver asks for it.

    Args:
        every: after so many updates; None for never.
        at_end: when the run is over without a failure.
        at_interrupt: when it is over because a worker's `work` was interrupted.

    Raises:
        ValueError: `every` is not 1 or more.
    """

    every: int | None = None
    at_end: bool = False
    at_interrupt: bool = False

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"marks: expected one every 1 or more updates, got {self.every}")


class MarkingServer(WorkServer):
    """A server that owns the work and keeps the account of it, and marks both for checkpoints.

    Args:
        workers, store, policy, memory, score: as for `WorkServer`.
        servers: S.
        max_updates: the run is over at this version.
        marks: when it marks itself.

    Attributes:
        ledger: the account of every push.
        staleness: count of applied pushes by staleness.
        diverged: whether 10 W pushes in a row were refused.
        failure: (worker, failure) of the worker whose `work` raised first.
        marks_skipped: marks that were not made because one was under way.
    """

    def __init__(
        self,
        workers: int,
        store: Store,
        policy: Policy,
        memory: ServerMemory,
        score: Score | None,
        correcting: Correcting | None = None,
        *,
        servers: int,
        max_updates: int | None,
        marks: Marks | None,
    ) -> None:
        super().__init__(workers, store, policy, memory, score, correcting, followers=servers > 1)
        self.ledger = LedgerBook()
        self.staleness: dict[int, int] = {}
        self.diverged = False
        self.failure: tuple[int, Failure] | None = None
        self.marks_skipped = 0
        self._refusals = 0
        self._servers = servers
        self._limit = max_updates
        self._marks = Marks() if marks is None else marks
        self._n_marks = 0
        self._unsaved: set[int] = set()  # servers that have still to save the mark under way
        self._entries: dict[int, str] = {}
        # The state at the end, for a mark that is to be made when the one under way is saved.
        self._owed: dict[str, Any] | None = None
        # The version that the run began with, if at its end there need be no mark of that.
        self._began_at = 0 if max_updates == 0 else None
        self._draws = Draws()
        self._mark_soon = False  # when the batch is complete: what is in it is not in a mark
        self._max_updates: int | None = None
        self._set_due()

    @property
    def _broken(self) -> bool:
        """Whether the run has failed or diverged, and was not just interrupted."""
        failed = self.failure is not None and not self.failure[1].interrupted
        return failed or self.diverged

    # ---- when ------------------------------------------------------------------------------

    @property
    def marking(self) -> bool:
        """Whether a mark is under way: some server has still to save it."""
        return bool(self._unsaved)

    def mark(self) -> list[Output]:
        """Mark the run as it is, as `Marks` does; nothing, if a mark is under way or the run over.

        Returns:
            What follows from it, in order; as `handle`.
        """
        if not self.stopped and not self._mark_soon:
            self._mark_soon = self.store.pending > 0
            if not self._mark_soon:
                self._mark()
        return self._take_out()

    def _take_out(self) -> list[Output]:
        out, self._out = self._out, []
        return self._number(out) if self._followers else out

    def _mark(self, state: Mapping[str, Any] | None = None) -> None:
        """Mark the run as it is or, once it is over, as it was at its end."""
        if self._unsaved:
            self.marks_skipped += 1
            return
        number = self._n_marks
        self._n_marks += 1
        self._unsaved = set(range(self._servers))
        self._entries = {}
        if self._followers:
            self._out.append(Mark(number))
        self._out.append(self._keep(number, self.state() if state is None else state))

    def mark_end(self) -> None:
        """Have the end of the run marked, whatever was said before."""
        self._marks = replace(self._marks, at_end=True)

    def mark_interrupt(self) -> None:
        """Have the end of the run marked, too, should a worker's `work` be interrupted."""
        self._marks = replace(self._marks, at_interrupt=True)

    def _mark_end(self) -> bool:
        """Mark the end of the run, if that is wanted; True if it is to be made later.

        Then the snapshot that is pinned stays so until it is.
        """
        marks, failure = self._marks, self.failure
        wanted = marks.at_end if failure is None else marks.at_interrupt and failure[1].interrupted
        if not wanted or self.diverged or self.store.version == self._began_at:
            return False
        if self._unsaved:
            # Now: what is answered from here on, because it is over, is not of the run.
            self._owed = self.state()
        else:
            self._mark()
        return self._owed is not None

    def _set_due(self) -> None:
        """Set the next version at which something is due: a mark, or the end."""
        every, limit = self._marks.every, self._limit
        due = None if every is None else (self.store.version // every + 1) * every
        self._max_updates = limit if due is None or (limit is not None and limit < due) else due

    def _updated(self) -> None:
        """Do what is due after an update that has been accounted for."""
        version, every = self.store.version, self._marks.every
        if self._mark_soon:
            self._mark_soon = False
            self._mark()
        if version != self._max_updates:
            return
        ends = version == self._limit
        if every is not None and version % every == 0 and not (ends and self._marks.at_end):
            self._mark()
        if ends:
            self._stop()
        self._set_due()

    @abstractmethod
    def _stop(self) -> None:
        """End the run."""

    # ---- what was saved --------------------------------------------------------------------

    def _saved(self, event: Saved) -> None:
        self._keeper.let_go(event.number)
        self._unsaved.discard(0)
        self._after_saved()

    def _shard_saved(self, event: ShardSaved) -> None:
        server = event.server
        if event.number != self._n_marks - 1 or server not in self._unsaved:
            raise MessageError(f"server {server} has saved mark {event.number}, which it has not")
        self._unsaved.discard(server)
        self._entries[server] = event.entry
        if len(self._entries) == self._servers - 1:
            entries = [entry for _, entry in sorted(self._entries.items())]
            self._out.append(ShardsSaved(event.number, entries))
        self._after_saved()

    def _after_saved(self) -> None:
        if self._owed is not None and not self._unsaved:
            state, self._owed = self._owed, None
            self._mark(state)
            self._unpin()

    # ---- random numbers --------------------------------------------------------------------

    def _tell(self, event: RandomState) -> None:
        self._draws.tell(event.worker, event.seq, event.numbers, self._is_handled)

    def _is_handled(self, worker: int, seq: int) -> bool:
        return self._last_seq[worker] >= seq and not any(
            isinstance(event, Push) and event.seq == seq and event.receipt is None
            for event in self._inbox[worker]
        )

    # ---- the state -------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Give the run's state as plain data, fit for JSON: with the arrays all that is to come.

        What has not been decided is not in it: gradients under way are computed again.
        """
        return {
            "version": self.store.version,
            "policy": self.policy.state(),
            "leases": self._book.state(pinned=self._pinned != NO_BUFFER),
            "ledger": self.ledger.state(),
            "staleness": [list(item) for item in sorted(self.staleness.items())],
            "epoch_staleness": list(self._epoch_staleness),
            "refusals": self._refusals,
            "best": plain_number(self._best),
            "kept_version": self.kept_version,
            "random": self._draws.state(self._is_handled),
        }

    def restore(self, state: Mapping[str, Any], arrays: Arrays, begin: int) -> None:
        """Go on from a state, before anything else; see `Server.restore`."""
        fields = Fields(state)
        self._draws.restore(read_draws(fields))
        self.ledger.restore(fields.part("ledger"))
        self.staleness = {row[0]: row[1] for row in fields.rows("staleness", 2)}
        if sum(self.staleness.values()) != self.ledger.ledger().applied:
            raise fields.bad("staleness", "as many pushes as the ledger says were applied")
        total, count = fields.pair("epoch_staleness")
        self._epoch_staleness = [total, count]
        # Not so many that the first one refused would be the end.
        self._refusals = min(fields.count("refusals"), 9 * self.workers)
        self._best = fields.number("best")
        if math.isnan(self._best):
            raise fields.bad("best", "a number")
        version = fields.count("version")
        self.kept_version = fields.count_or_none("kept_version", version)
        self._book.restore(fields.part("leases"), version)
        super().restore(state, arrays, begin)
        self._began_at = version
        if self._limit is not None and version >= self._limit:
            self._stop()
        self._set_due()
