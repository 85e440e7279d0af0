"""Who watches whom: server 0 all others, and they server 0; MPI tells everybody of the dead.

A rank on the same node shows that it lives in shared memory, another by messages.
"""

from __future__ import annotations

import logging

from psframe.transports.heartbeat import BEAT_LINE, Beats
from psframe.transports.meeting import Neighbours
from psframe.transports.mpi import Mesh
from psframe.transports.processes import Processes
from psframe.transports.watch import Watch

__all__ = ["keep_watch"]

_log = logging.getLogger("psframe")


def keep_watch(mesh: Mesh, neighbours: Neighbours, timeout_s: float) -> Watch:
    """Begin to watch the ranks of a run that have met; `mesh.watch` from now on.

    There is to be a `Pulse`. Where MPI cannot be called from that thread, a
    worker on another node shows no signs while it computes, and is not watched.

    Args:
        mesh: the ranks.
        neighbours: who shares memory with this one.
        timeout_s: a rank that is silent for so long counts as lost.
    """
    servers, leads = neighbours.servers, mesh.rank == 0
    works = mesh.rank >= servers
    others = [rank for rank in range(mesh.size) if rank != mesh.rank] if leads else [0]
    own = None if neighbours.own is None else neighbours.own.words(BEAT_LINE)
    lines = {
        rank: neighbours.segments[rank].words(BEAT_LINE)
        for rank in others
        if rank in neighbours.segments
    }
    far = [rank for rank in others if rank not in lines]
    mute = [rank for rank in far if rank >= servers and not mesh.threads]
    if mute:
        _log.warning("this MPI has no threads; silent workers of other nodes are not noticed")
    messages = mesh.signs(far, None if leads else 0) if far else None
    watch = Watch(
        mesh.watch.faults,
        mesh.names,
        Beats(own, lines, messages),
        [rank for rank in others if rank not in mute],
        Processes({rank: neighbours.pids[rank] for rank in others if rank in neighbours.pids}),
        timeout_s,
        paced=messages is None or mesh.threads,
        pulsed=works and (messages is None or mesh.threads),
    )
    mesh.guard(watch)
    return watch
