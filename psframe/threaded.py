"""A run in this process: the first server in this thread, the others and the workers in threads."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from psframe.blas import limited_threads
from psframe.checkpoint import Reader
from psframe.client import Worker
from psframe.devices import announce_threads, choose_device, make_device
from psframe.draws import read_draws
from psframe.errors import Interrupted, RankLost
from psframe.host import Host
from psframe.interrupts import Interrupts
from psframe.leader import Leader
from psframe.plan import Plan, Result
from psframe.restoring import explained_state
from psframe.results import diverged, ended_by, interrupted_by, make_result, summarise
from psframe.roles import (
    Grace,
    Overdue,
    describe,
    keeping_errors,
    no_host_event,
    open_worker,
    serve,
    serve_first,
    take_part,
)
from psframe.rundir import CHECKPOINTS
from psframe.saving import ShardSaver
from psframe.server_device import Card, choose_server_device
from psframe.state import Fields, Resume
from psframe.transports.threads import ThreadEndpoint, ThreadHub, ThreadPort

__all__ = ["run_threads"]

# Threads that have nothing to do but to return get this long.
_JOIN_BOUND_S = 2.0

_log = logging.getLogger("psframe")


def run_threads(
    work: Callable[[Worker], Any], plan: Plan, workers: int, make_host: Callable[[Plan], Host]
) -> Result:
    """Run with `workers` worker threads, and a thread a server but the first; see `psframe.run`."""
    host = Host(None, None)
    interrupts = Interrupts(lambda reason: host.verdict("interrupted", reason=reason))
    try:
        with interrupts, limited_threads(workers):
            with interrupts.held():  # or a run directory might say "running" for ever
                host = make_host(plan)
            interrupts.check()
            reader = host.resume(plan.layout, plan.seed) if plan.resumes else None
            with contextlib.nullcontext() if reader is None else reader:
                run = _ThreadRun(work, plan, workers, host, interrupts, reader)
            with interrupts.held():
                host.begin()
            interrupts.check()
            result = run.run()
            with interrupts.held():  # it is complete, whatever comes now
                host.verdict("completed", updates=result.version)
    except BaseException as error:
        what = describe(error)
        interrupted = isinstance(error, (KeyboardInterrupt, Interrupted))
        state = "interrupted" if interrupted else "failed"
        host.verdict(state, reason=f"{what.type}: {what.message}")
        raise
    return result


class _ThreadRun:
    """One run."""

    def __init__(
        self,
        work: Callable[[Worker], Any],
        plan: Plan,
        workers: int,
        host: Host,
        interrupts: Interrupts,
        reader: Reader | None,
    ) -> None:
        self._interrupts = interrupts
        self._plan = plan
        self._host = host
        self._errors: list[BaseException | None] = [None] * workers
        self._work = keeping_errors(work, self._errors)
        self._hub = hub = ThreadHub(plan.layout, plan.servers, workers)
        self._ports = [ThreadPort(hub, s) for s in range(plan.servers)]
        ordinals = [choose_server_device(plan.server_device, s) for s in range(plan.servers)]
        cards = [None if ordinal is None else Card(ordinal) for ordinal in ordinals]
        resume = None if reader is None else Resume(reader.state, reader)
        with explained_state(reader):
            self._machines = [
                plan.build_server(
                    s, workers, port.buffers, port.memory, resume=resume, card=cards[s]
                )
                for s, port in enumerate(self._ports)
            ]
            self._random = {} if reader is None else read_draws(Fields(reader.state))
        self._devices = [choose_device(plan.device, w) for w in range(workers)]
        announce_threads(plan.device, self._devices)
        self._threads = [
            threading.Thread(
                target=self._follow, args=(s,), name=f"psframe-server-{s}", daemon=True
            )
            for s in range(1, plan.servers)
        ] + [
            threading.Thread(
                target=self._take_part,
                args=(w, self._devices[w]),
                name=f"psframe-worker-{w}",
                daemon=True,
            )
            for w in range(workers)
        ]

    def run(self) -> Result:
        leader = self._machines[0]
        assert isinstance(leader, Leader)
        grace = Grace(leader, self._interrupts)
        for thread in self._threads:
            thread.start()
        try:
            serve_first(grace, self._ports[0], self._host, self._plan)
        except Overdue as error:
            # Nobody can end a thread; these are daemons, and end with the process.
            _log.warning("%s; they are left behind", error)
            if grace.interrupt is not None:  # of what is saved nothing can be said
                raise grace.interrupt from None
        except BaseException as error:
            self._hub.broken = error  # every waiting thread finds it within its poll
            raise
        else:
            self._join()
        if grace.interrupt is not None:
            said = ended_by(str(grace.interrupt), leader.store.version, grace.saved)
            raise KeyboardInterrupt(said) from grace.interrupt
        self._raise_failure(leader)
        if grace.request:
            raise interrupted_by(grace.request, leader.store.version, grace.saved)
        params = np.concatenate([machine.outcome for machine in self._machines])
        return make_result(
            self._plan,
            summarise(leader, self._devices, (m.traffic for m in self._machines[1:])),
            params,
            self._host.path,
        )

    def _follow(self, server: int) -> None:
        try:
            port = self._ports[server]
            plan, machine = self._plan, self._machines[server]
            spans = port.to_leader if plan.spans else None
            path = self._host.path
            if path is None or plan.marks is None:
                serve(machine, port, no_host_event, spans=spans)
                return
            saver = ShardSaver(path / CHECKPOINTS, machine, plan.layout, plan.servers)
            serve(machine, port, saver.observe, spans=spans, saver=saver)
        except BaseException as error:  # a thread has nobody to raise to but those that wait
            self._hub.broken = error

    def _take_part(self, index: int, device: str) -> None:
        endpoint = ThreadEndpoint(self._hub, index)
        plan = self._plan
        try:
            worker, opened = open_worker(
                endpoint,
                lambda: make_device(device, plan.layout),
                lambda opened: plan.build_worker(endpoint, opened, self._random.get(index)),
            )
        except Exception as error:  # which the others have heard of
            self._errors[index] = error
            return
        try:
            take_part(self._work, worker, opened)
        except RankLost as error:
            _log.debug("worker %d ends: %s", index, error)  # a server thread has told why
        except BaseException as error:
            self._errors[index] = error
            self._hub.broken = error

    def _join(self) -> None:
        deadline = time.monotonic() + _JOIN_BOUND_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._hub.broken is not None:
            raise RankLost("a thread of the run broke down") from self._hub.broken

    def _raise_failure(self, leader: Leader) -> None:
        if leader.failure is not None:
            error = self._errors[leader.failure[0]]
            assert error is not None, "a failure was reported by its own thread"
            raise error
        if leader.diverged:
            raise diverged(leader)
