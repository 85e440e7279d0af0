"""Gradients that are coded on a GPU that is none, over MPI: the run's bits are those of the CPU."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from fake_cupy import FakeCupy
from mpi4py import MPI
from on_stand_ins import push_by_turns

import psframe
from psframe import BSP, SSP, Async, codecs, optim
from psframe.devices.encoding import DeviceCoder

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
CODECS = [
    codecs.Float16(),
    codecs.BFloat16(error_feedback=False),
    codecs.QSGD(127),
    codecs.Sign(),
    codecs.TopK(0.05, momentum=0.5, warmup=5),
]
by_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)


def start(n: int) -> dict[str, Any]:
    return {
        "w": np.linspace(-1.0, 1.0, 30 * n, dtype=np.float32).reshape(n, 30),
        "b": np.linspace(0.5, 2.0, 70, dtype=np.float32),
    }


def train(device: str, mode: Any, n: int, **options: Any) -> psframe.Result:
    def work(worker: psframe.Worker) -> None:
        if worker.index and not isinstance(mode, BSP):
            return  # one at a time, so that bits can be compared
        params = worker.pull()
        for step in range(10):
            slope = np.float32(0.25 * worker.index + 0.125 * step)
            grads = {name: params[name] * np.float32(0.5) + slope for name in params}
            if step == 4:
                grads["b"][3:4] = np.full(1, np.nan, np.float32)
            pending = push_by_turns(worker, grads, step)
            params = worker.pull()
            assert pending.wait().applied == (step != 4)

    return psframe.run(
        work,
        start(n),
        optimizer=optim.SGD(0.1, momentum=0.5),
        mode=mode,
        device=device,
        **{"shared_memory": False, **options},
    )


def same(first: psframe.Result, second: psframe.Result) -> None:
    if RANK == 0:
        for name, array in first.params.items():
            np.testing.assert_array_equal(array, second.params[name], err_msg=name)
        assert first.ledger == second.ledger
        assert first.traffic == second.traffic


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("n", [20, 3000])  # inside a message; behind it
@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP()], ids=repr)
@by_codec
def test_the_bits_are_the_cpu_s(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, codec: Any, mode: Any, n: int
) -> None:
    made, original = [], DeviceCoder.encode

    def watched(*arguments: Any) -> Any:
        made.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(DeviceCoder, "encode", watched)
    on_gpu = train("cuda", mode, n, codec=codec)
    assert len(made) == (10 if RANK == 1 or (RANK and isinstance(mode, BSP)) else 0)
    same(on_gpu, train("cpu", mode, n, codec=codec))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("servers", [1, 2])
def test_powersgd_is_the_cpu_s_but_for_rounding(cupy: FakeCupy, servers: int) -> None:
    if servers == SIZE:
        pytest.skip("a worker more is needed")
    options = {"codec": codecs.PowerSGD(2), "servers": servers}
    on_gpu, on_cpu = (train(device, Async(), 300, **options) for device in ("cuda", "cpu"))
    if RANK == 0:
        for name, array in on_gpu.params.items():
            np.testing.assert_allclose(array, on_cpu.params[name], rtol=1e-4, atol=1e-5)
        assert on_gpu.ledger == on_cpu.ledger
        assert on_gpu.traffic == on_cpu.traffic


@pytest.mark.mpi(min_size=3)
@by_codec
def test_several_servers(cupy: FakeCupy, codec: Any) -> None:
    """Of a gradient that is not finite no shard applies its part, nor keeps a residual."""
    options = {"codec": codec, "servers": 2, "pull_codec": codecs.Float16()}
    same(train("cuda", Async(), 300, **options), train("cpu", Async(), 300, **options))


@pytest.mark.mpi(min_size=2)
def test_on_one_node_the_host_codes_and_says_so(
    cupy: FakeCupy, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"codec": codecs.Float16(), "shared_memory": True}
    with caplog.at_level(logging.INFO, "psframe"):
        on_gpu = train("cuda", Async(), 300, **options)
    lines = [line for line in caplog.messages if "codes its gradients on the host" in line]
    assert len(lines) == (RANK > 0)
    same(on_gpu, train("cpu", Async(), 300, **options))


@pytest.mark.mpi(min_size=2)
def test_clipping_needs_the_norm_and_takes_the_host_s_way(cupy: FakeCupy) -> None:
    options = {"codec": codecs.Float16(), "clip_norm": 5.0}
    same(train("cuda", Async(), 300, **options), train("cpu", Async(), 300, **options))
