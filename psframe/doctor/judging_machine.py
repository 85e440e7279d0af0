"""Judges the nodes: cores and binding, threads, memory, what ranks share, limits."""

from __future__ import annotations

import math
from collections.abc import Callable

from psframe.doctor.case import Case, Finding, Node, Verdict
from psframe.doctor.local import THREAD_VARIABLES

__all__ = [
    "judge_binding",
    "judge_cores",
    "judge_leftovers",
    "judge_limits",
    "judge_memory",
    "judge_shared_memory",
    "judge_shm",
    "judge_threads",
    "size",
    "usable_cores",
]

_MIB = 1 << 20
# Python, NumPy, numba and MPI take about 150 MiB a rank before there is any model.
_RANK_BYTES = 256 * _MIB
# What Open MPI's and MPICH's own buffers may come to, for each rank; seen were 0.1 and 6 MiB.
_SHM_RANK_BYTES = 16 * _MIB
# Python's and MPI's own files, and beside them a few of each rank: sockets, shared memory.
_FILES, _FILES_A_RANK = 128, 4
_FLOAT32_BYTES = 4


def judge_cores(case: Case) -> Finding:
    """Judge whether each rank of each node has a core."""
    case.together()
    return _worst(case, _cores_of)


def usable_cores(case: Case, node: Node) -> int:
    """Count the cores that the ranks of a node may use at once: those there are, or a quota."""
    facts = [case.of(rank, "cores") for rank in node.ranks]
    cores = len({core for one in facts for core in one["affinity"]})
    quotas = [one["quota"] for one in facts if one["quota"] is not None]
    return max(1, min(cores, math.floor(min(quotas)))) if quotas else cores


def _cores_of(case: Case, node: Node) -> Finding:
    ranks, cores = len(node.ranks), usable_cores(case, node)
    quota = case.of(node.ranks[0], "cores")["quota"]
    found = f"{ranks} rank{'s' * (ranks > 1)}, {cores} core{'s' * (cores > 1)}"
    if quota is not None:
        found += f" (the control group's quota is {quota:g})"
    if ranks > cores:
        return Finding(
            Verdict.WARNING,
            found,
            "start no more ranks than cores: those too many wait for their turn",
        )
    return Finding(Verdict.OK, found)


def judge_binding(case: Case) -> Finding:
    """Judge whether the launcher has bound ranks to fewer cores than they need."""
    case.together()
    return _worst(case, _binding_of)


def _binding_of(case: Case, node: Node) -> Finding:
    bound = [frozenset(case.of(rank, "cores")["affinity"]) for rank in node.ranks]
    allowed = case.of(node.ranks[0], "cores")["allowed"]
    used = frozenset().union(*bound)
    remedy = "mpirun --bind-to none (psframe launch adds it); under srun: --cpu-bind=none"
    if len(used) == 1 and len(bound) > 1 and len(allowed) > 1:
        return Finding(
            Verdict.ERROR,
            f"all {len(bound)} ranks are bound to core {min(used)} of {len(allowed)}",
            remedy,
        )
    if len(used) < min(len(bound), len(allowed)):
        return Finding(
            Verdict.WARNING,
            f"{len(bound)} ranks are bound to {len(used)} of {len(allowed)} cores",
            remedy,
        )
    if len(used) < len(allowed) and all(len(cores) == 1 for cores in bound):
        return Finding(
            Verdict.WARNING,
            f"each rank is bound to one core, and {len(allowed) - len(used)} of {len(allowed)}"
            " cores are free: a worker's BLAS and its thread that prepares data share one",
            remedy,
        )
    if all(cores == bound[0] for cores in bound) and len(bound[0]) == len(allowed):
        return Finding(Verdict.OK, "not bound")
    least = min(map(len, bound))
    return Finding(Verdict.OK, f"bound, to {least} core{'s' * (least > 1)} a rank at least")


def judge_threads(case: Case) -> Finding:
    """Judge whether the environment makes NumPy start too many threads."""
    return _worst(case, _threads_of)


