"""Questions to processes that can be thrown away: they may hang, crash, or never start.

Whether MPI takes a device pointer is one, for a run and the doctor alike: an MPI that is not
CUDA-aware dies of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Unknown", "alone", "answer", "ask", "takes_device_pointers"]

# What a library prints besides is told apart by this.
_MARK = "psframe-answer: "
# A process that a dead file system holds does not die of SIGKILL; it is left behind.
_DEATH_BOUND_S = 2.0
_REASON_CHARS_MAX = 400

# The first use of a GPU compiles a kernel, and wakes a driver that nobody keeps awake.
POINTER_BOUND_S = 90.0
# 8 MiB, which no MPI sends eagerly: what is small it may take by another path than a run's arrays.
_ASK_MPI = """
from psframe.throwaway import answer
import cupy
from mpi4py import MPI
there, back = cupy.arange(2 << 20, dtype="f4"), cupy.zeros(2 << 20, "f4")
cupy.cuda.get_current_stream().synchronize()
MPI.COMM_SELF.Sendrecv(there, 0, recvbuf=back, source=0)
answer(bool((there == back).all()))
"""

# What launchers tell their ranks begins with one of the first; but for settings, which are the
# user's, unless they are of those that mpirun itself makes (the last line has Open MPI 4's).
_LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "PMI2_", "PRTE_", "SLURM_", "HYDRA_", "HYDI_", "MPI_LOCAL")
_SETTINGS = ("OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_")
_SETTINGS_OF_LAUNCHERS = (
    *("OMPI_MCA_initial_wdir", "OMPI_MCA_num_procs", "OMPI_MCA_num_restarts", "OMPI_MCA_cpu_type"),
    "OMPI_MCA_PREFIXES",
    *("OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix", "OMPI_MCA_shmem_RUNTIME_QUERY_hint"),
)


class Unknown(Exception):
    """Raised where something cannot be found out; the message is the reason."""


def answer(value: Any) -> None:
    """Print an answer; the asked process does so once."""
    print(f"\n{_MARK}{json.dumps(value)}", flush=True)


def ask(
    command: Sequence[str],
    *,
    timeout_s: float,
    given: Any = None,
    environ: Mapping[str, str] | None = None,
) -> Any:
    """Start a process and give its answer.

    Args:
        command: its program and arguments.
        timeout_s: how long it may take.
        given: JSON for its standard input.
        environ: its environment; else this process's.

    Raises:
        Unknown: there was no answer; the message says why.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=None if environ is None else dict(environ),
            close_fds=False,  # MPICH's launcher is spoken to through an inherited descriptor
        )
    except OSError as error:
        raise Unknown(f"{command[0]} could not be started: {error.strerror}") from error
    ended = True
    try:
        out, err = process.communicate(json.dumps(given), timeout_s)
    except subprocess.TimeoutExpired as error:
        ended = False  # perhaps it has answered, and hangs at its end
        out, err = _text(error.output), _text(error.stderr)
    finally:
        _end(process)
    marked = [line for line in out.splitlines() if line.startswith(_MARK)]
    if not marked:
        how = _how_it_ended(process.returncode) if ended else f"no answer within {timeout_s:g} s"
        raise Unknown(f"{how}: {_last_words(err or out)}")
    try:
        return json.loads(marked[-1][len(_MARK) :])
    except ValueError as error:
        raise Unknown(f"the answer is no JSON: {error}") from error


def _text(output: bytes | str | None) -> str:
    """Read what had come before a bound; communicate gives bytes then."""
    return output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_DEATH_BOUND_S)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):  # its reader has gone
                stream.close()


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"the process that was asked ended with status {status}"
    try:
        return f"the process that was asked died of {signal.Signals(-status).name}"
    except ValueError:
        return f"the process that was asked died of signal {-status}"


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" \t-=*")]
    return " ".join(lines[-3:])[-_REASON_CHARS_MAX:] or "it said nothing"


def alone(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Give an environment without what a launcher has set, for a process that is no rank.

    What the user has told MPI, with --mca or in the environment, stays: which way bytes take is
    decided by it.
    """
    return {name: value for name, value in environ.items() if not _is_launchers(name)}


def _is_launchers(name: str) -> bool:
    if name.startswith(_SETTINGS):
        return name.startswith(_SETTINGS_OF_LAUNCHERS)
    return name.startswith(_LAUNCHERS)


def takes_device_pointers() -> dict[str, Any]:
    """Give a device pointer to MPI, in a process that may die of it: {"value": ..., "by": ...}.

    Raises:
        Unknown: there was no answer, and the pointer need not be the reason.
    """
    try:
        value = ask([sys.executable, "-c", _ASK_MPI], timeout_s=POINTER_BOUND_S, environ=alone())
    except Unknown as error:
        if "SIGSEGV" not in str(error) and "SIGBUS" not in str(error):
            raise
        value = False
    return {"value": value is True, "by": "a device pointer that it was given"}
