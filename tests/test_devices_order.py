"""What is ordered by what: nothing is read too early, nothing is overwritten too early.

The streams of `fake_cupy` do nothing until somebody waits for them or, `eager`, as soon as they
may; every host buffer that a copy goes to is NaN until it has arrived. Each order has been broken
once by hand, and a test here failed.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fake_cupy import FakeCupy, ForeignArray
from scripted import Script

from psframe.client import Worker
from psframe.devices import CudaDevice, pinning
from psframe.layout import Layout
from psframe.packing import GradientSlot

N = 300_000  # 1.2 MB of float32: registered, and five pieces
LAYOUT = Layout.of({"w": np.zeros((N - 3,), np.float32), "b": np.zeros(3, np.float32)})
SMALL = Layout.of({"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)})
DOUBLE = Layout.of({"w": np.zeros(1000)})


@pytest.fixture
def worker(cupy: FakeCupy, request: pytest.FixtureRequest) -> Iterator[Worker]:
    options = getattr(request, "param", {})
    device = CudaDevice(0, LAYOUT)
    yield Worker(Script(LAYOUT, **options), LAYOUT, device, 0)  # type: ignore[arg-type]
    device.close()


FOLLOWED = pytest.mark.parametrize(
    "worker", [{"follows": False}, {"follows": True}], indirect=True, ids=["whole", "followed"]
)


def script_of(worker: Worker) -> Script:
    script = worker._endpoint
    assert isinstance(script, Script)
    return script


def gradient(cupy: FakeCupy, value: float, layout: Layout = LAYOUT) -> dict[str, Any]:
    """Arrays that kernels on the current stream will fill."""
    grads = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        array = cupy.empty(math.prod(shape), layout.dtype).reshape(shape)
        array[...] = np.full(shape, value, layout.dtype)
        grads[name] = array
    return grads


def value_of(array: Any) -> float:
    found = array.get()
    assert (found == found.flat[0]).all(), "two versions in one array"
    return float(found.flat[0])


# ---- gradients ------------------------------------------------------------------------------


@FOLLOWED
@pytest.mark.parametrize("own", [False, True])
def test_gradients_leave_behind_the_kernels_that_make_them(
    cupy: FakeCupy, worker: Worker, own: bool
) -> None:
    script = script_of(worker)
    for step in range(4):
        if own:
            for array in worker.gradients().values():
                array[...] = np.full(array.shape, step + 1, np.float32)
            worker.push(None).wait()
        else:
            worker.push(gradient(cupy, step + 1)).wait()
    assert [set(g) for g in script.pushed] == [{1.0}, {2.0}, {3.0}, {4.0}]
    assert all(finite for finite, _ in script.verdicts)
    assert script.verdicts[2][1] == pytest.approx(3.0 * math.sqrt(N), rel=1e-12)


@FOLLOWED
def test_gradients_may_be_overwritten_once_push_returns(cupy: FakeCupy, worker: Worker) -> None:
    script, grads = script_of(worker), gradient(cupy, 1.0)
    for step in range(6):
        pending = worker.push(grads)
        for array in grads.values():
            array[...] = np.full(array.shape, step + 2, np.float32)
        cupy.cuda.default.synchronize()  # as early as the order allows
        pending.wait()
    assert [set(g) for g in script.pushed] == [{v} for v in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]


@pytest.mark.parametrize("worker", [{"follows": True}], indirect=True)
def test_the_current_stream_waits_for_what_leaves_behind_the_worker(
    cupy: FakeCupy, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread comes last: the copies are done for the stream's sake."""
    device, jobs = worker._device, []
    assert isinstance(device, CudaDevice)
    gate = threading.Event()
    start = device._behind.start

    def gated(do: Callable[[], None]) -> Any:
        jobs.append(do)
        return start(lambda: (gate.wait(20.0), do())[1])

    monkeypatch.setattr(device._behind, "start", gated)
    grads = gradient(cupy, 1.0)
    pending = worker.push(grads)
    for array in grads.values():
        array[...] = np.zeros(array.shape, np.float32)
    cupy.cuda.default.synchronize()
    gate.set()
    pending.wait()
    assert len(jobs) == 1
    assert set(script_of(worker).pushed[0]) == {1.0}


