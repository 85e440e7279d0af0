"""A `cupy` without a GPU: streams as queues, events as places in them, memory by its address.

Nothing that is queued is done before somebody waits for it (or, with `eager`, everything on a
stream but the default one as soon as the events allow): what the code under test reads too early is
poison, and what it overwrites too early is overwritten. Device memory is NumPy memory, copies are
`memmove` between addresses, and each copy's host end must be pinned or registered.
"""

from __future__ import annotations

import contextlib
import ctypes
import operator
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import encoders_in_c
import numpy as np
from fake_ipc import FakeIpc

__all__ = ["FakeArray", "FakeCupy", "ForeignArray"]


class FakeEvent:
    """An event: the last place where it was recorded, as in CUDA."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.place: tuple[FakeStream, int] | None = None
        self.ptr = cuda.handle(self)

    def record(self, stream: FakeStream) -> None:
        with self.cuda.lock:
            self.place = stream, stream.queued

    def synchronize(self) -> None:
        self.cuda.check()
        self.cuda.log.append("synchronize event")
        with self.cuda.lock:
            self.cuda.reach(self.place)

    @property
    def done(self) -> bool:
        with self.cuda.lock:
            return self.place is None or self.place[0].ran >= self.place[1]


class FakeStream:
    """A queue of work; `ran` of the `queued` operations have been done."""

    def __init__(self, cuda: FakeCuda, ptr: int = 0) -> None:
        self.cuda = cuda
        self.ptr = ptr or cuda.handle(self)
        self.work: deque[Callable[[], None]] = deque()
        self.queued = self.ran = 0

    def add(self, operation: Callable[[], None]) -> None:
        with self.cuda.lock:
            self.work.append(operation)
            self.queued += 1
            if self.cuda.eager and self is not self.cuda.default:
                self.run_to(self.queued)

    def wait_event(self, event: FakeEvent) -> None:
        place = event.place
        self.add(lambda: self.cuda.reach(place))

    def synchronize(self) -> None:
        self.cuda.check()
        self.cuda.log.append("synchronize stream")
        with self.cuda.lock:
            self.run_to(self.queued)

    def run_to(self, count: int) -> None:
        while self.ran < count:
            self.work[0]()
            self.work.popleft()
            self.ran += 1

    def __enter__(self) -> FakeStream:
        self.cuda.stack().append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self.cuda.stack().pop()


class FakeRuntime(FakeIpc):
    """The calls of the CUDA runtime that are used, with their values."""

    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3

    def __init__(self, cuda: FakeCuda, gpus: int, total: int) -> None:
        super().__init__(cuda.is_busy, total)
        self.cuda, self.gpus = cuda, gpus
        self.registered: dict[int, int] = {}
        self.registrations = 0
        self.refuse_register = False
        self.copies: list[tuple[int, int]] = []  # kind, bytes

    def getDeviceCount(self) -> int:
        return self.gpus

    def getDeviceProperties(self, ordinal: int) -> dict[str, Any]:
        return {"uuid": bytes([7, ordinal] * 8), "totalGlobalMem": self.total, "name": b"fake"}

    def pointerGetAttributes(self, pointer: int) -> SimpleNamespace:
        return SimpleNamespace(device=self.cuda.places.get(pointer, 0))

    def eventRecord(self, event: int, stream: int) -> None:
        self.cuda.handles[event].record(self.cuda.stream_at(stream))

    def hostRegister(self, address: int, n_bytes: int, flags: int) -> None:
        assert flags == 1, "portable"
        if self.refuse_register:
            raise RuntimeError("cudaErrorNotSupported: operation not supported")
        if address in self.registered:
            raise RuntimeError("cudaErrorHostMemoryAlreadyRegistered")
        self.registered[address] = n_bytes
        self.registrations += 1

    def hostUnregister(self, address: int) -> None:
        self.cuda.check()
        end = address + self.registered.pop(address)
        assert not any(address <= at < end for at in self.cuda.copying()), "it is being copied"

    def ipcCloseMemHandle(self, address: int) -> None:
        self.cuda.check()
        super().ipcCloseMemHandle(address)

    def reaches(self, host: int, n_bytes: int) -> bool:
        ranges = [*self.registered.items(), *self.cuda.pinned.items()]
        return any(a <= host and host + n_bytes <= a + n for a, n in ranges)

    def memsetAsync(self, target: int, value: int, n_bytes: int, stream: int) -> None:
        assert self.cuda.is_device(target, n_bytes), "not on the device"
        self.cuda.stream_at(stream).add(lambda: ctypes.memset(target, value, n_bytes))

    def memcpyAsync(self, target: int, source: int, n_bytes: int, kind: int, stream: int) -> None:
        if kind == self.memcpyDeviceToDevice:
            assert self.cuda.is_device(source, n_bytes), "not on the device"
            assert self.cuda.is_device(target, n_bytes), "not on the device"
            self.copies.append((kind, n_bytes))
            ends = [(target, n_bytes), (source, n_bytes)]
            self.cuda.under_way += ends

            def copy_here() -> None:
                ctypes.memmove(target, source, n_bytes)
                for end in ends:
                    self.cuda.under_way.remove(end)

            self.cuda.stream_at(stream).add(copy_here)
            return
        host = target if kind == self.memcpyDeviceToHost else source
        assert self.reaches(host, n_bytes), "not pinned"
        if kind == self.memcpyDeviceToHost:
            ctypes.memset(target, 0xFF, n_bytes)  # NaN, until it has arrived
        self.copies.append((kind, n_bytes))
        under_way = self.cuda.under_way
        entry = (host, n_bytes)
        under_way.append(entry)

        def copy() -> None:
            assert self.reaches(host, n_bytes), "it was unregistered"
            ctypes.memmove(target, source, n_bytes)
            under_way.remove(entry)

        self.cuda.stream_at(stream).add(copy)


class FakePool:
    """The pools of all devices; `limits` has those that have one."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.limits: dict[int, int] = {}

    def set_limit(self, size: int) -> None:
        self.limits[self.cuda.current_device()] = size

    def free_bytes(self) -> int:
        return self.cuda.runtime.free_bytes()

    def free_all_blocks(self) -> None:
        self.cuda.runtime.free_all_blocks()


