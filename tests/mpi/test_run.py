"""`psframe.run` on ranks: what it promises beside the bits. Every rank asserts what it sees."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import psframe
from psframe import BSP, SSP, Async, Worker
from psframe.cluster import fail_together
from psframe.devices import visible_gpus
from psframe.events import EpochDone, Evaluated, HostEvent, Stop
from psframe.launcher import find_launcher
from psframe.transports import mpi_post, watch
from psframe.transports.mpi import TAG_END, Mesh
from psframe.transports.mpi_endpoint import MpiEndpoint
from psframe.transports.mpi_port import MpiServerPort
from psframe.transports.shared_memory import Segment
from psframe.wire import Limits, Link, decode

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
PARAMS = {"w": np.zeros((4, 2), np.float32), "b": np.zeros(3, np.float32)}
ONES = {name: np.ones_like(p) for name, p in PARAMS.items()}
NAN = {name: np.full_like(p, np.nan) for name, p in PARAMS.items()}
SGD = psframe.optim.SGD(lr=0.5)
MODES = (Async(), SSP(0), SSP(3), BSP(), BSP(backup=1))

# Shared by all modes and by both ways: every rank has the same list.
VARIANTS = [
    pytest.param(mode, servers, shared, id=f"{mode}-{servers}-{'memory' if shared else 'mpi'}")
    for mode, servers, shared in itertools.product(MODES, (1, 2), (True, False))
    if servers < SIZE
]


def total(values: Any) -> Any:
    """The sum over all ranks of an array."""
    mine = np.array(values)
    everyone = np.empty_like(mine)
    WORLD.Allreduce(mine, everyone)
    return everyone


def run(work: Callable[[Worker], None], **kwargs: Any) -> psframe.Result:
    return psframe.run(work, kwargs.pop("params", PARAMS), optimizer=SGD, **kwargs)


def check_accounts(result: psframe.Result, mode: Any) -> None:
    ledger = result.ledger
    fates = ledger.applied + ledger.refused + ledger.dropped + ledger.lost + ledger.stopped
    assert ledger.received == fates
    assert sum(ledger.reasons.values()) == ledger.received - ledger.applied
    assert result.staleness.ndim == 1
    assert result.staleness.sum() == ledger.applied
    if isinstance(mode, BSP):
        # With backup workers one may sit out a round for want of a block, with what it has pulled.
        assert result.staleness.size <= 1 + mode.backup
    else:
        assert result.version == ledger.applied


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("mode", "servers", "shared"), VARIANTS)
def test_leases_evaluations_and_accounts(mode: Any, servers: int, shared: bool) -> None:
    """Each sample once an epoch, evaluations merged, every push in the ledger, in every mode."""
    n_samples, epochs, n_tests = 53, 2, 17
    seen = np.zeros((epochs, n_samples), np.int64)
    pushes = np.zeros(1, np.int64)
    events: list[HostEvent] = []

    def work(worker: Worker) -> None:
        assert (worker.count, worker.index) == (SIZE - servers, RANK - servers)
        fresh = False
        for task in worker.tasks(n_samples, 5, epochs=epochs, evaluate=(n_tests, 4)):
            if task.kind == "evaluate":
                task.report(count=len(task.indices), version=task.params().version)
                fresh = False  # what it has now may be an old version
                continue
            if not fresh:
                worker.pull()
                fresh = True
            seen[task.epoch, task.indices] += 1
            pushes[0] += 1
            worker.log(loss=1.0)
            worker.push_pull(ONES)

    result = run(work, mode=mode, servers=servers, shared_memory=shared, observer=events.append)
    np.testing.assert_array_equal(total(seen), np.ones_like(seen))
    check_accounts(result, mode)
    assert result.ledger.received == total(pushes)[0]
    if RANK:
        assert not result.is_root
        assert result.params is None
        assert not events
        return
    assert result.params is not None
    np.testing.assert_array_equal(result.params["w"], -0.5 * result.version)
    # In the order in which they were done: a slow rank may hold a block of an earlier one.
    assert sorted(e.epoch for e in events if isinstance(e, EpochDone)) == list(range(epochs))
    evaluated = [e for e in events if isinstance(e, Evaluated)]
    assert [e.sums["count"] for e in evaluated] == [n_tests] * epochs
    blocks = -(-n_tests // 4)
    for event in evaluated:  # all ranks have evaluated one version
        assert event.sums["version"] == blocks * event.version


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("mode", "servers", "shared"), VARIANTS)
def test_max_updates_is_exact(mode: Any, servers: int, shared: bool) -> None:
    """The version is max_updates on every shard, although every worker would go on for ever."""

    def work(worker: Worker) -> None:
        while True:
            worker.push_pull(ONES)

    result = run(work, mode=mode, servers=servers, shared_memory=shared, max_updates=23)
    assert result.version == 23
    check_accounts(result, mode)
    if result.params is not None:
        for array in result.params.values():  # of all shards
            np.testing.assert_array_equal(array, -0.5 * 23)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("shared", [True, False], ids=["memory", "mpi"])
def test_prefetch_in_place_and_waits(shared: bool) -> None:
    """What a worker can do beside push_pull, several requests under way."""

    def work(worker: Worker) -> None:
        params = worker.pull()
        for _ in range(10):
            ahead = worker.pull_async()
            arrays = worker.gradients()
            for name in arrays:
                arrays[name][...] = 1.0
            first, second = worker.push(None), worker.push(ONES)
            before = params.copy()
            for name, array in before.items():  # still valid beside the one under way
                np.testing.assert_array_equal(array, params[name])
            params = ahead.wait(timeout_s=60.0)
            receipts = first.wait(), second.wait()
            assert first.done
            assert second.done
            assert all(receipt.applied for receipt in receipts)
            assert receipts[0].version < receipts[1].version
            with pytest.raises(ValueError, match="w"):
                worker.push({"b": ONES["b"]})

    result = run(work, shared_memory=shared)
    assert result.version == 20 * (SIZE - 1)
    assert result.ledger.received == result.version


@pytest.mark.mpi(min_size=2)
def test_stop_ends_every_worker() -> None:
    """One worker stops; those that loop for ever are ended, wherever they are."""
    stopped = np.zeros(1, np.int64)

    def work(worker: Worker) -> None:
        if worker.index == 0:
            for _ in range(5):
                worker.push_pull(ONES)
            worker.stop()
        try:
            while True:
                worker.push(ONES).wait()
        except psframe.Stopped:
            stopped[0] = 1
            raise

    check_accounts(run(work), Async())
    assert total(stopped)[0] == SIZE - 1


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("shared", [True, False], ids=["memory", "mpi"])
def test_not_finite_is_refused_and_diverges(shared: bool) -> None:
    """A refusal has its receipt; ten times W in a row are an error on every rank."""

    def now_and_then(worker: Worker) -> None:
        for _ in range(4):
            receipt = worker.push(NAN).wait()
            assert (receipt.applied, receipt.reason) == (False, "non-finite gradient")
            assert worker.push(ONES).wait().applied

    result = run(now_and_then, shared_memory=shared)
    assert result.ledger.refused == 4 * (SIZE - 1) == result.version

    def always(worker: Worker) -> None:
        while True:
            worker.push(NAN)

    with pytest.raises(psframe.Diverged, match="smaller learning rate"):
        run(always, shared_memory=shared)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("order", [1, -1], ids=["as-given", "reversed"])
def test_part_of_the_ranks(order: int) -> None:
    """Ranks are those of `comm`, which may be two of many, in another order."""
    comm = WORLD.Split(RANK // 2, order * RANK)
    if comm.size == 2:
        result = run(lambda worker: worker.push(ONES).wait() and None, comm=comm)
        assert result.is_root == (comm.rank == 0)
        assert result.version == 1
    comm.Free()


@pytest.mark.mpi(min_size=2)
def test_an_exception_is_known_to_every_rank() -> None:
    """Its own rank raises it, the others WorkerFailed; then another run works."""

    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    for error, message in (
        (ValueError("Unglück 🐌 \udc80"), "Unglück 🐌 \\udc80"),
        (ValueError("x" * 100_000), "x" * 100),
        (Odd(), "(its __str__ raised RuntimeError)"),
        (SystemExit(3), "3"),
        (KeyboardInterrupt(), ""),
        (MemoryError(), ""),
    ):

        def work(worker: Worker, error: BaseException = error) -> None:
            worker.push_pull(ONES)
            if worker.index == worker.count - 1:
                raise error
            while True:
                worker.push_pull(ONES)

        with pytest.raises((type(error), psframe.WorkerFailed)) as caught:
            run(work)
        failed: Any = caught.value
        if RANK == SIZE - 1:
            assert failed is error
            continue
        assert isinstance(failed, psframe.WorkerFailed)
        assert (failed.worker, failed.rank) == (SIZE - 2, SIZE - 1)
        assert failed.type == type(error).__name__
        assert failed.message.startswith(message)
        assert "raise error" in failed.traceback
        assert f"worker {SIZE - 2} (rank {SIZE - 1})" in str(failed)
    assert run(lambda worker: None).version == 0


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("optimizer", SGD, psframe.optim.SGD(0.25)),
        ("mode", BSP(), BSP(1)),
        ("seed", 0, 1),
        ("max_updates", None, 5),
        ("device", "auto", "cpu"),
        ("clip_norm", None, 1.0),
        ("run_dir", None, "nowhere"),
        ("overwrite", False, True),
        ("shared_memory", True, False),
        ("params", PARAMS, {"w": PARAMS["w"], "c": PARAMS["b"]}),
        ("params", PARAMS, {"w": PARAMS["w"].T, "b": PARAMS["b"]}),
        ("params", PARAMS, {name: p.astype(float) for name, p in PARAMS.items()}),
    ],
)
def test_arguments_that_differ_are_named(name: str, here: Any, there: Any) -> None:
    kwargs = {"params": PARAMS, "optimizer": SGD, name: there if RANK == SIZE - 1 else here}
    with pytest.raises(psframe.ArgumentError, match=f"{name}: rank {SIZE - 1} called"):
        psframe.run(lambda worker: None, kwargs.pop("params"), **kwargs)


@pytest.mark.mpi(min_size=2)
@pytest.mark.skipif(visible_gpus() > 0, reason="there is a GPU")
def test_without_a_gpu_no_rank_starts_with_a_server_on_one() -> None:
    """Server 0's rank raises what it would raise alone, the others name it."""
    kind = psframe.ArgumentError if RANK else ValueError
    with pytest.raises(kind, match="server_device: 'cuda' needs a GPU that CuPy can use") as caught:
        psframe.run(lambda worker: None, PARAMS, optimizer=SGD, server_device="cuda")
    assert RANK == 0 or str(caught.value).startswith("rank 0: ")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("wrong", [0, SIZE - 1])
