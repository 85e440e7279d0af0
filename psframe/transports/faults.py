"""What MPI knows of the dead.

Under `mpirun --with-ft ulfm` Open MPI tells of a process that has died by failing the calls that
have to do with it, and those that might have: a receive from any source fails once with
MPI_ERR_PROC_FAILED_PENDING, stays active, and fails no more once the failure is acknowledged. All
of it happens in exceptions; a call that succeeds costs nothing more. An MPI without such a thing
reports nothing here, and its launcher ends the job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from psframe.errors import RankLost

__all__ = ["Faults", "NoFaults", "fault_tolerant"]


def fault_tolerant() -> bool:
    """Whether MPI was started so that it goes on without those who die (`--with-ft ulfm`)."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "") in ("1", "true")  # noqa: SIM112 - theirs


class Faults:
    """The dead of one communicator, as far as MPI has noticed.

    Args:
        comm: an mpi4py communicator whose errors are returned.

    Attributes:
        dead: their ranks in it.
    """

    def __init__(self, comm: Any) -> None:
        self.dead: set[int] = set()
        self._comm = comm

    def learn(self) -> list[int]:
        """Acknowledge all failures; give the ranks that were not known to be dead."""
        self._comm.Ack_failed()
        group = self._comm.Get_failed()
        if not group.size:
            return []
        ranks = set(group.Translate_ranks(list(range(group.size)), self._comm.group))
        new = sorted(ranks - self.dead)
        self.dead |= ranks
        return new

    def stir(self) -> set[int]:
        """Let MPI get on, so that it notices deaths; give the dead."""
        with contextlib.suppress(RuntimeError):  # MPI's, if it has noticed one
            self._comm.Iprobe()
        self.learn()
        return self.dead

    def explain(self, error: Exception) -> list[int]:
        """Learn why a call of MPI has failed; give the ranks that were not known to be dead.

        Raises:
            Exception: the error itself, if nobody is dead.
        """
        try:
            new = self.learn()
        except Exception as unknown:  # an MPI that has no such calls
            raise error from unknown
        if not self.dead:
            raise error
        return new

    def lost(self, names: Sequence[int], what: str) -> RankLost:
        """Make the error of a step for which every rank is needed, and some are dead."""
        ranks = [names[rank] for rank in sorted(self.dead)]
        who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {ranks} have"
        return RankLost(f"{who} died; {what} needs every rank")


class NoFaults(Faults):
    """Of a process that is none of MPI's, whatever becomes of it."""

    def __init__(self) -> None:
        super().__init__(None)

    def learn(self) -> list[int]:
        """Give nobody."""
        return []
