"""psframe: a parameter server for MPI clusters, in Python."""

from psframe import optim
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
    "CheckpointError",
    "Diverged",
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
    "Result",
    "RunDirError",
    "SimResult",
    "Stopped",
    "Task",
    "WaitTimeout",
    "Worker",
    "WorkerFailed",
    "optim",
    "run",
    "simulate",
]