@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("seed", -1, ValueError),
        ("optimizer", "sgd", TypeError),
        ("params", {"w": np.zeros(2, np.int64)}, TypeError),
        ("device", "tpu", ValueError),
    ],
)
def test_a_wrong_argument_on_one_rank(name: str, value: Any, kind: type, wrong: int) -> None:
    """That rank raises what it would raise alone, the others an ArgumentError that names it."""
    kwargs: dict[str, Any] = {"params": PARAMS, "optimizer": SGD}
    if wrong == RANK:
        kwargs[name] = value
    if name == "device" and wrong == 0:
        pytest.skip("a server has no device")
    with pytest.raises((ValueError, TypeError)) as caught:
        psframe.run(lambda worker: None, kwargs.pop("params"), **kwargs)
    if wrong == RANK:
        assert isinstance(caught.value, kind)
    else:
        assert isinstance(caught.value, psframe.ArgumentError)
        assert str(caught.value).startswith(f"rank {wrong}: {kind.__name__}: ")
    assert name in str(caught.value)


@pytest.mark.mpi
def test_every_server_needs_a_worker() -> None:
    with pytest.raises(psframe.ArgumentError, match=f"mpirun -n {SIZE + 1} ") as caught:
        run(lambda worker: None, servers=SIZE)
    assert "no worker" in str(caught.value)


