"""MPI, and it alone imports mpi4py: nonblocking calls on contiguous bytes, polled with a bound.

`Mesh` is one run's duplicated communicator: collectives for set-up, arrays from rank to rank; the
end is a matter of each rank with the first, for others may be dead. A buffer given to MPI is not
touched until its request is complete.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import stat
import sys
import termios
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import mpi4py
import numpy as np

from psframe.errors import LaunchError, MessageError, RankLost
from psframe.launcher import Launcher, find_launcher, lone_process_message
from psframe.layout import Array
from psframe.transports.faults import Faults
from psframe.transports.heartbeat import Messages
from psframe.transports.patience import Patience
from psframe.transports.shared_memory import node_id
from psframe.transports.transfers import PIECE_BYTES, Transfers
from psframe.transports.watch import Unwatched, Watch

# What the import would do by itself is done below, once the library has said what it is: MPICH's
# would end this process with a message of its own under another MPI's launcher.
_rc = mpi4py.rc.initialize, mpi4py.rc.finalize
mpi4py.rc(initialize=False, finalize=True)
from mpi4py import MPI  # noqa: E402

mpi4py.rc(initialize=_rc[0], finalize=_rc[1])

__all__ = [
    "SETUP_BOUND_S",
    "TAG_END",
    "TAG_POST",
    "Gathering",
    "Mesh",
    "Patience",
    "Transfers",
    "WrongLength",
    "abort",
    "open_mesh",
    "piece_elements",
]

TAG_POST, _TAG_ARRAY, TAG_END, _TAG_BEAT, _TAG_GROUP = 1, 2, 3, 4, 5
# Set-up needs every rank; one that does not come within this has died or gone astray.
SETUP_BOUND_S = 120.0
# To send the last sign of life, a rank has only to come to the end of the run, where it is let go.
_LEAVE_BOUND_S = 30.0
# How long a launcher has to read a rank's last words.
_READ_BOUND_S = 1.0


# Of the last test of a piece; only the thread that runs the program receives any.
_status = MPI.Status()
# Ranks of MPI_COMM_WORLD that a run has lost. MPI is one a process, and so are its dead: a later
# run is made of the others.
_counted_out: set[int] = set()


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


class WrongLength(MessageError):
    """A piece of an array is longer or shorter than was announced.

    Attributes:
        source: the rank that sent it.
    """

    def __init__(self, source: int, got: str, n_bytes: int) -> None:
        super().__init__(f"a piece of an array has {got} bytes, expected {n_bytes}")
        self.source = source


class _Piece:
    """The receive of one piece."""

    __slots__ = ("_complete", "_n_bytes", "_request", "_source")

    def __init__(self, request: Any, n_bytes: int, source: int) -> None:
        self._request, self._n_bytes, self._source = request, n_bytes, source
        self._complete = False

    def Test(self) -> bool:
        """Whether it is complete.

        Raises:
            WrongLength: it is, and has another length.
        """
        if self._complete:
            return True
        try:
            if not self._request.Test(_status):
                return False
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_TRUNCATE:
                raise
            raise WrongLength(self._source, "more", self._n_bytes) from error
        got = _status.Get_count(MPI.BYTE)
        if got != self._n_bytes:
            raise WrongLength(self._source, f"{got}", self._n_bytes)
        self._complete = True
        return True


@dataclass
class Gathering:
    """Bytes of every rank that are being gathered, by `requests`."""

    requests: list[Any]
    everyone: Array

    def rows(self) -> list[bytes]:
        """Give each rank's, once the requests are complete."""
        return [row.tobytes() for row in self.everyone]


