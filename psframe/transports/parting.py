"""The end of a run: each rank with the first, so that nobody waits for the dead.

Rank 0 sends everyone the summary, and everyone says that it has it. Then rank 0 sends the last
word: who is lost, those that did not reply among them, so that all leave out the same ranks from
now on. Till then everyone shows that it lives. What is sent to a rank that counts as lost but may
come back is waited for by nobody.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from psframe.errors import RankLost
from psframe.transports.mpi import MPI, TAG_END, Mesh  # type: ignore[attr-defined]

__all__ = ["Ending", "tell_end"]

# To say that it has the summary, a rank has only to receive it.
_REPLY_BOUND_S = 30.0

_log = logging.getLogger("psframe")


class _Farewell:
    """What goes to one rank, and its reply."""

    def __init__(self, comm: Any, rank: int, data: bytes) -> None:
        self._comm = comm
        self._rank = rank
        self._buffers: list[Any] = [bytearray(1)]
        self._requests = [comm.Irecv([self._buffers[0], MPI.BYTE], rank, TAG_END)]
        self.send(data)

    def send(self, data: bytes) -> None:
        """Send one thing more."""
        for buffer in (np.array([len(data)], np.int64), bytearray(data)):
            self._buffers.append(buffer)
            self._requests.append(self._comm.Isend([buffer, MPI.BYTE], self._rank, TAG_END))

    def done(self) -> bool:
        return bool(MPI.Request.Testall(self._requests))


def tell_end(
    mesh: Mesh, data: bytes, last_word: Callable[[], bytes], bound_s: float | None
) -> dict[int, Callable[[], bool]]:
    """Send every rank the summary, as rank 0, wait for all that are not lost, and let them go.

    Args:
        mesh: the ranks.
        data: the summary.
        last_word: gives what they go with, once it is known who has replied.
        bound_s: None where the run is good: a rank that does not reply then counts as lost.

    Returns:
        The ranks that have not replied and are not known to be dead, for whom MPI_Finalize will
        wait; and of each, what tells whether it has replied meanwhile.

    Raises:
        RankLost: some rank did not reply within the bound.
    """
    watch = mesh.watch
    farewells = {
        rank: _Farewell(mesh.comm, rank, data)
        for rank in range(1, mesh.size)
        if rank not in watch.faults.dead
    }
    _wait(farewells, mesh, bound_s)
    word = last_word()
    for rank in farewells.keys() - watch.faults.dead:
        try:
            farewells[rank].send(word)
        except MPI.Exception as error:
            watch.failed(error)
    waiting = _wait(farewells, mesh, bound_s)
    return {rank: partial(_replied, waiting[rank], mesh) for rank in sorted(waiting)}


def _wait(
    farewells: Mapping[int, _Farewell], mesh: Mesh, bound_s: float | None
) -> dict[int, _Farewell]:
    """Wait for all that are not lost; give those that are left, and not known to be dead."""
    watch, waiting = mesh.watch, dict(farewells)
    mesh.patience.reset()
    deadline = time.monotonic() + (_REPLY_BOUND_S if bound_s is None else bound_s)
    while not waiting.keys() <= watch.lost:
        for rank in tuple(waiting):
            if _replied(waiting[rank], mesh):
                del waiting[rank]
        for rank in waiting.keys() & watch.faults.dead:
            del waiting[rank]
        if mesh.patience.wait() and time.monotonic() > deadline:
            late = sorted(waiting.keys() - watch.lost)
            names = [mesh.names[rank] for rank in late]
            if bound_s is not None:
                raise RankLost(
                    f"ranks {names} did not come to the end of the run within {bound_s:g} s"
                )
            _log.error("ranks %s did not come to the end of the run; they count as lost", names)
            watch.lost.update(late)
    return {rank: one for rank, one in waiting.items() if rank not in watch.faults.dead}


def _replied(farewell: _Farewell, mesh: Mesh) -> bool:
    try:
        return farewell.done()
    except MPI.Exception as error:
        mesh.watch.failed(error)
        return False


class Ending:
    """The end of a run as every rank hears it but the first: the summary, then the last word.

    Who is lost the last word alone tells. The summary comes to everybody, and to one who has left
    perhaps before the servers' answers do.

    Args:
        mesh: the ranks.

    Attributes:
        summary: as rank 0 sent it; empty until it is here.
        last_word: the same.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.summary = self.last_word = b""
        self._request: Any = None
        self._buffer = np.zeros(0, np.int64)
        self._reply: Any = None
        self._byte = bytearray(1)

    def poll(self) -> bool:
        """Take what has come, and say that the summary is here; True once both have come.

        Raises:
            RankLost: rank 0 is lost.
        """
        watch = self._mesh.watch
        try:
            while not self.last_word and self._take():
                pass
            return bool(self.last_word) and bool(self._reply.Test())
        except MPI.Exception as error:
            watch.failed(error)
            if 0 in watch.lost:
                raise watch.faults.lost(self._mesh.names, "the end of the run") from error
            return False

    def wait(self) -> None:
        """Wait until both have come, for as long as rank 0 lives: the others may be at it for long.

        Should the run fail, rank 0 ends the job.

        Raises:
            RankLost: rank 0 is lost.
        """
        self._mesh.patience.reset()
        while not self.poll():
            self._mesh.patience.wait()

    def _take(self) -> bool:
        """Take a length or a content; False if it is not here yet."""
        comm = self._mesh.comm
        if self._request is None:
            if not comm.Iprobe(0, TAG_END):
                return False
            self._expect(np.zeros(1, np.int64))
        if not self._request.Test():
            return False
        if self._buffer.dtype == np.int64:
            self._expect(np.empty(int(self._buffer[0]), np.uint8))
            return True
        content, self._request = self._buffer.tobytes(), None
        if self.summary:
            self.last_word = content
            return True
        self.summary = content
        self._reply = comm.Isend([self._byte, MPI.BYTE], 0, TAG_END)
        return True

    def _expect(self, buffer: Any) -> None:
        self._buffer = buffer
        self._request = self._mesh.comm.Irecv([buffer, MPI.BYTE], 0, TAG_END)