@pytest.mark.mpi(min_size=2)
def test_a_run_directory_that_cannot_be_used(shared_folder: Path) -> None:
    """Rank 0 says so, and nothing in it has changed; the verdict of a failed run is in its own."""
    folder = shared_folder
    (folder / "file").touch()
    for path in (folder / "file", Path("/proc/nowhere/run")):
        with pytest.raises(psframe.RunDirError if RANK == 0 else psframe.ArgumentError) as caught:
            run(lambda worker: None, run_dir=path)
        assert "choose" in str(caught.value)
    good = folder / "run"
    result = run(lambda worker: worker.push(ONES).wait() and None, run_dir=good)
    assert result.run_dir == (good if RANK == 0 else None)
    WORLD.Barrier()
    status = (good / "status.json").read_text(encoding="utf-8")
    assert '"completed"' in status
    with pytest.raises((psframe.RunDirError, psframe.ArgumentError), match="another run's"):
        run(lambda worker: None, run_dir=good)
    assert (good / "status.json").read_text(encoding="utf-8") == status
    with pytest.raises(psframe.ArgumentError, match="no worker"):
        run(lambda worker: None, run_dir=folder / "few", servers=SIZE)
    WORLD.Barrier()
    assert '"failed"' in (folder / "few" / "status.json").read_text(encoding="utf-8")