class Mesh:
    """The ranks of one run, in a line that `arrange` may change.

    Args:
        comm: an mpi4py communicator. Ranks that an earlier run has lost are left out.

    Attributes:
        rank, size: this process's place in the line, and the line's length.
        names: of each place the rank in the communicator that was given, for messages.
        nodes: of each place 16 bytes, equal on one node.
        library: the MPI library's name and version.
        watch: who of them lives; it looks at nobody before `guard`.
    """

    def __init__(self, comm: Any) -> None:
        self.library = _library()
        self.patience = Patience(crowded=True)
        gone = set(_counted_out_of(comm))
        self.names: tuple[int, ...] = tuple(rank for rank in range(comm.size) if rank not in gone)
        self.rank: int = self.names.index(comm.rank)
        self.size = len(self.names)
        self.watch: Unwatched = Unwatched(Faults(comm))
        before = comm.Get_errhandler()
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        try:
            if gone:
                mine = _without(comm, gone)
            else:
                mine, request = comm.Idup()
                self.complete([request], SETUP_BOUND_S, "the duplicated communicator")
        except MPI.Exception as error:
            self.watch.failed(error)
            raise self.watch.faults.lost(range(comm.size), "a communicator") from error
        finally:
            comm.Set_errhandler(before)
        self._use(mine)
        self.nodes: tuple[bytes, ...] = tuple(self.all_gather(node_id(), "the nodes"))

    def _use(self, comm: Any) -> None:
        self._comm = comm
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.watch = Unwatched(Faults(comm))

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
        with _bounded():
            self._use(before.Split(0, line.index(self.rank)))
        before.Free()
        self.rank = self._comm.rank
        self.names = tuple(self.names[place] for place in line)
        self.nodes = tuple(self.nodes[place] for place in line)

    def guard(self, watch: Watch) -> None:
        """Watch the others from now on."""
        self.watch = watch
        self.patience = Patience(crowded=True, watch=watch)
        watch.start()

    def signs(self, peers: Sequence[int], source: int | None) -> Messages:
        """Make the signs of life that are sent.

        Args:
            peers: to whom they go.
            source: from whom they come, None for any.
        """
        heard = MPI.ANY_SOURCE if source is None else source
        return Messages(self._comm, peers, heard, MPI.Status(), _TAG_BEAT)

    def all_gather(self, data: bytes, what: str, bound_s: float = SETUP_BOUND_S) -> list[bytes]:
        """Gather equally many bytes of every rank, in rank order.

        Raises:
            RankLost: some rank did not take part within the bound.
        """
        gathering = self.start_all_gather(data)
        self.complete(gathering.requests, bound_s, what)
        return gathering.rows()

    def start_all_gather(self, data: bytes) -> Gathering:
        """Start to gather equally many bytes of every rank."""
        everyone = np.empty((self.size, len(data)), np.uint8)
        request = self._comm.Iallgather(np.frombuffer(data, np.uint8), everyone)
        return Gathering([request], everyone)

    def broadcast(self, data: bytes | None, what: str, bound_s: float | None) -> bytes:
        """Give every rank the bytes of rank 0; only rank 0's `data` counts."""
        length = np.array([len(data) if data is not None else 0], np.int64)
        self.complete([self._comm.Ibcast(length, 0)], bound_s, what)
        content = np.empty(int(length[0]), np.uint8)
        if self.rank == 0 and data is not None:
            content[:] = np.frombuffer(data, np.uint8)
        self.complete([self._comm.Ibcast(content, 0)], bound_s, what)
        return content.tobytes()

    def send(
        self, array: Array, target: int, what: str, bound_s: float | None = SETUP_BOUND_S
    ) -> None:
        """Send an array and wait until it has left."""
        self.complete(self.start_send(array, target), bound_s, what)

    def receive(
        self, array: Array, source: int, what: str, bound_s: float | None = SETUP_BOUND_S
    ) -> None:
        """Receive into an array and wait until it is there."""
        requests = [request for request, _ in self._start_receive(array, source)]
        self.complete(requests, bound_s, what)

    def start_send(self, array: Any, target: int) -> list[Any]:
        """Start to send a contiguous array in pieces, of the host or of a device that MPI takes;
        none go to the dead."""
        comm = self._comm
        if target in self.watch.faults.dead:
            return []
        return [comm.Isend([p, MPI.BYTE], target, _TAG_ARRAY) for p in _pieces(array)]

    def start_receive(self, array: Any, source: int) -> list[Any]:
        """Start to receive into a contiguous array in pieces; none come from the dead.

        The test of a piece that is longer or shorter than its part of the array raises WrongLength.
        """
        pieces = self._start_receive(array, source)
        return [_Piece(request, n_bytes, source) for request, n_bytes in pieces]

    def _start_receive(self, array: Any, source: int) -> list[tuple[Any, int]]:
        """Give each piece's request and length in bytes."""
        comm = self._comm
        if source in self.watch.faults.dead:
            return []
        return [(comm.Irecv([p, MPI.BYTE], source, _TAG_ARRAY), p.nbytes) for p in _pieces(array)]

    @property
    def comm(self) -> Any:
        """The duplicated communicator."""
        return self._comm

    @property
    def threads(self) -> bool:
        """Whether several threads may call MPI at the same time."""
        return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)

    def abort(self, status: int) -> NoReturn:
        """End the whole job at once."""
        abort(status)

    def count_out(self, ranks: Iterable[int]) -> None:
        """Leave ranks out of every later run of this process; all others leave out the same."""
        _counted_out.update(_to_world(self._comm, sorted(ranks)))

    def close(self, *, keep: bool = False) -> None:
        """Give the communicator back, or keep it to the end of the program; every rank does.

        To free it is a matter of all ranks, so where one is lost it is kept. So it is where a
        message may be under way: Open MPI would count it with those of the next communicator,
        which has the same number, and lose one of these for it.
        """
        keep = keep or not self._take_leave()
        self.watch.close()
        if not keep:
            self._comm.Free()

    def _take_leave(self) -> bool:
        """Whether all that was sent has come, within a bound."""
        self.patience.reset()
        deadline = time.monotonic() + _LEAVE_BOUND_S
        while not self.watch.take_leave():
            if self.patience.wait() and time.monotonic() > deadline:
                return False
        return True

    def complete(self, requests: list[Any], bound_s: float | None, what: str) -> None:
        """Wait until requests are complete that come of one rank or all, and without which the
        run cannot go on.

        Raises:
            RankLost: they were not within the bound, or cannot be.
        """
        patience = self.patience
        patience.reset()
        deadline = None if bound_s is None else time.monotonic() + bound_s
        while not self.test(requests, what):
            if patience.wait() and deadline is not None and time.monotonic() > deadline:
                raise RankLost(
                    f"rank {self.name}: {what} did not come within {bound_s:g} s: some rank has"
                    " died, or has not called psframe.run (a script that imports mpi4py itself is"
                    " best started with python -m mpi4py, which ends the job when a rank raises)"
                )

    def test(self, requests: list[Any], what: str) -> bool:
        """Whether such requests are complete.

        Raises:
            RankLost: they cannot be.
        """
        try:
            return bool(MPI.Request.Testall(requests))
        except MPI.Exception as error:
            self.watch.failed(error)
            raise self.watch.faults.lost(self.names, what) from error


