"""Device pointers given to MPI: what is in them when it reads and writes, and who decides.

`aware_mpi` reads as late as it may, and `fake_cupy` computes as late as it may: what is sent before
it is there, or overwritten before it has left, is not what the CPU gives. Each order has been
broken once by hand, and a test here failed.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aware_mpi import AwareMesh
from fake_cupy import FakeCupy
from mpi4py import MPI

import psframe
from psframe import BSP, SSP, Async, cards, cluster, optim
from psframe.devices import visible_gpus
from psframe.throwaway import alone, ask
from psframe.transports import mpi, mpi_facts, transfers
from psframe.transports.mpi_endpoint import MpiEndpoint

ROOT = Path(__file__).parents[2]
WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
N = 300_000
START = {
    "w": np.linspace(-1.0, 1.0, N, dtype=np.float32).reshape(1000, 300),
    "b": np.linspace(0.5, 2.0, 70, dtype=np.float32),
}
YES = {"value": True, "by": "a test"}


class Ends:
    """The workers' ends that were made, and what they have sent and received."""

    def __init__(self) -> None:
        self.meshes: list[AwareMesh] = []

    def make(self, mesh: Any, *arguments: Any) -> MpiEndpoint:
        self.meshes.append(AwareMesh(mesh))
        return MpiEndpoint(self.meshes[-1], *arguments)  # type: ignore[arg-type]

    def used(self) -> tuple[set[str], set[str]]:
        """Where the last run's gradients left from, and where its parameters landed."""
        last = self.meshes[-1]
        return tuple({k for k, n in d.items() if n} for d in (last.sent, last.received))  # type: ignore[return-value]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    """An MPI that takes device pointers; arrays travel in several pieces."""
    made = Ends()
    monkeypatch.setattr(cards, "cuda_support", lambda: YES)
    monkeypatch.setattr(cluster, "MpiEndpoint", made.make)
    for module in (mpi, transfers):
        monkeypatch.setattr(module, "PIECE_BYTES", 256 << 10)
    return made


def computed(params: Any, worker: int, step: int) -> dict[str, Any]:
    slope = np.float32(0.25 * worker + 0.125 * step)
    return {name: params[name] * np.float32(0.5) + slope for name in params}


def spoil(grads: dict[str, Any], cupy: Any) -> None:
    """Write to what has been pushed, as soon as the order allows."""
    for array in grads.values():
        array[...] = np.zeros(array.shape, np.float32)
    if cupy is not None:
        cupy.cuda.default.synchronize()


def train(device: str, mode: Any, cupy: Any = None, **options: Any) -> psframe.Result:
    def work(worker: psframe.Worker) -> None:
        if worker.index and not isinstance(mode, BSP):
            return  # one at a time, so that bits can be compared
        params = worker.pull()
        for step in range(8):
            grads = computed(params, worker.index, step)
            if step % 2:
                for name, array in worker.gradients().items():
                    array[...] = grads[name]
                pending = worker.push(None)
            else:
                pending = worker.push(grads)
                spoil(grads, cupy if worker.device != "cpu" else None)
            if isinstance(mode, Async) and step in (2, 5):
                ahead = worker.pull_async()  # while the next ones are computed from the old
                second = worker.push(computed(params, worker.index, step + 20))
                params = ahead.wait()
                assert second.wait().applied
            elif step == 3:
                params = worker.pull()
            assert pending.wait().applied
            params = worker.push_pull(computed(params, worker.index, step + 10))

    options = {"optimizer": optim.SGD(0.1, momentum=0.5), "shared_memory": False, **options}
    return psframe.run(work, START, mode=mode, device=device, **options)