class FakeDevice:
    def __init__(self, cuda: FakeCuda, ordinal: int) -> None:
        self.cuda, self.id = cuda, ordinal
        self.before: list[int] = []

    def use(self) -> None:
        self.cuda.use(self.id)

    def __enter__(self) -> FakeDevice:
        self.before.append(self.cuda.current_device())
        self.use()
        return self

    def __exit__(self, *exception: object) -> None:
        self.cuda.use(self.before.pop())


class FakeCuda:
    """`cupy.cuda`."""

    def __init__(self, gpus: int, total: int) -> None:
        self.lock = threading.RLock()
        self.log: list[str] = []
        self.handles: dict[int, Any] = {}
        self.pinned: dict[int, int] = {}
        self.places: dict[int, int] = {}
        self.under_way: list[tuple[int, int]] = []
        self.device_memory: dict[int, int] = {}
        self.eager = False
        self.elapsed_ms = 0.0  # between any two events
        self.broken = False  # a kernel has failed: what waits, or closes, raises from then on
        self.runtime = FakeRuntime(self, gpus, total)
        self.using_allocator = self.runtime.using_allocator
        self.default = FakeStream(self, ptr=1)
        self.used_by: dict[str, int] = {}  # by thread, the device that it has made current
        self._local = threading.local()

    def check(self) -> None:
        if self.broken:
            raise RuntimeError("cudaErrorIllegalAddress")

    def mend(self) -> None:
        """Be broken no more; what was queued is never done."""
        self.broken = False
        self.under_way.clear()
        for stream in (self.default, *self.handles.values()):
            if isinstance(stream, FakeStream):
                stream.work.clear()
                stream.ran = stream.queued

    def handle(self, what: Any) -> int:
        self.handles[1000 + len(self.handles)] = what
        return 999 + len(self.handles)

    def stream_at(self, ptr: int) -> FakeStream:
        return self.default if ptr in (0, 1) else self.handles[ptr]

    def stack(self) -> list[FakeStream]:
        if not hasattr(self._local, "stack"):
            self._local.stack = [self.default]
        return self._local.stack

    def reach(self, place: tuple[FakeStream, int] | None) -> None:
        if place is not None:
            place[0].run_to(place[1])

    def allocated(self, memory: np.ndarray) -> np.ndarray:
        """Note that memory is the device's, as long as it lives."""
        address = memory.ctypes.data
        self.device_memory[address] = memory.nbytes
        weakref.finalize(memory, self.device_memory.pop, address, None)
        return memory

    def is_busy(self, address: int, n_bytes: int) -> bool:
        return any(a < address + n_bytes and address < a + n for a, n in self.under_way)

    def is_device(self, address: int, n_bytes: int) -> bool:
        if self.runtime.is_here(address, n_bytes):
            return True
        ranges = tuple(self.device_memory.items())
        return any(a <= address and address + n_bytes <= a + n for a, n in ranges)

    def copying(self) -> list[int]:
        return [address for address, _ in self.under_way]

    def get_current_stream(self) -> FakeStream:
        return self.stack()[-1]

    def Device(self, ordinal: int) -> FakeDevice:
        return FakeDevice(self, ordinal)

    def use(self, ordinal: int) -> None:
        self._local.device = ordinal
        self.used_by[threading.current_thread().name] = ordinal

    def current_device(self) -> int:
        return getattr(self._local, "device", 0)

    def Stream(self, *, non_blocking: bool) -> FakeStream:
        assert non_blocking, "or the default stream would order it, and hide what is missing"
        return FakeStream(self)

    def Event(self, *, disable_timing: bool = False) -> FakeEvent:
        return FakeEvent(self)

    def get_elapsed_time(self, begin: FakeEvent, end: FakeEvent) -> float:
        assert begin.done
        assert end.done
        return self.elapsed_ms

    def alloc_pinned_memory(self, n_bytes: int) -> np.ndarray:
        memory = np.full(n_bytes, 0xFF, np.uint8)
        self.pinned[memory.ctypes.data] = n_bytes
        weakref.finalize(memory, self.pinned.pop, memory.ctypes.data)
        return memory


