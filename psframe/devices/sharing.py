"""Several processes on one GPU: how much of its memory each may take, and what they are told.

They do not know of each other: without a limit the first one's pool may keep what the next one
needs. What a process has beside its pool (a CUDA context, kernels, the libraries' workspaces) the
limit cannot bound, so a margin is left for it. What they lend others of the node (`opening`) is
beside the pools, too: known, and taken off.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "NO_GPU",
    "Sharing",
    "announce",
    "announce_threads",
    "fit_memory",
    "identify",
    "memory_limit",
    "memory_of",
    "mps_runs",
    "too_much_to_lend",
]

# For a CUDA context with the kernels of CuPy and cuBLAS; an allowance, not a measurement.
MARGIN_BYTES = 512 << 20
# The part of a GPU's memory that all who are on it lend at most, one of so many: it is taken from
# what they compute in, and must not be what makes a training too large.
LENT_PARTS = 4
_LIMIT_SET_BY_USER = "CUPY_GPU_MEMORY_LIMIT"
_ID_BYTES = 16
NO_GPU = bytes(_ID_BYTES)

_log = logging.getLogger("psframe")


@dataclass(frozen=True)
class Sharing:
    """The processes that compute on one GPU.

    Attributes:
        gpu: how this process calls it, such as "cuda:0".
        users: their ranks, as the user knows them; this process's included.
        here: this process's.
    """

    gpu: str
    users: tuple[int, ...]
    here: int

    @classmethod
    def of(
        cls,
        gpu: str,
        place: int,
        ids: Sequence[bytes],
        nodes: Sequence[Hashable],
        names: Sequence[int],
    ) -> Sharing:
        """Find those with the same GPU on the same node.

        Args:
            gpu: as above.
            place: this process's, in the lists that follow.
            ids, nodes, names: by process, its GPU (`identify`), its node, and its rank.
        """
        mine = ids[place], nodes[place]
        processes = zip(ids, nodes, names, strict=True)
        users = (name for identity, node, name in processes if (identity, node) == mine)
        return cls(gpu, tuple(sorted(users)), names[place])


def identify(name: str) -> bytes:
    """Give 16 bytes that name the GPU "cuda:k" on its node, whatever is visible; zeros for "cpu".

    Ordinals would not do: each rank may be shown one GPU alone, which it calls cuda:0.
    """
    if name == "cpu":
        return NO_GPU
    import cupy

    found = cupy.cuda.runtime.getDeviceProperties(int(name.partition(":")[2])).get("uuid")
    identity = bytes(found or name.encode())[:_ID_BYTES]
    return identity.ljust(_ID_BYTES, b"\0")


def memory_limit(total_bytes: int, processes: int, lent_bytes: int = 0) -> int | None:
    """Compute how much memory the pool of each of several processes on one GPU may take.

        (total - lent - min(processes * 512 MiB, total / 2)) / processes

    Args:
        total_bytes: the card's memory.
        processes: on it, workers and servers.
        lent_bytes: what all of them together lend others, beside their pools.

    Returns:
        Bytes; None for a process that is alone on its GPU.

    Example:
        >>> memory_limit(80 << 30, 4) >> 20
        19968
    """
    if processes < 2:
        return None
    margin = min(processes * MARGIN_BYTES, total_bytes // 2)
    return (total_bytes - margin - lent_bytes) // processes


def memory_of(name: str) -> tuple[int, int]:
    """Give the bytes of a GPU's memory, and how many of them this process can have now.

    The latter are those that are free, and those that CuPy's pool here keeps and nothing uses.
    """
    import cupy

    with cupy.cuda.Device(int(name.partition(":")[2])):
        free, total = cupy.cuda.runtime.memGetInfo()
        kept = cupy.get_default_memory_pool().free_bytes()
    return int(total), int(free) + int(kept)


def too_much_to_lend(lent_bytes: int, total_bytes: int, free_bytes: int) -> str:
    """Say why nothing is to be lent on a GPU, for the log; "" if it may be.

    Args:
        lent_bytes: what all who are on it would lend.
        total_bytes: its memory.
        free_bytes: of which the one who can have least can have so much.
    """
    would = f"{lent_bytes >> 20} MiB would be lent on one GPU"
    if lent_bytes > total_bytes // LENT_PARTS:
        return f"{would}, more than a quarter of its {total_bytes >> 20} MiB"
    if lent_bytes > free_bytes:
        return f"{would}, of which {free_bytes >> 20} MiB are free"
    return ""


def fit_memory(
    name: str,
    processes: int,
    environ: Mapping[str, str] = os.environ,
    *,
    lent_bytes: int = 0,
) -> int | None:
    """Limit CuPy's pool on a GPU to one process's share of its memory.

    A limit that the user has set (CUPY_GPU_MEMORY_LIMIT) stays.

    Args:
        name: the GPU, such as "cuda:0"; it need not be the current one.
        processes, lent_bytes: as for `memory_limit`.
        environ: the environment.

    Returns:
        The limit that was set, in bytes.
    """
    if environ.get(_LIMIT_SET_BY_USER):
        return None
    import cupy

    ordinal = int(name.partition(":")[2])
    total = int(cupy.cuda.runtime.getDeviceProperties(ordinal)["totalGlobalMem"])
    limit = memory_limit(total, processes, lent_bytes)
    if limit is not None:
        with cupy.cuda.Device(ordinal):  # or it would be the current GPU's pool that has a limit
            cupy.get_default_memory_pool().set_limit(size=limit)
    return limit


def announce(sharing: Sharing, limit: int | None, environ: Mapping[str, str] = os.environ) -> None:
    """Log one line, in the first of the processes that share a GPU."""
    users = sharing.users
    if len(users) < 2 or sharing.here != users[0]:
        return
    if limit is None:
        memory = f"{_LIMIT_SET_BY_USER} says how much memory each may take"
    else:
        memory = f"each may take {limit / 2**30:.1f} GiB of its memory"
    if mps_runs(environ):
        turns = "MPS runs, so that their kernels overlap"
    else:
        turns = "MPS does not run here, so that they take turns (nvidia-cuda-mps-control -d)"
    _log.warning(
        "ranks %s share one GPU (%s in rank %d): %s; %s",
        ", ".join(map(str, users)),
        sharing.gpu,
        sharing.here,
        memory,
        turns,
    )


def announce_threads(device: str, devices: Sequence[str]) -> None:
    """Log one line if workers of one process share a GPU, or have none though they might.

    Args:
        device: what the user asked for.
        devices: by worker, what it got.
    """
    if device == "auto" and "cpu" in devices and sys.modules.get("cupy") is not None:
        _log.info("workers compute on the CPU: CuPy is installed, and sees no GPU")
    shared = sorted({name for name in devices if name != "cpu" and devices.count(name) > 1})
    if shared:
        _log.warning(
            "%d workers of this process share %s: they have one memory pool, and one context, so"
            " that MPS would change nothing",
            sum(name in shared for name in devices),
            ", ".join(shared),
        )


def mps_runs(environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether NVIDIA's Multi-Process Service has its control pipe where CUDA looks for it."""
    pipes = Path(environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")
    return (pipes / "control").exists()
