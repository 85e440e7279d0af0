"""A program for `tests/test_errors_mpirun.py` to start under mpirun: failing_job.py WHAT FOLDER.

Each rank leaves FOLDER/pid-RANK when it is in its place; FOLDER/now appears at the moment when
what is to go wrong does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import psframe

WHAT, FOLDER = sys.argv[1], Path(sys.argv[2])
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
SERVERS = 2 if WHAT == "loop-2" else 1
ONES = {"w": np.ones(1000)}


def in_place() -> None:
    half = FOLDER / f"half-{RANK}"
    half.write_text(str(os.getpid()), encoding="ascii")
    half.rename(FOLDER / f"pid-{RANK}")  # who sees it can read it


def now() -> None:
    (FOLDER / "now").touch()


def observe(event: Any) -> None:
    if WHAT == "observer":
        now()
        raise OSError("the observer has no room")


def work(worker: psframe.Worker) -> None:
    last = worker.index == worker.count - 1
    worker.pull()
    if WHAT == "signals":
        worker.push_pull(ONES)  # something to be saved
    in_place()
    if WHAT == "observer":
        for _ in worker.leases(10, 1):
            worker.push_pull(ONES)
    if WHAT.startswith("raise") and last:
        while not (FOLDER / f"pid-{RANK - 1}").exists():
            worker.pull()  # until the other one is where it is to be caught
        now()
        raise ValueError("the data are gone")
    if WHAT == "kill" and last:
        now()
        os.kill(os.getpid(), signal.SIGKILL)
    if WHAT in ("raise-sleep", "sleep"):
        time.sleep(60.0)  # what never calls psframe, in place of a long computation
    while True:
        worker.push_pull(ONES)


if RANK < SERVERS:
    in_place()
psframe.run(
    work,
    ONES,
    optimizer=psframe.optim.SGD(1e-3),
    servers=SERVERS,
    run_dir=FOLDER / "run",
    observer=observe,
)
