"""Servers on a GPU whose memory MPI reads and writes: `fake_cuda` behind `aware_mpi`.

Each order has been broken once by hand, and a test here failed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from aware_mpi import AwareMesh
from fake_cuda import FakeCuda
from fake_cupy import FakeCupy, installed
from mpi4py import MPI
from on_stand_ins import are_ordered, check_outcome

import psframe
from psframe import BSP, SSP, Async, cards, cluster, device_store, optim, stale
from psframe.layout import Layout
from psframe.optim import cuda
from psframe.transports import mpi, transfers
from psframe.transports.mpi_endpoint import MpiEndpoint
from psframe.transports.mpi_port import MpiServerPort

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
PARAMS = {"w": np.linspace(-1, 1, 150_001, dtype=np.float32), "b": np.zeros(3, np.float32)}
SERVERS = 2 if SIZE > 3 else 1


class Ends:
    """The ends of this rank, whatever it is."""

    def __init__(self) -> None:
        self.meshes: list[AwareMesh] = []
        self.tests = 3  # of a server's send, before it reads

    def port(self, mesh: Any, *arguments: Any) -> MpiServerPort:
        self.meshes.append(AwareMesh(mesh, self.tests))
        return MpiServerPort(self.meshes[-1], *arguments)  # type: ignore[arg-type]

    def endpoint(self, mesh: Any, *arguments: Any) -> MpiEndpoint:
        self.meshes.append(AwareMesh(mesh))
        return MpiEndpoint(self.meshes[-1], *arguments)  # type: ignore[arg-type]

    def used(self) -> tuple[set[str], set[str]]:
        last = self.meshes[-1]
        sent, received = ({k for k, n in d.items() if n} for d in (last.sent, last.received))
        return sent, received


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    made = Ends()
    monkeypatch.setattr(cards, "cuda_support", lambda: {"value": True, "by": "a test"})
    monkeypatch.setattr(cluster, "MpiServerPort", made.port)
    monkeypatch.setattr(cluster, "MpiEndpoint", made.endpoint)
    monkeypatch.setattr(device_store, "STEP", 60_000)
    for module in (mpi, transfers):
        monkeypatch.setattr(module, "PIECE_BYTES", 160_000)
    return made


@pytest.fixture(params=["late", "early"])
def cupy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Another one for servers than for workers: each knows what it needs of CuPy."""
    cuda.compile_kernel.cache_clear()
    if RANK >= SERVERS:
        with installed(FakeCupy(gpus=1)) as fake:
            yield fake
    else:
        server = FakeCuda(copies=request.param)
        monkeypatch.setitem(sys.modules, "cupy", server)
        yield server
    cuda.compile_kernel.cache_clear()


def work(worker: Any) -> None:
    params = worker.pull()
    for step in range(5):
        slope = np.float32(worker.index - step)
        grads = {name: p * np.float32(0.5) + slope for name, p in params.items()}
        if step == 2:
            pending = worker.push(grads)
            params = worker.pull()
            assert pending.wait().applied
        else:
            params = worker.push_pull(grads)
            assert params.receipt.applied


def run(server_device: str, mode: Any, device: str = "cpu", **options: Any) -> psframe.Result:
    options = {"optimizer": optim.SGD(0.1, momentum=0.9), "servers": SERVERS, **options}
    return psframe.run(
        work,
        PARAMS,
        mode=mode,
        device=device,
        server_device=server_device,
        **{"shared_memory": False, **options},
    )


def compare(gpu: psframe.Result, cpu: psframe.Result, mode: Any) -> None:
    if RANK == 0:
        check_outcome(gpu, cpu, same_bits=are_ordered(mode, SIZE - SERVERS))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP()], ids=repr)
