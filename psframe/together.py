"""What is wrong on one rank before a run is told to all of them; this module starts MPI."""

from __future__ import annotations

import sys

from psframe.launcher import Launcher, starting_mpi

__all__ = ["fail_if_any"]


def fail_if_any(launcher: Launcher, error: Exception | None) -> None:
    """Return if every rank can go on; every rank calls this.

    Args:
        launcher: as the environment tells.
        error: why this rank cannot go on; None if it can.

    Raises:
        Exception: `error`, if there is one.
        ArgumentError: another rank cannot go on; it says why.
        LaunchError, RankLost: as `psframe.run`.
    """
    if launcher.replaces:  # nobody else is where this process is
        if error is not None:
            raise error
        return
    with starting_mpi():
        from psframe.agreement import tell
        from psframe.transports.mpi import open_mesh

    mesh = open_mesh(None, launcher, sys.prefix)
    told = tell(mesh, error)
    mesh.close()
    if told is not None:
        raise told
