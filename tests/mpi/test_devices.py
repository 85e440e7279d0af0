"""Workers on a GPU that is none, over MPI: gradients that leave behind the worker."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from fake_cupy import FakeCupy
from mpi4py import MPI
from on_stand_ins import push_by_turns

import psframe
from psframe import BSP, SSP, Async, optim

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
N = 300_000  # 1.2 MB of float32: streamed
START = {
    "w": np.linspace(-1.0, 1.0, N, dtype=np.float32).reshape(1000, 300),
    "b": np.linspace(0.5, 2.0, 70, dtype=np.float32),
}


def train(device: str, mode: Any, shared: bool, **options: Any) -> psframe.Result:
    def work(worker: psframe.Worker) -> None:
        if worker.index and not isinstance(mode, BSP):
            return  # one at a time, so that bits can be compared
        params = worker.pull()
        for step in range(6):
            slope = np.float32(0.25 * worker.index + 0.125 * step)
            grads = {name: params[name] * np.float32(0.5) + slope for name in params}
            pending = push_by_turns(worker, grads, step)
            if step == 3:
                params = worker.pull()
                assert pending.wait().applied
            else:
                assert pending.wait().applied
                params = worker.pull()

    return psframe.run(
        work,
        START,
        optimizer=optim.SGD(0.1, momentum=0.5),
        mode=mode,
        device=device,
        shared_memory=shared,
        **options,
    )


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP()], ids=repr)
@pytest.mark.parametrize("shared", [True, False])
def test_the_bits_are_the_cpu_s(cupy: FakeCupy, mode: Any, shared: bool) -> None:
    on_gpu, on_cpu = train("cuda", mode, shared), train("cpu", mode, shared)
    if RANK == 0:
        for name, array in on_gpu.params.items():
            np.testing.assert_array_equal(array, on_cpu.params[name], err_msg=name)
        assert on_gpu.ledger == on_cpu.ledger
    workers = SIZE - 1
    assert (on_gpu.devices, on_cpu.devices) == (("cuda",) * workers, ("cpu",) * workers)


@pytest.mark.mpi(min_size=3)
def test_several_servers(cupy: FakeCupy) -> None:
    on_gpu = train("cuda", BSP(), True, servers=2)
    on_cpu = train("cpu", BSP(), True, servers=2)
    if RANK == 0:
        for name, array in on_gpu.params.items():
            np.testing.assert_array_equal(array, on_cpu.params[name], err_msg=name)


@pytest.mark.mpi(min_size=3)
def test_ranks_that_share_a_gpu_share_its_memory_and_the_first_says_so(
    cupy: FakeCupy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUPY_GPU_MEMORY_LIMIT", raising=False)
    with caplog.at_level(logging.WARNING, "psframe"):
        train("cuda", Async(), True)
    lines = [line for line in caplog.messages if "share one GPU" in line]
    assert len(lines) == (RANK == 1)
    if RANK:
        workers = SIZE - 1
        (limit,) = cupy.pool.limits.values()
        assert limit == ((8 << 30) - workers * (512 << 20)) // workers


@pytest.mark.mpi(min_size=2)
def test_gradients_that_leave_behind_the_worker_are_streamed(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psframe.devices import CudaDevice

    behind = []
    original = CudaDevice.fetch_behind

    def watched(*arguments: Any) -> bool:
        behind.append(original(*arguments))
        return behind[-1]

    monkeypatch.setattr(CudaDevice, "fetch_behind", watched)
    train("cuda", Async(), True)
    crowded = WORLD.size > 2  # then gradients are not streamed on a small machine
    if RANK == 1 and not crowded:
        assert behind
        assert all(behind)
