"""Workers on a real GPU: what CuPy, CUDA and PyTorch do where other tests have stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from scripted import Script

import psframe
from psframe import BSP, SSP, Async, optim
from psframe.client import Worker
from psframe.devices import CudaDevice, choose_device, fit_memory, identify
from psframe.layout import Layout
from psframe.packing import GradientSlot

pytestmark = pytest.mark.gpu

N = 4_000_000  # 16 MB: its copies take as long as thirty kernels
LAYOUT = Layout.of({"w": np.zeros((N - 3,), np.float32), "b": np.zeros(3, np.float32)})
CYCLES = 20_000_000  # 10 to 20 ms


@pytest.fixture
def worker(cupy: Any, request: pytest.FixtureRequest) -> Iterator[Worker]:
    device = CudaDevice(0, LAYOUT)
    script = Script(LAYOUT, follows=getattr(request, "param", False))
    for array in (*script.slots, *script.buffers):
        array[:] = np.nan
    yield Worker(script, LAYOUT, device, 0)  # type: ignore[arg-type]
    device.close()


FOLLOWED = pytest.mark.parametrize("worker", [False, True], indirect=True, ids=["whole", "pieces"])


def script_of(worker: Worker) -> Script:
    script = worker._endpoint
    assert isinstance(script, Script)
    return script


def side_of(worker: Worker) -> Any:
    device = worker._device
    assert isinstance(device, CudaDevice)
    return device._stream


def value_of(array: Any) -> float:
    found = array.get()
    assert (found == found.flat[0]).all(), "two versions in one array"
    return float(found.flat[0])


def full(cupy: Any, value: float) -> dict[str, Any]:
    return {
        name: cupy.full(shape, value, np.float32)
        for name, shape in zip(LAYOUT.names, LAYOUT.shapes, strict=True)
    }


def test_devices_are_given_out_in_turn_and_have_ids(cupy: Any) -> None:
    count = cupy.cuda.runtime.getDeviceCount()
    for worker in range(2 * count):
        assert choose_device("cuda", worker) == f"cuda:{worker % count}"
    ids = {identify(f"cuda:{k}") for k in range(count)}
    assert len(ids) == count
    assert bytes(16) not in ids


def test_a_share_of_the_card_is_a_limit_on_the_pool(cupy: Any) -> None:
    pool = cupy.get_default_memory_pool()
    before = pool.get_limit()
    try:
        limit = fit_memory("cuda:0", 4, {})
        assert limit is not None
        assert pool.get_limit() == limit
        assert 4 * limit < cupy.cuda.runtime.getDeviceProperties(0)["totalGlobalMem"]
    finally:
        pool.set_limit(size=before)


@FOLLOWED
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("who", ["user", "side", "both"])
def test_gradients_in_their_order(
    cupy: Any, slow: Callable[[Any], None], worker: Worker, own: bool, who: str
) -> None:
    script, grads = script_of(worker), full(cupy, 0.0)
    for step in range(5):
        target: Any = worker.gradients() if own else grads
        if who != "side":
            slow(cupy.cuda.get_current_stream())
        for array in target.values():
            array[...] = step + 1
        if who != "user":
            slow(side_of(worker))
        pending = worker.push(None if own else grads)
        if not own:
            for array in grads.values():
                array[...] = np.nan  # at once: push has returned
        pending.wait()
    assert [set(g.tolist()) for g in script.pushed] == [{1.0}, {2.0}, {3.0}, {4.0}, {5.0}]
    norms = [norm for _, norm in script.verdicts]
    assert norms == pytest.approx([math.sqrt(N) * (k + 1) for k in range(5)], rel=1e-12)
    assert all(followed.wrong == [] for followed in script.followed.values())
    assert not worker._device._pinning._told, "memory could not be registered"  # type: ignore[attr-defined]


@pytest.mark.parametrize("who", ["user", "side", "both"])
def test_parameters_in_their_order(
    cupy: Any, slow: Callable[[Any], None], worker: Worker, who: str
) -> None:
    script, results, params = script_of(worker), [], worker.pull()
    for _ in range(6):
        pending = worker.pull_async()
        if who != "side":
            slow(cupy.cuda.get_current_stream())
        results.append((params.version, params["w"] * 1.0))
        if who != "user":
            slow(side_of(worker))
        script.version += 1
        params = pending.wait()
    for version, result in results:
        assert value_of(result) == Script.value(version)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("special", [None, np.nan, np.inf, 3e38, 1e-30])
def test_the_verdict_is_the_host_s(cupy: Any, dtype: Any, special: float | None) -> None:
    layout = Layout.of({"a": np.zeros(100_001, dtype), "b": np.zeros((7, 11), dtype)})
    flat = np.random.default_rng(1).standard_normal(layout.size).astype(dtype)
    if special is not None:
        flat[layout.size // 2] = special
    device, script = CudaDevice(0, layout), Script(layout)
    worker = Worker(script, layout, device, 0)  # type: ignore[arg-type]
    worker.push({name: cupy.asarray(part) for name, part in layout.views(flat).items()}).wait()
    device.close()
    finite, norm = script.verdicts[0]
    host_finite, host_norm = GradientSlot(layout, flat).judge()
    assert finite == host_finite
    np.testing.assert_array_equal(script.pushed[0], flat)
    if finite:
        assert norm == pytest.approx(host_norm, rel=1e-6 if dtype == np.float32 else 1e-14)


@FOLLOWED
@pytest.mark.parametrize("interface", [False, True])
def test_a_tensor_of_pytorch_on_a_stream_of_its_own(
    cupy: Any, slow: Callable[[Any], None], worker: Worker, interface: bool
) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")

    class Interface:
        """Only the CUDA array interface, with the stream that PyTorch leaves out."""

        def __init__(self, tensor: Any, stream: Any) -> None:
            described = dict(tensor.__cuda_array_interface__)
            self.__cuda_array_interface__ = {**described, "version": 3, "stream": stream}
            self.tensor = tensor

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensors = {
            name: torch.zeros(shape, device="cuda:0")
            for name, shape in zip(LAYOUT.names, LAYOUT.shapes, strict=True)
        }
        for step in range(4):
            torch.cuda._sleep(CYCLES)
            for tensor in tensors.values():
                tensor.fill_(step + 1.0)
            grads: dict[str, Any] = dict(tensors)
            if interface:
                grads = {n: Interface(t, stream.cuda_stream) for n, t in tensors.items()}
            used = torch.cuda.memory_allocated()
            pending = worker.push(grads)
            assert torch.cuda.memory_allocated() == used, "it was copied on the device"
            for tensor in tensors.values():
                tensor.fill_(math.nan)
            pending.wait()
    assert [set(g.tolist()) for g in script_of(worker).pushed] == [{1.0}, {2.0}, {3.0}, {4.0}]


def test_what_pytorch_gives_and_cannot_be_read(cupy: Any, worker: Worker) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    good = {"b": np.zeros(3, np.float32)}
    for wrong in (
        torch.zeros(N - 3, device="cuda:0", requires_grad=True),
        torch.zeros(N - 3, device="cuda:0", dtype=torch.bfloat16),
        torch.zeros(N - 3, device="cuda:0", dtype=torch.int32),
        torch.zeros(N - 3, dtype=torch.int64),
    ):
        with pytest.raises(TypeError, match="gradient 'w'"):
            worker.push({"w": wrong, **good})
    worker.push({"w": torch.ones(N - 3), "b": torch.ones(3, device="cuda:0").half()}).wait()
    assert set(script_of(worker).pushed[0].tolist()) == {1.0}


@pytest.mark.parametrize("mode", [Async(), SSP(1), BSP()], ids=repr)
def test_a_run_gives_the_bits_of_the_cpu(cupy: Any, mode: Any) -> None:
    """Each product and sum is a kernel of its own, so that none is contracted to an FMA."""
    start = {"w": np.linspace(-1.0, 1.0, 500_000, dtype=np.float32).reshape(1000, 500)}

    def work(worker: psframe.Worker) -> None:
        for step in range(6):
            half = worker.pull()["w"] * np.float32(0.5)
            grads = {"w": half + np.float32(step / 8)}
            worker.push(grads).wait()

    def run(device: str) -> Any:
        params = psframe.run(
            work, start, optimizer=optim.SGD(0.1, momentum=0.5), mode=mode, device=device
        ).params
        assert params is not None
        return params["w"]

    np.testing.assert_array_equal(run("cuda"), run("cpu"))
