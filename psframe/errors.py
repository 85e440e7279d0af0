"""The errors that psframe raises, and when.

A caller's mistake is an ordinary `ValueError` or `TypeError` at the call. What is here is what
only a distributed run can say.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "Diverged",
    "Interrupted",
    "LaunchError",
    "MessageError",
    "PsframeError",
    "RankLost",
    "RunDirError",
    "Stopped",
    "WaitTimeout",
    "WorkerFailed",
]


class PsframeError(Exception):
    """The root of psframe's own errors."""


class ArgumentError(PsframeError, ValueError):
    """Raised on every rank when an argument is wrong, or differs between the ranks."""


class LaunchError(PsframeError, RuntimeError):
    """Raised when the processes were not started as the ranks of one MPI job."""


class RunDirError(PsframeError, RuntimeError):
    """Raised when a run directory cannot be used; nothing in it has been changed."""


class CheckpointError(PsframeError, RuntimeError):
    """Raised when a checkpoint cannot be written, or there is none that can be used.

    Those that were committed before stay as they were.
    """


class Interrupted(PsframeError):
    """Raised on every rank when SIGUSR1 or SIGUSR2 has ended the run in good order.

    What it had learned is in a checkpoint, if it has a run directory: `resume=True` goes on.
    """


class MessageError(PsframeError):
    """Raised when bytes are not a message of the protocol, or come at the wrong moment.

    It is the peer's error, never our caller's; a server refuses such a message and goes on.
    """


class Stopped(PsframeError):
    """Raised by pull, push, push_pull and the lease iterator once the run is over.

    `run` absorbs it; a `work` function may catch it to clean up.
    """


class WaitTimeout(PsframeError, TimeoutError):
    """Raised when a wait passes its bound. The request stays valid and can be waited for again."""


class RankLost(PsframeError):
    """Raised when a rank has died or has not answered within its bound."""


class Diverged(PsframeError, ArithmeticError):
    """Raised on every rank after 10 W refused pushes in a row."""


class WorkerFailed(PsframeError):
    """Raised on the other ranks when a worker's `work` raised.

    Attributes:
        worker: index of the worker, 0..W-1.
        rank: its rank in the communicator of the run.
        type: name of the exception's class.
        message: `str` of the exception.
        traceback: text of the traceback, its tail if it was long.
    """

    def __init__(self, worker: int, rank: int, type: str, message: str, traceback: str) -> None:
        super().__init__(worker, rank, type, message, traceback)
        self.worker = worker
        self.rank = rank
        self.type = type
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return (
            f"worker {self.worker} (rank {self.rank}) failed with {self.type}: {self.message}\n"
            f"its traceback:\n{self.traceback}"
        )
