"""What a process's environment tells of its launcher."""

import os
import subprocess
import sys

import pytest

from psframe import launcher
from psframe.launcher import Launcher, find_launcher, lone_process_message

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "2"}
HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "3"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
SRUN = {**BATCH, "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (OPEN_MPI, Launcher("mpirun (Open MPI)", 2, 4)),
        (HYDRA, Launcher("mpiexec (PMI)", 0, 3)),
        (BATCH, None),
        (SRUN, Launcher("srun", 5, 8)),
        ({**SRUN, **OPEN_MPI}, Launcher("mpirun (Open MPI)", 2, 4)),
        ({**SRUN, **HYDRA}, Launcher("mpiexec (PMI)", 0, 3)),
        ({**SRUN, "PMIX_RANK": "5"}, Launcher("srun or prun (PMIx)", 5, 8)),
        ({"PMIX_RANK": "1"}, Launcher("srun or prun (PMIx)", 1, None)),
        ({"PMI_RANK": "1"}, Launcher("mpiexec (PMI)", 1, None)),
        ({"PMI_RANK": "", "PMI_SIZE": "2"}, None),
        ({"PMI_RANK": "x", "PMI_SIZE": "2"}, None),
    ],
)
def test_find(environ: dict[str, str], expected: Launcher | None) -> None:
    assert find_launcher(environ) == expected


def test_only_open_mpi_is_open_mpi() -> None:
    for environ in (OPEN_MPI, HYDRA, SRUN):
        found = find_launcher(environ)
        assert found is not None
        assert found.is_open_mpi == (environ is OPEN_MPI)


def test_the_message_names_the_remedy() -> None:
    text = lone_process_message(Launcher("srun", 1, 3), "MPI of ours 1.0", "/prefix")
    assert text.startswith("srun started 3 processes, but")
    for part in ("MPI of ours 1.0", "/prefix/bin/mpirun", "--mpi=pmix"):
        assert part in text


def start_no_mpi(more: str = "") -> subprocess.CompletedProcess[str]:
    """A call that holds the interpreter, as MPI_Init does."""
    program = (
        "import ctypes, psframe.launcher as launcher\n"
        f"launcher._START_BOUND_S = 0.2; launcher._LATER_S = 1.0{more}\n"
        "with launcher.starting_mpi():\n"
        "    ctypes.PyDLL(None).sleep(60)\n"
    )
    environ = {**os.environ, "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, env=environ
    )


def test_mpi_that_does_not_start_ends_the_process() -> None:
    """Another process says why."""
    done = start_no_mpi()
    assert done.returncode == 1
    assert "Timeout" not in done.stderr
    assert "psframe: error: rank 3 ends: MPI has not started within 0.2 s" in done.stderr


def test_mpi_that_does_not_start_ends_the_process_that_can_start_no_other() -> None:
    done = start_no_mpi("; import sys; sys.executable = '/nowhere'")
    assert done.returncode == 1
    assert "nobody will say so should MPI not start" in done.stderr
    assert "Timeout" in done.stderr
    assert 'File "<string>", line 4' in done.stderr


def test_mpi_that_starts_leaves_no_process_behind() -> None:
    with launcher.starting_mpi():
        pass
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_mpi_that_is_there_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", sys)  # any module will do
    monkeypatch.setattr(launcher, "_START_BOUND_S", -1.0)  # refused, if it were used
    with launcher.starting_mpi():
        pass


def test_a_process_in_a_lost_workers_place_knows_it_and_no_launcher() -> None:
    started = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "0", "A": "b"}
    assert launcher.find_place(started) is None
    place = launcher.Place(rank=2, size=4, socket=7, own=8, server=9)
    environ = launcher.child_environment(started, place)
    assert environ == {"A": "b", "PSFRAME_REPLACES": "2 4 7 8 9"}
    assert launcher.find_place(environ) == place
    assert launcher.find_launcher(environ) == Launcher("psframe", 2, 4, replaces=True)
    assert launcher.find_place({"PSFRAME_REPLACES": "2 4 x"}) is None