def _threads_of(case: Case, node: Node) -> Finding:
    cores, ranks = usable_cores(case, node), len(node.ranks)
    for rank in node.ranks:
        variables = case.of(rank, "threads")
        name = next((name for name in THREAD_VARIABLES if variables[name]), None)
        if name is None:
            continue
        text = variables[name].partition(",")[0].strip()
        if not text.isdigit() or not int(text):
            return Finding(
                Verdict.WARNING,
                f"{name}={variables[name]} on rank {rank} is no number of threads",
                f"unset {name}, or set it to {max(1, cores // ranks)}",
            )
        if int(text) > 1 and int(text) * ranks > cores:
            return Finding(
                Verdict.WARNING,
                f"{name}={text}: {ranks} rank{'s' * (ranks > 1)} would run {int(text) * ranks}"
                f" threads on {cores} core{'s' * (cores > 1)}, which get in each other's way",
                f"unset {name}, and psframe shares the cores out; or set it to"
                f" {max(1, cores // ranks)}",
            )
        return Finding(Verdict.OK, f"{name}={text}")
    return Finding(Verdict.OK, "OMP_NUM_THREADS is not set: psframe shares the cores out")


def judge_memory(case: Case) -> Finding:
    """Judge whether there is room for the ranks, and say for how many parameters."""
    return _worst(case, _memory_of)


def _memory_of(case: Case, node: Node) -> Finding:
    facts = [case.of(rank, "memory") for rank in node.ranks]
    left = min(one["available_bytes"] for one in facts)
    limits = [one for one in facts if one["limit_bytes"] is not None]
    by = "available"
    if limits and min(one["left_bytes"] for one in limits) < left:
        tightest = min(limits, key=lambda one: int(one["left_bytes"]))
        left = tightest["left_bytes"]
        by = f"left of the control group's {size(tightest['limit_bytes'])}"
    ranks = len(node.ranks)
    need = ranks * _RANK_BYTES
    # A buffer a worker and two more, and of each worker two slots and where pulls land.
    workers = max(1, ranks - 1)
    params = max(0, left - need) // (_FLOAT32_BYTES * (workers + 2 + 3 * workers))
    millions = float(f"{params:.1g}") / 1e6  # no more digits than such a rule is worth
    if left < need:
        return Finding(
            Verdict.WARNING,
            f"{size(left)} {by} for {ranks} rank{'s' * (ranks > 1)}",
            f"give the job {size(need)} at least, and what the model and its data need; or start"
            " fewer ranks",
        )
    return Finding(
        Verdict.OK,
        f"{size(left)} {by}: room for about {millions:,g} million float32 parameters with"
        f" {workers} worker{'s' * (workers > 1)} here, less what optimizer, activations and data"
        " take",
    )


def judge_shared_memory(case: Case) -> Finding:
    """Judge whether the ranks of a node can open each other's memory."""
    slow = "; psframe goes through MPI instead, which is slower"
    for rank in range(len(case.ranks)):
        error = case.of(rank, "segment")["error"]
        if error:
            return Finding(
                Verdict.WARNING,
                f"rank {rank} cannot make shared memory: {error}{slow}",
                "allow memfd_create, and lift limits on the size of files (ulimit -f unlimited)",
            )
    if not case.met:
        return Finding(Verdict.OK, "this process can make shared memory")
    for rank in range(len(case.ranks)):
        for one in case.of(rank, "refused"):
            return Finding(
                Verdict.WARNING,
                f"rank {rank} cannot open rank {one['rank']}'s memory: {one['reason']}{slow}",
                "run the ranks of a node as one user in one container, without hidepid on /proc",
            )
    nodes = case.nodes()
    boots = [case.of(node.ranks[0], "node")["boot"] for node in nodes]
    for i, boot in enumerate(boots):
        if boot in boots[:i]:
            return Finding(
                Verdict.WARNING,
                f"ranks {nodes[boots.index(boot)].ranks[0]} and {nodes[i].ranks[0]} are on one"
                f" machine, but do not see each other's processes{slow}",
                "run the ranks of a node in one container, or let the containers share the"
                " namespace of processes",
            )
    if len(nodes) == len(case.ranks):
        return Finding(Verdict.OK, "this process can make shared memory; no rank shares its node")
    return Finding(Verdict.OK, "the ranks of a node can open each other's memory")


