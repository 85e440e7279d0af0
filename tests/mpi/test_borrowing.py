"""Workers and servers of one node that open each other's GPU memory, without a GPU.

Two fakes in two processes see the same bytes (`fake_ipc`): a worker has `fake_cupy`, a server
`fake_cuda`, and both compute and copy as late as they may. Each order has been broken once by
hand, and a test here failed.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_cupy import FakeCupy, installed
from fake_ipc import FakeIpc
from mpi4py import MPI
from on_stand_ins import are_ordered, check_outcome, push_by_turns

import psframe
from psframe import BSP, SSP, Async, cards, cluster, device_store, optim, stale
from psframe.client import Worker
from psframe.devices import memory_limit
from psframe.devices.opening import lent_bytes
from psframe.layout import Layout
from psframe.optim import cuda
from psframe.transports import borrowing, mpi_port
from psframe.transports.shared_memory import Segment

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
N = 150_001
PARAMS = {"w": np.linspace(-1, 1, N, dtype=np.float32), "b": np.zeros(3, np.float32)}
SERVERS = 2 if SIZE > 3 else 1
SERVES = RANK < SERVERS
SHARD_BYTES = 4 * max(end - begin for begin, end in Layout.of(PARAMS).shards(SERVERS))


def ipc_of(cupy: Any) -> FakeIpc:
    return cupy.ipc if SERVES else cupy.cuda.runtime


@pytest.fixture(params=["late", "early"])
def cupy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Another one for servers than for workers: each knows what it needs of CuPy."""
    cuda.compile_kernel.cache_clear()
    monkeypatch.delenv("CUPY_GPU_MEMORY_LIMIT", raising=False)
    monkeypatch.setattr(device_store, "STEP", 60_000)
    if SERVES:
        fake: Any = FakeCuda(copies=request.param)
        monkeypatch.setitem(sys.modules, "cupy", fake)
        yield fake
        for stream in fake.streams:  # what has been done knows its arrays
            stream.todo.clear()
    else:
        monkeypatch.setattr(Worker, "_free_slot", handing_over(Worker._free_slot))
        with installed(FakeCupy(gpus=1)) as fake:
            fake.cuda.eager = request.param == "early"
            yield fake
        assert fake.cuda.runtime.registered == {}
    cuda.compile_kernel.cache_clear()
    gc.collect()
    ipc = ipc_of(fake)
    assert (ipc.wrong, ipc.open_now, ipc.files) == ([], {}, {})


def handing_over(free_slot: Callable[[Worker], int]) -> Callable[[Worker], int]:
    """Make NaN of what a worker lends of a slot, each time it may be written again.

    Its push has been answered, so that nobody reads it any more; and who is told of the next
    gradient too early, or reads the last one too late, reads NaN.
    """

    def found(worker: Worker) -> int:
        index = free_slot(worker)
        packer = getattr(worker._device, "_packers", {}).get(index)
        if packer is not None:
            address = packer.flat.data.ptr
            assert not packer.flat.cupy.cuda.is_busy(address, packer.flat.nbytes), "it is written"
            packer.flat.memory.fill(np.nan)
            worker._device.xp.poisoned += 1
        return index

    return found


def work(worker: Any) -> None:
    params = worker.pull()
    for step in range(6):
        slope = np.float32(worker.index - step)
        grads = {name: params[name] * np.float32(0.5) + slope for name in params}
        pending = push_by_turns(worker, grads, step)
        if step == 2:
            ahead = worker.pull_async()  # while the next ones are computed from the old
            more = {name: params[name] * np.float32(0.25) + slope for name in params}
            second = worker.push(more)
            params = ahead.wait()
            assert second.wait().applied
        elif step == 3:
            params = worker.pull()
        assert pending.wait().applied
        params = worker.push_pull({n: params[n] * np.float32(0.125) + slope for n in params})


def run(device: str, mode: Any = None, function: Any = work, **options: Any) -> psframe.Result:
    options = {"optimizer": optim.SGD(0.1, momentum=0.9), "servers": SERVERS, **options}
    mode = Async() if mode is None else mode
    params = options.pop("params", PARAMS)
    return psframe.run(function, params, mode=mode, device=device, server_device=device, **options)


def compare(gpu: psframe.Result, cpu: psframe.Result, mode: Any) -> None:
    if RANK == 0:
        check_outcome(gpu, cpu, same_bits=are_ordered(mode, SIZE - SERVERS))


