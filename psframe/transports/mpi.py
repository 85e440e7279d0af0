"""MPI, and it alone imports mpi4py: nonblocking calls on contiguous bytes, polled with a bound.

`Mesh` is one run's duplicated communicator: collectives for set-up and end, arrays from rank to
rank. A buffer given to MPI is not touched until its request is complete.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import mpi4py
import numpy as np

from psframe.errors import LaunchError, RankLost
from psframe.launcher import Launcher, find_launcher, lone_process_message
from psframe.layout import Array
from psframe.transports.shared_memory import node_id

# What the import would do by itself is done below, once the library has said what it is: MPICH's
# would end this process with a message of its own under another MPI's launcher.
_rc = mpi4py.rc.initialize, mpi4py.rc.finalize
mpi4py.rc(initialize=False, finalize=True)
from mpi4py import MPI  # noqa: E402

mpi4py.rc(initialize=_rc[0], finalize=_rc[1])

__all__ = ["TAG_POST", "Mesh", "Patience", "Transfers", "open_mesh", "piece_elements"]

TAG_POST, _TAG_ARRAY = 1, 2
# A transfer in pieces can be followed: while one is on its way, the one before is applied.
_PIECE_BYTES = 4 << 20
# Ranks fewer than the cores: Tests, then yields, then sleeps; more: yield at once, for a
# spinning rank takes its core from the one that it waits for.
_SPINS = 500
# Counted in time, since a yield takes as long as others like. A little longer than a large update.
_YIELD_S, _YIELD_CROWDED_S = 10e-3, 1e-3
_SLEEP_S = 100e-6
# A sleep costs the kernel of a virtual machine some 29 us of a core, so short ones a sixth of it.
# Who has slept for 50 ms is waiting for something slow; a message then is 0.7 ms late at most.
_SLEEPY_S, _LONG_SLEEP_S = 50e-3, 650e-6
# Set-up and end need every rank; one that does not come within this has died or gone astray.
SETUP_BOUND_S = 120.0


def _library() -> str:
    return MPI.Get_library_version().splitlines()[0].partition(",")[0].strip("\x00 ")


def _start() -> None:
    """Start MPI, unless the program has done so.

    Raises:
        LaunchError: the launcher is of another MPI.
    """
    if MPI.Is_initialized():
        return
    launcher = find_launcher()
    if launcher is not None and launcher.is_open_mpi and "Open MPI" not in _library():
        raise LaunchError(lone_process_message(launcher, _library(), sys.prefix))
    MPI.Init_thread()


_start()


class Patience:
    """What to do while nothing comes: test again, yield the core, then sleep a little.

    Args:
        crowded: whether the node has more ranks than this process may use cores.

    Attributes:
        asleep: whether nothing has come for so long that it sleeps; little should be done then.
    """

    def __init__(self, crowded: bool) -> None:
        self._spins = 0 if crowded else _SPINS
        self._yield_s = _YIELD_CROWDED_S if crowded else _YIELD_S
        self._turns = 0
        self._until = 0.0
        self.asleep = False

    def reset(self) -> None:
        """Something came."""
        self._turns = 0
        self.asleep = False

    def wait(self) -> bool:
        """Nothing came; True if so much time has passed that a clock may be read."""
        self._turns += 1
        if self._turns <= self._spins:
            return False
        if not self.asleep:
            now = time.monotonic()
            if self._turns == self._spins + 1:
                self._until = now + self._yield_s
            if now < self._until:
                os.sched_yield()
                return True
        self.asleep = True
        time.sleep(_SLEEP_S if time.monotonic() < self._until + _SLEEPY_S else _LONG_SLEEP_S)
        return True


class Mesh:
    """The ranks of one run, in a line that `arrange` may change.

    Attributes:
        rank, size: this process's place in the line, and the line's length.
        names: of each place the rank in the communicator that was given, for messages.
        nodes: of each place 16 bytes, equal on one node.
        library: the MPI library's name and version.
    """

    def __init__(self, comm: Any) -> None:
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.library = _library()
        self.patience = Patience(crowded=True)
        self._comm, request = comm.Idup()
        self._complete([request], SETUP_BOUND_S, "the duplicated communicator")
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.names: tuple[int, ...] = tuple(range(self.size))
        self.nodes: tuple[bytes, ...] = tuple(self.all_gather(node_id(), "the nodes"))

    @property
    def name(self) -> int:
        """This process's rank in the communicator that was given."""
        return self.names[self.rank]

    def arrange(self, line: Sequence[int]) -> None:
        """Let the ranks stand in another line; every rank calls it, and nothing is under way.

        MPI has no nonblocking way to do so. Call it where all ranks have just been heard of.

        Args:
            line: the places in their new order.
        """
        if tuple(line) == tuple(range(self.size)):
            return
        before = self._comm
        self._comm = before.Split(0, line.index(self.rank))
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        before.Free()
        self.rank = self._comm.rank
        self.names = tuple(self.names[place] for place in line)
        self.nodes = tuple(self.nodes[place] for place in line)

    def all_gather(self, data: bytes, what: str, bound_s: float = SETUP_BOUND_S) -> list[bytes]:
        """Gather equally many bytes of every rank, in rank order.

        Raises:
            RankLost: some rank did not take part within the bound.
        """
        mine = np.frombuffer(data, np.uint8)
        everyone = np.empty((self.size, len(data)), np.uint8)
        self._complete([self._comm.Iallgather(mine, everyone)], bound_s, what)
        return [row.tobytes() for row in everyone]

    def broadcast(self, data: bytes | None, what: str, bound_s: float | None) -> bytes:
        """Give every rank the bytes of rank 0; only rank 0's `data` counts."""
        length = np.array([len(data) if data is not None else 0], np.int64)
        self._complete([self._comm.Ibcast(length, 0)], bound_s, what)
        content = np.empty(int(length[0]), np.uint8)
        if self.rank == 0 and data is not None:
            content[:] = np.frombuffer(data, np.uint8)
        self._complete([self._comm.Ibcast(content, 0)], bound_s, what)
        return content.tobytes()

    def send(
        self, array: Array, target: int, what: str, bound_s: float | None = SETUP_BOUND_S
    ) -> None:
        """Send an array and wait until it has left."""
        self._complete(self.start_send(array, target), bound_s, what)

    def receive(
        self, array: Array, source: int, what: str, bound_s: float | None = SETUP_BOUND_S
    ) -> None:
        """Receive into an array and wait until it is there."""
        self._complete(self.start_receive(array, source), bound_s, what)

    def start_send(self, array: Array, target: int) -> list[Any]:
        """Start to send a contiguous array in pieces."""
        comm = self._comm
        return [comm.Isend([p, MPI.BYTE], target, _TAG_ARRAY) for p in _pieces(array)]

    def start_receive(self, array: Array, source: int) -> list[Any]:
        """Start to receive into a contiguous array in pieces."""
        comm = self._comm
        return [comm.Irecv([p, MPI.BYTE], source, _TAG_ARRAY) for p in _pieces(array)]

    @property
    def comm(self) -> Any:
        """The duplicated communicator."""
        return self._comm

    def abort(self, status: int) -> NoReturn:
        """End the whole job at once."""
        MPI.COMM_WORLD.Abort(status)
        os._exit(status)  # MPICH's returns while its launcher is ending the job itself

    def close(self) -> None:
        """Give the communicator back; every rank does."""
        self._comm.Free()

    def _complete(self, requests: list[Any], bound_s: float | None, what: str) -> None:
        patience = self.patience
        patience.reset()
        deadline = None if bound_s is None else time.monotonic() + bound_s
        while not MPI.Request.Testall(requests):
            if patience.wait() and deadline is not None and time.monotonic() > deadline:
                raise RankLost(
                    f"rank {self.name}: {what} did not come within {bound_s:g} s: some rank has"
                    " died, or has not called psframe.run (a script that imports mpi4py itself is"
                    " best started with python -m mpi4py, which ends the job when a rank raises)"
                )