def judge_shm(case: Case) -> Finding:
    """Judge whether /dev/shm is large enough for MPI; psframe's own memory is not there."""
    return _worst(case, _shm_of)


def _shm_of(case: Case, node: Node) -> Finding:
    facts = case.of(node.ranks[0], "shm")
    need = len(node.ranks) * _SHM_RANK_BYTES
    found = f"{size(facts['free_bytes'])} of {size(facts['total_bytes'])} free"
    if facts["free_bytes"] >= need:
        return Finding(Verdict.OK, found)
    return Finding(
        Verdict.WARNING,
        f"{found}, and MPI's own buffers may need {size(need)} (psframe's memory is not there)",
        "docker run --shm-size=1g; in Kubernetes an emptyDir of medium Memory at /dev/shm",
    )


def judge_leftovers(case: Case) -> Finding:
    """Judge whether launchers that were killed have left folders behind that others would use."""
    return _worst(case, _leftovers_of)


def _leftovers_of(case: Case, node: Node) -> Finding:
    facts = case.of(node.ranks[0], "leftovers")
    names, folder = facts["names"], facts["folder"]
    if not names:
        return Finding(Verdict.OK, f"no launcher that was killed has left anything in {folder}")
    return Finding(
        Verdict.WARNING,
        f"{len(names)} in {folder} of Open MPI's mpirun that was killed, such as {names[0]}; one"
        " that gets the same process number fails: 'The PMIx server's listener thread failed'",
        "remove them, unless they are of a container with process numbers of its own",
    )


def judge_limits(case: Case) -> Finding:
    """Judge the limits of a process (ulimit)."""
    need = _FILES + _FILES_A_RANK * len(case.ranks)
    for rank in range(len(case.ranks)):
        limits = case.of(rank, "limits")
        if limits["files"] is not None and limits["files"] < need:
            return Finding(
                Verdict.WARNING,
                f"rank {rank} may open {limits['files']} files, and {len(case.ranks)} ranks may"
                f" need {need}",
                f"ulimit -n {need}, or more",
            )
        if limits["locked"] is not None and limits["infiniband"]:
            return Finding(
                Verdict.WARNING,
                f"rank {rank} may lock {size(limits['locked'])}, and InfiniBand needs its buffers"
                " locked",
                "ulimit -l unlimited, in the launcher's daemon too (LimitMEMLOCK=infinity)",
            )
        for name, what, flag in (("address", "address space", "-v"), ("file_bytes", "files", "-f")):
            if limits[name] is not None:
                return Finding(
                    Verdict.WARNING,
                    f"rank {rank}: {what} limited to {size(limits[name])}; shared memory counts",
                    f"ulimit {flag} unlimited",
                )
    files = case.of(0, "limits")["files"]
    many = "any number of" if files is None else files
    return Finding(Verdict.OK, f"{many} open files, nothing else is limited that matters")


def _worst(case: Case, judge: Callable[[Case, Node], Finding]) -> Finding:
    """Judge each node; give the first of the worst, and say how many nodes are so."""
    nodes = case.nodes()
    findings = [judge(case, node) for node in nodes]
    order = (Verdict.ERROR, Verdict.WARNING, Verdict.OK)
    worst = min(findings, key=lambda finding: order.index(finding.verdict))
    if len(nodes) == 1:
        return worst
    alike = sum(finding.verdict is worst.verdict for finding in findings)
    where = nodes[findings.index(worst)].host
    found = f"{where}: {worst.found} ({alike} of {len(nodes)} nodes are {worst.verdict.value})"
    return Finding(worst.verdict, found, worst.remedy)


def size(n_bytes: int) -> str:
    """Write a size with the unit that suits it, rounded."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", _MIB)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.3g} {unit}"
    return f"{n_bytes / 1024:.3g} KiB"
