"""`psframe.simulate`: the same `work`, on the same servers, in virtual time and one process."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from psframe.client import Worker
from psframe.codecs import Codec
from psframe.consistency import Async, Mode
from psframe.devices import HostDevice
from psframe.draws import read_draws
from psframe.events import Answer, HostEvent, Marked, Output, PushHandled, Saved, ToServer
from psframe.host import Host
from psframe.leader import Leader
from psframe.plan import Observer, OptimizerLike, Plan, Result, check_count
from psframe.results import diverged, make_result, summarise
from psframe.roles import handle, keeping_errors, route, take_part
from psframe.server import Server
from psframe.stale import Rule
from psframe.state import Fields, Resume
from psframe.transports.simulated import ComputeTime, Network, SimulatedPort, VirtualTime

__all__ = ["TRACE_DTYPE", "Network", "SimResult", "Simulation", "simulate"]

TRACE_DTYPE = np.dtype(
    [
        ("time_s", "<f8"),
        ("worker", "<i4"),
        ("clock", "<i8"),
        ("version_read", "<i8"),
        ("version_applied", "<i8"),
        ("staleness", "<i8"),
        ("applied", "?"),
    ]
)


_pack_row = struct.Struct("<diqqqq?").pack  # a row of TRACE_DTYPE


@dataclass(frozen=True)
class SimResult(Result):
    """What a simulated run leaves behind: a `Result`, and

    Attributes:
        time_s: virtual seconds until the run was over.
        trace: packed structured array, one row a push in the order server 0 handled them:
            time_s f8, worker i4, clock i8 (steps finished before it), version_read i8,
            version_applied i8 (the version after handling it), staleness i8 (the version just
            before minus version_read), applied bool.
    """

    time_s: float = 0.0
    trace: npt.NDArray[Any] = field(default_factory=lambda: np.empty(0, TRACE_DTYPE))


def simulate(
    work: Callable[[Worker], Any],
    params: Mapping[str, Any],
    *,
    optimizer: OptimizerLike,
    mode: Mode = Async(),  # noqa: B008 - frozen, and part of the signature users read
    workers: int,
    servers: int = 1,
    compute_time_s: ComputeTime,
    network: Network = Network(),  # noqa: B008
    seed: int = 0,
    max_updates: int | None = None,
    clip_norm: float | None = None,
    stale: Rule | None = None,
    codec: Codec | None = None,
    pull_codec: Codec | None = None,
    observer: Observer | None = None,
) -> SimResult:
    """Run `work` on a simulated cluster; the same seed gives the same trace, byte for byte.

    Args:
        work, params, optimizer, mode, servers, seed, max_updates: as for `psframe.run`.
        clip_norm, stale, codec, pull_codec, observer: likewise.
        workers: W >= 1; 1,000 are ordinary.
        compute_time_s: (rng, worker_index, clock) -> seconds from a worker's last answer with
            parameters to its next push; `clock` counts the pushes it has made, and `rng` is the
            worker's own stream for this, not `worker.rng`. A second push after one answer costs
            nothing.
        network: latency and bandwidth of every node's link.

    Returns:
        The SimResult; ties are broken by (time, worker, order of issue).

    Raises:
        TypeError, ValueError: an argument is wrong.
        Diverged: 10 W pushes in a row were refused.
        Exception: whatever a `work` raised.
    """
    plan = Plan.check(
        work,
        params,
        optimizer=optimizer,
        mode=mode,
        servers=servers,
        seed=seed,
        max_updates=max_updates,
        clip_norm=clip_norm,
        stale=stale,
        codec=codec,
        pull_codec=pull_codec,
    )
    check_count("workers", workers, 1)
    if not callable(compute_time_s):
        raise TypeError(
            "compute_time_s: expected a function (rng, worker_index, clock) -> seconds,"
            f" got {compute_time_s!r}"
        )
    return Simulation(work, plan, int(workers), network, compute_time_s, observer=observer).run()


class Simulation:
    """One simulated run.

    Args:
        work, plan, workers, network, compute_time_s: as for `simulate`.
        observer: takes the leader's events.
        deaths: worker -> number of messages after which it dies (tests).
        inspect: called with (server index, its machine) after every event that it handled.
        save: called with (its machine, mark) when a server has made one: seconds to write it.
        resume: what to go on from.
    """

    def __init__(
        self,
        work: Callable[[Worker], Any],
        plan: Plan,
        workers: int,
        network: Network,
        compute_time_s: ComputeTime,
        *,
        observer: Observer | None = None,
        deaths: Mapping[int, int] | None = None,
        inspect: Callable[[int, Server], None] | None = None,
        save: Callable[[Server, Marked], float] = lambda machine, mark: 0.0,
        resume: Resume | None = None,
    ) -> None:
        self._plan = plan
        self._host = Host(None, observer)
        self._inspect = inspect
        self._save = save
        # By worker; checked by the leader's machine, too.
        self._random_states = {} if resume is None else read_draws(Fields(resume.state))
        self._errors: list[BaseException | None] = [None] * workers
        self._work = keeping_errors(work, self._errors)
        self._rows = bytearray()  # of the trace, packed: 45 bytes a push
        self._stop_time: float | None = None
        self._virtual = virtual = VirtualTime(
            plan.layout,
            plan.servers,
            workers,
            network=network,
            compute_time_s=compute_time_s,
            seed=plan.seed,
            deaths=deaths,
        )
        self._ports = [SimulatedPort(virtual, s) for s in range(plan.servers)]
        self.machines: list[Server] = [
            plan.build_server(
                s,
                workers,
                virtual.memory.buffers[s],
                virtual.server_memory(s),
                trace=True,
                resume=resume,
            )
            for s in range(plan.servers)
        ]
        virtual.deliver = [self._deliverer(s) for s in range(plan.servers)]

    def run(self) -> SimResult:
        """Run to the end.

        Raises:
            RuntimeError: every worker waits and nothing is to come.
        """
        leader = self.machines[0]
        assert isinstance(leader, Leader)
        virtual = self._virtual
        for index in range(virtual.workers):
            virtual.at(0.0, index, self._start, index)
        virtual.run()
        if not all(machine.finished for machine in self.machines):
            waiting = [w for w, gone in enumerate(leader.gone) if not gone]
            raise RuntimeError(f"simulation: workers {waiting} wait for what never comes")
        if leader.failure is not None:
            error = self._errors[leader.failure[0]]
            assert error is not None, "a failure was reported by its own worker"
            raise error
        if leader.diverged:
            raise diverged(leader)
        params = np.concatenate([machine.store.params for machine in self.machines])
        devices = ["cpu"] * leader.workers
        summary = summarise(leader, devices, (m.traffic for m in self.machines[1:]))
        result = make_result(self._plan, summary, params, None)
        time_s = virtual.now if self._stop_time is None else self._stop_time
        trace = np.frombuffer(self._rows, TRACE_DTYPE)
        return SimResult(**vars(result), time_s=time_s, trace=trace)

    def _start(self, index: int) -> None:
        endpoint = self._virtual.endpoints[index]

        def body() -> None:
            device = HostDevice()
            worker = self._plan.build_worker(endpoint, device, self._random_states.get(index))
            take_part(self._work, worker, device)

        endpoint.start(body)

    def mark(self) -> None:
        """Have the run marked for a checkpoint, as a driver does on its own account."""
        leader = self.machines[0]
        assert isinstance(leader, Leader)
        self._route(0, leader.mark())

    def _route(self, index: int, outs: list[Output]) -> None:
        port = self._ports[index]
        for out in outs:
            if type(out) is Answer:  # as route does, at less cost
                port.to_worker(out)
            elif type(out) is Marked:
                time = self._virtual.now + self._save(self.machines[index], out)
                self._virtual.at(time, -1, self._virtual.deliver[index], Saved(out.number))
            else:
                route(out, port, self._observe)

    def _deliverer(self, index: int) -> Callable[[ToServer], None]:
        machine, inspect, pass_on = self.machines[index], self._inspect, self._route
        virtual = self._virtual

        def clock() -> float:
            return virtual.now

        def deliver(event: ToServer) -> None:
            pass_on(index, handle(machine, event, clock))
            if machine.stopped and index == 0 and self._stop_time is None:
                self._stop_time = self._virtual.now
            if inspect is not None:
                inspect(index, machine)

        return deliver

    def _observe(self, event: HostEvent) -> None:
        if type(event) is PushHandled:
            self._rows += _pack_row(
                self._virtual.now,
                event.worker,
                event.clock,
                event.version_read,
                event.version_applied,
                event.staleness,
                event.applied,
            )
        self._host(event)