@pytest.mark.parametrize("worker", [{"follows": True}], indirect=True)
def test_a_server_is_told_of_a_piece_when_it_is_there(cupy: FakeCupy, worker: Worker) -> None:
    script = script_of(worker)
    for _ in range(3):
        worker.push(gradient(cupy, 2.0)).wait()
    for followed in script.followed.values():
        assert followed.wrong == []
    ends = script.followed[0].ends
    assert len(ends) == 4, "pieces of 256 KiB"
    assert ends == sorted(set(ends))
    assert ends[-1] < N


def test_gradients_of_the_worker_leave_in_one_copy(cupy: FakeCupy, worker: Worker) -> None:
    worker.gradients()
    cupy.cuda.runtime.copies.clear()
    worker.push(None).wait()
    to_host = [n for kind, n in cupy.cuda.runtime.copies if kind == 2]
    assert to_host == [8 * 293, 4 * N], "the blocks' sums, and the gradient"
    assert cupy.kernels == 1


@pytest.mark.parametrize("protocol", ["dlpack", "interface"])
@FOLLOWED
def test_another_library_s_kernels_come_first_and_it_may_go_on_at_once(
    cupy: FakeCupy, worker: Worker, protocol: str
) -> None:
    """Its stream is its own: neither of psframe's waits for it unless it is asked to."""
    script, torch = script_of(worker), cupy.cuda.Stream(non_blocking=True)
    with torch:
        arrays = gradient(cupy, 1.0)
    foreign = {name: ForeignArray(array, torch, protocol) for name, array in arrays.items()}
    worker.push(foreign)
    with torch:
        for array in arrays.values():
            array[...] = np.zeros(array.shape, np.float32)
    torch.synchronize()
    assert set(script.pushed[0]) == {1.0}


def test_arrays_that_need_a_cast_or_are_strided_or_on_the_host(cupy: FakeCupy) -> None:
    device, script = CudaDevice(0, SMALL), Script(SMALL)
    worker = Worker(script, SMALL, device, 0)  # type: ignore[arg-type]
    wide = cupy.empty(12, np.float64).reshape(2, 6)
    wide[...] = np.arange(12.0).reshape(2, 6)
    worker.push({"w": wide[:, ::2], "b": np.full(3, 7.0)}).wait()
    worker.push({"w": wide[:, ::2].astype(np.float32), "b": gradient(cupy, 5.0, SMALL)["b"]}).wait()
    assert script.pushed[0].tolist() == [0, 2, 4, 6, 8, 10, 7, 7, 7]
    assert script.pushed[1].tolist() == [0, 2, 4, 6, 8, 10, 5, 5, 5]
    norms = [float(np.linalg.norm(g.astype(np.float64))) for g in script.pushed]
    np.testing.assert_allclose([norm for _, norm in script.verdicts], norms, rtol=1e-6)
    device.close()


def test_a_wrong_gradient_is_an_error_and_nothing_is_sent(cupy: FakeCupy, worker: Worker) -> None:
    grads = gradient(cupy, 1.0)
    with pytest.raises(ValueError, match="missing"):
        worker.push({"w": grads["w"]})
    with pytest.raises(ValueError, match="shape"):
        worker.push({"w": grads["w"], "b": grads["b"][:2]})
    with pytest.raises(TypeError, match="dtype int32"):
        worker.push({"w": grads["w"], "b": grads["b"].astype(np.int32)})
    assert script_of(worker).pushed == []


