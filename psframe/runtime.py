"""`psframe.run`: takes the arguments, and runs in threads or, under a launcher, over MPI."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from psframe.cadence import parse_cadence
from psframe.client import Worker
from psframe.codecs import Codec
from psframe.consistency import Async, Mode
from psframe.errors import ArgumentError
from psframe.host import Host
from psframe.launcher import find_launcher, find_place, starting_mpi
from psframe.leader import Score
from psframe.marking import Marks
from psframe.placement import Servers, check_servers, one_process
from psframe.plan import (
    TIMEOUT_S,
    Observer,
    OptimizerLike,
    Plan,
    Result,
    check_count,
    check_threads,
)
from psframe.stale import Rule
from psframe.threaded import run_threads

__all__ = ["Result", "run"]

_log = logging.getLogger("psframe")


def run(
    work: Callable[[Worker], Any],
    params: Mapping[str, Any],
    *,
    optimizer: OptimizerLike,
    mode: Mode = Async(),  # noqa: B008 - frozen, and part of the signature users read
    servers: Servers = 1,
    workers: int | None = None,
    device: str = "auto",
    server_device: str = "cpu",
    gpu_direct: str = "auto",
    seed: int = 0,
    max_updates: int | None = None,
    run_dir: str | Path | None = None,
    comm: Any = None,
    clip_norm: float | None = None,
    stale: Rule | None = None,
    codec: Codec | None = None,
    pull_codec: Codec | None = None,
    overwrite: bool = False,
    checkpoint_every: int | str | None = None,
    keep_checkpoints: int = 3,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    observer: Observer | None = None,
    trace: bool = False,
    spans: bool = False,
    score: Score | None = None,
    shared_memory: bool = True,
    timeout_s: float = TIMEOUT_S,
    respawn: int = 0,
) -> Result:
    """Train `params` with a parameter server; every rank calls it with equal arguments.

    Ranks [0, servers) serve, or those that `servers` names; each other rank calls `work(worker)`
    once. Without an MPI launcher everything runs in this process, in threads, and MPI is not
    imported. The run is over when every `work` has returned, when `max_updates` updates have been
    applied, or when someone has called `worker.stop()`; pushes made before a `work` returns are
    drained.

    Args:
        work: function of one `psframe.Worker`.
        params: names to float32 or float64 arrays, all of one dtype; rank 0's values count.
        optimizer: one of `psframe.optim`.
        mode: `psframe.Async()`, `psframe.SSP(staleness=s)` or `psframe.BSP(backup=b)`.
        servers: S >= 1, for the first S ranks; "per-node", for the first rank of each node (one
            server without a launcher); or a list of ranks, with 0, which is server 0, in front.
        workers: worker threads without a launcher (default 1); ignored under one.
        device: "auto" (a GPU if CuPy can use one), "cpu", "cuda" or "cuda:k".
        server_device: where the servers' parameters are, and are updated: "cpu", "cuda" (server k
            of a node takes its GPU k, and the next one again the first after the last) or
            "cuda:k". The optimizer is one of `psframe.optim`, or one with a formula as theirs.
        gpu_direct: whether MPI is given arrays where they are, on a GPU, between ranks that share
            no memory: "auto", where MPI is known to take them; "on", which is an error on every
            rank where it is not; "off", where nobody asks it. "on" is about MPI alone. On a node,
            workers and servers on GPUs open each other's device memory, where they can, unless this
            is "off". docs/gpu.md says what goes so.
        seed: decides `worker.rng` and the order of leased samples.
        max_updates: stop at exactly this version.
        run_dir: folder for config.toml, metrics.jsonl and status.json, written by rank 0;
            "{time}" in it becomes the date and time.
        comm: an mpi4py communicator to run in, duplicated; default all ranks.
        clip_norm: scale a gradient whose Euclidean norm is larger down to it.
        stale: what becomes of a stale gradient, one of `psframe.stale`; as it is, if None.
        codec: what travels in place of a gradient, one of `psframe.codecs`; itself, if None.
        pull_codec: the same for parameters: of what they differ by from those that the worker has.
        overwrite: replace what an earlier run wrote into run_dir.
        checkpoint_every: write a checkpoint into run_dir every so many updates, or every "30s",
            "5min" or "2h", and at the end. One that is due while another is being written is left
            out. Between servers on several nodes run_dir is on a file system that they share.
        keep_checkpoints: how many of them stay, beside that of the best evaluation.
        resume: go on in run_dir from the newest checkpoint that verifies, or begin if there is
            none. The parameters, the optimizer and the seed are those of then; numbers of workers
            and servers may be others.
        config: what to write to config.toml; default these arguments.
        observer: called on rank 0 with each `psframe.events.HostEvent`; one that returns True ends
            the run as `worker.stop()` does. It may have a method `tick`, which is called between
            events and at least twice a second, `opened`, called with the run directory, and
            `goes_on`, called before it with the version that a resumed run begins with.
        trace: tell the observer of every push (`PushHandled`).
        spans: tell it when servers were at what (`Spans`); workers tell with `worker.span`.
        score: function of an evaluation's sums (`worker.tasks(evaluate=...)`), higher is better;
            the result's parameters are then those of the best evaluation.
        shared_memory: use it between ranks on one node; False sends everything through MPI.
        timeout_s: a rank that gives no sign of life for so long counts as lost, 0.5 at least.
            Workers give one while they compute, too. Without a launcher it means nothing.
        respawn: lost workers that server 0 replaces, at most so many in all (0 to 1000); with one
            server, under `mpirun --with-ft ulfm`. A replacement is this program once more, on
            server 0's node and alone, without MPI; its first call of this function joins the run,
            and does not return: when the run is over for it, its process ends. So it is for a
            program's first run. `Result.lost` names the lost all the same.

    Returns:
        The Result; `.params` only on rank 0.

    Raises:
        TypeError, ValueError: an argument is wrong; on the other ranks ArgumentError.
        ArgumentError: an argument differs between ranks, or there are too few ranks.
        LaunchError: the launcher and the MPI library do not belong together.
        RunDirError: run_dir cannot be used.
        CheckpointError: there are checkpoints to go on from, and none can be used.
        Interrupted: SIGUSR1 or SIGUSR2 has ended the run; with run_dir it has left a checkpoint.
        WorkerFailed: `work` raised on another rank (its own rank re-raises what it raised).
        Diverged: 10 W pushes in a row were refused.
        RankLost: a server died or fell silent, or every worker; a rank did not come back in time;
            or this one was silent for so long that the run has ended without it. The loss of a
            worker ends no run, unless MPI ends the job (`mpirun --with-ft ulfm` does not).
        KeyboardInterrupt: the run was interrupted, here or on another rank.
    """

    launcher = find_launcher()
    alone = comm is None and launcher is None

    def plan() -> Plan:
        placement = check_servers(servers)
        every = (None, None) if checkpoint_every is None else parse_cadence(checkpoint_every)
        for name, asked in (("checkpoint_every", checkpoint_every), ("resume", resume or None)):
            if asked is not None and run_dir is None:
                raise ValueError(f"{name}: needs a run_dir for the checkpoints")
        if resume and overwrite:
            raise ValueError("resume: goes on with what overwrite would replace; give one of them")
        check_count("keep_checkpoints", keep_checkpoints, 1)
        marks = Marks(every[0], at_end=checkpoint_every is not None)
        return Plan.check(
            work,
            params,
            optimizer=optimizer,
            mode=mode,
            servers=one_process(placement) if alone else 1,
            placement=placement,
            device=device,
            server_device=server_device,
            gpu_direct=gpu_direct,
            seed=seed,
            max_updates=max_updates,
            clip_norm=clip_norm,
            stale=stale,
            codec=codec,
            pull_codec=pull_codec,
            score=score,
            trace=trace,
            spans=spans,
            marks=None if run_dir is None else marks,
            every_s=every[1],
            keep_checkpoints=int(keep_checkpoints),
            resumes=resume,
            timeout_s=timeout_s,
            respawn=respawn,
        )

    def host(checked: Plan) -> Host:
        described = {
            "optimizer": repr(checked.optimizer),
            "mode": repr(checked.mode),
            "servers": checked.placement,
            "device": checked.device,
            **({} if server_device == "cpu" else {"server_device": server_device}),
            **({} if gpu_direct == "auto" else {"gpu_direct": gpu_direct}),
            "seed": checked.seed,
            **({} if checked.max_updates is None else {"max_updates": checked.max_updates}),
            **({} if checked.clip_norm is None else {"clip_norm": checked.clip_norm}),
            **({} if stale is None else {"stale": repr(checked.stale)}),
            **({} if codec is None else {"codec": repr(checked.codec)}),
            **({} if pull_codec is None else {"pull_codec": repr(checked.pull_codec)}),
            **({} if checkpoint_every is None else {"checkpoint_every": checkpoint_every}),
            **({} if checked.timeout_s == TIMEOUT_S else {"timeout_s": checked.timeout_s}),
            **({"respawn": checked.respawn} if checked.respawn else {}),
        }
        return Host.open(
            run_dir,
            overwrite=overwrite,
            resume=resume,
            config=described if config is None else config,
            observer=observer,
        )

    if alone:
        checked = plan()
        if checked.gpu_direct == "on":
            raise ArgumentError(
                "gpu_direct: 'on' gives arrays on GPUs to MPI, and this is one process without it;"
                " start several with mpirun, or take gpu_direct='auto'"
            )
        check_threads("servers", checked.servers)
        count = 1 if workers is None else workers
        check_threads("workers", count)
        return run_threads(work, checked, int(count), host)
    same = {"run_dir": str(run_dir), "overwrite": overwrite, "shared_memory": shared_memory}
    place = find_place()
    if place is not None:
        from psframe.replacement import stand_in

        stand_in(work, plan, place, same)
    with starting_mpi():
        from psframe.cluster import run_cluster  # imports MPI

    if workers is not None and (launcher is None or launcher.rank == 0):
        _log.warning("workers=%s is ignored: the launcher decides how many ranks work", workers)
    return run_cluster(
        work,
        plan,
        host,
        launcher=launcher,
        comm=comm,
        shared_memory=shared_memory,
        same=same,
    )
