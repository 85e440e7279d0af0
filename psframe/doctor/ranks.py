"""What the ranks find out together. As a program it is one rank, which starts MPI.

The process that the launcher started starts this one and waits for it with a bound: so that it can
still speak where MPI hangs, or ends the process that starts it.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from psframe.doctor.case import Unknown, gather
from psframe.doctor.folder import NAME, sees_token
from psframe.errors import LaunchError
from psframe.launcher import find_launcher, starting_mpi
from psframe.machine import NO_LIBRARY
from psframe.throwaway import answer, ask
from psframe.transports.shared_memory import Segment

__all__ = ["meet"]

_HELLO = struct.Struct("<qi16s")
_LENGTH = struct.Struct("<q")
_ELEMENTS = 1024
_CANNOT_LOAD = "cannot load MPI library"  # mpi4py's, of its wheels; then a path a line
_FILES_MIN = 64  # MPICH has started with 40, and been killed with 32
_REFUSED_MAX = 4  # of the ranks that refuse their memory: one tells as much as all


def meet(facts: Mapping[str, Any], folder: str, timeout_s: float) -> dict[str, Any]:
    """Start MPI in a process of its own and meet the others there.

    Args:
        facts: of this rank, for all.
        folder: that rank 0 has tried, to be looked for on the other nodes; "" for none.
        timeout_s: how long it may take.

    Returns:
        `ranks`: the facts of each, `mpi`: of this process's library, `lone`: what is wrong if this
        is not one job, or "".

    Raises:
        Unknown: MPI did not start, or the ranks did not meet.
    """
    _check_files(facts["limits"])
    command = [sys.executable, "-m", "psframe.doctor.ranks"]
    with _spoken_to_by_the_launcher():
        found = ask(command, timeout_s=timeout_s, given={"facts": dict(facts), "folder": folder})
    if not isinstance(found, dict):
        raise Unknown(f"the answer is {found!r}")
    if "trouble" in found:
        raise Unknown(str(found["trouble"]))
    return found


def _check_files(limits: Mapping[str, Any]) -> None:
    """Tell of too few files before MPICH does: its launcher kills all ranks, this one included.

    Raises:
        Unknown: MPI cannot start with so few.
    """
    files = limits.get("files")
    if files is not None and files < _FILES_MIN and find_launcher() is not None:
        raise Unknown(
            f"each rank may open {files} files, and MPI needs {_FILES_MIN} to start: ulimit -n"
        )


@contextmanager
def _spoken_to_by_the_launcher() -> Iterator[None]:
    """Take SIGTERM for the end of the meeting: a launcher sends it when any rank has gone.

    Once the meeting has failed it is ignored, since it comes to whoever is about to say so; a
    launcher sends SIGKILL soon enough.
    """
    if find_launcher() is None:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Unknown("the launcher has ended the job, as it does when any of its ranks dies")

    after: Any = signal.SIG_IGN
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
        after = before
    finally:
        signal.signal(signal.SIGTERM, after)


def main() -> None:
    """Be one rank: meet the others and answer with what all have found."""
    given = json.load(sys.stdin)
    try:
        answer(_together(given["facts"], given["folder"]))
    except Exception as error:  # whatever MPI has against this machine is what is asked for
        answer({"trouble": _trouble(error)})


def _trouble(error: Exception) -> str:
    """Say why MPI did not start; where it has no library not all the paths that it has tried."""
    lines = str(error).splitlines() or [""]
    if lines[0].startswith(_CANNOT_LOAD):
        return f"{NO_LIBRARY} ({lines[0].rstrip(':')})"
    return f"{type(error).__name__}: {error}"


def _together(facts: dict[str, Any], folder: str) -> dict[str, Any]:
    launcher = find_launcher()
    try:
        with starting_mpi():
            from psframe.transports.mpi import open_mesh
            from psframe.transports.mpi_facts import mpi_facts
    except LaunchError as error:
        return {"ranks": [facts], "mpi": None, "lone": str(error)}
    facts.update(gather({"mpi": mpi_facts}))
    try:
        mesh = open_mesh(None, launcher, sys.prefix)
    except LaunchError as error:
        return {"ranks": [facts], "mpi": facts["mpi"], "lone": str(error)}
    if launcher is None and mesh.size > 1:
        lone = f"MPI has {mesh.size} ranks, but no launcher that psframe knows has started them"
        return {"ranks": [facts], "mpi": facts["mpi"], "lone": lone, "rank": mesh.rank}
    facts["refused"] = _refused(mesh)
    facts["sees_folder"] = _sees_folder(mesh, folder)
    ranks = [json.loads(text) for text in _all_texts(mesh, json.dumps(facts), "the facts")]
    mesh.close()
    return {"ranks": ranks, "mpi": facts["mpi"], "lone": "", "rank": mesh.rank}


def _all_texts(mesh: Any, text: str, what: str) -> list[str]:
    data = text.encode()
    lengths = [_LENGTH.unpack(one)[0] for one in mesh.all_gather(_LENGTH.pack(len(data)), what)]
    padded = mesh.all_gather(data.ljust(max(lengths)), what)
    return [one[:length].decode() for one, length in zip(padded, lengths, strict=True)]


def _refused(mesh: Any) -> list[dict[str, Any]]:
    """Try to open the memory of this node's ranks, as a run does; give those that refuse it."""
    try:
        own = Segment.create(1, _ELEMENTS, "float32")
    except OSError:
        own = None
    hello = (os.getpid(), -1, bytes(16)) if own is None else (os.getpid(), own.fd, own.nonce)
    hellos = [_HELLO.unpack(one) for one in mesh.all_gather(_HELLO.pack(*hello), "the hello")]
    refused = []
    for rank, (pid, fd, nonce) in enumerate(hellos):
        here = mesh.nodes[rank] == mesh.nodes[mesh.rank] and rank != mesh.rank
        if not here or fd < 0 or Segment.open(pid, fd, nonce, 1, _ELEMENTS, "float32"):
            continue
        refused.append({"rank": rank, "reason": _why_not(pid, fd)})
    mesh.all_gather(b"x", "the shared memory")  # nobody closes before everyone has tried
    if own is not None:
        own.close_file()
    return refused[:_REFUSED_MAX]


def _why_not(pid: int, fd: int) -> str:
    try:
        os.close(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return "it is another process's memory, or cannot be mapped"


def _sees_folder(mesh: Any, folder: str) -> Any:
    """Whether what rank 0 writes into a folder is there on this node.

    The first rank of each node but rank 0's looks; for the others, or without a folder, it is None.
    """
    name = f"{NAME}{uuid.uuid4().hex}" if folder and mesh.rank == 0 else ""
    file = Path(folder) / name
    if name:
        try:
            file.write_text(name, encoding="ascii")
        except OSError:  # trying the folder has said so
            name = ""
    where, name = json.loads(_all_texts(mesh, json.dumps([folder, name]), "the folder")[0])
    node = mesh.nodes[mesh.rank]
    seen: Any = None
    if name and mesh.nodes.index(node) == mesh.rank and node != mesh.nodes[0]:
        seen = gather({"seen": lambda: sees_token(where, name)["seen"]})["seen"]
    mesh.all_gather(b"x", "the folder")
    if name and mesh.rank == 0:
        file.unlink(missing_ok=True)
    return seen


if __name__ == "__main__":
    main()