def same_bits(cupy: FakeCupy, mode: Any, **options: Any) -> None:
    on_gpu = train("cuda", mode, cupy, **options)
    on_cpu = train("cpu", mode, **options)
    if RANK == 0:
        for name, array in on_gpu.params.items():
            np.testing.assert_array_equal(array, on_cpu.params[name], err_msg=name)
        assert on_gpu.ledger == on_cpu.ledger


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP()], ids=repr)
def test_the_bits_are_the_cpu_s(cupy: FakeCupy, ends: Ends, mode: Any) -> None:
    on_gpu = train("cuda", mode, cupy)
    if RANK == 1:
        assert ends.used() == ({"device"}, {"device"})
        assert cupy.cuda.runtime.registrations == 0, "no byte takes the host's way"
    on_cpu = train("cpu", mode)
    if RANK == 0:
        for name, array in on_gpu.params.items():
            np.testing.assert_array_equal(array, on_cpu.params[name], err_msg=name)
        assert on_gpu.ledger == on_cpu.ledger


@pytest.mark.mpi(min_size=3)
def test_several_servers(cupy: FakeCupy, ends: Ends) -> None:
    same_bits(cupy, BSP(), servers=2)


@pytest.mark.mpi(min_size=3)
def test_one_server_shares_memory_and_the_other_does_not(
    cupy: FakeCupy, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet = cluster.meet

    def parted(*arguments: Any, **options: Any) -> Any:
        neighbours = meet(*arguments, **options)
        far = [1] if RANK > 1 else range(SIZE)
        for rank in far if RANK else ():
            neighbours.segments.pop(rank, None)
        return neighbours

    monkeypatch.setattr(cluster, "meet", parted)
    on_gpu = train("cuda", BSP(), cupy, servers=2, shared_memory=True)
    if RANK == 2:
        assert ends.used() == ({"device"}, {"device"})
    on_cpu = train("cpu", BSP(), servers=2, shared_memory=True)
    if RANK == 0:
        for name, array in on_gpu.params.items():
            np.testing.assert_array_equal(array, on_cpu.params[name], err_msg=name)


@pytest.mark.mpi(min_size=2)
def test_pulls_that_follow_one_another(cupy: FakeCupy, ends: Ends) -> None:
    """What they bring is copied when it suits the GPU; MPI has one buffer meanwhile, not both."""

    def work(worker: psframe.Worker) -> None:
        params, found = worker.pull(), []
        for step in range(8):
            ahead = worker.pull_async()
            found.append(params["w"] * 1.0)
            params = ahead.wait() if step % 3 else worker.pull()
        for result in reversed(found):
            np.testing.assert_array_equal(result.get(), START["w"])

    psframe.run(work, START, optimizer=optim.SGD(1.0), device="cuda", shared_memory=False)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", [Async(), BSP()], ids=repr)
def test_a_gradient_that_is_partly_on_the_host_takes_the_host_s_way(
    cupy: FakeCupy, ends: Ends, mode: Any
) -> None:
    def work(worker: psframe.Worker) -> None:
        params = worker.pull()
        for step in range(4):
            grads = {name: params[name] * np.float32(0) + np.float32(step + 1) for name in params}
            if step % 2:
                grads = {"w": grads["w"] * np.float32(1), "b": np.full(70, step + 1, np.float32)}
            params = worker.push_pull(grads)

    zeros = {name: np.zeros_like(array) for name, array in START.items()}
    result = psframe.run(
        work, zeros, optimizer=optim.SGD(1.0), mode=mode, device="cuda", shared_memory=False
    )
    if RANK == 0:
        expected = -10.0 if isinstance(mode, BSP) else -10.0 * (SIZE - 1)
        assert all((array == expected).all() for array in result.params.values())
    else:
        assert ends.used() == ({"host", "device"}, {"device"})


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", [Async(), BSP()], ids=repr)
def test_what_is_not_finite_is_refused(cupy: FakeCupy, ends: Ends, mode: Any) -> None:
    def work(worker: psframe.Worker) -> None:
        params = worker.pull()
        for value in (1.0, np.inf, 1.0):
            grads = computed(params, 0, 0)
            grads["b"][3:4] = np.full(1, value, np.float32)
            pending = worker.push(grads)
            params = worker.pull()
            assert pending.wait().applied == np.isfinite(value)

    result = psframe.run(
        work, START, optimizer=optim.SGD(0.1), mode=mode, device="cuda", shared_memory=False
    )
    if RANK == 0:
        assert result.ledger.refused == SIZE - 1


@pytest.mark.mpi(min_size=2)
def test_arrays_of_the_buffer_itself_may_change_places(cupy: FakeCupy, ends: Ends) -> None:
    """They are those of `gradients()`, under each other's names."""
    start = {name: np.zeros(70_000, np.float32) for name in "ab"}

    def work(worker: psframe.Worker) -> None:
        worker.pull()
        own = dict(worker.gradients())
        own["a"][...] = np.full(70_000, 1, np.float32)
        own["b"][...] = np.full(70_000, 2, np.float32)
        assert worker.push({"a": own["b"], "b": own["a"]}).wait().applied

    result = psframe.run(work, start, optimizer=optim.SGD(1.0), device="cuda", shared_memory=False)
    if RANK == 0:
        assert (result.params["a"] == -2.0 * (SIZE - 1)).all()
        assert (result.params["b"] == -1.0 * (SIZE - 1)).all()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("options", "sent", "received"),
    [
        ({"codec": psframe.codecs.Float16()}, "host", "device"),
        ({"pull_codec": psframe.codecs.Float16()}, "device", "host"),
        ({"gpu_direct": "off"}, "host", "host"),
    ],
    ids=["codec", "pull_codec", "off"],
)
def test_what_takes_the_host_s_way(
    cupy: FakeCupy,
    ends: Ends,
    options: dict[str, Any],
    sent: str,
    received: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "psframe"):
        train("cuda", Async(), cupy, **options)
    if RANK == 1:
        assert ends.used()[1] <= {received}
        if "pull_codec" not in options:
            assert ends.used()[1] == {received}
        if "codec" not in options:  # what a codec sends is its own
            assert ends.used()[0] == {sent}
    lines = [line for line in caplog.messages if "what is on GPUs" in line]
    assert len(lines) == (RANK == 0 and "gpu_direct" not in options)
    assert all("are coded, or read on the host, first" in line for line in lines)


