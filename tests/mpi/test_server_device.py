"""Servers on a device made of NumPy, behind MPI and shared memory: with the bits of the CPU."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from mpi4py import MPI

import psframe
from psframe import device_store
from psframe.optim import cuda

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
# Large enough for gradients that are followed while they are written, and of several pieces.
PARAMS = {"w": np.linspace(-1, 1, 150_001, dtype=np.float32), "b": np.zeros(3, np.float32)}


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(device_store, "STEP", 60_000)
    cuda.compile_kernel.cache_clear()
    yield fake
    cuda.compile_kernel.cache_clear()


def work(worker: Any) -> None:
    params = worker.pull()
    for step in range(4):
        grads = {name: p * np.float32(0.5) + worker.index - step for name, p in params.items()}
        params = worker.push_pull(grads)
        assert params.receipt.applied


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("codec", [None, psframe.codecs.Float16()])
@pytest.mark.parametrize("mode", [psframe.Async(), psframe.BSP()])
def test_a_run_has_the_bits_of_the_cpu(
    mode: Any, codec: Any, shared_memory: bool, cupy: FakeCuda
) -> None:
    results = [
        psframe.run(
            work,
            PARAMS,
            optimizer=psframe.optim.SGD(0.1, momentum=0.9),
            mode=mode,
            codec=codec,
            servers=2 if SIZE > 3 else 1,
            device="cpu",
            server_device=device,
            shared_memory=shared_memory,
        )
        for device in ("cpu", "cuda")
    ]
    alone = SIZE == 2 or isinstance(mode, psframe.BSP)  # or the order of pushes is anybody's
    if RANK == 0:
        cpu, gpu = (result.params for result in results)
        assert cpu is not None
        assert gpu is not None
        assert results[0].version == results[1].version
        for name, value in cpu.items():
            if alone:
                assert gpu[name].tobytes() == value.tobytes(), name
            assert np.isfinite(gpu[name]).all()
        assert cupy.used == {0}
        assert cupy.was_registered == shared_memory
        assert not cupy.registered, "it is given back"
        assert set(cupy.limits) == ({0} if SIZE > 3 else set()), "two servers share the GPU"
