"""A program for `tests/test_errors_mpirun.py` under mpirun --with-ft ulfm: leaving_job.py WHAT.

Its run ends well. What goes wrong is between that and MPI_Finalize: rank 0 ends without a word.
"""

from __future__ import annotations

import os
import sys

import numpy as np

import psframe


def work(worker: psframe.Worker) -> None:
    worker.push_pull({"w": np.ones(4)})


psframe.run(work, {"w": np.zeros(4)}, optimizer=psframe.optim.SGD(0.1))
if os.environ["OMPI_COMM_WORLD_RANK"] == "0":
    print("rank 0 has nothing more to say", flush=True)
    os._exit(int(sys.argv[1]))