class FakeArray:
    """Device memory: an operation is queued, and its result is poison until it has run."""

    __array_ufunc__ = None  # NumPy's operators leave it to this class

    def __init__(self, cupy: FakeCupy, memory: np.ndarray, ordinal: int = 0) -> None:
        self.cupy, self.memory = cupy, memory
        self.shape, self.dtype, self.size = memory.shape, memory.dtype, memory.size
        self.nbytes, self.itemsize = memory.nbytes, memory.itemsize
        self.data = SimpleNamespace(ptr=memory.ctypes.data)
        self.device = SimpleNamespace(id=ordinal)

    def __getitem__(self, key: Any) -> FakeArray:
        return FakeArray(self.cupy, self.memory[key], self.device.id)

    def reshape(self, *shape: Any) -> FakeArray:
        view = self.memory.reshape(*shape)
        assert np.shares_memory(view, self.memory) or not view.size
        return FakeArray(self.cupy, view, self.device.id)

    def __setitem__(self, key: Any, value: Any) -> None:
        target = self.memory[key]
        self.queue(lambda: np.copyto(target, host_of(value)))

    def queue(self, operation: Callable[[], None]) -> None:
        self.cupy.cuda.get_current_stream().add(operation)

    def made(self, compute: Callable[[], Any], shape: tuple[int, ...], dtype: Any) -> FakeArray:
        result = self.cupy.cuda.allocated(np.empty(shape, dtype))
        result.reshape(-1).view(np.uint8)[:] = 0xFF  # NaN
        self.queue(lambda: np.copyto(result, compute(), casting="unsafe"))
        return FakeArray(self.cupy, result, self.device.id)

    def _binary(self, operate: Callable[[Any, Any], Any], other: Any, turned: bool) -> FakeArray:
        def compute() -> Any:
            a, b = self.memory, host_of(other)
            return operate(b, a) if turned else operate(a, b)

        given = host_of(other)
        shape = np.broadcast_shapes(self.shape, np.shape(given))
        return self.made(compute, shape, np.result_type(self.memory, given))

    def copy(self) -> FakeArray:
        return self.made(lambda: self.memory, self.shape, self.dtype)

    def astype(self, dtype: Any) -> FakeArray:
        return self.made(lambda: self.memory, self.shape, dtype)

    def get(self) -> np.ndarray:
        self.cupy.cuda.get_current_stream().synchronize()
        return self.memory.copy()

    def __add__(self, other: Any) -> FakeArray:
        return self._binary(operator.add, other, False)

    def __sub__(self, other: Any) -> FakeArray:
        return self._binary(operator.sub, other, False)

    def __rsub__(self, other: Any) -> FakeArray:
        return self._binary(operator.sub, other, True)

    def __mul__(self, other: Any) -> FakeArray:
        return self._binary(operator.mul, other, False)

    __radd__, __rmul__ = __add__, __mul__


