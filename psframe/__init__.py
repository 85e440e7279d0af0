"""psframe: a parameter server for MPI clusters, in Python.

What it exports is imported when it is first asked for (PEP 562): a program that needs an error's
class does not wait for all the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import psframe.starting  # noqa: F401 - what a training imports takes a second, in which signals may come

if TYPE_CHECKING:
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

_SUBPACKAGES = ("codecs", "local", "optim", "stale")
_MODULES = {
    "psframe.batches": "Buffered Rennala Ringleader",
    "psframe.client": "Worker",
    "psframe.consistency": "BSP SSP Async",
    "psframe.errors": (
        "ArgumentError CheckpointError Diverged Interrupted LaunchError MessageError PsframeError"
        " RankLost RunDirError Stopped WaitTimeout WorkerFailed"
    ),
    "psframe.ledger": "Ledger",
    "psframe.pacing": "DynamicSSP WarmStart",
    "psframe.params": "Params Receipt",
    "psframe.pending": "Pending PendingPull",
    "psframe.runtime": "Result run",
    "psframe.simulation": "Network SimResult simulate",
    "psframe.tasks": "Task",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"psframe.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'psframe' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
