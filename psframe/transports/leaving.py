"""The end of a program some of whose ranks were lost, or may be: MPI_Finalize waits for nobody.

It would for ranks that are stopped, and Open MPI's for those that die while others are in it. So
the ranks meet before it. Rank 0 ends those on its node that will not come, and lets the others go
on when MPI knows that they are dead; if it does not, it aborts the job.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psframe.transports.faults import Faults, fault_tolerant
from psframe.transports.mpi import (  # type: ignore[attr-defined]
    MPI,
    SETUP_BOUND_S,
    TAG_END,
    Mesh,
)
from psframe.transports.processes import Processes
from psframe.transports.watch import Watch

__all__ = ["part", "part_alone"]

# Between the death of a process and the moment when MPI knows of it.
_LEARN_BOUND_S = 2.0
# MPI_Finalize takes a tenth of a second once every rank has come to it. Now and then Open MPI's
# goes on for ever after a death; so the process is ended by a signal, which an MPI that tolerates
# deaths does not mind.
_FINALIZE_BOUND_S = 5

_WHAT_NOW = {True: "the job is aborted", False: "this rank ends without them"}

_BYTE = bytearray(1)  # which says nothing but that it has come

_log = logging.getLogger("psframe")


@dataclass
class _Absent:
    """A rank that will not come, unless it has come back."""

    rank: int
    name: int
    has_replied: Callable[[], bool]
    faults: Faults
    processes: Processes

    def end(self) -> None:
        """End its process, if it is on this node."""
        self.processes.kill(self.rank)

    @property
    def is_dead(self) -> bool:
        """Whether MPI knows that it is dead."""
        return self.rank in self.faults.stir()


# What the end of this process has to do with. MPI is one a process, and so are these: the last
# run's ranks, and those that will not come, by name, with what knows of them.
_last: list[Mesh] = []
_absent: list[_Absent] = []


def part(mesh: Mesh, absent: Mapping[int, Callable[[], bool]]) -> None:
    """Close a run's mesh, and see to the end of the program.

    Args:
        mesh: the run's.
        absent: on rank 0, the ranks that have not replied and are not known to be dead, and
            whether they have replied meanwhile.
    """
    watch = mesh.watch
    if not (watch.lost or fault_tolerant()):
        mesh.close()
        return
    if isinstance(watch, Watch):
        watch.left_behind = True  # of whom the kernel tells until the end
        for rank, has_replied in absent.items():
            name, faults = mesh.names[rank], watch.faults
            _absent.append(_Absent(rank, name, has_replied, faults, watch.processes))
    mesh.close(keep=True)
    _forget_last()
    _last[:] = [mesh]
    atexit.unregister(_leave)  # once is enough
    atexit.register(_leave)


def _forget_last() -> None:
    """Let the processes of the run before go, but for those that are to be ended."""
    for before in _last:
        watch = before.watch
        if isinstance(watch, Watch) and all(
            one.processes is not watch.processes for one in _absent
        ):
            watch.processes.close()


def part_alone(mesh: Mesh) -> None:
    """Close the mesh of a run that has ended without this rank; nobody waits for it any more."""
    mesh.close(keep=True)
    _last.clear()


def _leave() -> None:
    """Leave MPI."""
    if MPI.Is_finalized() or not _last:
        return
    mesh = _last[0]
    absent = [one for one in _absent if not one.has_replied()]
    others = set(range(1, mesh.size) if mesh.rank == 0 else [0]) - mesh.watch.lost
    # Of the last run, those that stopped when they had heard its last word are not lost.
    others -= {one.rank for one in absent if one.faults is mesh.watch.faults}
    leads = mesh.rank == 0
    late = _hear(mesh, others, SETUP_BOUND_S) if leads else _ask(mesh)
    if late or not _end_absent(mesh, absent):
        names = [mesh.names[rank] for rank in sorted(late)] + [one.name for one in absent]
        _log.error("ranks %s have not come to the end; %s", names, _WHAT_NOW[leads])
        if not leads and fault_tolerant():
            # Each of the others does the same, and an mpirun whose ranks abort at once may stay.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        mesh.abort(1)
    if leads:
        for rank in others - mesh.watch.lost - mesh.watch.faults.dead:
            _say(mesh, rank)
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_FINALIZE_BOUND_S)
    MPI.Finalize()
    signal.alarm(0)


def _ask(mesh: Mesh) -> set[int]:
    """Tell rank 0 that this one has come, and wait for its word; {0} if that cannot come.

    The wait has no bound but rank 0's life, of whose end MPI or the kernel tells: what the program
    does there after its last run may take hours, and MPI_Finalize would wait for it, too.
    """
    if 0 in mesh.watch.lost:
        return {0}
    _say(mesh, 0)
    _hear(mesh, {0}, None)
    return {0} & (mesh.watch.lost | mesh.watch.faults.dead)


def _say(mesh: Mesh, rank: int) -> None:
    """Send a byte, which does not need its receiver to leave; should it not, there is the end."""
    deadline = time.monotonic() + _LEARN_BOUND_S
    try:
        request = mesh.comm.Isend([_BYTE, MPI.BYTE], rank, TAG_END)
        mesh.patience.reset()
        while not request.Test():
            if mesh.patience.wait() and time.monotonic() > deadline:
                return
    except MPI.Exception as error:
        mesh.watch.failed(error)


def _hear(mesh: Mesh, ranks: set[int], bound_s: float | None) -> set[int]:
    """Wait for a byte of each rank that lives; give those of which none came in time."""
    waiting: dict[int, Any] = {}
    for rank in ranks - mesh.watch.faults.dead:
        waiting[rank] = mesh.comm.Irecv([bytearray(1), MPI.BYTE], rank, TAG_END)
    deadline = None if bound_s is None else time.monotonic() + bound_s
    ended: set[int] = set()
    mesh.patience.reset()
    while waiting:
        for rank, request in tuple(waiting.items()):
            try:
                if request.Test():
                    del waiting[rank]
                elif rank in ended:
                    mesh.watch.lost.add(rank)
                    del waiting[rank]
            except MPI.Exception as error:
                mesh.watch.failed(error)
                if rank in mesh.watch.faults.dead:
                    del waiting[rank]
        if waiting and mesh.patience.wait():
            if deadline and time.monotonic() > deadline:
                break
            ended.update(_ended(mesh))  # what they have sent is here by the next turn
    return set(waiting)


def _ended(mesh: Mesh) -> list[int]:
    """Give the ranks whose processes the kernel says have ended, once each."""
    return mesh.watch.processes.ended() if isinstance(mesh.watch, Watch) else []


def _end_absent(mesh: Mesh, absent: Sequence[_Absent]) -> bool:
    """End the processes that will not come; whether MPI knows that they have ended."""
    deadline = time.monotonic() + _LEARN_BOUND_S
    for one in absent:
        one.end()
    mesh.patience.reset()
    while not all(one.is_dead for one in absent):
        if mesh.patience.wait() and time.monotonic() > deadline:
            return False
    return True