# ---- verdicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [SMALL, LAYOUT, DOUBLE], ids=["small", "float32", "float64"])
@pytest.mark.parametrize("special", [None, np.nan, np.inf, -np.inf, 3e38, 1e300, 1e-30])
def test_the_verdict_is_the_host_s(cupy: FakeCupy, layout: Layout, special: float | None) -> None:
    """Finite or not exactly; the norm within what the host's own float32 sums are good for."""
    device, script = CudaDevice(0, layout), Script(layout)
    worker = Worker(script, layout, device, 0)  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    flat = rng.standard_normal(layout.size).astype(layout.dtype)
    if special is not None:
        with np.errstate(over="ignore"):
            flat[layout.size // 2] = special
    grads = {}
    for name, part in layout.views(flat).items():
        grads[name] = cupy.empty(part.size, layout.dtype).reshape(part.shape)
        grads[name][...] = part
    worker.push(grads).wait()
    finite, norm = script.verdicts[0]
    host_finite, host_norm = GradientSlot(layout, flat).judge()
    assert finite == host_finite == bool(np.isfinite(flat).all())
    np.testing.assert_array_equal(script.pushed[0], flat)
    if finite:
        tolerance = 1e-6 if layout.dtype == np.float32 else 1e-14
        assert norm == pytest.approx(host_norm, rel=tolerance)
        with np.errstate(over="ignore"):
            exact = math.sqrt(math.fsum(float(x) ** 2 if abs(x) < 1e150 else 0.0 for x in flat))
        if special is None or abs(special) < 1e150:
            assert norm == pytest.approx(exact, rel=2.0**-44)
    device.close()


# ---- parameters -------------------------------------------------------------------------------


def test_parameters_are_there_for_what_the_current_stream_does_next(
    cupy: FakeCupy, worker: Worker
) -> None:
    for _ in range(4):
        params = worker.pull()
        assert value_of(params["w"] * 2.0) == 2 * Script.value(params.version)
        params = worker.push_pull(gradient(cupy, 1.0))
        assert value_of(params["b"] + 0.0) == Script.value(params.version)


def test_kernels_may_still_read_the_parameters_before(cupy: FakeCupy, worker: Worker) -> None:
    """They were queued when those were the present ones; they run when it suits the GPU."""
    results = []
    for step in range(6):
        params = worker.pull()
        results.append((step, params["w"] * 1.0))
        worker._protocol.drop_params()
        script_of(worker).version += 1
    for step, result in reversed(results):
        assert value_of(result) == Script.value(step)


@FOLLOWED
def test_prefetched_parameters_leave_the_present_ones(cupy: FakeCupy, worker: Worker) -> None:
    """A snapshot is given back when it has been copied: the server overwrites it at once."""
    params, results = worker.pull(), []
    for step in range(6):
        pending = worker.pull_async()
        results.append((params.version, params["w"] * 1.0))
        worker.push({name: params[name] * 0.5 for name in params}).wait()
        params = pending.wait()
        assert params.version == step
    for version, result in results:
        assert value_of(result) == Script.value(version)
    values = [float(g[0]) for g in script_of(worker).pushed]
    assert values == [Script.value(version) / 2 for version, _ in results]


def test_pulls_that_follow_one_another_ahead_of_time(cupy: FakeCupy, worker: Worker) -> None:
    """A snapshot that a prefetch has followed is given back by the next: it has been copied."""
    params, results = worker.pull(), []
    for _ in range(6):
        pending = worker.pull_async()
        results.append((params.version, params["w"] * 1.0))
        script_of(worker).version += 1
        params = pending.wait()
    for version, result in results:
        assert value_of(result) == Script.value(version)


def test_a_prefetch_does_not_wait_for_what_has_not_been_copied(
    cupy: FakeCupy, worker: Worker
) -> None:
    worker.pull()
    cupy.cuda.log.clear()
    pending = worker.pull_async()
    if not cupy.cuda.eager:
        assert cupy.cuda.log == []
        assert len(script_of(worker).held) == 2, "both snapshots are held"
    assert value_of(pending.wait()["w"]) == Script.value(0)


def test_leaving_waits_for_the_last_copy(cupy: FakeCupy, worker: Worker) -> None:
    kept = worker.pull()["w"]
    worker.leave()
    for buffer in script_of(worker).buffers:
        buffer[:] = np.nan  # the server goes on without it
    assert value_of(kept) == Script.value(0)


# ---- memory -----------------------------------------------------------------------------------


def test_host_memory_is_registered_once_and_unregistered(cupy: FakeCupy) -> None:
    device, script = CudaDevice(0, LAYOUT), Script(LAYOUT)
    worker = Worker(script, LAYOUT, device, 0)  # type: ignore[arg-type]
    for _ in range(8):
        worker.push_pull(gradient(cupy, 1.0))
    runtime = cupy.cuda.runtime
    known = {array.ctypes.data for array in (*script.slots, *script.buffers)}
    assert set(runtime.registered) <= known
    assert runtime.registrations == len(runtime.registered) <= 4
    device.close()
    assert runtime.registered == {}


def test_two_workers_of_a_process_register_what_they_share_once(cupy: FakeCupy) -> None:
    shared = np.full(N, 3.0, np.float32)
    first, second = CudaDevice(0, LAYOUT), CudaDevice(1, LAYOUT)
    for device in (first, second):
        assert value_of(device.params([shared])["w"]) == 3.0
    assert cupy.cuda.runtime.registrations == 1
    first.close()
    assert len(cupy.cuda.runtime.registered) == 1
    assert value_of(second.params([shared])["w"]) == 3.0
    second.close()


@FOLLOWED
def test_what_cannot_be_registered_goes_through_pinned_buffers(
    cupy: FakeCupy, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    cupy.cuda.runtime.refuse_register = True
    with caplog.at_level(logging.WARNING, "psframe"):
        for step in range(4):
            params = worker.push_pull(gradient(cupy, step))
            assert value_of(params["w"] * 1.0) == Script.value(step + 1)
    (line,) = caplog.messages
    assert "1.1 MiB of host memory cannot be registered with CUDA" in line
    assert [set(g) for g in script_of(worker).pushed] == [{0.0}, {1.0}, {2.0}, {3.0}]
    assert all(followed.wrong == [] for followed in script_of(worker).followed.values())


def test_small_arrays_are_not_registered(cupy: FakeCupy) -> None:
    assert SMALL.size * 4 < pinning.REGISTER_BYTES_MIN
    device = CudaDevice(0, SMALL)
    assert value_of(device.params([np.full(9, 2.0, np.float32)])["w"]) == 2.0
    assert cupy.cuda.runtime.registrations == 0
    device.close()


def test_several_servers_shards_land_side_by_side(cupy: FakeCupy) -> None:
    device = CudaDevice(0, SMALL)
    flat = np.arange(9, dtype=np.float32)
    params = device.params([flat[:4], flat[4:4], flat[4:]])
    assert params["w"].get().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert params["b"].get().tolist() == [6, 7, 8]
    device.close()


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", [{"follows": True}], indirect=True)
def test_a_copy_that_fails_behind_the_worker_is_refused_and_raised_there(
    cupy: FakeCupy, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psframe.devices.outgoing import Outgoing

    def broken(*arguments: object) -> None:
        raise RuntimeError("the GPU has fallen off the bus")

    with monkeypatch.context() as patch:
        patch.setattr(Outgoing, "follow", broken)
        worker.push(gradient(cupy, 1.0)).wait()
    assert script_of(worker).verdicts == [(False, 0.0)]
    with pytest.raises(RuntimeError, match="fallen off"):
        worker.push(gradient(cupy, 1.0))
    worker.push(gradient(cupy, 2.0)).wait()
    assert set(script_of(worker).pushed[-1]) == {2.0}
