"""Other processes in place of lost workers: server 0 starts them on its node, and meets them.

They are its children and no MPI processes: MPI hears nothing of their beginning and their end, and
waits for none of them. Arrays are in shared memory, messages go through a socket. Server 0 makes
both, and the child inherits them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from psframe.errors import MessageError
from psframe.events import Missing
from psframe.launcher import Place, child_environment
from psframe.layout import Layout
from psframe.transports.faults import NoFaults
from psframe.transports.frames import Frames
from psframe.transports.heartbeat import BEAT_LINE, Beats
from psframe.transports.meeting import WORKER_ARRAYS, Neighbours
from psframe.transports.mpi_port import MpiServerPort
from psframe.transports.processes import Processes
from psframe.transports.shared_memory import Segment
from psframe.transports.watch import Watch
from psframe.wire import HEADER_BYTES, payload_limit

__all__ = ["Replacements"]

# A program has so long from its start to `psframe.run`; it may have much to load.
_START_BOUND_S = 300.0
# One that has said good-bye has only to end.
_END_BOUND_S = 5.0
# Until a child has come to `psframe.run` it cannot see that server 0 has died, and it may load data
# for long; so the kernel ends it then. It is asked by the child itself, which then becomes the
# program: Python would do it between fork and exec, where other threads' locks are held for ever.
_PR_SET_PDEATHSIG = 1
_TIED = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, int(signal.SIGKILL), 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

_log = logging.getLogger("psframe")


@dataclass(eq=False)
class _Replacement:
    """One child.

    Attributes:
        worker: in whose place.
        watch: None before it has joined.
        here: whether the leader has readmitted the worker.
        over: whether nothing is expected of it any more.
    """

    worker: int
    process: subprocess.Popen[bytes]
    frames: Frames
    segment: Segment
    deadline: float
    watch: Watch | None = None
    here: bool = False
    over: bool = False


class Replacements:
    """Server 0's, of one run; the only server.

    Args:
        port: that the children join.
        layout: the parameters.
        neighbours: server 0's; its memory's file is open.
        names: of each rank, for messages.
        nodes: of each rank.
        digests: of the arguments, which a child's must equal.
        timeout_s: a child that is silent for so long counts as lost.
        vacant: worker -> number of the replacement that it waits for, as the leader has it.
        gone: by worker, whether it has left or is lost.
    """

    def __init__(
        self,
        port: MpiServerPort,
        layout: Layout,
        neighbours: Neighbours,
        *,
        names: tuple[int, ...],
        nodes: tuple[bytes, ...],
        digests: Mapping[str, bytes],
        timeout_s: float,
        vacant: Callable[[], Mapping[int, int]],
        gone: Callable[[int], bool],
    ) -> None:
        assert neighbours.own is not None, "they share its memory"
        assert neighbours.servers == 1, "the others would not know of them"
        self._port = port
        self._layout = layout
        self._neighbours = neighbours
        self._own = neighbours.own
        self._names = names
        self._nodes = nodes
        self._digests = {name: digest.hex() for name, digest in digests.items()}
        self._timeout_s = timeout_s
        self._vacant = vacant
        self._gone = gone
        self._bytes_max = HEADER_BYTES + payload_limit(neighbours.workers)
        self._begun: set[int] = set()  # replacements, by number
        self._all: list[_Replacement] = []

    def tick(self) -> None:
        """Start those that are wanted, let those join that have come, and see who is lost."""
        vacant = self._vacant()
        if not vacant and not self._all:
            return
        for worker, number in tuple(vacant.items()):
            if number not in self._begun:
                self._begun.add(number)
                self._start(worker)
        for one in self._all:
            if one.over:
                continue
            if one.watch is None:
                self._meet(one)
            else:
                self._look(one, one.watch)

    def leave(self) -> None:
        """Give those that have said good-bye the time to end."""
        deadline = time.monotonic() + _END_BOUND_S
        for one in self._all:
            if one.watch is not None and not one.over:
                try:
                    one.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    _log.warning("the replacement of worker %d is ended", one.worker)

    def close(self) -> None:
        """End all that are still there."""
        for one in self._all:
            one.process.kill()  # nothing, if it has ended
            with contextlib.suppress(subprocess.TimeoutExpired):  # a dead file system holds it
                one.process.wait(_END_BOUND_S)
            one.frames.close()
            one.segment.close_file()
        self._all.clear()
        self._own.close_file()

    def _start(self, worker: int) -> None:
        rank = self._neighbours.servers + worker
        try:
            one = self._make(worker)
        except OSError as error:
            _log.error("no replacement of worker %d can be started: %s", worker, error)
            self._port.tell(Missing(worker))
            return
        self._all.append(one)
        _log.warning(
            "a replacement of worker %d (rank %d) is started, process %d",
            worker,
            self._names[rank],
            one.process.pid,
        )

    def _make(self, worker: int) -> _Replacement:
        layout, rank = self._layout, self._neighbours.servers + worker
        segment = Segment.create(WORKER_ARRAYS, layout.size, layout.dtype)
        ours, theirs = socket.socketpair()
        files = theirs.fileno(), segment.fd, self._own.fd
        place = Place(self._names[rank], len(self._names), *files)
        tied = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid())]
        try:
            with theirs:
                process = subprocess.Popen(
                    [*tied, sys.executable, *sys.orig_argv[1:]],
                    stdin=subprocess.DEVNULL,
                    pass_fds=files,
                    env=child_environment(os.environ, place),
                    start_new_session=True,  # signals to the ranks are not for it
                )
        except OSError:
            ours.close()
            segment.close_file()
            raise
        frames = Frames(ours, self._bytes_max)
        return _Replacement(worker, process, frames, segment, time.monotonic() + _START_BOUND_S)

    # ---- joining ---------------------------------------------------------------------------

    def _meet(self, one: _Replacement) -> None:
        """Hear one that has come to `psframe.run`, and let it join if it does the same as we."""
        try:
            hello = one.frames.take()
            asked = None if hello is None else json.loads(hello)["digests"]
        except (MessageError, ValueError, KeyError, TypeError) as error:
            self._give_up(one, f"it sent no hello: {error}")
            return
        if asked is None:
            if one.frames.ended or one.process.poll() is not None:
                self._give_up(one, "it has ended before it came to psframe.run")
            elif time.monotonic() > one.deadline:
                self._give_up(one, f"it has not come to psframe.run within {_START_BOUND_S:.0f} s")
        elif asked != self._digests:
            different = [name for name, d in self._digests.items() if asked.get(name) != d]
            self._give_up(one, f"it calls psframe.run with another value of {different}")
        else:
            self._admit(one)

    def _admit(self, one: _Replacement) -> None:
        worker, neighbours = one.worker, self._neighbours
        rank = neighbours.servers + worker
        here = [r for r in range(neighbours.servers, rank) if self._nodes[r] == self._nodes[0]]
        welcome = {
            "index": worker,
            "workers": neighbours.workers,
            "own": one.segment.nonce.hex(),
            "server": self._own.nonce.hex(),
            "local_worker": len(here),
            "ranks_here": neighbours.ranks_here,
        }
        one.frames.send(json.dumps(welcome).encode())
        watch = one.watch = Watch(
            NoFaults(),
            (self._names[rank],),
            Beats(None, {0: one.segment.words(BEAT_LINE)}, None),
            [0],
            Processes({}),
            self._timeout_s,
            paced=False,
            pulsed=False,
        )
        watch.tell(lambda _, why: self._lose(one, why))
        watch.start()
        self._port.admit(worker, one.segment, one.frames)
        _log.warning("a replacement of worker %d has joined", worker)

    def _give_up(self, one: _Replacement, why: str) -> None:
        _log.error("the replacement of worker %d does not come: %s", one.worker, why)
        self._end(one)
        self._port.tell(Missing(one.worker))

    # ---- those that have joined ------------------------------------------------------------

    def _look(self, one: _Replacement, watch: Watch) -> None:
        if not self._port.linked(one.worker):  # it sent what made no sense
            self._end(one)
        elif self._gone(one.worker):
            if one.here:  # it has said good-bye
                watch.due = math.inf
        else:
            one.here = True
            if one.frames.ended:
                watch.lose(0, "it has died")
            else:
                watch.tick()

    def _lose(self, one: _Replacement, why: str) -> None:
        _log.error("the replacement of worker %d is lost: %s", one.worker, why)
        self._end(one)
        self._port.unlink(one.worker)

    def _end(self, one: _Replacement) -> None:
        """End one of which nothing more will be believed."""
        one.over = True
        one.process.kill()
        one.frames.close()
