"""How many threads NumPy's matrix products may use while a worker computes.

An unlimited BLAS starts a thread a core in each of several workers on a node. Those threads spin
while they wait for each other: training the digits with four ranks on two cores took ten times
as long.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

__all__ = ["limited_threads"]

# Whoever set one of these has chosen.
_CHOSEN = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@contextlib.contextmanager
def limited_threads(sharing: int, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Give BLAS this process's share of its cores, for as long as the context lasts.

    Nothing is done where the environment has chosen.

    Args:
        sharing: ranks, or worker threads, that compute on the cores that this process may use.
        environ: where a choice would stand.
    """
    if any(environ.get(name) for name in _CHOSEN):
        yield
        return
    from threadpoolctl import threadpool_limits  # here, so that importing psframe stays quick

    share = max(1, len(os.sched_getaffinity(0)) // max(1, sharing))
    with threadpool_limits(limits=share, user_api="blas"):
        yield
