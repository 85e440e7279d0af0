"""Checkpoints of runs over MPI: the same files, and the same bits, whoever writes them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe.checkpoint import Reader, committed_versions, reading

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
PARAMS = {"w": np.linspace(-1, 1, 50, dtype=np.float32), "b": np.zeros(3, np.float32)}
UPDATES = 48


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rank 0's, on all."""
    shared: Path = WORLD.bcast(tmp_path, 0)
    return shared / "run"


def work(worker: psframe.Worker) -> None:
    params = worker.pull()
    for indices in worker.leases(48, 4, epochs=4):
        noise = worker.rng.standard_normal(50).astype(np.float32)
        grads = {
            "w": np.tanh(params["w"]) + np.float32(1e-2) * noise,
            "b": params["b"] + np.float32(indices.mean() * 1e-3),
        }
        params = worker.push_pull(grads)


def run(**more: Any) -> psframe.Result:
    return psframe.run(work, PARAMS, optimizer=psframe.optim.Adam(lr=0.01), seed=3, **more)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("stop", [1, 17, 47])
@pytest.mark.parametrize("after", [1, 2])
def test_stopped_and_resumed(folder: Path, stop: int, after: int) -> None:
    """With one worker to the bit; with several, every sample is done once."""
    servers = SIZE - 1
    if after == 2 and servers < 2:
        after = 1
    whole = run(servers=servers)
    run(servers=servers, max_updates=stop, checkpoint_every=7, run_dir=folder)
    last = run(servers=after, resume=True, checkpoint_every=7, run_dir=folder)
    assert last.version == whole.version == UPDATES
    assert last.ledger.applied == UPDATES
    if RANK == 0:
        assert committed_versions(folder / "checkpoints")[-1] == UPDATES
        assert whole.params is not None
        assert last.params is not None
        if after == servers:
            for name in PARAMS:
                assert whole.params[name].tobytes() == last.params[name].tobytes()


@pytest.mark.mpi(min_size=2)
def test_a_large_checkpoint_may_take_longer_than_anybody_is_silent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verification, while the others wait, and its reading, which is no hanging loop."""
    digest_of, read = reading.digest_of, Reader.read

    def slow_digest_of(fd: int, size: int, name: str, alive: Any) -> str:
        _spend(1.5, alive)
        return digest_of(fd, size, name, alive)

    def slow_read(self: Reader, *arguments: Any) -> None:
        _spend(1.0, self.alive)
        read(self, *arguments)

    servers = min(2, SIZE - 1)
    run(servers=servers, max_updates=5, checkpoint_every=5, run_dir=folder)
    monkeypatch.setattr("psframe.transports.rounds._BOUND_S", 0.5)
    monkeypatch.setattr("psframe.transports.watch._STUCK_S", 0.5)
    monkeypatch.setattr("psframe.transports.watch._NOTICE_S", 0.0)
    monkeypatch.setattr(reading, "digest_of", slow_digest_of)
    monkeypatch.setattr(Reader, "read", slow_read)
    assert run(servers=servers, resume=True, run_dir=folder, timeout_s=0.5).version == UPDATES


def _spend(seconds: float, alive: Any) -> None:
    """Be at something for so long, in small pieces."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("to_root", [True, False])
def test_a_signal_to_any_rank_ends_the_run_with_a_checkpoint(folder: Path, to_root: bool) -> None:
    def endless(worker: psframe.Worker) -> None:
        params = worker.pull()
        while True:
            params = worker.push_pull({name: params[name] for name in PARAMS})
            if worker.index == 0 and params.version > 9:
                if to_root:
                    os.kill(root, signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGUSR1)

    root: int = WORLD.bcast(os.getpid(), 0)
    with pytest.raises(psframe.Interrupted, match="SIGUSR1 has ended the run at version"):
        psframe.run(endless, PARAMS, optimizer=psframe.optim.SGD(0.1), run_dir=folder)
    if RANK == 0:
        status = json.loads((folder / "status.json").read_text())
        assert status["state"] == "interrupted"
        assert committed_versions(folder / "checkpoints") == [status["updates"]]


@pytest.mark.mpi(min_size=3)
def test_a_server_that_cannot_read_its_part_ends_the_run_on_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: Any, **more: Any) -> Any:
        raise psframe.CheckpointError("v000000005: cannot be read: Stale file handle")

    run(servers=2, max_updates=5, checkpoint_every=5, run_dir=folder)
    if RANK == 1:
        monkeypatch.setattr("psframe.restoring.open_checkpoint", refuses)
    with pytest.raises(psframe.PsframeError, match="file system that all servers share"):
        run(servers=2, resume=True, run_dir=folder)
    if RANK == 0:  # it has not begun: what the attempt before has left stays
        assert json.loads((folder / "status.json").read_text())["state"] == "completed"
    monkeypatch.undo()
    assert run(servers=2, resume=True, run_dir=folder).version == UPDATES
