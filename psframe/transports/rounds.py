"""Waiting at the beginning of a run for ranks that are at long work, such as reading a checkpoint.

All ranks gather a byte each, again and again, until everyone is ready. Who still works takes part
now and then, between two pieces of its work, and so shows that it gets on; it waits for nobody.
"""

from __future__ import annotations

import time

from psframe.transports.mpi import SETUP_BOUND_S, Gathering, Mesh

__all__ = ["Rounds"]

# So long nobody is silent; one that works shows that it gets on much more often.
_BOUND_S = SETUP_BOUND_S
_SHOWN = 8
_BUSY, _READY = b"\0", b"\1"


class Rounds:
    """One such wait; every rank makes it, before its work, and calls `wait` after it.

    Args:
        mesh: the ranks; of its collectives there are no others until `wait` has returned.
        what: all are waiting for, for the error.
    """

    def __init__(self, mesh: Mesh, what: str) -> None:
        self._mesh = mesh
        self._what = what
        self._due = time.monotonic() + _BOUND_S / _SHOWN
        self._gathering: Gathering | None = None

    def alive(self) -> None:
        """Show that this rank gets on; to be called between two pieces of its work.

        Raises:
            RankLost: some rank has died.
        """
        if self._gathering is not None:
            if not self._mesh.test(self._gathering.requests, self._what):
                return
            self._gathering = None
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _BOUND_S / _SHOWN
            self._gathering = self._mesh.start_all_gather(_BUSY)

    def wait(self) -> None:
        """Wait until every rank is ready.

        Raises:
            RankLost: some rank has died, or has not shown itself within the bound.
        """
        everyone = [_BUSY]
        while _BUSY in everyone:
            gathering, self._gathering = self._gathering, None
            if gathering is None:
                gathering = self._mesh.start_all_gather(_READY)
            self._mesh.complete(gathering.requests, _BOUND_S, self._what)
            everyone = gathering.rows()
