"""Judges the start: launcher, library, thread level, fault tolerance, device pointers, root."""

from __future__ import annotations

from psframe.doctor.case import Case, Finding, Unknown, Verdict
from psframe.machine import INSTALL_ONE, NO_LIBRARY

__all__ = ["judge_cuda", "judge_fault_tolerance", "judge_launch", "judge_mpi", "judge_root"]

OPEN_MPI = "Open MPI"
_TRIED = (OPEN_MPI, "MPICH")
_FT = "mpirun --with-ft ulfm"
_FT_SINCE = 5  # the first release of Open MPI with it


def judge_launch(case: Case) -> Finding:
    """Judge whether the processes are the ranks of one job, or could be started as such."""
    launched = case.launched
    if case.lone:
        return Finding(
            Verdict.ERROR,
            case.lone,
            "take the mpirun of the MPI that mpi4py uses: psframe launch -n 4 -- ... finds it",
        )
    if not case.met and case.trouble.startswith(NO_LIBRARY):
        return Finding(
            Verdict.ERROR,
            f"MPI did not start: {case.trouble}",
            f"{INSTALL_ONE}; without MPI psframe trains in one process, with threads",
        )
    if not case.met and case.own("home") is False:
        return Finding(
            Verdict.ERROR,
            f"MPI did not start, or the ranks did not meet: {case.trouble}",
            "set HOME, without which Open MPI does not start",
        )
    if not case.met:
        return Finding(
            Verdict.ERROR,
            f"MPI did not start, or the ranks did not meet: {case.trouble}",
            "see that mpi4py finds its library, that every rank starts, and that they reach each"
            " other: between nodes firewalls and the network interface, on a node /dev/shm and one"
            " namespace of processes; --timeout gives them longer",
        )
    if launched is not None:
        nodes = len(case.nodes())
        many = f"{len(case.ranks)} ranks on {nodes} node{'s' * (nodes > 1)}"
        return Finding(Verdict.OK, f"{many}, started by {launched['name']}")
    mpirun = case.own("mpirun")
    if not mpirun["path"]:
        return Finding(Verdict.ERROR, mpirun["error"], "or run without MPI, with --workers threads")
    if mpirun["in_path"] not in ("", mpirun["path"]):
        return Finding(
            Verdict.WARNING,
            f"one process; mpi4py's MPI has {mpirun['path']}, but mpirun in PATH is"
            f" {mpirun['in_path']}",
            "start with psframe launch, or type the whole path",
        )
    return Finding(Verdict.OK, f"one process, without a launcher; there is {mpirun['path']}")


def judge_mpi(case: Case) -> Finding:
    """Judge vendor, version and thread level, and whether they are the same everywhere."""
    facts = case.every("mpi")
    names = [f"{one['vendor']} {one['version']}" for one in facts]
    different = next((rank for rank, name in enumerate(names) if name != names[0]), 0)
    if different:
        return Finding(
            Verdict.ERROR,
            f"rank 0 has {names[0]}, rank {different} has {names[different]}",
            "use one installation of MPI, and one Python environment, on all nodes",
        )
    first = facts[0]
    level = first["thread_level"]
    found = f"{names[0]} (MPI {first['standard']}), thread level {level}"
    if first["vendor"] not in _TRIED:
        return Finding(
            Verdict.WARNING,
            found,
            f"psframe is tested with {' and '.join(_TRIED)}; with others run its tests first",
        )
    if level == "single":
        return Finding(
            Verdict.WARNING,
            found,
            "psframe calls MPI from one thread, but data are prepared in another: take an MPI that"
            " offers at least the level funneled",
        )
    return Finding(Verdict.OK, found)


def judge_fault_tolerance(case: Case) -> Finding:
    """Judge whether the death of a rank can be survived."""
    facts = case.every("mpi")
    vendor, version = facts[0]["vendor"], facts[0]["version"]
    can = vendor == OPEN_MPI and int(version.split(".")[0]) >= _FT_SINCE
    lost = "the death of one rank ends the whole job"
    if case.launched is None:
        if can:
            return Finding(Verdict.OK, f"decided at the start: {_FT}; without it {lost}")
        return Finding(Verdict.WARNING, f"{vendor} {version} has none: {lost}", _take_open_mpi())
    values = [one["fault_tolerant"]["value"] for one in facts]
    by = facts[0]["fault_tolerant"]["by"]
    if None in values:
        raise Unknown(f"{by}; it is on if the job was started with {_FT}")
    if all(values):
        told = [case.of(rank, "launched_with_ft") for rank in range(len(facts))]
        if False in told:
            return Finding(
                Verdict.WARNING,
                "on in the library, but the launcher was not told: it would end the job itself",
                f"start with {_FT}; the variable alone is not enough",
            )
        return Finding(Verdict.OK, f"on, as {by} says")
    if any(values):
        off = values.index(False)
        return Finding(Verdict.ERROR, f"off on rank {off}, on elsewhere", f"start all with {_FT}")
    return Finding(
        Verdict.WARNING,
        f"off ({by}): {lost}",
        f"start with {_FT}" if can else _take_open_mpi(),
    )


def _take_open_mpi() -> str:
    return f"where ranks may be lost take Open MPI {_FT_SINCE} or newer, and {_FT}"


def judge_cuda(case: Case) -> Finding:
    """Judge whether MPI takes device pointers; psframe copies through the host where not."""
    facts = case.every("mpi")
    pointer = case.own("pointer")
    cuda = [one["cuda"] for one in facts]
    if pointer is not None and cuda[0]["value"] is None:
        cuda = [pointer] * len(cuda)
    values, by = [one["value"] for one in cuda], cuda[0]["by"]
    if any(value != values[0] for value in values):
        return Finding(
            Verdict.WARNING,
            f"ranks differ: {sum(value is True for value in values)} of {len(values)} have a"
            " CUDA-aware MPI",
            "use one installation of MPI on all nodes",
        )
    if values[0] is None:
        raise Unknown(f"{by}; psframe then copies gradients of GPUs through the host")
    if values[0]:
        return Finding(Verdict.OK, f"CUDA-aware, as {by} says")
    return Finding(
        Verdict.OK,
        f"not CUDA-aware, as {by} says; gradients of GPUs are copied through the host",
    )


def judge_root(case: Case) -> Finding:
    """Judge whether Open MPI's launcher will start for this user."""
    if case.of(0, "user") != 0:
        return Finding(Verdict.OK, "not root")
    if case.launched is not None:
        return Finding(Verdict.OK, "root, and the launcher has started all the same")
    vendor = case.of(0, "mpi")["vendor"]
    if vendor != OPEN_MPI:
        return Finding(Verdict.OK, f"root, to which {vendor} does not object")
    if case.own("root_allowed"):
        return Finding(Verdict.OK, "root, which the environment allows Open MPI's mpirun")
    return Finding(
        Verdict.WARNING,
        "root, for whom Open MPI's mpirun does not start anything",
        "psframe launch adds --allow-run-as-root; or set OMPI_ALLOW_RUN_AS_ROOT=1 and"
        " OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, or be another user",
    )
