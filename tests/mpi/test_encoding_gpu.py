"""Gradients that are coded on real GPUs, over MPI; `test_encoding` has a stand-in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe import codecs, optim
from psframe.devices.encoding import DeviceCoder

pytestmark = [pytest.mark.gpu, pytest.mark.mpi(min_size=2)]

RANK = MPI.COMM_WORLD.rank
START = {"w": np.linspace(-1.0, 1.0, 2_000_000, dtype=np.float32).reshape(1000, 2000)}
CODECS = [codecs.Float16(), codecs.QSGD(127), codecs.Sign(), codecs.TopK(0.01, momentum=0.5)]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_the_bits_are_the_cpu_s(codec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], DeviceCoder.encode

    def watched(*arguments: Any) -> Any:
        made.append(arguments)
        return original(*arguments)

    def work(worker: psframe.Worker) -> None:
        if worker.index:
            return
        params = worker.pull()
        for step in range(10):
            made = params["w"] * np.float32(0.5) + np.float32(step / 8)
            params = worker.push_pull({"w": made})

    def run(device: str) -> psframe.Result:
        return psframe.run(
            work,
            START,
            optimizer=optim.SGD(0.1),
            codec=codec,
            device=device,
            shared_memory=False,
        )

    monkeypatch.setattr(DeviceCoder, "encode", watched)
    on_gpu = run("cuda")
    assert len(made) == (10 if RANK == 1 else 0)
    on_cpu = run("cpu")
    if RANK == 0:
        np.testing.assert_array_equal(on_gpu.params["w"], on_cpu.params["w"])
        assert on_gpu.ledger == on_cpu.ledger
        assert on_gpu.traffic == on_cpu.traffic