def crossed(cupy: Any) -> tuple[bool, bool]:
    """Whether gradients, and parameters, have gone through the host; else from card to card."""
    if SERVES:
        to_device, to_host = cupy.copied
        return to_device > 1.1 * SHARD_BYTES, to_host > 1.1 * SHARD_BYTES  # the first, the last
    kinds = [0, 0, 0, 0]
    for kind, n_bytes in cupy.cuda.runtime.copies:
        kinds[kind] += n_bytes
    assert kinds[1] + kinds[2] + kinds[3] > 0
    return kinds[2] > 100_000, kinds[1] > 100_000  # or sums of squares, and their tables


def limits(cupy: Any) -> dict[int, int]:
    found: dict[int, int] = cupy.limits if SERVES else cupy.pool.limits
    return found


def lent_by(ranks: Iterable[int]) -> int:
    """The bytes that these lend."""
    shards, workers = Layout.of(PARAMS).shards(SERVERS), SIZE - SERVERS
    return sum(
        lent_bytes(2 * workers + 5, shards[rank][1] - shards[rank][0], np.float32)
        if rank < SERVERS
        else lent_bytes(2, Layout.of(PARAMS).size, np.float32)
        for rank in ranks
    )


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP()], ids=repr)
def test_a_run_has_the_bits_of_the_cpu_and_nothing_crosses_the_bus(
    cupy: Any, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "psframe"):
        on_gpu = run("cuda", mode)
    ipc = ipc_of(cupy)
    assert limits(cupy) == {0: memory_limit(8 << 30, SIZE, lent_by(range(SIZE)))}
    assert ipc.lent == 1
    assert ipc.opened == (SIZE - SERVERS if SERVES else SERVERS)
    if SERVES:
        assert not crossed(cupy)[0], "gradients come from the workers' device memory"
        assert cupy.between > SHARD_BYTES
        # A pull beside parameters in use is a copy on the host.
        assert crossed(cupy)[1] <= isinstance(mode, Async | SSP)
    else:
        assert cupy.cuda.runtime.registrations <= SERVERS
        assert not crossed(cupy)[0]
        assert cupy.poisoned > 5
    told = [line for line in caplog.messages if "open each other's GPU memory" in line]
    assert len(told) == (RANK == 0)
    compare(on_gpu, run("cpu", mode), mode)


def push_and_pull(worker: Any) -> None:
    params = worker.pull()
    for step in range(6):
        slope = np.float32(worker.index - step)
        grads = {name: params[name] * np.float32(0.5) + slope for name in params}
        params = worker.push_pull(grads)
        assert params.receipt.applied


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("options", "gradients", "parameters"),
    [
        ({}, False, False),
        ({"stale": stale.DelayCompensation(0.1)}, False, False),
        ({"clip_norm": 3.0}, False, False),
        ({"codec": psframe.codecs.Float16()}, True, False),
        ({"pull_codec": psframe.codecs.Float16()}, False, True),
        ({"mode": psframe.Buffered(2)}, True, False),
        ({"gpu_direct": "off"}, True, True),
    ],
    ids=["plain", "compensated", "clipped", "codec", "pull_codec", "gathered", "off"],
)
def test_what_is_read_on_the_host_goes_there(
    cupy: Any, options: dict[str, Any], gradients: bool, parameters: bool
) -> None:
    rest = dict(options)
    mode = rest.pop("mode", Async())
    on_gpu = run("cuda", mode, push_and_pull, **rest)
    found = crossed(cupy)
    assert found[0] == gradients
    if "mode" not in options or not SERVES:  # a batch is gathered on the host, with what it reads
        assert found[1] == parameters
    # The norm of a GPU is no CPU's to the last bit.
    device, way = ("cuda", {"gpu_direct": "off"}) if "clip_norm" in rest else ("cpu", {})
    compare(on_gpu, run(device, mode, push_and_pull, **{**rest, **way}), mode)


