"""Device pointers given to a real MPI, and memory that ranks open of each other, on real GPUs.

`test_gpu_direct` and `test_borrowing` have stand-ins.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe import BSP, Async, optim
from psframe.throwaway import Unknown, alone, ask, takes_device_pointers
from psframe.transports.mpi_facts import cuda_support

pytestmark = [pytest.mark.gpu, pytest.mark.mpi(min_size=2)]

RANK = MPI.COMM_WORLD.rank
START = {"w": np.linspace(-1.0, 1.0, 3_000_000, dtype=np.float32).reshape(1500, 2000)}


@pytest.fixture(scope="module")
def aware() -> bool:
    """Whether this MPI takes device pointers, as rank 0 finds."""
    known = cuda_support()["value"]
    if RANK == 0 and known is None:
        known = takes_device_pointers()["value"]
    return bool(MPI.COMM_WORLD.bcast(known))


def run(device: str, mode: Any, **options: Any) -> psframe.Result:
    def work(worker: psframe.Worker) -> None:
        if worker.index and not isinstance(mode, BSP):
            return
        params = worker.pull()
        for step in range(10):
            made = params["w"] * np.float32(0.5) + np.float32(worker.index / 4 + step / 8)
            if step % 2:
                worker.gradients()["w"][...] = made
                params = worker.push_pull(None)
            else:
                params = worker.push_pull({"w": made})

    return psframe.run(
        work,
        START,
        optimizer=optim.SGD(0.1, momentum=0.5),
        mode=mode,
        device=device,
        **{"shared_memory": False, **options},
    )


@pytest.mark.parametrize("server_device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", [Async(), BSP()], ids=repr)
def test_the_bits_are_the_cpu_s(mode: Any, server_device: str, aware: bool) -> None:
    if not aware:
        pytest.skip("this MPI takes no device pointers")
    on_gpu = run("cuda", mode, server_device=server_device, gpu_direct="on")
    on_cpu = run("cpu", mode)
    if RANK == 0:
        np.testing.assert_array_equal(on_gpu.params["w"], on_cpu.params["w"])
        assert on_gpu.ledger == on_cpu.ledger


def test_on_is_an_error_where_mpi_takes_none_and_auto_falls_back(aware: bool) -> None:
    if aware:
        pytest.skip("this MPI takes device pointers")
    with pytest.raises(psframe.ArgumentError, match="gpu_direct: 'on', but on rank"):
        run("cuda", Async(), gpu_direct="on")
    run("cuda", Async())


# Opens memory of the first card from each, with nothing of psframe's way to do so.
OPENS = """
import json, sys
import cupy
from psframe.throwaway import answer

runtime, handle = cupy.cuda.runtime, bytes.fromhex(json.load(sys.stdin))
refused = ""
for ordinal in range(runtime.getDeviceCount()):
    with cupy.cuda.Device(ordinal):
        if ordinal and not runtime.deviceCanAccessPeer(ordinal, 0):
            refused = refused or f"cuda:{ordinal} does not reach cuda:0"
            continue
        try:
            flags = runtime.cudaIpcMemLazyEnablePeerAccess
            runtime.ipcCloseMemHandle(runtime.ipcOpenMemHandle(handle, flags))
        except RuntimeError as error:
            refused = refused or str(error)
answer(refused)
"""


@pytest.fixture(scope="module")
def refused() -> str:
    """Why no process opens another's memory on these cards, as rank 0 finds; "" if one does."""
    return str(MPI.COMM_WORLD.bcast(_try_opening() if RANK == 0 else ""))


def _try_opening() -> str:
    import cupy

    runtime = cupy.cuda.runtime
    with cupy.cuda.Device(0):
        address = runtime.malloc(2 << 20)
        try:
            handle = bytes(runtime.ipcGetMemHandle(address)).hex()
            command = [sys.executable, "-c", OPENS]
            return str(ask(command, timeout_s=120.0, given=handle, environ=alone()))
        except (RuntimeError, Unknown) as error:
            return str(error)
        finally:
            runtime.free(address)


@pytest.mark.parametrize("mode", [Async(), BSP()], ids=repr)
def test_ranks_of_one_node_open_each_other_s_memory(
    mode: Any, refused: str, caplog: pytest.LogCaptureFixture
) -> None:
    if refused:  # a container may be without IPC
        pytest.skip(f"no process opens another's GPU memory here: {refused}")
    with caplog.at_level(logging.INFO, "psframe"):
        on_gpu = run("cuda", mode, server_device="cuda", shared_memory=True)
    told = [one for one in caplog.records if "CUDA IPC" in one.getMessage()]
    assert [one.levelname for one in told] == ["INFO"] * (RANK == 0), caplog.messages
    on_host = run("cuda", mode, server_device="cuda", shared_memory=True, gpu_direct="off")
    if RANK == 0:
        np.testing.assert_array_equal(on_gpu.params["w"], on_host.params["w"])
        assert on_gpu.ledger == on_host.ledger
