"""What this process sees of its machine, from the system's own files; nothing here can hang."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from psframe.doctor import cgroups
from psframe.doctor.case import Unknown
from psframe.launcher import find_launcher
from psframe.transports.shared_memory import Segment, node_id

__all__ = ["THREAD_VARIABLES", "local_probes"]

# NumPy's BLAS reads the first of its own that is set, and then OMP_NUM_THREADS.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
)
_LIMITS = {"files": "NOFILE", "locked": "MEMLOCK", "address": "AS", "file_bytes": "FSIZE"}
_LAUNCHERS = frozenset(("mpirun", "mpiexec", "prterun", "orterun", "prte"))
_ANCESTORS_MAX = 8
_PROBE_ELEMENTS = 1 << 18  # 1 MiB: more than nothing, and no burden


def local_probes() -> dict[str, Callable[[], Any]]:
    """Give the groups of facts that a process finds out by itself."""
    return {
        "node": _node,
        "launcher": _launcher,
        "user": os.geteuid,
        "cores": _cores,
        "threads": lambda: {name: os.environ.get(name, "") for name in THREAD_VARIABLES},
        "memory": _memory,
        "limits": _limits,
        "shm": _shm,
        "leftovers": _leftovers,
        "segment": _segment,
        "launched_with_ft": lambda: _launched_with_ft(os.getppid()),
    }


def _node() -> dict[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return {"host": socket.gethostname(), "id": node_id().hex(), "boot": boot}


def _launcher() -> dict[str, Any] | None:
    found = find_launcher()
    return None if found is None else found._asdict()


def _cores() -> dict[str, Any]:
    return {
        "affinity": sorted(os.sched_getaffinity(0)),
        "quota": cgroups.cpu_quota(),
        "allowed": cgroups.cores_allowed() or list(range(os.cpu_count() or 1)),
    }


def _memory() -> dict[str, Any]:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise Unknown("/proc/meminfo does not tell what is available")
    limit = cgroups.memory_limit()
    return {
        "available_bytes": int(found[1]) * 1024,
        "limit_bytes": limit and limit[0],
        "left_bytes": limit and limit[0] - limit[1],
    }


def _limits() -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for name, of_system in _LIMITS.items():
        soft = resource.getrlimit(getattr(resource, f"RLIMIT_{of_system}"))[0]
        limits[name] = None if soft == resource.RLIM_INFINITY else soft
    infiniband = Path("/sys/class/infiniband")
    return {**limits, "infiniband": infiniband.is_dir() and any(infiniband.iterdir())}


def _shm() -> dict[str, int]:
    found = os.statvfs("/dev/shm")
    return {
        "free_bytes": found.f_bavail * found.f_frsize,
        "total_bytes": found.f_blocks * found.f_frsize,
    }


def _leftovers() -> dict[str, Any]:
    """Find the folders of this user's Open MPI launchers that are no more."""
    folder, found = Path(os.environ.get("TMPDIR", "/tmp")), list[str]()
    for one in sorted(folder.glob("ompi.*")):
        process = one.name.partition(".")[2]
        with contextlib.suppress(OSError):  # it has just gone
            mine = one.stat().st_uid == os.geteuid()
            if mine and process.isdecimal() and not Path("/proc", process).exists():
                found.append(one.name)
    return {"folder": str(folder), "names": found}


def _segment() -> dict[str, str]:
    """Make such memory as psframe shares, and touch it."""
    try:
        segment = Segment.create(1, _PROBE_ELEMENTS, "float32")
    except OSError as error:
        return {"error": error.strerror or str(error)}
    segment.array(0)[:] = 1
    segment.close_file()
    return {"error": ""}


def _launched_with_ft(process: int) -> bool | None:
    """Whether Open MPI's launcher was told --with-ft; None if it is not above this process."""
    for _ in range(_ANCESTORS_MAX):
        try:
            stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
            line = Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None  # it has ended, or is another user's
        end = stat.rindex(")")
        if stat[stat.index("(") + 1 : end] in _LAUNCHERS:
            return any(re.match(r"--?with-ft(=|$)", word) for word in line.split("\0"))
        process = int(stat[end + 2 :].split()[1])
        if process <= 1:
            return None
    return None
