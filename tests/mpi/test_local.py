"""Local steps under MPI: sums of small integers, which no order of summation changes."""

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe import optim
from psframe.local import EASGD, LocalSGD

WORLD = MPI.COMM_WORLD
SAMPLES = 90


def local_work(worker: psframe.Worker) -> None:
    """Each sample adds one to its own parameter, in every epoch."""
    local = LocalSGD(worker, optim.SGD(1.0), period=4)
    for indices in local.leases(SAMPLES, 5, epochs=3):
        ones = np.zeros(SAMPLES)
        ones[indices] = -1.0
        local.step({"n": ones})


def elastic_work(worker: psframe.Worker) -> None:
    """Every exchange carries over half of what the worker is ahead of the center."""
    easgd = EASGD(worker, optim.SGD(1.0), alpha=0.5, period=4)
    for _ in range(10):
        easgd.step({"n": -np.ones(SAMPLES)})
    easgd.finish()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("shared_memory", [True, False])
def test_every_sample_is_in_what_is_pushed(servers: int, shared_memory: bool) -> None:
    if WORLD.size <= servers:
        pytest.skip(f"{servers} servers and a worker need more ranks")
    params = {"n": np.zeros(SAMPLES)}
    result = psframe.run(
        local_work,
        params,
        optimizer=optim.SGD(1.0),
        servers=servers,
        shared_memory=shared_memory,
    )
    assert result.version == 15  # 20 samples a lease, 5 leases an epoch
    if result.params is not None:
        assert result.params["n"].tolist() == [3.0] * SAMPLES


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("shared_memory", [True, False])
def test_the_center_follows_the_workers(shared_memory: bool) -> None:
    workers = WORLD.size - 1
    result = psframe.run(
        elastic_work,
        {"n": np.zeros(SAMPLES)},
        optimizer=EASGD.server_optimizer(),
        shared_memory=shared_memory,
    )
    assert result.version == 3 * workers
    if result.params is not None:
        center = set(result.params["n"].tolist())
        assert len(center) == 1
        assert 0.0 < center.pop() < 10.0 * workers
        if workers == 1:  # half of the way from 0 to 4, from 2 to 6, and from 4 to 6
            assert result.params["n"].tolist() == [5.0] * SAMPLES
