"""A run for `test_opening_deaths` to start under mpirun, in which a worker is killed.

    opening.py FOLDER MOMENT MODE SERVERS KILLER RESPAWN

Workers and servers have each other's GPU memory open, by the stand-ins of `fake_ipc`. The second
worker dies at a MOMENT: "computing" on a snapshot, "pulling" another, when it has "pushed"; or when
the server KILLER has "received" a push of its, or "granted" it a snapshot, and not yet said so:
that server kills it, and goes on when it is dead. A second run of those that are left follows.
Workers leave FOLDER/rank-R, with their process; every rank that ends leaves FOLDER/rank-R.json, and
rank 0 FOLDER/result.json.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from fake_cuda import FakeCuda
from fake_cupy import FakeCupy

import psframe
from psframe import cluster, device_store
from psframe.events import NO_BUFFER, Answer, Logged, Push
from psframe.layout import Layout
from psframe.transports import borrowing
from psframe.transports.mpi_port import MpiServerPort

FOLDER, MOMENT, MODE = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
SERVERS, KILLER, RESPAWN = (int(number) for number in sys.argv[4:7])
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "-1"))
REPLACES = "PSFRAME_REPLACES" in os.environ
SERVES = RANK < SERVERS and not REPLACES
VICTIM, AT, STEPS = 1, 3, 12
BOUND = 2_000_000  # updates; far more than it takes
PARAMS = {"w": np.zeros(20_001, np.float32)}
SHARDS = Layout.of(PARAMS).shards(SERVERS)

cupy: Any = FakeCuda() if SERVES else FakeCupy(gpus=1)
sys.modules["cupy"] = cupy
ipc = cupy.ipc if SERVES else cupy.cuda.runtime
device_store.STEP = 4096


def write(name: str, text: str) -> None:
    (FOLDER / f".{name}").write_text(text, encoding="ascii")
    (FOLDER / f".{name}").rename(FOLDER / name)


def kill_victim() -> None:
    pid = int((FOLDER / f"rank-{SERVERS + VICTIM}").read_text(encoding="ascii"))
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([process], [], [])
    os.close(process)


class Port(MpiServerPort):
    """A server's end that does what the scene asks."""

    pushes = grants = 0

    def receive(self, timeout_s: float) -> Any:
        event = super().receive(timeout_s)
        if isinstance(event, Push) and event.worker == VICTIM and RANK == KILLER:
            self.pushes += 1
            if MOMENT == "received" and self.pushes == AT:
                kill_victim()
        return event

    def to_worker(self, answer: Any) -> None:
        granted = isinstance(answer, Answer) and answer.buffer != NO_BUFFER
        if granted and answer.worker == VICTIM and RANK == KILLER:
            self.grants += 1
            if MOMENT == "granted" and self.grants == AT:
                kill_victim()
        super().to_worker(answer)


def whole(params: Any) -> list[float]:
    """Give what each shard is full of."""
    found = params.get() if hasattr(params, "get") else params
    parts = [set(found[begin:end].tolist()) for begin, end in SHARDS]
    assert all(len(part) == 1 for part in parts), parts
    return [part.pop() for part in parts]


def die(worker: psframe.Worker, grads: dict[str, Any]) -> None:
    if MOMENT == "pulling":
        worker.pull_async()
    elif MOMENT == "pushed":
        worker.push(grads)
    if MOMENT in ("computing", "pulling", "pushed"):
        os.kill(os.getpid(), signal.SIGKILL)


def slope_of(index: int) -> float:
    """What a worker's gradients are full of; where rounds have their mean, all alike."""
    return 1.0 if MODE == "bsp" or RESPAWN else index + 1.0


def work(worker: psframe.Worker) -> None:
    if not REPLACES:
        write(f"rank-{SERVERS + worker.index}", str(os.getpid()))
    slope, applied = np.float32(slope_of(worker.index)), 0
    params = worker.pull()
    for step in itertools.count() if RESPAWN else range(STEPS):
        grads = {"w": params["w"] * np.float32(0) + slope}
        if worker.index == VICTIM and step == AT and not REPLACES:
            die(worker, grads)
        whole(params["w"])
        worker.log(replacement=float(REPLACES))
        params = worker.push_pull(grads)
        applied += params.receipt.applied
    write(f"applied-{worker.index}", str(applied))


def push_ten(worker: psframe.Worker) -> None:
    params = worker.pull()
    for _ in range(10):
        whole(params["w"])
        params = worker.push_pull({"w": params["w"] * np.float32(0) + np.float32(1)})


open_beside_replacement: list[int] = []


def replacement_works(event: Any) -> bool:
    """End the run that has a replacement once that has pushed."""
    if isinstance(event, Logged) and event.sums.get("replacement", (0.0, 0))[0]:
        open_beside_replacement.append(len(ipc.open_now))
    return len(open_beside_replacement) > 0


def run(function: Any, **options: Any) -> psframe.Result:
    return psframe.run(
        function,
        PARAMS,
        optimizer=psframe.optim.SGD(lr=1.0),
        servers=SERVERS,
        device="cuda",
        server_device="cuda",
        timeout_s=10.0,
        **options,
    )


cluster.MpiServerPort = Port  # type: ignore[misc]
mode = psframe.BSP() if MODE == "bsp" else psframe.Async()
bound = BOUND if RESPAWN else None
result = run(work, mode=mode, respawn=RESPAWN, max_updates=bound, observer=replacement_works)
cluster.MpiServerPort = MpiServerPort  # type: ignore[misc]
after = {
    "open": len(ipc.open_now),
    "kept": len(borrowing._never_freed),
    "beside_replacement": open_beside_replacement[:1],
}
again = run(push_ten)
after |= {"lent": ipc.lent, "open_again": len(ipc.open_now), "wrong": ipc.wrong}
write(f"rank-{RANK}.json", json.dumps(after))
if result.is_root:
    assert result.params is not None
    assert again.params is not None
    what = {
        "version": result.version,
        "lost": result.lost,
        "ledger": result.ledger.as_dict(),
        "shards": whole(result.params["w"]),
        "again": whole(again.params["w"]),
    }
    write("result.json", json.dumps(what))