def test_a_run_has_the_bits_of_the_cpu(cupy: Any, ends: Ends, mode: Any, device: str) -> None:
    on_gpu = run("cuda", mode, device)
    if RANK < SERVERS:
        assert ends.used() == ({"device"}, {"device"})
        begin, end = Layout.of(PARAMS).shards(SERVERS)[RANK]
        shard_bytes = 4 * (end - begin)
        to_device, to_host = cupy.copied
        assert to_device == shard_bytes, "the first parameters"
        assert to_host < 1.1 * shard_bytes, "the last ones, and verdicts"
    compare(on_gpu, run("cpu", mode), mode)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("options", "sent", "received"),
    [
        ({"stale": stale.DelayCompensation(0.1)}, {"device"}, {"device"}),
        ({"clip_norm": 3.0}, {"device"}, {"device"}),
        ({"codec": psframe.codecs.Float16()}, {"device"}, {"host"}),
        ({"pull_codec": psframe.codecs.Float16()}, {"host"}, {"device"}),
        ({"mode": psframe.Buffered(2)}, {"device"}, {"host"}),
        ({"gpu_direct": "off"}, {"host"}, {"host"}),
    ],
    ids=["compensated", "clipped", "codec", "pull_codec", "gathered", "off"],
)
def test_what_is_read_on_the_host_is_brought_there(
    cupy: Any,
    ends: Ends,
    options: dict[str, Any],
    sent: set[str],
    received: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mode = options.get("mode", Async())
    rest = {name: value for name, value in options.items() if name != "mode"}
    with caplog.at_level(logging.INFO, "psframe"):
        on_gpu = run("cuda", mode, **rest)
    if RANK < SERVERS:
        assert ends.used() == (sent, received)
        if sent == received == {"device"}:
            assert cupy.copied[1] < 1.1 * 4 * Layout.of(PARAMS).size / SERVERS, "the last ones"
    told = [line for line in caplog.messages if "servers are given gradients through" in line]
    assert len(told) == (RANK == 0 and "device" in sent | received and received == {"host"})
    compare(on_gpu, run("cpu", mode, **rest), mode)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", [Async(), BSP()], ids=repr)
def test_what_is_not_finite_is_refused_and_the_host_says_why(
    cupy: Any, ends: Ends, mode: Any
) -> None:
    def spoiled(worker: Any) -> None:
        params = worker.pull()
        for value in (1.0, np.nan, 1.0):
            grads = {name: array.copy() for name, array in params.items()}
            grads["b"][1] = value
            params = worker.push_pull(grads)
            reason = params.receipt.reason
            assert reason == ("" if value == 1.0 else "non-finite gradient")

    result = psframe.run(
        spoiled,
        PARAMS,
        optimizer=optim.SGD(0.1),
        mode=mode,
        servers=SERVERS,
        device="cpu",
        server_device="cuda",
        shared_memory=False,
    )
    if RANK == 0:
        assert result.ledger.refused == SIZE - SERVERS


@pytest.mark.mpi(min_size=3)
def test_a_snapshot_that_is_still_leaving_is_not_written(cupy: Any, ends: Ends) -> None:
    """Others push meanwhile, again and again."""
    ends.tests = 200

    def push_or_pull(worker: Any) -> None:
        params = worker.pull()
        ones = {name: np.ones_like(array) for name, array in params.items()}
        for _ in range(3 if worker.index == 0 else 30):
            if worker.index:
                worker.push(ones).wait()
            else:
                params = worker.pull()
                assert len(set(params["b"].tolist())) == 1
                assert params["b"][0] == -params.version

    result = psframe.run(
        push_or_pull,
        {name: np.zeros_like(array) for name, array in PARAMS.items()},
        optimizer=optim.SGD(1.0),
        servers=1,
        device="cpu",
        server_device="cuda",
        shared_memory=False,
    )
    if RANK == 0:
        assert result.version == 30 * (SIZE - 2)


@pytest.mark.mpi(min_size=3)
def test_one_worker_shares_memory_with_the_server_and_another_does_not(
    cupy: Any, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet, last = cluster.meet, SIZE - 1

    def parted(*arguments: Any, **options: Any) -> Any:
        neighbours = meet(*arguments, **options)
        for rank in range(SIZE) if last == RANK else [last]:
            neighbours.segments.pop(rank, None)
        return neighbours

    monkeypatch.setattr(cluster, "meet", parted)
    on_gpu = run("cuda", BSP(), shared_memory=True)
    if RANK == 0:
        assert ends.used() == ({"device"}, {"device"})
    compare(on_gpu, run("cpu", BSP(), shared_memory=True), BSP())


@pytest.mark.mpi(min_size=2)
@pytest.mark.skipif(MPI.Query_thread() < MPI.THREAD_MULTIPLE, reason="no second thread calls MPI")
def test_the_thread_of_the_signs_of_life_is_on_the_server_s_gpu(cupy: Any, ends: Ends) -> None:
    """They are messages here, and MPI may carry on a transfer while it receives one."""

    def push(worker: Any) -> None:
        params = worker.pull()
        while True:
            worker.log(step=1)
            params = worker.push_pull({name: p * np.float32(0.5) for name, p in params.items()})

    psframe.run(
        push,
        PARAMS,
        optimizer=optim.SGD(0.1),
        servers=1,
        device="cpu",
        server_device="cuda:0",
        shared_memory=False,
        observer=lambda event: "psframe-pulse" in cupy.used_by,
    )
    if RANK == 0:
        assert cupy.used_by["psframe-pulse"] == 0
