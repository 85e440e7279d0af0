"""`psframe.run`: finds out who serves and who works, and runs the loops until it is over."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from psframe.client import Worker
from psframe.consistency import Async, Mode
from psframe.devices import choose_device, make_device
from psframe.errors import RankLost
from psframe.host import Host
from psframe.launcher import find_launcher
from psframe.leader import Leader
from psframe.plan import Observer, OptimizerLike, Plan, Result, check_count
from psframe.results import diverged, make_result, summarise
from psframe.roles import no_host_event, route, serve, take_part
from psframe.transports.threads import ThreadEndpoint, ThreadHub, ThreadPort

__all__ = ["Result", "run"]

# After Ctrl-C, or once the run has broken down, workers have this long to come back from what
# they compute.
_GRACE_S = 2.0

_log = logging.getLogger("psframe")


def run(
    work: Callable[[Worker], Any],
    params: Mapping[str, Any],
    *,
    optimizer: OptimizerLike,
    mode: Mode = Async(),  # noqa: B008 - frozen, and part of the signature users read
    servers: int = 1,
    workers: int | None = None,
    device: str = "auto",
    seed: int = 0,
    max_updates: int | None = None,
    run_dir: str | Path | None = None,
    comm: Any = None,
    clip_norm: float | None = None,
    overwrite: bool = False,
    config: Mapping[str, Any] | None = None,
    observer: Observer | None = None,
    shared_memory: bool = True,
) -> Result:
    """Train `params` with a parameter server; every rank calls it with equal arguments.

    Ranks [0, servers) serve; each other rank calls `work(worker)` once. Without an MPI launcher
    everything runs in this process, in threads, and MPI is not imported. The run is over when
    every `work` has returned, when `max_updates` updates have been applied, or when someone has
    called `worker.stop()`; pushes made before a `work` returns are drained.

    Args:
        work: function of one `psframe.Worker`.
        params: names to float32 or float64 arrays, all of one dtype; rank 0's values count.
        optimizer: one of `psframe.optim`.
        mode: `psframe.Async()`, `psframe.SSP(staleness=s)` or `psframe.BSP(backup=b)`.
        servers: S >= 1.
        workers: worker threads without a launcher (default 1); ignored under one.
        device: "auto" (a GPU if CuPy can use one), "cpu", "cuda" or "cuda:k".
        seed: decides `worker.rng` and the order of leased samples.
        max_updates: stop at exactly this version.
        run_dir: folder for config.toml, metrics.jsonl and status.json, written by rank 0;
            "{time}" in it becomes the date and time.
        comm: an mpi4py communicator to run in, duplicated; default all ranks.
        clip_norm: scale a gradient whose Euclidean norm is larger down to it.
        overwrite: replace what an earlier run wrote into run_dir.
        config: what to write to config.toml; default these arguments.
        observer: called on rank 0 with each `psframe.events.HostEvent`.
        shared_memory: use it between ranks on one node; False sends everything through MPI.

    Returns:
        The Result; `.params` only on rank 0.

    Raises:
        TypeError, ValueError: an argument is wrong; on the other ranks ArgumentError.
        ArgumentError: an argument differs between ranks, or there are too few ranks.
        LaunchError: the launcher and the MPI library do not belong together.
        RunDirError: run_dir cannot be used.
        WorkerFailed: `work` raised on another rank (its own rank re-raises what it raised).
        Diverged: 10 W pushes in a row were refused.
        RankLost: a rank died, or did not come back in time.
        KeyboardInterrupt: the run was interrupted, here or on another rank.
    """

    def plan() -> Plan:
        return Plan.check(
            work,
            params,
            optimizer=optimizer,
            mode=mode,
            servers=servers,
            device=device,
            seed=seed,
            max_updates=max_updates,
            clip_norm=clip_norm,
        )

    def host(checked: Plan) -> Host:
        described = {
            "optimizer": repr(checked.optimizer),
            "mode": repr(checked.mode),
            "servers": checked.servers,
            "device": checked.device,
            "seed": checked.seed,
            **({} if checked.max_updates is None else {"max_updates": checked.max_updates}),
            **({} if checked.clip_norm is None else {"clip_norm": checked.clip_norm}),
        }
        return Host.open(
            run_dir,
            overwrite=overwrite,
            config=described if config is None else config,
            observer=observer,
        )

    launcher = find_launcher()
    if comm is None and launcher is None:
        checked = plan()
        count = 1 if workers is None else workers
        check_count("workers", count, 1)
        return _run_threads(work, checked, int(count), host(checked))
    from psframe.cluster import run_cluster  # imports MPI

    if workers is not None:
        _log.warning("workers=%s is ignored: the launcher decides how many ranks work", workers)
    return run_cluster(
        work,
        plan,
        host,
        launcher=launcher,
        comm=comm,
        shared_memory=shared_memory,
        same={"run_dir": str(run_dir), "overwrite": overwrite, "shared_memory": shared_memory},
    )


def _run_threads(work: Callable[[Worker], Any], plan: Plan, workers: int, host: Host) -> Result:
    try:
        with host.interrupts():
            result = _ThreadRun(work, plan, workers, host).run()
    except KeyboardInterrupt:
        host.verdict("interrupted", reason="interrupted")
        raise
    except BaseException as error:
        host.verdict("failed", reason=f"{type(error).__name__}: {error}")
        raise
    host.verdict("completed", updates=result.version)
    return result


class _ThreadRun:
    """One run in this process: the leader in this thread, the others in daemon threads."""

    def __init__(self, work: Callable[[Worker], Any], plan: Plan, workers: int, host: Host) -> None:
        self._work = work
        self._plan = plan
        self._host = host
        self._errors: list[BaseException | None] = [None] * workers
        self._hub = hub = ThreadHub(plan.layout, plan.servers, workers)
        self._ports = [ThreadPort(hub, s) for s in range(plan.servers)]
        self._machines = [
            plan.build_server(s, workers, port.buffers, port.memory)
            for s, port in enumerate(self._ports)
        ]
        devices = [choose_device(plan.device, w) for w in range(workers)]
        self._threads = [
            threading.Thread(
                target=self._follow, args=(s,), name=f"psframe-server-{s}", daemon=True
            )
            for s in range(1, plan.servers)
        ] + [
            threading.Thread(
                target=self._take_part,
                args=(w, devices[w]),
                name=f"psframe-worker-{w}",
                daemon=True,
            )
            for w in range(workers)
        ]

    def run(self) -> Result:
        leader = self._machines[0]
        assert isinstance(leader, Leader)
        for thread in self._threads:
            thread.start()
        try:
            serve(leader, self._ports[0], self._host)
        except KeyboardInterrupt:
            self._end(leader)
            raise
        except BaseException as error:
            self._hub.broken = error  # every waiting thread finds it within its poll
            raise
        self._join()
        self._raise_failure(leader)
        params = np.concatenate([machine.store.params for machine in self._machines])
        return make_result(self._plan, summarise(leader), params, self._host.path)

    def _follow(self, server: int) -> None:
        try:
            serve(self._machines[server], self._ports[server], no_host_event)
        except BaseException as error:
            self._hub.broken = error

    def _take_part(self, index: int, device: str) -> None:
        try:
            opened = make_device(device, self._plan.layout)
            endpoint = ThreadEndpoint(self._hub, index)
            worker = Worker(endpoint, self._plan.layout, opened, self._plan.seed)
            self._errors[index] = take_part(self._work, worker)
        except RankLost as error:
            _log.debug("worker %d ends: %s", index, error)  # a server thread has told why
        except BaseException as error:
            self._errors[index] = error
            self._hub.broken = error

    def _end(self, leader: Leader) -> None:
        """After Ctrl-C: tell everyone, and give the workers a moment to come back."""
        for out in leader.end():
            route(out, self._ports[0], no_host_event)
        deadline = time.monotonic() + _GRACE_S

        def check() -> None:
            if time.monotonic() > deadline:
                raise RankLost("some workers did not come back")

        try:
            serve(leader, self._ports[0], no_host_event, tick=check)
        except RankLost:
            _log.warning("interrupted; some workers are still computing and are left behind")

    def _join(self) -> None:
        deadline = time.monotonic() + _GRACE_S
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
