"""Questions to processes that can be thrown away: they may hang, crash, or never start.

Whether MPI takes a device pointer is one, for a run and the doctor alike: an MPI that is not
CUDA-aware dies of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Unknown", "alone", "answer", "ask", "takes_device_pointers"]

# What a library prints besides is told apart by this.
_MARK = "psframe-answer: "
# A process that a dead file system holds does not die of SIGKILL; it is left behind.
_DEATH_BOUND_S = 2.0
_REASON_CHARS_MAX = 400
# Of what a process writes the last is kept; one that writes for ever must not take all memory.
_KEPT_BYTES = 1 << 20
_PIECE_BYTES = 64 << 10
# How often to look whether a process has ended whose output stays open: it has left behind another.
_LOOK_S = 0.05

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
            env=None if environ is None else dict(environ),
            close_fds=False,  # MPICH's launcher is spoken to through an inherited descriptor
        )
    except OSError as error:
        raise Unknown(f"{command[0]} could not be started: {error.strerror}") from error
    try:
        out, err, ended = _hear(process, json.dumps(given).encode(), timeout_s)
    finally:
        _end(process)
    marked = [line for line in out.splitlines() if line.startswith(_MARK)]
    if not marked:
        how = _how_it_ended(process.returncode) if ended else f"no answer within {timeout_s:g} s"
        raise Unknown(f"{how}: {_last_words(err or out)}")
    try:
        return json.loads(marked[-1][len(_MARK) :])
    except (ValueError, RecursionError) as error:
        raise Unknown(f"the answer is no JSON: {error}") from error


def _hear(
    process: subprocess.Popen[bytes], given: bytes, timeout_s: float
) -> tuple[str, str, bool]:
    """Give a process its input until it has ended, or its time is over.

    Returns:
        The last of what it has written, to stdout and to stderr, and whether it has ended.
    """
    assert process.stdin is not None, "a pipe"
    assert process.stdout is not None, "a pipe"
    assert process.stderr is not None, "a pipe"
    deadline = time.monotonic() + timeout_s
    heard = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    out, err = heard.values()
    with selectors.DefaultSelector() as pipes:
        pipes.register(process.stdin.fileno(), selectors.EVENT_WRITE)
        for number in heard:
            pipes.register(number, selectors.EVENT_READ)
        unread = set(heard)
        while unread and (left_s := deadline - time.monotonic()) > 0:
            ready = pipes.select(min(left_s, _LOOK_S))
            if not ready and process.poll() is not None:
                break  # perhaps another has its output, and would hold this one up
            for number in (key.fd for key, _ in ready):
                if number in heard:
                    if not _read_some(number, heard[number]):
                        pipes.unregister(number)
                        unread.discard(number)
                else:
                    given = _write_some(number, given)
                    if not given:
                        pipes.unregister(number)
                        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - time.monotonic()))
    ended = process.poll() is not None
    return out.decode("utf-8", "replace"), err.decode("utf-8", "replace"), ended


def _write_some(number: int, given: bytes) -> bytes:
    """Write as much as a pipe takes at least; give the rest, none if nobody reads it."""
    try:
        return given[os.write(number, given[: select.PIPE_BUF]) :]
    except BrokenPipeError:
        return b""


def _read_some(number: int, heard: bytearray) -> bool:
    """Read what is there; False at the end."""
    piece = os.read(number, _PIECE_BYTES)
    heard += piece
    if len(heard) > 2 * _KEPT_BYTES:
        del heard[:-_KEPT_BYTES]
    return bool(piece)


def _end(process: subprocess.Popen[bytes]) -> None:
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
