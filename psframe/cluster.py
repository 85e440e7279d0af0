"""A run over MPI ranks: set-up, who serves and who works, the end, and never a hang.

Set-up and end are made by all ranks together, with nonblocking collectives polled with a
bound. What every rank must learn (an argument differs, a worker failed) is exchanged there, so
that all of them raise; where that is no longer possible the job is aborted, with the verdict
written first.
"""

from __future__ import annotations

import json
import logging
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from psframe.client import Worker
from psframe.devices import choose_device, make_device
from psframe.errors import ArgumentError, Diverged, RankLost, WorkerFailed
from psframe.events import Failure
from psframe.host import Host
from psframe.launcher import Launcher
from psframe.layout import Array
from psframe.leader import Leader
from psframe.plan import Plan, Result
from psframe.results import diverged, make_result, summarise
from psframe.roles import no_host_event, route, serve, take_part
from psframe.server import Server
from psframe.transports.mpi import Mesh, open_mesh
from psframe.transports.mpi_ports import MpiEndpoint, MpiServerPort, Neighbours, meet

__all__ = ["run_cluster"]

# Once the run has failed or was interrupted, the others have this long to come back from what
# they compute; then the job is aborted.
_GRACE_S = 3.0
_TEXT_BYTES = 2048
_CHECK = struct.Struct(f"<?H{_TEXT_BYTES}s")

_log = logging.getLogger("psframe")


def run_cluster(
    work: Callable[[Worker], Any],
    make_plan: Callable[[], Plan],
    make_host: Callable[[Plan], Host],
    *,
    launcher: Launcher | None,
    comm: Any,
    shared_memory: bool,
    same: Mapping[str, object],
) -> Result:
    """Run on the ranks of `comm`; see `psframe.run`.

    Args:
        work: the user's function.
        make_plan: checks this rank's arguments.
        make_host: opens the run directory (called on rank 0).
        launcher: as the environment tells.
        comm: a communicator, or None for all ranks.
        shared_memory: whether to use it.
        same: further arguments that must be equal on every rank.
    """
    mesh = open_mesh(comm, launcher, sys.prefix)
    run = _ClusterRun(mesh, work, shared_memory)
    try:
        run.check(make_plan, make_host, same)
    except RankLost as error:
        run.abort(error)
        raise
    except BaseException as error:
        run.verdict_of(error)
        mesh.close()  # every rank raises here
        raise
    try:
        with run.host.interrupts():
            summary = run.run()
    except BaseException as error:
        run.abort(error)
        raise
    mesh.close()
    return run.conclude(summary)