def abort(status: int) -> NoReturn:
    """End the whole job at once, when the launcher has read why."""
    # Output that is closed, broken or full is no reason to go on.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
        _until_read(sys.stdout.fileno())
        _until_read(sys.stderr.fileno())
    MPI.COMM_WORLD.Abort(status)
    os._exit(status)  # MPICH's returns while its launcher is ending the job itself


def _until_read(output: int) -> None:
    """Wait until a pipe is empty, within a bound: MPICH's launcher drops what it has not read of a
    job that is aborted."""
    if stat.S_ISFIFO(os.fstat(output).st_mode):
        deadline = time.monotonic() + _READ_BOUND_S
        while any(fcntl.ioctl(output, termios.FIONREAD, bytes(4))):
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)


def open_mesh(comm: Any, launcher: Launcher | None, prefix: str) -> Mesh:
    """Duplicate the communicator of a run.

    Args:
        comm: an mpi4py communicator, or None for all ranks.
        launcher: as the environment tells.
        prefix: the Python environment's folder, for the error's remedy.

    Raises:
        LaunchError: a launcher started several processes, but each is alone.
        RankLost: some rank did not come, or has died; MPI_Finalize may wait for ever then.
        TypeError: `comm` is no intracommunicator.
    """
    if comm is not None and not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm: expected an mpi4py communicator, got {comm!r}")
    if MPI.COMM_WORLD.size == 1 and launcher is not None and (launcher.size or 1) > 1:
        raise LaunchError(lone_process_message(launcher, _library(), prefix))
    return Mesh(MPI.COMM_WORLD if comm is None else comm)


def piece_elements(array: Array) -> int:
    """Elements of an array that are sent at a time."""
    return PIECE_BYTES // array.itemsize


def _pieces(array: Any) -> Sequence[Any]:
    """Cut an array into what is sent at a time.

    Of one on a device MPI is given addresses: mpi4py would take the array itself, but ask the
    driver about each piece. So the requests do not keep it alive; see `Transfers.add`.
    """
    if isinstance(array, np.ndarray):
        data = array.view(np.uint8)
        return [data[b : b + PIECE_BYTES] for b in range(0, data.size, PIECE_BYTES)]
    address, n_bytes = int(array.data.ptr), int(array.nbytes)
    return [
        MPI.buffer.fromaddress(address + b, min(PIECE_BYTES, n_bytes - b))
        for b in range(0, n_bytes, PIECE_BYTES)
    ]


def _without(comm: Any, gone: set[int]) -> Any:
    """Make a communicator of the others, who call this together, while some are dead or stopped.

    Not of the communicator: once it has dead ranks, Open MPI makes no other of it.
    """
    group = comm.group.Excl(sorted(gone))
    with _bounded():
        try:
            return MPI.Intracomm.Create_from_group(group, "psframe", errhandler=MPI.ERRORS_RETURN)
        except NotImplementedError:  # before MPI 4
            return comm.Create_group(group, _TAG_GROUP)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """End this process, with its stack on stderr, if a call of MPI does not come back."""
    faulthandler.dump_traceback_later(SETUP_BOUND_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _to_world(comm: Any, ranks: Sequence[int]) -> list[int]:
    return list(comm.group.Translate_ranks(list(ranks), MPI.COMM_WORLD.group))


def _counted_out_of(comm: Any) -> list[int]:
    """Give the ranks of a communicator that an earlier run has lost."""
    if not _counted_out:
        return []
    world = _to_world(comm, range(comm.size))
    return [rank for rank, of_world in enumerate(world) if of_world in _counted_out]
