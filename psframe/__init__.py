"""psframe: a parameter server for MPI clusters, in Python."""

import psframe.starting  # noqa: F401 - what follows takes a second, in which signals may come

# isort: split
from psframe import codecs, local, optim, stale
from psframe.batches import Buffered, Rennala, Ringleader
from psframe.client import Worker
from psframe.consistency import BSP, SSP, Async
from psframe.errors import (
    ArgumentError,
    CheckpointError,
    Diverged,
    Interrupted,
    LaunchError,
    MessageError,
    PsframeError,
    RankLost,
    RunDirError,
    Stopped,
    WaitTimeout,
    WorkerFailed,
)
from psframe.ledger import Ledger
from psframe.pacing import DynamicSSP, WarmStart
from psframe.params import Params, Receipt
from psframe.pending import Pending, PendingPull
from psframe.runtime import Result, run
from psframe.simulation import Network, SimResult, simulate
from psframe.tasks import Task

__all__ = [
    "BSP",
    "SSP",
    "ArgumentError",
    "Async",
    "Buffered",
    "CheckpointError",
    "Diverged",
    "DynamicSSP",
    "Interrupted",
    "LaunchError",
    "Ledger",
    "MessageError",
    "Network",
    "Params",
    "Pending",
    "PendingPull",
    "PsframeError",
    "RankLost",
    "Receipt",
    "Rennala",
    "Result",
    "Ringleader",
    "RunDirError",
    "SimResult",
    "Stopped",
    "Task",
    "WaitTimeout",
    "WarmStart",
    "Worker",
    "WorkerFailed",
    "codecs",
    "local",
    "optim",
    "run",
    "simulate",
    "stale",
]
