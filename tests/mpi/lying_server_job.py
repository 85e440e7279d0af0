"""A job whose server says things that make no sense to rank 1: python lying_server_job.py LIE."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
from mpi4py import MPI

import psframe
from psframe import codecs
from psframe.events import NO_BUFFER, Answer, Lease, LeaseKind
from psframe.transports.mpi_port import MpiServerPort

LIE = sys.argv[1]
honest = MpiServerPort.to_worker


def to_worker(port: MpiServerPort, answer: Answer | Lease) -> None:
    """Answer the first push of worker 0 with the lie."""
    if answer.worker or not isinstance(answer, Answer) or not answer.applied:
        honest(port, answer)
    elif LIE == "lease":
        honest(port, Lease(0, answer.seq, LeaseKind.EXHAUSTED))
    elif LIE == "bare":
        honest(port, replace(answer, buffer=NO_BUFFER, version=0))
    elif LIE == "another":
        honest(port, replace(answer, seq=answer.seq + 5))
    else:
        assert answer.coded is not None
        answer.coded.data = answer.coded.data[:-2]
        honest(port, answer)


MpiServerPort.to_worker = to_worker  # type: ignore[method-assign]


def work(worker: psframe.Worker) -> None:
    params: Any = worker.pull()
    for _ in range(3):
        params = worker.push_pull({"w": params["w"]})


try:
    psframe.run(
        work,
        {"w": np.ones(3000, np.float32)},
        optimizer=psframe.optim.SGD(0.05),
        pull_codec=codecs.Float16(),
        shared_memory=False,
    )
except psframe.PsframeError as error:  # raised again it would end the others, who have it to tell
    message = str(error).partition("\n")[0]
    print(f"rank {MPI.COMM_WORLD.rank}: {type(error).__name__}: {message}\n", end="", flush=True)
