"""Judges what is on disk: versions, numba's cache, the run directory."""

from __future__ import annotations

import re

from psframe.doctor.case import Case, Finding, Unknown, Verdict
from psframe.doctor.judging_machine import size

__all__ = ["judge_cache", "judge_run_dir", "judge_shared_folder", "judge_versions"]

_FREE_BYTES = 100 << 20  # metrics and summaries are small; weights are what they are
_FREE_INODES = 100
_PYTHONS = ((3, 10), (3, 14))
# Ranks with other releases of these may speak another protocol, or compute other bits.
_SAME = ("psframe", "numpy", "numba", "python")
_REMEDIES = {
    "Read-only file system": "choose a folder that you may write",
    "Permission denied": "choose a folder that you may write",
    "No space left on device": "free some space, or choose a folder on another disk",
    "Disk quota exceeded": "free some space, or choose a folder on another disk",
    "Not a directory": "a file is in the way; choose another folder",
}


def judge_versions(case: Case) -> Finding:
    """Judge whether all is there, new enough, and the same on every rank."""
    everyone = case.every("versions")
    least = case.of(0, "requirements")
    for rank, found in enumerate(everyone):
        wrong = [
            f"{name} {version or 'is not installed'}"
            for name, version in found.items()
            if name != "cupy" and not _suits(name, version, least)
        ]
        if wrong:
            return Finding(
                Verdict.ERROR,
                f"rank {rank}: {', '.join(wrong)}",
                "install psframe with its dependencies: pip install .",
            )
    first = everyone[0]
    for rank, found in enumerate(everyone):
        for name in (*_SAME, "mpi4py", "cupy"):
            if found[name] != first[name]:
                return Finding(
                    Verdict.ERROR if name == "psframe" else Verdict.WARNING,
                    f"rank 0 has {name} {first[name]}, rank {rank} has {found[name]}",
                    "use one Python environment on all nodes",
                )
    return Finding(
        Verdict.OK, ", ".join(f"{name} {version}" for name, version in first.items() if version)
    )


def _suits(name: str, version: str | None, least: dict[str, list[int]]) -> bool:
    if version is None:
        return False
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    if name == "python":
        return _PYTHONS[0] <= tuple(numbers[:2]) < _PYTHONS[1]
    return numbers >= list(least.get(name, []))


def judge_cache(case: Case) -> Finding:
    """Judge whether update kernels are compiled once, or in every process."""
    for rank in range(len(case.ranks)):
        found = case.of(rank, "numba")
        if found["broken"]:
            return Finding(
                Verdict.ERROR,
                f"rank {rank}: numba cannot be imported: {found['error']}",
                "install the numba and the NumPy that go together: pip install .",
            )
        if found["error"]:
            return Finding(
                Verdict.WARNING,
                f"rank {rank}: numba finds no folder to keep what it compiles in, so that servers"
                " take seconds to start",
                "let NUMBA_CACHE_DIR name a folder that can be written",
            )
    return Finding(Verdict.OK, case.of(0, "numba")["folder"])


def judge_run_dir(case: Case) -> Finding | None:
    """Judge the folder that --run-dir names."""
    found = case.own("folder")
    if found is None:
        return None
    folder = f"{found['folder']} ({found['kind']})"
    if found["error"]:
        return Finding(
            Verdict.ERROR,
            f"{folder}: cannot {found['step']}: {found['error']}",
            _REMEDIES.get(found["error"], "choose a folder on another file system"),
        )
    free, inodes = found["free_bytes"], found["free_inodes"]
    if free < _FREE_BYTES or (inodes is not None and inodes < _FREE_INODES):
        few = f"{size(free)} and {'any number of' if inodes is None else inodes} files are free"
        return Finding(Verdict.WARNING, f"{folder}: {few}", "free some space")
    return Finding(
        Verdict.OK, f"{folder}: files can be replaced and synchronised, {size(free)} free"
    )


def judge_shared_folder(case: Case) -> Finding | None:
    """Judge whether the other nodes see what rank 0 writes into the run directory."""
    if case.own("folder") is None or not case.met or len(case.nodes()) == 1:
        return None
    if case.own("folder")["error"]:
        raise Unknown("nothing could be written there")
    hosts = []
    for node in case.nodes()[1:]:
        if case.of(node.ranks[0], "sees_folder") is not True:
            hosts.append(node.host)
    if hosts:
        return Finding(
            Verdict.WARNING,
            f"what rank 0 writes is not seen on {hosts[0]}"
            + (f" and {len(hosts) - 1} other nodes" if len(hosts) > 1 else ""),
            "put it on a file system that the nodes share, if servers run on several nodes; with"
            " one server it does not matter",
        )
    return Finding(Verdict.OK, "all nodes see what rank 0 writes")
