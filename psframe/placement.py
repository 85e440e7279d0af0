"""Which ranks serve: the first ones, one on each node, or those that the user names.

Inside a run the ranks stand in a line, servers first, in which server s is number s and worker w
number S + w. What the user is told are ranks as the user knows them.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Hashable, Sequence
from typing import TypeAlias

import numpy as np

from psframe.errors import ArgumentError
from psframe.launcher import Launcher, starting_mpi

__all__ = [
    "PER_NODE",
    "Servers",
    "check_servers",
    "find_serving",
    "line_of",
    "no_room",
    "one_process",
    "parse_servers",
    "serving_ranks",
]

# What `servers` may be: how many (the first ranks), PER_NODE, or the ranks themselves.
Servers: TypeAlias = int | str | Sequence[int]
Checked: TypeAlias = int | str | tuple[int, ...]

PER_NODE = "per-node"
_KINDS = f"a number of servers, {PER_NODE!r} or a list of ranks that begins with 0"
_COUNT_MAX = 2**31 - 1  # a rank is an int in C


def check_servers(servers: object, name: str = "servers") -> Checked:
    """Return an int, PER_NODE or a tuple of different ranks, the first of them 0.

    Args:
        servers: what the user gave.
        name: of the argument, for the error.

    Raises:
        TypeError, ValueError: it is none of them; the message names it.
    """
    if isinstance(servers, (int, np.integer)) and not isinstance(servers, bool):
        if not 1 <= servers <= _COUNT_MAX:
            raise ValueError(f"{name}: expected at least 1, got {servers}")
        return int(servers)
    if isinstance(servers, str):
        if servers != PER_NODE:
            raise ValueError(f"{name}: expected {_KINDS}, got {servers!r}")
        return servers
    ranks = _integers(servers)
    if ranks is None:
        raise TypeError(f"{name}: expected {_KINDS}, got {servers!r}")
    if not ranks or ranks[0] != 0:
        raise ValueError(
            f"{name}: expected {_KINDS}, got {list(ranks)}; rank 0 is server 0, which decides"
        )
    for i, rank in enumerate(ranks):
        if not 0 <= rank <= _COUNT_MAX:
            raise ValueError(f"{name}: there is no rank {rank}; ranks are 0 or more")
        if rank in ranks[:i]:
            raise ValueError(f"{name}: rank {rank} is twice in {list(ranks)}; a rank serves once")
    return ranks


def parse_servers(text: str, name: str = "--servers") -> Checked:
    """Read `4`, `per-node` or `0,4,8`.

    Raises:
        ArgumentError: it is none of them.
    """
    value: object = text.strip()
    try:
        if "," in text:
            value = [int(part) for part in text.split(",") if part.strip()]
        elif value != PER_NODE:
            value = int(text)
    except ValueError:
        raise ArgumentError(
            f"{name}: expected a number of servers, {PER_NODE}, or ranks such as 0,4,8;"
            f" got {text!r}"
        ) from None
    try:
        return check_servers(value, name)
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def one_process(servers: Checked) -> int:
    """Count the servers of a run without MPI; one process is one node.

    Raises:
        ValueError: they are ranks, and there are none.
    """
    if isinstance(servers, tuple):
        raise ValueError(
            f"servers: {list(servers)} are ranks of an MPI job, and this is one process; start it"
            f" with mpirun, or give how many ({len(servers)})"
        )
    return 1 if isinstance(servers, str) else servers


def serving_ranks(servers: Checked, nodes: Sequence[Hashable]) -> tuple[int, ...]:
    """Say which ranks serve, server 0 first; whether there are so many ranks, `no_room` tells.

    Args:
        servers: as checked.
        nodes: of each rank, equal for ranks on one node.
    """
    if isinstance(servers, tuple):
        return servers
    if isinstance(servers, str):
        return tuple(rank for rank, node in enumerate(nodes) if node not in nodes[:rank])
    return tuple(range(servers))


def find_serving(servers: Checked, launcher: Launcher | None) -> tuple[int, ...]:
    """Say before a run which ranks will serve in it; none without a launcher.

    Which rank is on which node, MPI has to tell; with PER_NODE every rank calls this.

    Raises:
        ArgumentError: ranks are named, and there are none.
        LaunchError, RankLost: as `psframe.run`.
    """
    if launcher is None:
        try:
            one_process(servers)
        except ValueError as error:
            raise ArgumentError(str(error)) from error
        return ()
    if not isinstance(servers, str):
        return serving_ranks(servers, ())
    if launcher.replaces:
        return (0,)  # or there would be no replacements
    with starting_mpi():
        from psframe.transports.mpi import open_mesh  # imports MPI

    mesh = open_mesh(None, launcher, sys.prefix)
    mesh.close()
    return serving_ranks(servers, mesh.nodes)


def no_room(servers: Checked, serving: Sequence[int], size: int) -> ArgumentError | None:
    """Say what is wrong if `serving` of `size` ranks cannot serve, or leave no worker."""
    count = len(serving)
    if isinstance(servers, tuple) and max(serving) >= size:
        return ArgumentError(
            f"servers: there is no rank {max(serving)} of {list(serving)}: the run has {size}"
            f" ranks, 0 to {size - 1}"
        )
    if size > count:
        return None
    if isinstance(servers, str):
        return ArgumentError(
            f"servers: {PER_NODE!r} makes each of {size} ranks serve, since each is alone on its"
            " node, which leaves no worker; start two ranks or more on a node"
        )
    return ArgumentError(
        f"servers: {count} of {size} ranks serve, which leaves no worker; start at least"
        f" {count + 1} ranks (mpirun -n {count + 1} ...) or take fewer servers"
    )


def line_of(serving: Sequence[int], size: int) -> tuple[int, ...]:
    """Give the ranks in the order of a run's line: those that serve, then the others.

    Example:
        >>> line_of((0, 2), 5)
        (0, 2, 1, 3, 4)
    """
    served = frozenset(serving)
    return (*serving, *(rank for rank in range(size) if rank not in served))


def _integers(value: object) -> tuple[int, ...] | None:
    """Return the integers of a sequence; None if it is none, or of something else."""
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (bytes, bytearray)):
        return None
    if any(isinstance(item, (bool, np.bool_)) for item in value):
        return None
    try:
        return tuple(operator.index(item) for item in value)
    except TypeError:
        return None
