"""Devices: which one is chosen, and that the host and the GPU never look too early.

There is no GPU here: a small recording `cupy` stands in, whose stream does nothing before it is
synchronised. Whether CuPy itself keeps that order, the tests marked `gpu` would say.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import psframe
from psframe.devices import CudaDevice, HostDevice, choose_device, make_device
from psframe.layout import Layout

LAYOUT = Layout.of({"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)})


class FakeCupy(ModuleType):
    """The few names of CuPy that devices use; `log` is what was called."""

    def __init__(self, gpus: int) -> None:
        super().__init__("cupy")
        self.log: list[str] = []
        self.queue: list[tuple[np.ndarray, np.ndarray]] = []
        stream = SimpleNamespace(synchronize=self.synchronize)
        self.cuda = SimpleNamespace(
            Device=lambda k: SimpleNamespace(use=lambda: self.log.append(f"use {k}")),
            get_current_stream=lambda: stream,
            runtime=SimpleNamespace(getDeviceCount=lambda: gpus),
        )
        self.is_available = lambda: gpus > 0

    def empty(self, size: int, dtype: np.dtype) -> "FakeArray":
        return FakeArray(self, np.full(size, np.nan, dtype))

    def asnumpy(self, array: "FakeArray") -> np.ndarray:
        self.log.append("asnumpy")
        self.run_queue()
        return array.memory.copy()

    def synchronize(self) -> None:
        self.log.append("synchronize")
        self.run_queue()

    def run_queue(self) -> None:
        for target, source in self.queue:
            target[...] = source
        self.queue.clear()


class FakeArray:
    """Device memory: only `set`, and the kernels of this test, write it; in stream order."""

    def __init__(self, cupy: FakeCupy, memory: np.ndarray) -> None:
        self.cupy, self.memory = cupy, memory
        self.shape, self.dtype = memory.shape, memory.dtype

    def __getitem__(self, key: slice) -> "FakeArray":
        return FakeArray(self.cupy, self.memory[key])

    def reshape(self, shape: tuple[int, ...]) -> "FakeArray":
        return FakeArray(self.cupy, self.memory.reshape(shape))

    def set(self, source: np.ndarray) -> None:
        assert source.flags.c_contiguous
        assert (source.shape, source.dtype) == (self.shape, self.dtype)
        self.cupy.log.append("set")
        self.cupy.queue.append((self.memory, source))  # read later, as a copy engine would

    def compute(self, value: float) -> "FakeArray":
        self.cupy.queue.append((self.memory, np.full(self.shape, value, self.dtype)))
        return self


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy(gpus=2)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


@pytest.mark.parametrize(
    ("device", "worker", "visible", "chosen"),
    [
        ("cpu", 0, 4, "cpu"),
        ("auto", 0, 0, "cpu"),
        ("auto", 0, 4, "cuda:0"),
        ("auto", 5, 4, "cuda:1"),  # GPUs are given out in turn
        ("cuda", 3, 4, "cuda:3"),
        ("cuda", 3, 1, "cuda:0"),
        ("cuda:2", 0, 4, "cuda:2"),
        ("cuda:02", 0, 4, "cuda:2"),
    ],
)
def test_the_device_that_is_chosen(device: str, worker: int, visible: int, chosen: str) -> None:
    assert choose_device(device, worker, visible) == chosen


@pytest.mark.parametrize("device", ["gpu", "", "cuda:", "auto:0", "cpu:0", "cuda:x", "cuda:²"])
def test_what_is_no_device(device: str) -> None:
    with pytest.raises(ValueError, match="device: expected 'auto', 'cpu', 'cuda' or 'cuda:k'"):
        choose_device(device, 0, 1)


@pytest.mark.parametrize(
    ("device", "visible", "error"),
    [
        ("cuda", 0, "needs a GPU that CuPy can use, and there is none"),
        ("cuda:0", 0, "needs a GPU"),
        ("cuda:2", 2, "'cuda:2', but the visible GPUs are cuda:0 to cuda:1"),
    ],
)
def test_a_gpu_that_is_not_there(device: str, visible: int, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        choose_device(device, 0, visible)


def test_cupy_is_asked_how_many_gpus_there_are(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_device("auto", 3) == "cuda:1"
    cupy.is_available = lambda: False  # CuPy is installed, a driver is not
    assert choose_device("auto", 3) == "cpu"
    monkeypatch.setitem(sys.modules, "cupy", None)  # the import fails
    assert choose_device("auto", 3) == "cpu"


def test_the_host_copies_nothing() -> None:
    device = make_device("cpu", LAYOUT)
    assert isinstance(device, HostDevice)
    views = LAYOUT.views(np.arange(9, dtype=np.float32))
    arrays, copied = device.params(views)
    assert not copied
    for given in (arrays, device.gradients(views), device.staging(views)):
        assert all(given[name] is view for name, view in views.items())


def test_parameters_are_on_the_gpu_before_the_host_s_may_change(cupy: FakeCupy) -> None:
    device = make_device("cuda:1", LAYOUT)
    assert isinstance(device, CudaDevice)
    assert (device.name, device.xp, cupy.log) == ("cuda:1", cupy, ["use 1"])
    host = np.arange(9, dtype=np.float32)
    arrays, copied = device.params(LAYOUT.views(host))
    assert copied
    assert cupy.log[1:] == ["set", "set", "synchronize"]
    host[:] = -1  # the server may now write its buffer
    assert arrays["w"].memory.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["b"].memory.tolist() == [6, 7, 8]


def test_the_parameters_before_a_prefetch_stay(cupy: FakeCupy) -> None:
    device = CudaDevice(0, LAYOUT)
    first, _ = device.params(LAYOUT.views(np.full(9, 1, np.float32)))
    second, _ = device.params(LAYOUT.views(np.full(9, 2, np.float32)))
    assert (first["w"].memory == 1).all()
    assert (second["w"].memory == 2).all()


def test_a_tensor_that_is_not_contiguous_is_copied_first(cupy: FakeCupy) -> None:
    layout = Layout.of({"w": np.zeros((2, 3), np.float32)})
    transposed = np.arange(6, dtype=np.float32).reshape(3, 2).T
    arrays, _ = CudaDevice(0, layout).params({"w": transposed})
    assert arrays["w"].memory.tolist() == transposed.tolist()


def test_gradients_are_fetched_after_the_kernels_that_make_them(cupy: FakeCupy) -> None:
    device = CudaDevice(0, LAYOUT)
    staging = device.staging({})
    assert {name: array.shape for name, array in staging.items()} == {"w": (2, 3), "b": (3,)}
    on_host = np.full(3, 4, np.float32)
    fetched = device.gradients({"w": staging["w"].compute(3.0), "b": on_host})
    assert (fetched["w"] == 3).all()  # not what was there before the kernel ran
    assert fetched["b"] is on_host


def test_two_slots_have_two_sets_of_gradients(cupy: FakeCupy) -> None:
    device = CudaDevice(0, LAYOUT)
    first, second = device.staging({}), device.staging({})
    first["w"].compute(1.0)
    second["w"].compute(2.0)
    cupy.run_queue()
    assert (first["w"].memory == 1).all()


@pytest.mark.parametrize("own_arrays", [False, True])
def test_a_run_on_the_fake_gpu_gives_the_host_s_bits(cupy: FakeCupy, own_arrays: bool) -> None:
    """The whole way, through threads: pull to the GPU, compute there, push from there."""
    seen = []

    def work(worker: psframe.Worker) -> None:
        seen.append((worker.device, worker.xp))
        for step in range(5):
            params = worker.pull()
            value = float(params["w"].memory[0, 0]) + step
            grads = worker.gradients() if own_arrays else CudaDevice(0, LAYOUT).staging({})
            for array in grads.values():
                array.compute(value)
            receipt = worker.push(None if own_arrays else grads).wait()
            assert receipt.applied, receipt

    start = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
    result = psframe.run(work, start, optimizer=psframe.optim.SGD(lr=0.5), device="cuda:0")
    assert seen == [("cuda:0", cupy)]
    w = 1.0
    for step in range(5):
        w -= 0.5 * (w + step)
    assert result.params is not None
    assert all((array == np.float32(w)).all() for array in result.params.values())
