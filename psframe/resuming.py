"""Whether a run that is to go on is completed already, which rank 0 decides for all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from psframe.launcher import Launcher, starting_mpi
from psframe.rundir import RunDir

__all__ = ["is_completed"]


def is_completed(folder: str | Path, launched: Launcher | None) -> bool:
    """Tell whether the run to go on with is completed; one that is not there yet can start.

    Under a launcher every rank calls this and rank 0 decides: not every node need see its files.

    Raises:
        RunDirError: there is a status.json, but it is not a run's; on rank 0.
        LaunchError, RankLost: as `psframe.run`.
    """
    if launched is not None and launched.replaces:
        return False  # it is under way
    if launched is None:
        return _look(folder)
    return _decide_together(launched, lambda: _look(folder))


def _look(folder: str | Path) -> bool:
    status = RunDir.read_status(folder)
    if status is None:
        return False
    if status["state"] != "completed":
        return False
    accuracy = status.get("test_accuracy")
    known = "" if accuracy is None else f", test accuracy {accuracy:.2%}"
    print(f"{folder}: already completed{known}; nothing is changed", flush=True)
    return True


def _decide_together(launcher: Launcher, decide: Callable[[], bool]) -> bool:
    """Let rank 0 decide; the other ranks hear of it, and of what it raises, as an ArgumentError."""
    with starting_mpi():
        from psframe.agreement import tell
        from psframe.transports.mpi import SETUP_BOUND_S, open_mesh

    mesh = open_mesh(None, launcher, sys.prefix)
    error: Exception | None = None
    decided = False
    if mesh.rank == 0:
        try:
            decided = decide()
        except Exception as raised:  # the others wait to hear of it, whatever it is
            error = raised
    error = tell(mesh, error)
    answer = mesh.broadcast(bytes([decided]), "what rank 0 has decided", SETUP_BOUND_S)
    mesh.close()
    if error is not None:
        raise error
    return bool(answer[0])