class Transfers:
    """Arrays on their way in pieces, and what to do when each has arrived or left."""

    def __init__(self) -> None:
        self._open: list[_Transfer] = []

    def add(
        self,
        requests: list[Any],
        then: Callable[[], None],
        each: Callable[[int], None] | None = None,
    ) -> None:
        """Follow the requests of an array's pieces.

        Args:
            requests: in the order of the pieces.
            then: called once, when all are complete.
            each: called with how many bytes from the start are complete, when that has changed and
                they are not yet all.
        """
        self._open.append(_Transfer(requests, then, each))

    def progress(self) -> bool:
        """Test them; True if any piece was complete."""
        if not self._open:
            return False
        some = False
        done = []
        for transfer in self._open:
            before = transfer.complete
            if transfer.test():
                done.append(transfer)
            elif transfer.each is not None and transfer.complete > before:
                transfer.each(transfer.complete * _PIECE_BYTES)
            some |= transfer.complete > before
        if done:
            self._open = [transfer for transfer in self._open if transfer not in done]
        for transfer in done:
            transfer.then()
        return some or bool(done)

    @property
    def busy(self) -> bool:
        """Whether any is on its way."""
        return bool(self._open)


class _Transfer:
    """One array on its way.

    Attributes:
        then, each: as for `Transfers.add`.
        complete: how many pieces are, from the start.
    """

    def __init__(
        self, requests: list[Any], then: Callable[[], None], each: Callable[[int], None] | None
    ) -> None:
        self.then = then
        self.each = each
        self.complete = 0
        self._requests = requests

    def test(self) -> bool:
        """Test the pieces in their order; True if all are complete."""
        requests, complete = self._requests, self.complete
        while complete < len(requests) and requests[complete].Test():
            complete += 1
        self.complete = complete
        return complete == len(requests)


def open_mesh(comm: Any, launcher: Launcher | None, prefix: str) -> Mesh:
    """Duplicate the communicator of a run.

    Args:
        comm: an mpi4py communicator, or None for all ranks.
        launcher: as the environment tells.
        prefix: the Python environment's folder, for the error's remedy.

    Raises:
        LaunchError: a launcher started several processes, but each is alone.
        TypeError: `comm` is no intracommunicator.
    """
    if comm is not None and not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm: expected an mpi4py communicator, got {comm!r}")
    if MPI.COMM_WORLD.size == 1 and launcher is not None and (launcher.size or 1) > 1:
        raise LaunchError(lone_process_message(launcher, _library(), prefix))
    return Mesh(MPI.COMM_WORLD if comm is None else comm)


def piece_elements(array: Array) -> int:
    """Elements of an array that are sent at a time."""
    return _PIECE_BYTES // array.itemsize


def _pieces(array: Array) -> Sequence[Any]:
    data = array.view(np.uint8)
    return [data[b : b + _PIECE_BYTES] for b in range(0, data.size, _PIECE_BYTES)]