@pytest.mark.mpi(min_size=2)
def test_small_arrays_go_inside_their_messages(cupy: FakeCupy, ends: Ends) -> None:
    start = {"w": np.zeros(8, np.float32)}

    def work(worker: psframe.Worker) -> None:
        params = worker.pull()
        for _ in range(3):
            params = worker.push_pull({"w": params["w"] * np.float32(0) + np.float32(1)})

    result = psframe.run(work, start, optimizer=optim.SGD(1.0), device="cuda", shared_memory=False)
    if RANK == 0:
        assert (result.params["w"] == -3.0 * (SIZE - 1)).all()
    else:
        assert ends.used() == (set(), set())


@pytest.mark.mpi(min_size=2)
@pytest.mark.skipif(MPI.Query_thread() < MPI.THREAD_MULTIPLE, reason="no second thread calls MPI")
def test_the_thread_of_the_signs_of_life_is_on_the_worker_s_gpu(
    cupy: FakeCupy, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are messages here, and MPI may carry on a transfer while it sends one."""
    cupy.cuda.runtime.gpus = 2
    monkeypatch.setattr(cards, "choose_device", lambda *_: "cuda:1")
    threads = cupy.cuda.used_by

    def work(worker: psframe.Worker) -> None:
        params = worker.pull()
        while "psframe-pulse" not in threads:
            params = worker.push_pull(computed(params, 0, 0))

    psframe.run(work, START, optimizer=optim.SGD(0.1), device="cuda", shared_memory=False)
    assert threads.get("psframe-pulse") == (1 if RANK else None)


# ---- who decides ------------------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_a_rank_whose_mpi_says_no_decides_for_all(
    cupy: FakeCupy,
    ends: Ends,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    last = SIZE - 1
    monkeypatch.setattr(cards, "cuda_support", lambda: {"value": last != RANK, "by": "its library"})
    with caplog.at_level(logging.INFO, "psframe"):
        train("cuda", Async(), cupy)
    if RANK == 1:
        assert ends.used() == ({"host"}, {"host"})
    elif RANK == 0:
        (line,) = [line for line in caplog.messages if "what is on GPUs" in line]
        assert f"on rank {last} MPI does not take device pointers, as its library says" in line


@pytest.mark.mpi(min_size=2)
def test_off_and_what_shares_memory_ask_nobody(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> Any:
        raise AssertionError("nobody wants to know")

    monkeypatch.setattr(cards, "cuda_support", asked)
    train("cuda", Async(), cupy, gpu_direct="off")
    train("cuda", Async(), cupy, shared_memory=True)


@pytest.mark.mpi(min_size=2)
def test_on_is_an_error_on_every_rank_where_mpi_says_no(cupy: FakeCupy) -> None:
    """These MPIs are not CUDA-aware, and say so."""
    said = r"gpu_direct: 'on', but on rank 1 MPI does not take"
    with pytest.raises(psframe.ArgumentError, match=said):
        train("cuda", Async(), cupy, gpu_direct="on")
    train("cuda", Async(), cupy)


@pytest.mark.mpi(min_size=2)
@pytest.mark.skipif(visible_gpus() > 0, reason="there is a GPU")
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_on_without_a_gpu_is_an_error_on_every_rank(device: str) -> None:
    said = r"gpu_direct: 'on' .* no rank computes on a GPU"
    with pytest.raises(psframe.ArgumentError, match=said):
        train(device, Async(), gpu_direct="on")
    train(device, Async())


class Library:
    """MPI, as far as it is asked."""

    def __init__(self, query: int | None) -> None:
        if query is not None:
            self.MPIX_Query_cuda_support = lambda: query


@pytest.mark.parametrize(
    "kinds", ["cuda", "system,mpi,cuda:device", "mpi,cuda:host:device", "system, cuda"]
)
def test_kinds_that_have_the_device_s_memory_are_believed(kinds: str) -> None:
    for query in (None, 0, 1):
        found = mpi_facts._cuda(Library(query), kinds)  # type: ignore[arg-type]
        assert found == {"value": True, "by": "mpi_memory_alloc_kinds"}


@pytest.mark.parametrize(
    "kinds", [None, "", "system,mpi", "mpi,cuda:host", "cuda:managed:host", "cudax", "rocm:device"]
)
def test_of_other_kinds_the_library_s_own_word_counts(kinds: str | None) -> None:
    for query in (0, 1):
        found = mpi_facts._cuda(Library(query), kinds)  # type: ignore[arg-type]
        assert found == {"value": bool(query), "by": "MPIX_Query_cuda_support"}
    assert mpi_facts._cuda(Library(None), kinds)["value"] is None  # type: ignore[arg-type]


LONE = """
import os
from mpi4py import MPI
from psframe.launcher import find_launcher
from psframe.throwaway import answer
world = MPI.COMM_WORLD
answer([world.rank, world.size, find_launcher() is None, os.environ.get("OMPI_MCA_pml")])
"""


def test_the_process_that_tries_is_no_rank_and_has_the_user_s_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMPI_MCA_pml", "ob1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = ask([sys.executable, "-c", LONE], timeout_s=60.0, environ=alone())
    assert found == [0, 1, True, "ob1"]
    WORLD.Barrier()


CUPY = """
import os, signal, numpy as np
class _Stream:
    def synchronize(self): pass
class cuda:
    get_current_stream = staticmethod(_Stream)
def arange(n, dtype):
    if os.environ["FAKE"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return np.arange(n, dtype=dtype)
zeros = np.zeros
"""


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("how", ["works", "crash"])
def test_where_mpi_says_nothing_a_process_of_its_own_tries_it(
    cupy: FakeCupy,
    ends: Ends,
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "cupy.py").write_text(CUPY, encoding="ascii")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("FAKE", how)
    silent = {"value": None, "by": "it has no query"}
    monkeypatch.setattr(cards, "cuda_support", lambda: silent)
    with caplog.at_level(logging.INFO, "psframe"):
        train("cuda", Async(), cupy)
    if RANK == 1:
        place = "device" if how == "works" else "host"
        assert ends.used() == ({place}, {place})
    elif RANK == 0:
        (line,) = [line for line in caplog.messages if "what is on GPUs" in line]
        assert "as a device pointer that it was given says" in line