@pytest.mark.mpi(min_size=2)
def test_two_hundred_runs_leave_nothing_behind() -> None:
    """MPI has some 2,000 communicators, and a process 1,024 open files."""
    fds = Path("/proc/self/fd")
    for count in range(200):
        result = run(lambda worker: worker.push(ONES).wait() and None)
        assert result.version == SIZE - 1
        if count == 9:
            before = len(list(fds.iterdir()))
    # The library may open a connection of its own late; a run that left one would leave 190.
    assert len(list(fds.iterdir())) <= before + 20


@pytest.mark.mpi(min_size=2)
def test_who_cannot_call_run_tells_the_others() -> None:
    """A rank whose data are missing is known to those in `run`, or to those that fail like it."""
    launcher = find_launcher()
    assert launcher is not None
    if RANK == SIZE - 1:
        error = OSError("no such data")
        assert fail_together(launcher, error) is error
    else:
        with pytest.raises(psframe.ArgumentError, match=f"rank {SIZE - 1}: OSError: no such data"):
            run(lambda worker: None)
    mine = ValueError(str(RANK))
    assert fail_together(launcher, mine) is mine


@pytest.mark.mpi(min_size=2)
def test_the_end_of_a_run_is_no_exclusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker looks up when the summary is here, and before it has closed its own end."""
    close = MpiEndpoint.close

    def late(endpoint: MpiEndpoint) -> None:
        mesh = endpoint._mesh
        while not mesh.comm.Iprobe(0, TAG_END):
            pass
        mesh.watch.look(time.monotonic())
        close(endpoint)

    monkeypatch.setattr(MpiEndpoint, "close", late)

    def work(worker: Worker) -> None:
        worker.pull()
        worker.push_pull(ONES)

    for _ in range(3):
        assert run(work).version == SIZE - 1


@pytest.mark.mpi(min_size=2)
def test_nothing_of_a_run_is_under_way_when_the_next_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sign of life that came later would be counted with the next run's messages, and hang it."""
    monkeypatch.setattr(watch, "_LOOK_S", 0.001)
    for _ in range(60):
        result = run(lambda worker: worker.push_pull(ONES), shared_memory=False)
        assert result.version == max(1, SIZE - 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("shared", [True, False])
def test_the_memory_of_a_run_goes_with_it(shared: bool) -> None:
    """And not when the next collection of garbage finds a circle."""
    kinds = (Mesh, MpiEndpoint, MpiServerPort, Segment)

    def there() -> list[str]:
        return sorted(type(one).__name__ for one in gc.get_objects() if isinstance(one, kinds))

    gc.collect()
    gc.disable()
    try:
        before = there()
        run(lambda worker: worker.push_pull(ONES), shared_memory=shared)
        assert there() == before
    finally:
        gc.enable()


def test_receives_that_cannot_be_taken_back_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a long message whose sender has stopped in its middle: nobody waits for it."""
    mesh = Mesh(WORLD)
    post = mpi_post.Post(mesh.comm, watch=mesh.watch)
    monkeypatch.setattr(mpi_post, "_CLOSE_BOUND_S", 0.0)
    monkeypatch.setattr(mpi_post, "_kept", [])
    monkeypatch.setattr(post, "_cancelled", lambda: False)
    post.close()
    assert mpi_post._kept == [post]
    monkeypatch.undo()
    post.close()  # they have been cancelled, in truth
    mesh.close()


@pytest.mark.parametrize("arrived", [True, False])
def test_a_receive_that_has_ended_in_a_call_that_failed(
    monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    """As now and then at a death: its message is not lost, and if there is none, it goes on."""
    mesh = Mesh(WORLD)
    monkeypatch.setattr(mesh.watch, "failed", lambda error: None)
    post = mpi_post.Post(mesh.comm, watch=mesh.watch)
    post._tolerant = True
    test = post._tests[0]

    def failing(status: MPI.Status) -> bool:
        if test(status):
            post._tests[0] = test
            raise MPI.Exception(MPI.ERR_OTHER)
        return False

    def take() -> tuple[int, int]:
        deadline = time.monotonic() + 30.0
        while (taken := post.take()) is None:
            assert time.monotonic() < deadline
        source, n_bytes, buffer = taken
        limits = Limits(Link.WORKER_TO_LEADER, 100)
        event, _, _ = decode(buffer, n_bytes, limits)
        assert isinstance(event, Stop)
        return source, event.worker

    post._tests[0] = failing
    if not arrived:
        post._receives[0].Cancel()
        while post._tests[0] is failing:
            assert post.take() is None
    for number in range(9):
        post.send(mesh.rank, Stop(number))
        assert take() == (mesh.rank, number)
    while post.sending:
        pass
    post.close()
    mesh.close()
