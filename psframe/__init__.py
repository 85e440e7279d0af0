"""psframe: a parameter server for MPI clusters, in Python.

What it exports, and its modules, are imported when they are first asked for (PEP 562): a program
that needs an error's class does not wait for all the rest.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
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


if not TYPE_CHECKING:  # to a type checker it would say that there is everything

    def __getattr__(name: str) -> Any:
        home = _HOME.get(name)
        if home is None and (name.startswith("_") or find_spec(f"psframe.{name}") is None):
            raise AttributeError(f"module 'psframe' has no attribute {name!r}")
        try:
            module = import_module(home or f"psframe.{name}")
        except AttributeError as error:  # which whoever asks would take for an answer
            raise ImportError(f"psframe.{name} cannot be imported: {error}") from error
        value = module if home is None else getattr(module, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
