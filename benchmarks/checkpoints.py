"""How much checkpoints slow training down: mpirun -n 3 python benchmarks/checkpoints.py [--mib 64]

Rounds with and without them take turns. In a round each worker pushes and pulls, and computes after
each for as long as that took; with checkpoints there is one every `--every`. Prints a line a round,
and the median.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import psframe


def rate(seconds: float, size: int, run_dir: str | None, every: str | None) -> tuple[float, int]:
    """Train for so many seconds; updates a second, and checkpoints that were written."""

    def work(worker: psframe.Worker) -> None:
        grads = {"w": np.full(size, 1e-6, np.float32)}
        square = np.ones((400, 400), np.float32)
        worker.pull()
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            asked = time.monotonic()
            worker.push_pull(grads)
            until = 2 * time.monotonic() - asked
            while time.monotonic() < until:
                square @ square

    result = psframe.run(
        work,
        {"w": np.zeros(size, np.float32)},
        optimizer=psframe.optim.Adam(lr=1e-3),
        run_dir=run_dir,
        overwrite=run_dir is not None,
        checkpoint_every=every,
        keep_checkpoints=1000,
    )
    written = 0
    if result.run_dir is not None:
        written = len(list((result.run_dir / "checkpoints").glob("v*/manifest.json")))
    return result.version / seconds, written


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=float, default=64.0, help="of parameters; with Adam")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a round")
    parser.add_argument("--every", default="10s", help="as --checkpoint-every")
    parser.add_argument("--folder", default=Path(tempfile.gettempdir(), "psframe-checkpoints"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    size = int(arguments.mib * 2**20 / 4)
    folder = str(arguments.folder)
    plain, kept = [], []
    try:
        for number in range(arguments.rounds):
            without, _ = rate(arguments.seconds, size, None, None)
            with_them, written = rate(arguments.seconds, size, folder, arguments.every)
            plain.append(without)
            kept.append(with_them)
            if written:  # on rank 0
                print(
                    f"round {number}: {without:.1f} updates/s without, {with_them:.1f} with"
                    f" {written} checkpoints: {1 - with_them / without:.1%} slower",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    slower = statistics.median(1 - b / a for a, b in zip(plain, kept, strict=True))
    if written:
        print(f"median: {slower:.1%} slower")


if __name__ == "__main__":
    main()