class ForeignArray:
    """Another library's array on a GPU, made on a stream of that library's own.

    Args:
        array: the memory.
        stream: where its producer works.
        protocol: "dlpack" or "interface".
        kind, ordinal: what `__dlpack_device__` says.
    """

    def __init__(
        self,
        array: FakeArray,
        stream: FakeStream,
        protocol: str,
        kind: int = 2,
        ordinal: int = 0,
    ) -> None:
        self.array, self.stream, self.kind, self.ordinal = array, stream, kind, ordinal
        array.cupy.cuda.places[array.data.ptr] = ordinal
        if protocol == "dlpack":
            self.__dlpack__ = self.export
            self.__dlpack_device__ = lambda: (self.kind, self.ordinal)
        else:
            self.interface = {"data": (array.data.ptr, False), "stream": stream.ptr}

    def export(self, *, stream: FakeStream) -> FakeArray:
        event = self.array.cupy.cuda.Event(disable_timing=True)
        event.record(self.stream)
        stream.wait_event(event)
        return self.array

    def __getattr__(self, name: str) -> Any:
        if name == "__cuda_array_interface__" and "interface" in self.__dict__:
            return self.interface
        raise AttributeError(name)


class FakeKernel:
    """What the kernel of the squares computes, in the order of its blocks and threads."""

    def __init__(self, cupy: FakeCupy, source: str) -> None:
        self.cupy = cupy
        self.dtype = np.dtype("f4" if "(const float*)" in source else "f8")

    def __call__(self, grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
        table, runs, partial = arguments
        blocks, threads = grid[0], block[0]

        def run() -> None:
            sums = np.zeros(blocks * threads)
            for k in range(runs):
                address, size = (int(n) for n in table.memory[2 * k : 2 * k + 2])
                x = at(address, size, self.dtype).astype(np.float64)
                for begin in range(0, size, sums.size):
                    part = x[begin : begin + sums.size]
                    with np.errstate(all="ignore"):
                        sums[: part.size] += part * part
            tree, width = sums.reshape(blocks, threads), threads // 2
            while width:
                with np.errstate(all="ignore"):
                    tree[:, :width] += tree[:, width : 2 * width]
                width //= 2
            partial.memory[:blocks] = tree[:, 0]

        self.cupy.cuda.get_current_stream().add(run)
        self.cupy.kernels += 1


class FakeModule:
    """The encoders' kernels, compiled as C; the bits of the results are those of that."""

    def __init__(self, cupy: FakeCupy, code: str) -> None:
        self.cupy = cupy
        self.library, self.signatures = encoders_in_c.compiled(code)

    def get_function(self, name: str) -> Callable[..., None]:
        function, kinds = getattr(self.library, f"launch_{name}"), self.signatures[name]
        function.argtypes, function.restype = [ctypes.c_uint] * 3 + kinds, None

        def launch(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            assert 1 <= grid[0] < 2**31
            given = [encoders_in_c.argument(*one) for one in zip(arguments, kinds, strict=True)]
            threads = min(block[0], encoders_in_c.THREADS)

            def run() -> None:
                function(grid[0], 1, threads, *given)
                diverged = ctypes.c_int.in_dll(self.library, "diverged")
                assert not diverged.value, f"{name}: threads differ at a barrier"

            self.cupy.cuda.get_current_stream().add(run)
            self.cupy.launched.append(name)

        return launch


class FakeCupy(ModuleType):
    """The names of CuPy that devices use.

    Args:
        gpus: how many there are.
        total: bytes of memory of each.
    """

    ndarray = FakeArray

    def __init__(self, gpus: int = 2, total: int = 8 << 30) -> None:
        super().__init__("cupy")
        self.cuda: Any = FakeCuda(gpus, total)
        self.pool = FakePool(self.cuda)
        self.kernels = self.poisoned = 0
        self.launched: list[str] = []  # the encoders' kernels
        self.is_available = lambda: gpus > 0

    def get_default_memory_pool(self) -> FakePool:
        return self.pool

    def empty(self, size: int, dtype: Any) -> FakeArray:
        """Memory that its last user has still to write to, on the current stream."""
        if self.cuda.runtime.whole:
            memory = self.cuda.allocated(self.cuda.runtime.allocate(size, dtype))
            return FakeArray(self, memory, self.cuda.current_device())
        memory = self.cuda.allocated(np.empty(size, dtype))
        memory.view(np.uint8)[:] = 0xFF
        self.cuda.get_current_stream().add(lambda: memory.view(np.uint8).fill(0xFF))
        return FakeArray(self, memory, self.cuda.current_device())

    def zeros(self, size: int, dtype: Any) -> FakeArray:
        array = self.empty(size, dtype)
        array[...] = np.zeros(size, dtype)
        return array

    def ascontiguousarray(self, array: FakeArray, dtype: Any) -> FakeArray:
        if array.dtype == dtype and array.memory.flags.c_contiguous:
            return array
        return array.made(lambda: array.memory, array.shape, dtype)

    def from_dlpack(self, array: Any) -> FakeArray:
        return array.__dlpack__(stream=self.cuda.get_current_stream())

    def asarray(self, array: Any) -> FakeArray:
        if isinstance(array, np.ndarray):
            made = self.empty(array.size, array.dtype)
            made[...] = array.copy()
            return made
        return array.array  # as with CUPY_CUDA_ARRAY_INTERFACE_SYNC=0: it does not wait

    def RawKernel(self, source: str, name: str) -> FakeKernel:
        assert name == "psframe_squares"
        return FakeKernel(self, source)

    def RawModule(self, *, code: str, options: tuple[str, ...]) -> FakeModule:
        assert options == ("--fmad=false",)
        return FakeModule(self, code)


def host_of(value: Any) -> Any:
    return value.memory if isinstance(value, FakeArray) else value


def at(address: int, size: int, dtype: Any) -> np.ndarray:
    """View memory by its address."""
    n_bytes = size * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * n_bytes).from_address(address), dtype)


@contextlib.contextmanager
def installed(fake: FakeCupy) -> Iterator[FakeCupy]:
    """Have `import cupy` find the fake."""
    import sys

    from psframe.devices import norms

    before = sys.modules.get("cupy")
    sys.modules["cupy"] = fake
    norms.squares_kernel.cache_clear()
    try:
        yield fake
    finally:
        norms.squares_kernel.cache_clear()
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before
