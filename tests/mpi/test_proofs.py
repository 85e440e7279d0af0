"""Runs whose result is known to the last bit, on every way that bytes can take under MPI."""

import numpy as np
import pytest
from mpi4py import MPI
from proofs import cases, check

import psframe
from psframe.transports import mpi, mpi_post, transfers

WORLD = MPI.COMM_WORLD
WAYS = ("memory", "inline", "pieces")


def set_piece_bytes(n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mpi, transfers):
        monkeypatch.setattr(module, "PIECE_BYTES", n_bytes)


def prepare(way: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Choose how arrays travel; returns what to give as shared_memory."""
    if way == "pieces":  # each array behind its message, in several pieces and a rest
        monkeypatch.setattr(mpi_post, "_INLINE_BYTES_MAX", 8)
        set_piece_bytes(24, monkeypatch)
    return way == "memory"


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("servers", [1, 2, 3])
def test_every_bit(servers: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker is a serial loop, BSP an average in worker order, whatever S and the way."""
    workers = WORLD.size - servers
    if workers < 1:
        pytest.skip(f"{servers} servers and a worker need more ranks")
    shared_memory = prepare(way, monkeypatch)
    for case in cases(workers, [servers]):
        result = psframe.run(
            case.work, case.params, servers=servers, shared_memory=shared_memory, **case.kwargs
        )
        assert result.is_root == (WORLD.rank == 0), case.name
        if result.is_root:
            check(case, result)
        else:
            assert result.params is None, case.name
        if case.version is not None:
            assert result.version == case.version, case.name


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nbytes", [4088, 4 << 10, 300 << 10])
def test_arrays_of_many_sizes_arrive_whole(
    nbytes: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around the inline limit and the piece length; a pull is one version, a push is all there."""
    set_piece_bytes(64 << 10, monkeypatch)
    params = {"w": np.zeros(nbytes // 8), "b": np.zeros(3)}

    def work(worker: psframe.Worker) -> None:
        for _ in range(20):
            seen = worker.pull()
            values = {float(v) for name in seen for v in (seen[name].min(), seen[name].max())}
            assert values == {-float(seen.version)}
            worker.push({name: np.ones(p.shape) for name, p in params.items()})

    result = psframe.run(
        work, params, optimizer=psframe.optim.SGD(1.0), shared_memory=way == "memory"
    )
    assert result.version == 20 * (WORLD.size - 1)
    if result.params is not None:
        for array in result.params.values():
            np.testing.assert_array_equal(array, -float(result.version))
