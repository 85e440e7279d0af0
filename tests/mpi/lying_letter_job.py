"""A job with a letter that makes no sense: python lying_letter_job.py push|stream|answer."""

from __future__ import annotations

import sys

import numpy as np
from mpi4py import MPI

import psframe
from psframe.transports.letters import Desk, Letters
from psframe.transports.streams import Progress

WORLD = MPI.COMM_WORLD
SEQ = slice(16, 24)  # of a header
SIZE = 200_000 if sys.argv[1] == "stream" else 100

if sys.argv[1] == "push" and WORLD.rank == WORLD.size - 1:
    send = Letters.send

    def lie(end: Letters) -> None:
        end.push[SEQ] = bytes([255] * 8)
        send(end)

    Letters.send = lie  # type: ignore[method-assign]
elif sys.argv[1] == "stream" and WORLD.rank == WORLD.size - 1:
    honest, opened = Progress.open, []

    def misjudge(progress: Progress) -> None:
        """Say of the third that all is there, and neither that it is finite nor that it is not."""
        honest(progress)
        opened.append(progress)
        if len(opened) == 3:
            Progress.advance = Progress.close = lambda *said: None  # type: ignore[method-assign]
            progress.words[:2] = SIZE, 7

    Progress.open = misjudge  # type: ignore[method-assign]
elif sys.argv[1] == "answer":
    answer = Desk.send

    def mislead(desk: Desk, worker: int) -> None:
        if worker == 0:
            desk.answers[0][SEQ] = (1234).to_bytes(8, "little")
        answer(desk, worker)

    Desk.send = mislead  # type: ignore[method-assign]


def work(worker: psframe.Worker) -> None:
    params = worker.pull()
    for _ in range(4):
        params = worker.push_pull({"w": params["w"]})


try:
    result = psframe.run(
        work, {"w": np.ones(SIZE, np.float32)}, optimizer=psframe.optim.SGD(0.05), device="cpu"
    )
except psframe.PsframeError as error:  # raised again it would end the others, who have it to tell
    message = str(error).partition("\n")[0]
    print(f"rank {WORLD.rank}: {type(error).__name__}: {message}\n", end="", flush=True)
else:
    if result.is_root:
        print(f"lost {result.lost}, version {result.version}", flush=True)