@pytest.mark.mpi(min_size=2)
def test_where_codecs_read_all_on_the_host_nothing_is_opened_nor_said_to_be(
    cupy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    codecs = {"codec": psframe.codecs.Float16(), "pull_codec": psframe.codecs.Float16()}
    with caplog.at_level(logging.INFO, "psframe"):
        run("cuda", None, push_and_pull, **codecs)
    ipc = ipc_of(cupy)
    assert (ipc.lent, ipc.opened) == (0, 0)
    assert not [line for line in caplog.messages if "IPC" in line]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", [Async(), BSP()], ids=repr)
def test_a_gradient_that_is_partly_on_the_host_takes_the_host_s_way(cupy: Any, mode: Any) -> None:
    def push(worker: Any) -> None:
        params = worker.pull()
        for step in range(4):
            grads = {name: params[name] * np.float32(0) + np.float32(step + 1) for name in params}
            if step % 2:
                grads["b"] = np.full(3, step + 1, np.float32)
            params = worker.push_pull(grads)

    zeros = {name: np.zeros_like(array) for name, array in PARAMS.items()}
    result = run("cuda", mode, push, optimizer=optim.SGD(1.0), params=zeros)
    assert crossed(cupy)[0]
    if RANK == 0:
        expected = -10.0 if isinstance(mode, BSP) else -10.0 * (SIZE - SERVERS)
        assert all((array == expected).all() for array in result.params.values())


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", [Async(), BSP()], ids=repr)
def test_what_is_not_finite_is_refused(cupy: Any, mode: Any) -> None:
    def push(worker: Any) -> None:
        params = worker.pull()
        for value in (1.0, np.inf, 1.0):
            grads = {name: params[name] * np.float32(0.5) for name in params}
            grads["b"][1:2] = np.full(1, value, np.float32)
            params = worker.push_pull(grads)
            reason = params.receipt.reason
            assert reason == ("" if value == 1.0 else "non-finite gradient")

    result = run("cuda", mode, push)
    if RANK == 0:
        assert result.ledger.refused == SIZE - SERVERS


@pytest.mark.mpi(min_size=3)
def test_a_snapshot_that_is_still_read_is_not_written(cupy: Any) -> None:
    """Others push meanwhile, again and again."""

    def push_or_pull(worker: Any) -> None:
        params = worker.pull()
        if worker.index:
            for _ in range(40):
                ones = {name: params[name] * np.float32(0) + np.float32(1) for name in params}
                worker.push(ones).wait()
            return
        found = []
        while min(params.versions) < 40 * (worker.count - 1):
            if not found or min(params.versions) >= 8 * len(found):
                found.append((params.versions, params["w"] * np.float32(1)))
            params = worker.pull()
        for versions, array in found:
            assert set(array.get().tolist()) == {-float(version) for version in versions}

    zeros = {name: np.zeros_like(array) for name, array in PARAMS.items()}
    result = run("cuda", None, push_or_pull, optimizer=optim.SGD(1.0), params=zeros)
    if RANK == 0:
        assert result.version == 40 * (SIZE - SERVERS - 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("who", ["worker", "server", "peers", "memory", "bytes"])
def test_a_pair_of_which_one_cannot_open_goes_through_the_host(
    cupy: Any, who: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = SIZE - 1
    apart = who == "peers" and not SERVES
    if apart:
        cupy.cuda.runtime.gpus = 2
        cupy.cuda.runtime.peers = False
    elif who == "memory":
        ipc_of(cupy).full = SERVES
    elif who == "bytes":
        ipc_of(cupy).garbles = last == RANK
    elif (who == "worker" and last == RANK) or (who == "server" and SERVES):
        ipc_of(cupy).refuses = "cudaErrorMapBufferObjectFailed: mapping of buffer object failed"
    with monkeypatch.context() as patched:
        patched.setattr(cards, "choose_device", lambda *_: "cuda:1" if apart else "cuda:0")
        with caplog.at_level(logging.INFO, "psframe"):
            on_gpu = run("cuda", BSP())
    assert ipc_of(cupy).open_now == {}
    one_worker = who in ("worker", "bytes")
    affected = not one_worker or last == RANK
    if not SERVES:
        assert crossed(cupy) == (affected, affected)
    elif not one_worker or SIZE - SERVERS == 1:
        assert crossed(cupy) == (True, True)
    lines = [r for r in caplog.records if "CUDA IPC" in r.getMessage()]
    assert [line.levelname for line in lines] == ["WARNING"] * (RANK == 0)
    for line in lines:
        pairs = (SIZE - SERVERS) * SERVERS
        failed = SERVERS if one_worker else pairs
        assert f"of {pairs} pairs" in line.getMessage()
        assert f", {failed} do not open" in line.getMessage()
        reasons = {
            "peers": "does not reach the memory of",
            "memory": "out of memory",
            "bytes": "bring other bytes",
        }
        assert reasons.get(who, "mapping of buffer") in line.getMessage()
    compare(on_gpu, run("cpu", BSP()), BSP())


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("opens", [True, False])
def test_a_card_that_does_not_tell_its_memory_is_an_error_only_where_it_computes(
    cupy: Any, opens: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask makes a CUDA context, which there is no memory for, or which is another process's."""
    busy = "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable"

    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError(busy)

    if SIZE - 1 == RANK:
        ipc_of(cupy).memGetInfo = fail  # type: ignore[method-assign]
        if not opens:
            monkeypatch.setattr(cards, "make_device", fail)
    with caplog.at_level(logging.INFO, "psframe"):
        if opens:
            compare(run("cuda", BSP()), run("cpu", BSP()), BSP())
        else:
            own = SIZE - 1 == RANK
            error = RuntimeError if own else psframe.WorkerFailed
            with pytest.raises(error, match="DevicesUnavailable"):
                run("cuda", BSP())
    assert ipc_of(cupy).open_now == {}
    assert ipc_of(cupy).lent == (SIZE - 1 != RANK)
    lines = [line for line in caplog.messages if "CUDA IPC" in line]
    assert len(lines) == (RANK == 0)
    assert all(busy in line and f", {SERVERS} do not open" in line for line in lines)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("what", "said"),
    [("total", "more than a quarter of its 16 MiB"), ("free", "of which 3 MiB are free")],
)
def test_nothing_is_lent_where_it_is_too_much_for_the_card(
    cupy: Any, what: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever sees that; nobody has allocated anything then."""
    ipc = ipc_of(cupy)
    if what == "total":
        ipc.total = 16 << 20
    elif RANK == SIZE - 1:
        ipc.free, ipc.kept = 2 << 20, 1 << 20
    with caplog.at_level(logging.INFO, "psframe"):
        on_gpu = run("cuda", BSP())
    assert (ipc.lent, ipc.opened) == (0, 0)
    assert crossed(cupy) == (True, True)
    assert limits(cupy) == {0: memory_limit(ipc.total, SIZE)}
    lines = [line for line in caplog.messages if "CUDA IPC" in line]
    assert len(lines) == (RANK == 0)
    assert all(f"{lent_by(range(SIZE)) >> 20} MiB would be lent" in line for line in lines)
    assert all(said in line for line in lines)
    compare(on_gpu, run("cpu", BSP()), BSP())


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("tight", [False, True])
def test_each_card_is_counted_alone(
    cupy: Any, tight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers' one may be too small, and the workers' one then lends in vain."""
    ipc = ipc_of(cupy)
    if not SERVES:
        cupy.cuda.runtime.gpus = 2
    elif tight:
        ipc.total = 16 << 20
    with monkeypatch.context() as patched:
        patched.setattr(cards, "choose_device", lambda *_: "cuda:1")
        on_gpu = run("cuda", BSP())
    assert ipc.lent == (not tight or not SERVES)
    assert crossed(cupy) == (tight, tight)
    ordinal, users = (0, range(SERVERS)) if SERVES else (1, range(SERVERS, SIZE))
    lent = 0 if tight else lent_by(users)
    alone_on_it = len(users) == 1
    limit = memory_limit(ipc.total, len(users), lent)
    assert limits(cupy) == ({} if alone_on_it else {ordinal: limit})
    compare(on_gpu, run("cpu", BSP()), BSP())


@pytest.mark.mpi(min_size=3)
def test_one_worker_shares_memory_with_the_server_and_another_does_not(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet, last = cluster.meet, SIZE - 1

    def parted(*arguments: Any, **options: Any) -> Any:
        neighbours = meet(*arguments, **options)
        for rank in range(SIZE) if last == RANK else [last]:
            neighbours.segments.pop(rank, None)
        return neighbours

    monkeypatch.setattr(cluster, "meet", parted)
    on_gpu = run("cuda", BSP())
    if last == RANK:
        assert ipc_of(cupy).lent == 0
        assert crossed(cupy) == (True, True)
    elif not SERVES:
        assert crossed(cupy)[0] is False
    compare(on_gpu, run("cpu", BSP()), BSP())


@pytest.mark.mpi(min_size=3)
def test_one_server_is_opened_and_the_other_is_far(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a gradient is read on the device, and the other in the slot on the host."""
    if SERVERS == 1:
        pytest.skip("there is one server")
    meet = cluster.meet

    def parted(*arguments: Any, **options: Any) -> Any:
        neighbours = meet(*arguments, **options)
        for rank in [1] if not SERVES else range(SIZE) if RANK == 1 else []:
            neighbours.segments.pop(rank, None)
        return neighbours

    monkeypatch.setattr(cluster, "meet", parted)
    on_gpu = run("cuda", BSP())
    assert ipc_of(cupy).opened == {0: SIZE - SERVERS, 1: 0}.get(RANK, 1)
    compare(on_gpu, run("cpu", BSP()), BSP())


@pytest.mark.mpi(min_size=2)
def test_memory_that_a_lost_rank_may_have_open_is_kept(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(borrowing, "_never_freed", kept)
    free = borrowing.Borrowing.free
    everyone = set(range(SIZE))
    monkeypatch.setattr(borrowing.Borrowing, "free", lambda self, lost: free(self, everyone))
    run("cuda", BSP(), push_and_pull)
    assert len(kept) == 1
    kept.clear()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("gpu_direct", ["auto", "off"])
def test_after_a_kernel_that_fails_the_run_ends_as_it_does_where_nothing_is_open(
    cupy: Any,
    gpu_direct: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """CUDA closes nothing any more on that rank; the owners keep their memory, and wait not."""
    kept: list[Any] = []
    monkeypatch.setattr(borrowing, "_never_freed", kept)
    monkeypatch.setattr(borrowing, "_CLOSE_BOUND_S", 1e9)
    fails = RANK == SERVERS

    def fail(worker: Any) -> None:
        params = worker.pull()
        for _ in range(3):
            params = worker.push_pull({name: params[name] * np.float32(0.5) for name in params})
        if fails:
            cupy.cuda.broken = True
            raise ArithmeticError("a kernel of mine has failed")
        while True:
            params = worker.push_pull({name: params[name] * np.float32(0.5) for name in params})

    error = ArithmeticError if fails else psframe.WorkerFailed
    with pytest.raises(error, match="a kernel of mine has failed"):
        run("cuda", None, fail, gpu_direct=gpu_direct)
    opens = gpu_direct == "auto"
    lines = [line for line in caplog.messages if "stays open" in line]
    assert len(lines) == (SERVERS if opens and fails else 0)
    assert len(kept) == (opens and (SERVES or fails))
    if fails:
        cupy.cuda.mend()
        assert len(ipc_of(cupy).open_now) == (SERVERS if opens else 0)
        for address in tuple(ipc_of(cupy).open_now):
            ipc_of(cupy).ipcCloseMemHandle(address)
    WORLD.Barrier()
    kept.clear()
    caplog.clear()  # its errors know the frames, and these the device


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", [Async(), BSP()], ids=repr)
def test_two_runs_after_one_another(cupy: Any, mode: Any) -> None:
    for _ in range(2):
        run("cuda", mode, push_and_pull)
    assert ipc_of(cupy).lent == 2


@pytest.mark.mpi(min_size=2)
def test_a_pinned_snapshot_is_read_on_the_device_while_others_push(cupy: Any) -> None:
    def tasks(worker: Any) -> None:
        for task in worker.tasks(24, 2, epochs=2, evaluate=(12, 3)):
            if task.kind == "evaluate":
                params = task.params()
                # (Of a later server a few later pushes may be in it.)
                assert set(params["b"].get().tolist()) == {-float(params.versions[-1])}
                task.report(loss_sum=1.0)
                continue
            params = worker.pull()
            worker.push({n: params[n] * np.float32(0) + np.float32(1) for n in params}).wait()

    zeros = {name: np.zeros_like(array) for name, array in PARAMS.items()}
    result = run("cuda", None, tasks, optimizer=optim.SGD(1.0), params=zeros)
    if RANK == 0:
        assert result.version == 24
        assert (result.params["b"] == -24).all()


@pytest.mark.mpi(min_size=2)
def test_of_who_takes_a_lost_worker_s_place_gradients_are_read_on_the_host(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports: list[Any] = []
    dropped: list[int] = []

    class Port(mpi_port.MpiServerPort):
        def borrow(self, opened: Any, drop: Any) -> None:
            super().borrow(opened, dropped.append)
            ports.append(self)

    monkeypatch.setattr(cluster, "MpiServerPort", Port)
    run("cuda", BSP(), push_and_pull)
    for port in ports:
        assert not isinstance(port.memory.gradient(0, 0), np.ndarray)
        for _ in range(2):
            port.admit(0, Segment.create(3, Layout.of(PARAMS).size, np.float32), None)
            assert isinstance(port.memory.gradient(0, 0), np.ndarray)
        assert dropped == [SERVERS], "the lost one's memory, once"
    ports.clear()
