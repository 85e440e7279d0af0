"""Workers on real GPUs, over MPI; without one, `test_devices` has a stand-in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe import BSP, Async, optim

pytestmark = [pytest.mark.gpu, pytest.mark.mpi(min_size=2)]

START = {"w": np.linspace(-1.0, 1.0, 2_000_000, dtype=np.float32).reshape(1000, 2000)}


@pytest.mark.parametrize("mode", [Async(), BSP()], ids=repr)
@pytest.mark.parametrize("shared", [True, False])
def test_the_bits_are_the_cpu_s(mode: Any, shared: bool) -> None:
    def work(worker: psframe.Worker) -> None:
        if worker.index and not isinstance(mode, BSP):
            return
        params = worker.pull()
        for step in range(10):
            half = params["w"] * np.float32(0.5)
            worker.gradients()["w"][...] = half + np.float32(worker.index / 4 + step / 8)
            params = worker.push_pull(None)

    def run(device: str) -> psframe.Result:
        return psframe.run(
            work,
            START,
            optimizer=optim.SGD(0.1, momentum=0.5),
            mode=mode,
            device=device,
            shared_memory=shared,
        )

    on_gpu, on_cpu = run("cuda"), run("cpu")
    if MPI.COMM_WORLD.rank == 0:
        np.testing.assert_array_equal(on_gpu.params["w"], on_cpu.params["w"])
        assert on_gpu.ledger == on_cpu.ledger
