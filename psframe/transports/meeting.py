"""How the ranks of a run meet: who shares a node, and the memory that they open of each other."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from psframe.layout import Layout
from psframe.store import buffer_count
from psframe.transports.bell import BELL_LINE, Bell, can_ring
from psframe.transports.mpi import Mesh
from psframe.transports.shared_memory import Segment

__all__ = ["LANDING", "SLOTS", "WORKER_ARRAYS", "Neighbours", "meet"]

# A worker's segment: two gradient slots and the landing area, each of P elements.
SLOTS, LANDING, WORKER_ARRAYS = 2, 2, 3
_HELLO = struct.Struct("<qi16s")

_log = logging.getLogger("psframe")


@dataclass
class Neighbours:
    """What a rank knows of the others after they have met.

    Attributes:
        servers, workers: S and W; ranks [0, S) of the line serve.
        own: this rank's segment, None if it could not be made or is not wanted.
        segments: rank -> segment, of those that share memory with this rank.
        local_worker: how many workers of this rank's node come before it.
        ranks_here: ranks of the run on this rank's node, itself included.
        pids: by rank, the processes of the others on this node.
    """

    servers: int
    workers: int
    own: Segment | None
    segments: dict[int, Segment]
    local_worker: int
    ranks_here: int
    pids: dict[int, int]

    @property
    def crowded(self) -> bool:
        """Whether the node has more ranks than cores that this process may use."""
        return self.ranks_here > len(os.sched_getaffinity(0))

    def bells(self) -> dict[int, Bell]:
        """Give, by rank, where those sleep with whom this one shares memory."""
        if not can_ring():
            return {}
        return {rank: Bell(segment.words(BELL_LINE)) for rank, segment in self.segments.items()}

    def bell(self, senders: Iterable[int]) -> Bell | None:
        """Give where this rank may sleep; None if one of those who send to it cannot ring."""
        if self.own is None or not can_ring() or any(r not in self.segments for r in senders):
            return None
        return Bell(self.own.words(BELL_LINE))


def meet(
    mesh: Mesh, layout: Layout, servers: int, shared_memory: bool, *, stays_open: bool = False
) -> Neighbours:
    """Find out who shares this rank's node, and open their memory; every rank calls it.

    A pair shares memory only if both have opened all that they should on their node. The file of
    this rank's memory is closed then, unless it `stays_open` for processes that come later.
    """
    own = _make_segment(mesh, layout, servers) if shared_memory else None
    nonce, fd = (bytes(16), -1) if own is None else (own.nonce, own.fd)
    hellos = [
        _HELLO.unpack(record)
        for record in mesh.all_gather(_HELLO.pack(os.getpid(), fd, nonce), "the hello")
    ]
    here = [rank for rank, node in enumerate(mesh.nodes) if node == mesh.nodes[mesh.rank]]
    segments: dict[int, Segment] = {}
    good = own is not None
    for rank in here if own is not None else []:
        if (rank < servers) == (mesh.rank < servers):
            continue  # servers share nothing with servers, nor workers with workers
        pid, its_fd, its_nonce = hellos[rank]
        segment = _open_segment(rank, pid, its_fd, its_nonce, mesh, layout, servers)
        if segment is None:
            good = False
        else:
            segments[rank] = segment
    can = [bool(flag[0]) for flag in mesh.all_gather(bytes([good]), "the shared memory")]
    if own is not None and not stays_open:
        own.close_file()  # everyone has opened it
    if shared_memory and not good:
        _log.warning("rank %d cannot share memory on its node; all goes through MPI", mesh.name)
    workers_before = [rank for rank in here if servers <= rank < mesh.rank]
    return Neighbours(
        servers,
        mesh.size - servers,
        own,
        {rank: segment for rank, segment in segments.items() if good and can[rank]},
        len(workers_before),
        len(here),
        {rank: hellos[rank][0] for rank in here if rank != mesh.rank},
    )


def _shape(rank: int, mesh: Mesh, layout: Layout, servers: int) -> tuple[int, int]:
    """Count and length of the arrays in a rank's segment."""
    if rank >= servers:
        return WORKER_ARRAYS, layout.size
    begin, end = layout.shards(servers)[rank]
    return buffer_count(mesh.size - servers), end - begin


def _make_segment(mesh: Mesh, layout: Layout, servers: int) -> Segment | None:
    count, size = _shape(mesh.rank, mesh, layout, servers)
    try:
        return Segment.create(count, size, layout.dtype)
    except OSError as error:
        _log.warning("rank %d: no shared memory: %s", mesh.name, error)
        return None


def _open_segment(
    rank: int, pid: int, fd: int, nonce: bytes, mesh: Mesh, layout: Layout, servers: int
) -> Segment | None:
    if fd < 0:
        return None
    count, size = _shape(rank, mesh, layout, servers)
    return Segment.open(pid, fd, nonce, count, size, layout.dtype)
