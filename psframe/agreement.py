"""What all ranks of a run must agree on before it begins: that the arguments are right, and equal.

Everything is gathered by all ranks, so that an error on one of them is an error on every one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

from psframe.devices import choose_device
from psframe.errors import ArgumentError
from psframe.placement import no_room, serving_ranks
from psframe.plan import Plan
from psframe.roles import describe
from psframe.server_device import choose_server_device
from psframe.transports.mpi import Mesh
from psframe.transports.rounds import Rounds

__all__ = ["agree", "local_server", "tell"]

_TEXT_BYTES_MAX = 2048
_CHECK = "the check of the arguments"
_TOLD = struct.Struct(f"<?H{_TEXT_BYTES_MAX}s")


def agree(
    mesh: Mesh,
    make_plan: Callable[[], Plan],
    open_host: Callable[[Plan, Callable[[], None]], None],
    same: Mapping[str, object],
) -> tuple[Plan | None, Exception | None]:
    """Check the arguments on every rank and compare them.

    Args:
        mesh: the ranks.
        make_plan: checks this rank's arguments.
        open_host: opens the run directory (called on rank 0); where it takes long, it calls its
            second argument now and then.
        same: further arguments that must be equal on every rank.

    Returns:
        The plan, which knows its servers, and the error that this rank must raise. If that is not
        None, every rank has one.

    Raises:
        RankLost: some rank did not take part.
    """
    plan: Plan | None = None
    error: Exception | None = None
    rounds = Rounds(mesh, _CHECK)
    try:
        plan = make_plan()
        serving = serving_ranks(plan.placement, mesh.nodes)
        if isinstance(plan.placement, tuple):  # ranks as the user knows them
            serving = tuple(_place_of(rank, mesh) for rank in serving)
        plan = plan.placed(serving)
        if mesh.rank in plan.serving:
            choose_server_device(plan.server_device, local_server(mesh, plan.serving))
        if mesh.rank == 0:
            open_host(plan, rounds.alive)
        elif mesh.rank not in plan.serving:
            choose_device(plan.device, worker=0)
    except Exception as raised:  # every other rank has to hear of it, whatever it is
        error = raised
    error = tell(mesh, error, rounds)
    if error is None:
        assert plan is not None
        error = _compare(mesh, plan.digests(**same))
        error = error or no_room(plan.placement, plan.serving, mesh.size)
    return plan, error


def tell(mesh: Mesh, error: Exception | None, rounds: Rounds | None = None) -> Exception | None:
    """Tell every rank this one's error, when all have done what may have failed.

    Args:
        mesh: the ranks.
        error: this one's, if it has one.
        rounds: with which this rank has shown that it gets on, where its work took long.

    Returns:
        The error; if there is none, an ArgumentError with that of the first rank that has one.
    """
    (rounds or Rounds(mesh, _CHECK)).wait()
    text = b""
    if error is not None:
        what = describe(error)
        text = f"{what.type}: {what.message[:_TEXT_BYTES_MAX]}".encode("utf-8", "backslashreplace")
        text = text[:_TEXT_BYTES_MAX]
    everyone = mesh.all_gather(_TOLD.pack(error is not None, len(text), text), _CHECK)
    if error is not None:
        return error
    for rank, record in enumerate(everyone):
        failed, length, content = _TOLD.unpack(record)
        if failed:
            return ArgumentError(f"rank {rank}: {content[:length].decode(errors='replace')}")
    return None


def local_server(mesh: Mesh, serving: Sequence[int]) -> int:
    """Count the servers on this server's node that come before it.

    Args:
        mesh: the ranks.
        serving: the servers' places; one that there is not counts for none.
    """
    nodes, before = mesh.nodes, serving[: serving.index(mesh.rank)]
    return sum(nodes[rank] == nodes[mesh.rank] for rank in before if rank < mesh.size)


def _place_of(rank: int, mesh: Mesh) -> int:
    """Find a rank in the line; one that there is not stands behind it."""
    return mesh.names.index(rank) if rank in mesh.names else max(rank, mesh.size)


def _compare(mesh: Mesh, digests: Mapping[str, bytes]) -> ArgumentError | None:
    everyone = mesh.all_gather(b"".join(digests.values()), "the arguments' digests")
    for i, name in enumerate(digests):
        of_rank = [record[16 * i : 16 * i + 16] for record in everyone]
        different = [rank for rank, digest in enumerate(of_rank) if digest != of_rank[0]]
        if different:
            what = "names, shapes or dtypes of params" if name == "params" else name
            return ArgumentError(
                f"{what}: rank {different[0]}{' and others' * (len(different) > 1)} called"
                " psframe.run with another value than rank 0; every rank must call it with"
                " equal arguments"
            )
    return None
