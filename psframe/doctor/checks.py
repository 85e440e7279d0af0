"""The table of all checks, and how one is made; a check judges facts and touches nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from psframe.doctor.case import Case, Finding, Unknown, Verdict
from psframe.doctor.judging_files import (
    judge_cache,
    judge_run_dir,
    judge_shared_folder,
    judge_versions,
)
from psframe.doctor.judging_gpus import judge_gpu_sharing, judge_gpus
from psframe.doctor.judging_machine import (
    judge_binding,
    judge_cores,
    judge_leftovers,
    judge_limits,
    judge_memory,
    judge_shared_memory,
    judge_shm,
    judge_threads,
)
from psframe.doctor.judging_mpi import (
    judge_cuda,
    judge_fault_tolerance,
    judge_launch,
    judge_mpi,
    judge_root,
)

__all__ = ["CHECKS", "Row", "diagnose", "exit_status"]

Judge = Callable[[Case], Finding | None]

# What is judged, in the order in which it is said. A check that does not apply gives None.
CHECKS: Mapping[str, Judge] = {
    "versions": judge_versions,
    "launch": judge_launch,
    "mpi": judge_mpi,
    "fault tolerance": judge_fault_tolerance,
    "root": judge_root,
    "cores": judge_cores,
    "binding": judge_binding,
    "threads": judge_threads,
    "memory": judge_memory,
    "shared memory": judge_shared_memory,
    "/dev/shm": judge_shm,
    "leftovers": judge_leftovers,
    "limits": judge_limits,
    "numba's cache": judge_cache,
    "gpus": judge_gpus,
    "gpu sharing": judge_gpu_sharing,
    "cuda-aware mpi": judge_cuda,
    "run directory": judge_run_dir,
    "shared folder": judge_shared_folder,
}


@dataclass(frozen=True)
class Row:
    """A check and what it came to."""

    check: str
    finding: Finding

    def as_json(self) -> dict[str, str]:
        """Give check, verdict, found and remedy."""
        finding = self.finding
        return {
            "check": self.check,
            "verdict": finding.verdict.value,
            "found": finding.found,
            "remedy": finding.remedy,
        }


def diagnose(case: Case, checks: Mapping[str, Judge] = CHECKS) -> list[Row]:
    """Make every check that applies."""
    rows = []
    for name, judge in checks.items():
        try:
            finding = judge(case)
        except Unknown as error:
            finding = Finding(Verdict.UNKNOWN, str(error))
        except Exception as error:  # strange facts of a strange machine; the others are judged
            finding = Finding(Verdict.UNKNOWN, f"{type(error).__name__}: {error}")
        if finding is not None:
            rows.append(Row(name, finding))
    return rows


def exit_status(rows: Sequence[Row]) -> int:
    """Give 1 if anything is an error, else 0."""
    return int(any(row.finding.verdict is Verdict.ERROR for row in rows))
