"""A run for `test_respawn` to start under mpirun: replacing.py FOLDER RESPAWN WANTED.

Each process leaves FOLDER/rank-R or, of a replacement, FOLDER/replacement-R-PID, once it works. The
run ends when WANTED replacements have pushed often; a second run of those that are left follows.
Rank 0 writes FOLDER/result.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import psframe
from psframe.events import Logged

FOLDER, RESPAWN, WANTED = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
OFTEN = 20
BOUND = 2_000_000  # updates; far more than it takes
RANKS = int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "0")))
REPLACES = "PSFRAME_REPLACES"
PARAMS = {"w": np.zeros(3000, np.float32)}


class Census:
    """Ends the run when enough replacements have pushed often."""

    def __init__(self) -> None:
        self.pushes: Counter[tuple[int, int]] = Counter()

    def __call__(self, event: Any) -> bool:
        if isinstance(event, Logged) and "replacement" in event.sums:
            total, count = event.sums["replacement"]
            self.pushes[event.worker, round(total / count)] += count
        return sum(n >= OFTEN for n in self.pushes.values()) >= WANTED


def work(worker: psframe.Worker) -> None:
    replaces = REPLACES in os.environ
    name = f"replacement-{worker.index}-{os.getpid()}" if replaces else f"rank-{worker.index + 1}"
    (FOLDER / f".{name}").write_text(str(os.getpid()), encoding="ascii")
    (FOLDER / f".{name}").rename(FOLDER / name)
    params = worker.pull()
    while True:
        if replaces:
            worker.log(replacement=os.getpid())
        params = worker.push_pull({"w": params["w"] * 0 + 1})


def count_to_ten(worker: psframe.Worker) -> None:
    for _ in range(10):
        worker.pull()
        worker.push({"w": PARAMS["w"]}).wait()


census = Census()
result = psframe.run(
    work,
    PARAMS,
    optimizer=psframe.optim.SGD(lr=0.1),
    device="cpu",
    observer=census,
    max_updates=BOUND,
    timeout_s=10.0,
    respawn=RESPAWN,
)
again = None
if len(result.lost) < RANKS - 1:  # some worker is left
    again = psframe.run(count_to_ten, PARAMS, optimizer=psframe.optim.SGD(lr=0.1), device="cpu")
if result.is_root:
    what = {
        "version": result.version,
        "lost": result.lost,
        "ledger": result.ledger.as_dict(),
        "params": result.params["w"][[0, -1]].tolist(),
        "replacements": sorted(w for (w, _), n in census.pushes.items() if n >= OFTEN),
        "again": None if again is None else again.version,
    }
    (FOLDER / ".result").write_text(json.dumps(what), encoding="utf-8")
    (FOLDER / ".result").rename(FOLDER / "result.json")
