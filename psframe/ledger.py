"""The account of every push: what was received, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from psframe.events import Reason
from psframe.state import Fields

__all__ = ["Ledger", "LedgerBook"]

_REFUSED = (Reason.NON_FINITE, Reason.NON_FINITE_UPDATE, Reason.BAD_VERSION)


@dataclass(frozen=True)
class Ledger:
    """received = applied + refused + dropped + lost + stopped, always.

    Attributes:
        received: pushes that reached server 0.
        applied: pushes that made, or were part of, an update.
        refused: not finite, or of an unknown version, or from a worker that counts as lost.
        dropped: left out by a rule: late, or too stale.
        lost: received, but their worker was lost before they were applied.
        stopped: came after the end of the run.
        partial: applied by server 0 but not by every other server.
        reasons: count by reason, of the pushes that were not applied.
    """

    received: int = 0
    applied: int = 0
    refused: int = 0
    dropped: int = 0
    lost: int = 0
    stopped: int = 0
    partial: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Give the counts as plain data."""
        return {**vars(self), "reasons": dict(self.reasons)}


class LedgerBook:
    """Counts while the run goes on."""

    def __init__(self) -> None:
        self.received = 0
        self._by_reason = [0] * len(Reason)
        self._fenced = 0
        self._partial: set[tuple[int, int]] = set()
        self._partial_before = 0  # in the run that this one goes on from

    def count(self, reason: Reason) -> None:
        """Count what became of one received push."""
        self._by_reason[reason] += 1

    def count_fenced(self) -> None:
        """Count a push received from a worker that counts as lost."""
        self.received += 1
        self._fenced += 1

    def count_partial(self, worker: int, seq: int) -> None:
        """Note that a push is missing in some shard; twice the same push counts once."""
        self._partial.add((worker, seq))

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint is to have of it: pushes that have not been handled are not in it.

        They are lost with the run, and would be received again.
        """
        by_reason = {reason.name.lower(): self._by_reason[reason] for reason in Reason}
        partial = self._partial_before + len(self._partial)
        return {"by_reason": by_reason, "fenced": self._fenced, "partial": partial}

    def restore(self, fields: Fields) -> None:
        """Go on from a state.

        A reason that is missing is one that the psframe which wrote it did not know, so 0.

        Raises:
            ValueError: a field is wrong, or there is a reason that this psframe does not know.
        """
        counts = fields.part("by_reason")
        names = {reason: reason.name.lower() for reason in Reason}
        unknown = sorted(set(counts) - set(names.values()))
        if unknown:
            raise counts.bad(unknown[0], "no such reason; a later psframe may know it")
        self._by_reason = [counts.count(n) if n in counts else 0 for n in names.values()]
        self._fenced = fields.count("fenced")
        self._partial_before = fields.count("partial")
        self.received = sum(self._by_reason) + self._fenced

    def ledger(self) -> Ledger:
        """Close the account as it stands."""
        by_reason = self._by_reason
        reasons = {r.text: by_reason[r] for r in Reason if r is not Reason.NONE and by_reason[r]}
        if self._fenced:
            reasons["fenced"] = self._fenced
        return Ledger(
            received=self.received,
            applied=by_reason[Reason.NONE],
            refused=sum(by_reason[r] for r in _REFUSED) + self._fenced,
            dropped=by_reason[Reason.LATE] + by_reason[Reason.STALE],
            lost=by_reason[Reason.LOST],
            stopped=by_reason[Reason.STOPPED],
            partial=self._partial_before + len(self._partial),
            reasons=reasons,
        )
