"""BLAS threads: a share of the cores while a worker computes, and as before afterwards."""

from __future__ import annotations

import os

import pytest
from threadpoolctl import threadpool_info

from psframe.blas import limited_threads


def _threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.mark.parametrize(("own", "sharing", "share"), [(8, 1, 8), (8, 3, 2), (2, 4, 1), (1, 0, 1)])
def test_shares_of_cores(
    monkeypatch: pytest.MonkeyPatch, own: int, sharing: int, share: int
) -> None:
    before = _threads()
    assert before, "NumPy comes with a BLAS"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(own))
    with limited_threads(sharing, {}):
        assert set(_threads()) == {share}
    assert _threads() == before


def test_who_chose_is_obeyed() -> None:
    before = _threads()
    with limited_threads(10**6, {"OMP_NUM_THREADS": "2"}):
        assert _threads() == before
