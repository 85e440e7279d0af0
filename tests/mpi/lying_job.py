"""A job whose last rank sends payloads that are none: python lying_job.py ELEMENTS."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from mpi4py import MPI

import psframe
from psframe import codecs

LIES = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1


class Lying(codecs.Float16):
    """A codec whose payloads are cut off on the last rank."""

    def encoder(self, *arguments: Any) -> Any:
        whole = super().encoder(*arguments)
        if LIES:
            encode = whole.encode
            whole.encode = lambda grad, out: encode(grad, out) - 2  # type: ignore[method-assign]
        return whole

    def decoder(self, *arguments: Any) -> Any:
        decoder = super().decoder(*arguments)
        if LIES:
            decoder.decode = lambda payload, out: None  # type: ignore[method-assign]
        return decoder


def work(worker: psframe.Worker) -> None:
    params = worker.pull()
    for _ in range(3):
        params = worker.push_pull({"w": params["w"]})


result = psframe.run(
    work,
    {"w": np.ones(int(sys.argv[1]), np.float32)},
    optimizer=psframe.optim.SGD(0.05),
    codec=Lying(),
    shared_memory=False,
)
if result.is_root:
    print(f"lost {result.lost}, version {result.version}", flush=True)
