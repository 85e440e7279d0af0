"""Which launcher started this process, as its environment tells; it starts no MPI."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from psframe.alarm import told_after

__all__ = [
    "Launcher",
    "Place",
    "child_environment",
    "find_launcher",
    "find_place",
    "lone_process_message",
    "starting_mpi",
]

# To start MPI every rank has to have come so far; on a large machine imports alone take a minute.
_START_BOUND_S = 120.0
# When that has been said, the process ends.
_LATER_S = 1.0

_log = logging.getLogger("psframe")


class Launcher(NamedTuple):
    """What the environment says.

    Attributes:
        name: the launcher, for messages.
        rank: this process's rank.
        size: the number of ranks; None if the environment does not tell.
        replaces: whether this process stands in for that rank, which was lost: it is alone, and no
            MPI process.
    """

    name: str
    rank: int
    size: int | None
    replaces: bool = False

    @property
    def is_open_mpi(self) -> bool:
        """Whether it is Open MPI's own, which no other MPI library understands."""
        return self.name == _OPEN_MPI


class Place(NamedTuple):
    """Where a process belongs that server 0 has started in place of a lost worker.

    Attributes:
        rank: the lost one's.
        size: the number of ranks.
        socket, own, server: open files: to server 0, of this worker's memory, and of server 0's.
    """

    rank: int
    size: int
    socket: int
    own: int
    server: int


_PLACE = "PSFRAME_REPLACES"
_OPEN_MPI = "mpirun (Open MPI)"
# Name, rank and size, the most specific first: under mpirun inside a Slurm job the variables of
# both are set. SLURM_STEP_NUM_TASKS and not SLURM_NTASKS, which a batch script sees as well.
_VARIABLES = (
    (_OPEN_MPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("srun or prun (PMIx)", "PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ("mpiexec (PMI)", "PMI_RANK", "PMI_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

# What launchers tell their processes begins with one of these.
_LAUNCHERS = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "MPI_", "HYDRA_", "HYDI_", "SLURM_")


def find_launcher(environ: Mapping[str, str] = os.environ) -> Launcher | None:
    """Find the launcher of this process; None if it was started on its own."""
    place = find_place(environ)
    if place is not None:
        return Launcher("psframe", place.rank, place.size, replaces=True)
    for name, rank, size in _VARIABLES:
        if environ.get(rank, "").isdigit():
            count = environ.get(size, "")
            if name == "srun" and not count.isdigit():
                continue  # a batch script: it has a rank, but srun did not start it
            return Launcher(name, int(environ[rank]), int(count) if count.isdigit() else None)
    return None


def find_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Find the place of a process that stands in for a lost worker; None of all others."""
    numbers = environ.get(_PLACE, "").split()
    if len(numbers) != len(Place._fields) or not all(n.isdigit() for n in numbers):
        return None
    return Place(*map(int, numbers))


def child_environment(environ: Mapping[str, str], place: Place) -> dict[str, str]:
    """Give the environment of a process that is to take a place: no launcher's, who starts none."""
    others = {k: v for k, v in environ.items() if not k.startswith(_LAUNCHERS)}
    return {**others, _PLACE: " ".join(map(str, place))}


def lone_process_message(launcher: Launcher, library: str, prefix: str) -> str:
    """Say what is wrong when N processes were started and each is alone, and what to do.

    Args:
        launcher: as found.
        library: the MPI library's name and version.
        prefix: the Python environment's folder.
    """
    return (
        f"{launcher.name} started {launcher.size} processes, but to this process's MPI library"
        f" ({library}) it is alone: the launcher and the library do not belong together."
        f" Start with the mpirun of the same installation (perhaps {prefix}/bin/mpirun), or under"
        " Slurm choose what the library speaks: srun --mpi=pmix or --mpi=pmi2"
    )


@contextlib.contextmanager
def starting_mpi() -> Iterator[None]:
    """End this process, and say so on stderr, if MPI has not started in time.

    MPI_Init waits for every rank, holding the interpreter; for one that has ended before it came
    so far it would wait for ever, where the launcher does not end the job. Only faulthandler's
    thread can run then, and it says but where the process is; so another process says why. Nothing
    is done once mpi4py is there: to start MPI is to import it.
    """
    if "mpi4py.MPI" in sys.modules:
        yield
        return
    with contextlib.ExitStack() as bounds:
        stack: Any = sys.__stderr__
        try:
            bounds.enter_context(told_after(_START_BOUND_S, _not_started(_START_BOUND_S)))
            stack = None
        except OSError as error:
            _log.warning("nobody will say so should MPI not start: %s", error)
        if stack is None:  # it is told in words, or there is no stderr
            stack = bounds.enter_context(open(os.devnull, "wb"))
        faulthandler.dump_traceback_later(_START_BOUND_S + _LATER_S, exit=True, file=stack)
        bounds.callback(faulthandler.cancel_dump_traceback_later)
        yield


def _not_started(bound_s: float) -> str:
    launcher = find_launcher()
    who = "this process" if launcher is None else f"rank {launcher.rank}"
    return (
        f"psframe: error: {who} ends: MPI has not started within {bound_s:g} s. Some rank has died,"
        " or ended, before it came so far, or is still far from it: what has it said above?"
    )
