"""A job whose last rank sends arrays of another length than it says: python misfit_job.py BYTES."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from mpi4py import MPI

import psframe
from psframe.transports.mpi import Mesh

MORE = int(sys.argv[1])

if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
    honest = Mesh.start_send

    def start_send(mesh: Mesh, array: Any, target: int) -> list[Any]:
        """Send so many bytes more, or fewer."""
        return honest(mesh, np.zeros(array.nbytes + MORE, np.uint8), target)

    Mesh.start_send = start_send  # type: ignore[method-assign]


def work(worker: psframe.Worker) -> None:
    params = worker.pull()
    for _ in range(3):
        params = worker.push_pull({"w": params["w"]})


result = psframe.run(
    work,
    {"w": np.ones(90_000, np.float32)},
    optimizer=psframe.optim.SGD(0.05),
    shared_memory=False,
)
if result.is_root:
    print(f"lost {result.lost}, version {result.version}", flush=True)