class _ClusterRun:
    def __init__(self, mesh: Mesh, work: Callable[[Worker], Any], shared_memory: bool) -> None:
        self.mesh = mesh
        self.host = Host(None, None)
        self._work = work
        self._shared_memory = shared_memory
        self._plan: Plan | None = None
        self._error: BaseException | None = None  # what this rank's own `work` raised
        self._params: Array | None = None
        self._interrupted = False

    # ---- set-up --------------------------------------------------------------------------

    def check(
        self,
        make_plan: Callable[[], Plan],
        make_host: Callable[[Plan], Host],
        same: Mapping[str, object],
    ) -> None:
        """Check the arguments on every rank and compare them; an error is an error everywhere."""
        error: Exception | None = None
        plan: Plan | None = None
        try:
            plan = make_plan()
            if self.mesh.rank == 0:
                self.host = make_host(plan)
            elif self.mesh.rank >= plan.servers:
                choose_device(plan.device, worker=0)  # an error about it is an error everywhere
        except Exception as raised:
            error = raised
        text = b"" if error is None else f"{type(error).__name__}: {error}".encode()[:_TEXT_BYTES]
        told = self.mesh.all_gather(
            _CHECK.pack(error is not None, len(text), text), "the check of the arguments"
        )
        if error is not None:
            raise error
        for rank, record in enumerate(told):
            failed, length, content = _CHECK.unpack(record)
            if failed:
                raise ArgumentError(f"rank {rank}: {content[:length].decode(errors='replace')}")
        assert plan is not None
        self._compare(plan.digests(**same))
        self._count_ranks(plan)
        self._plan = plan

    def _compare(self, digests: Mapping[str, bytes]) -> None:
        names = list(digests)
        everyone = self.mesh.all_gather(b"".join(digests.values()), "the arguments' digests")
        for i, name in enumerate(names):
            of_rank = [record[16 * i : 16 * i + 16] for record in everyone]
            different = [rank for rank, digest in enumerate(of_rank) if digest != of_rank[0]]
            if different:
                what = "names, shapes or dtypes of params" if name == "params" else name
                raise ArgumentError(
                    f"{what}: rank {different[0]}{' and others' * (len(different) > 1)} called"
                    " psframe.run with another value than rank 0; every rank must call it with"
                    " equal arguments"
                )

    def _count_ranks(self, plan: Plan) -> None:
        size, servers = self.mesh.size, plan.servers
        if size <= servers:
            raise ArgumentError(
                f"servers: {servers} of {size} ranks serve, which leaves no worker; start at least"
                f" {servers + 1} ranks (mpirun -n {servers + 1} ...) or take fewer servers"
            )

    # ---- the run -------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Take part until the end, and return the summary that every rank gets."""
        plan = self._plan
        assert plan is not None
        mesh = self.mesh
        self._share_initial(plan)
        neighbours = meet(mesh, plan.layout, plan.servers, self._shared_memory)
        if mesh.rank < plan.servers:
            machine = self._serve(plan, neighbours)
        else:
            machine = None
            self._take_part(plan, neighbours)
        return self._end(plan, machine)

    def _share_initial(self, plan: Plan) -> None:
        """Give every server its part of rank 0's values."""
        mesh = self.mesh
        for server, (begin, end) in enumerate(plan.layout.shards(plan.servers)):
            if server and mesh.rank == 0:
                mesh.send(plan.initial[begin:end], server, "the first parameters")
            elif server and mesh.rank == server:
                mesh.receive(plan.initial[begin:end], 0, "the first parameters")

    def _serve(self, plan: Plan, neighbours: Neighbours) -> Server:
        port = MpiServerPort(self.mesh, plan.layout, neighbours)
        machine = plan.build_server(self.mesh.rank, port.workers, port.buffers, port.memory)
        try:
            serve(machine, port, self.host, tick=self._watch(machine))
        except KeyboardInterrupt:
            if not isinstance(machine, Leader):
                raise
            self._interrupted = True
            for out in machine.end():
                route(out, port, self.host)
            serve(machine, port, no_host_event, tick=self._watch(machine))
        port.close()
        return machine

    def _watch(self, machine: Server) -> Callable[[], None]:
        """Make the check that a run which has failed ends within its grace."""
        deadline: float | None = None

        def check() -> None:
            nonlocal deadline
            if not isinstance(machine, Leader):
                return
            if not (machine.failure or machine.diverged or self._interrupted):
                return
            now = time.monotonic()
            if deadline is None:
                deadline = now + _GRACE_S
            elif now > deadline:
                busy = [w for w, gone in enumerate(machine.gone) if not gone]
                raise RankLost(
                    f"workers {busy} did not come back within {_GRACE_S:.0f} s after the run"
                    f" had ended: {self._why(machine)}"
                )

        return check

    def _why(self, leader: Leader) -> str:
        if leader.failure is not None:
            worker, failure = leader.failure
            return f"worker {worker} failed with {failure.type}: {failure.message}"
        return "diverged" if leader.diverged else "interrupted"

    def _take_part(self, plan: Plan, neighbours: Neighbours) -> None:
        endpoint = MpiEndpoint(self.mesh, plan.layout, neighbours)
        device = choose_device(plan.device, neighbours.local_worker)
        if plan.device == "auto" and device == "cpu":
            _log.info("worker %d computes on the CPU: there is no GPU", endpoint.index)
        opened = make_device(device, plan.layout)
        worker = Worker(endpoint, plan.layout, opened, plan.seed)
        self._error = take_part(self._work, worker)
        endpoint.close()

    # ---- the end -------------------------------------------------------------------------

    def _end(self, plan: Plan, machine: Server | None) -> dict[str, Any]:
        """Bring the shards to rank 0, and its summary to everyone."""
        mesh = self.mesh
        if isinstance(machine, Leader):
            self._params = np.empty(plan.layout.size, plan.layout.dtype)
            for server, (begin, end) in enumerate(plan.layout.shards(plan.servers)):
                part = self._params[begin:end]
                if server:
                    mesh.receive(part, server, f"the parameters of server {server}", None)
                else:
                    part[:] = machine.store.params
            summary = json.dumps(self._summary(machine)).encode()
            return dict(json.loads(mesh.broadcast(summary, "the summary", None)))
        if machine is not None:
            mesh.send(machine.store.params, 0, "this server's parameters", None)
        # A worker may be done long before the others.
        return dict(json.loads(mesh.broadcast(None, "the summary", None)))

    def _summary(self, leader: Leader) -> dict[str, Any]:
        failure = None
        if leader.failure is not None:
            worker, what = leader.failure
            failure = [worker, what.type, what.message, what.traceback]
        return {
            **summarise(leader),
            "failure": failure,
            "diverged": str(diverged(leader)) if leader.diverged else "",
            "interrupted": self._interrupted,
        }

    def conclude(self, summary: dict[str, Any]) -> Result:
        """Return this rank's result, or raise what every rank raises."""
        plan = self._plan
        assert plan is not None
        error = self._outcome(summary, plan)
        if error is not None:
            self.verdict_of(error, updates=summary["version"])
            raise error
        self.host.verdict("completed", updates=summary["version"])
        if self._params is not None:
            return make_result(plan, summary, self._params, self.host.path)
        return make_result(plan, summary, None, None)

    def _outcome(self, summary: dict[str, Any], plan: Plan) -> BaseException | None:
        if summary["interrupted"]:
            return KeyboardInterrupt("the run was interrupted")
        if summary["failure"] is not None:
            worker, *what = summary["failure"]
            rank = plan.servers + worker
            if self._error is not None and rank == self.mesh.rank:
                return self._error
            failure = Failure(*what)
            return WorkerFailed(worker, rank, failure.type, failure.message, failure.traceback)
        return Diverged(summary["diverged"]) if summary["diverged"] else None

    def verdict_of(self, error: BaseException, updates: int | None = None) -> None:
        """Write to the run directory how the run ended."""
        interrupted = isinstance(error, KeyboardInterrupt) or (
            isinstance(error, WorkerFailed) and error.type == "KeyboardInterrupt"
        )
        state = "interrupted" if interrupted else "failed"
        text = str(error).partition("\nits traceback:")[0]
        self.host.verdict(state, updates=updates, reason=f"{type(error).__name__}: {text}")

    def abort(self, error: BaseException) -> None:
        """End the whole job: the others cannot be told otherwise any more."""
        self.verdict_of(error)
        what = "".join(traceback.format_exception(error))
        print(f"psframe: rank {self.mesh.rank} ends the job:\n{what}", file=sys.stderr, flush=True)
        self.mesh.abort(130 if isinstance(error, KeyboardInterrupt) else 1)
