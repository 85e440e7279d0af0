"""A CUDA device made of NumPy, under the names of CuPy that servers use, and as late as may be.

Streams do nothing before they are synchronised, or before something waits for an event behind it:
so who reads too early finds what was there before, or the NaN that fills new memory and whatever a
copy is still to write. With `copies="early"` the streams that only copy do all at once, as far as
events let them: so who overwrites too early is found, too. Kernels are read from their C text.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from fake_ipc import FakeIpc

_TOKEN = re.compile(r"\s*(\w+|<<|[!=<>]=|[-+*/<>?:()])")
_CASTS: dict[str, Any] = {"float": np.float32, "unsigned int": np.uint32}


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"error {status}")
        self.status = status


class Stream:
    """What is to be done, in order."""

    def __init__(self, fake: FakeCuda, name: str) -> None:
        self.fake, self.name = fake, name
        self.ptr = len(fake.streams) + 1
        self.todo: list[Callable[[], Any]] = []
        self.done = 0
        self.computes = False  # whether a kernel has run here
        fake.streams.append(self)

    def add(self, what: Callable[[], Any]) -> None:
        with self.fake.lock:
            self.todo.append(what)
            if self.fake.copies == "early" and self.name == "stream" and not self.computes:
                self.run(len(self.todo))

    def run(self, end: int) -> None:
        while self.done < end:
            self.done += 1
            self.todo[self.done - 1]()

    def synchronize(self) -> None:
        with self.fake.lock:
            self.fake.waits += 1
            self.run(len(self.todo))

    def wait_event(self, event: Event) -> None:
        stream, position = event.recorded
        self.add(lambda: stream.run(position))

    def __enter__(self) -> Stream:
        self.fake.entered.append(self)
        self.computes = True
        return self

    def __exit__(self, *error: object) -> None:
        self.fake.entered.pop()


class Event:
    def __init__(self, fake: FakeCuda) -> None:
        self.recorded = (fake.null, 0)

    def record(self, stream: Stream) -> None:
        self.recorded = (stream, len(stream.todo))


class FakeArray:
    """Memory of the device, which only copies and kernels reach."""

    __module__ = "cupy"

    def __init__(self, fake: FakeCuda, memory: Any) -> None:
        self.fake, self.memory = fake, memory
        self.dtype, self.shape, self.size = memory.dtype, memory.shape, memory.size
        self.nbytes, self.itemsize = memory.nbytes, memory.itemsize
        self.data = SimpleNamespace(ptr=memory.ctypes.data)

    def __len__(self) -> int:
        return len(self.memory)

    def __getitem__(self, part: slice) -> FakeArray:
        assert isinstance(part, slice)
        return FakeArray(self.fake, self.memory[part])

    def __setitem__(self, part: Any, value: FakeArray) -> None:
        memory = self.memory
        self.fake.current.add(lambda: memory.__setitem__(part, value.memory))

    def get(self, stream: Stream | None = None) -> Any:
        (stream or self.fake.current).synchronize()
        return self.memory.copy()


class _Device:
    def __init__(self, fake: FakeCuda, ordinal: int) -> None:
        self.fake, self.ordinal = fake, ordinal
        fake.used.add(ordinal)

    def use(self) -> None:
        self.fake.devices[:] = [self.ordinal]
        self.fake.used_by[threading.current_thread().name] = self.ordinal

    def __enter__(self) -> None:
        self.fake.devices.append(self.ordinal)

    def __exit__(self, *error: object) -> None:
        self.fake.devices.pop()


class FakeCuda(ModuleType):
    """Stands for `cupy`.

    Attributes:
        used: the devices that were opened; used_by: by thread, the one that it has made current.
        kernels: the names of those that were launched, in order.
        copied: bytes that have gone (to the device, to the host).
        waits: how often a stream has been waited for.
        registered: addresses of host memory to their sizes; was_registered: whether any ever was.
        limits: by device, of its memory pool.
        refuses: whether no memory can be registered; refused: how often that was tried.
    """

    def __init__(self, gpus: int = 1, copies: str = "late") -> None:
        super().__init__("cupy")
        self.copies = copies
        self.lock = threading.RLock()
        self.streams: list[Stream] = []
        self.null = Stream(self, "null")
        self._local = threading.local()
        self._allocated: list[Any] = []
        self.used: set[int] = set()
        self.used_by: dict[str, int] = {}
        self.kernels: list[str] = []
        self.copied = [0, 0]
        self.waits = 0
        self.registered: dict[int, int] = {}
        self.was_registered = False
        self.refused = 0
        self.refuses = False
        self.under_way: list[tuple[int, int]] = []  # where copies read, (address, bytes)
        self.ipc = FakeIpc(self._is_busy)
        self.between = 0  # bytes that have come from others' devices, or this one
        self.int32, self.ndarray = np.int32, FakeArray
        self.is_available = lambda: gpus > 0
        self.cuda = SimpleNamespace(
            Device=lambda ordinal: _Device(self, ordinal),
            Stream=lambda non_blocking: Stream(self, "stream"),
            Event=lambda disable_timing: Event(self),
            get_current_stream=lambda: self.current,
            alloc_pinned_memory=lambda size: bytearray(b"\xff" * size),
            using_allocator=self.ipc.using_allocator,
            runtime=SimpleNamespace(
                CUDARuntimeError=CUDARuntimeError,
                getDeviceCount=lambda: gpus,
                getDeviceProperties=lambda ordinal: {
                    "uuid": bytes([7, ordinal] * 8),
                    "totalGlobalMem": self.ipc.total,
                },
                memcpyHostToDevice=1,
                memcpyDeviceToHost=2,
                memcpyDeviceToDevice=3,
                memcpyAsync=self._copy,
                memsetAsync=self._set,
                hostRegister=self._register,
                hostUnregister=lambda address: self.registered.pop(address),
                memGetInfo=self.ipc.memGetInfo,
                cudaIpcMemLazyEnablePeerAccess=1,
                ipcGetMemHandle=self.ipc.ipcGetMemHandle,
                ipcOpenMemHandle=self.ipc.ipcOpenMemHandle,
                ipcCloseMemHandle=self.ipc.ipcCloseMemHandle,
                deviceCanAccessPeer=self.ipc.deviceCanAccessPeer,
            ),
        )
        self.limits: dict[int, int] = {}
        self.get_default_memory_pool = lambda: SimpleNamespace(
            set_limit=self._limit,
            free_bytes=self.ipc.free_bytes,
            free_all_blocks=self.ipc.free_all_blocks,
        )
        self.ElementwiseKernel = lambda *texts, **options: _Elementwise(self, *texts, **options)
        self.ReductionKernel = lambda *texts: _Distance(self, *texts)

    @property
    def entered(self) -> list[Stream]:
        return self._local.__dict__.setdefault("streams", [])

    @property
    def devices(self) -> list[int]:
        return self._local.__dict__.setdefault("devices", [])

    @property
    def current(self) -> Stream:
        return self.entered[-1] if self.entered else self.null

    def allocate(self, size: int, dtype: Any) -> FakeArray:
        assert self.devices, "which device?"
        memory = np.empty(size, dtype)
        memory.view(np.uint8)[:] = 0xFF  # NaN
        self._allocated.append(memory)
        return FakeArray(self, memory)

    def empty(self, size: int, dtype: Any) -> FakeArray:
        """Memory that its last user has still to write to, on the current stream."""
        if self.ipc.whole:
            assert self.devices, "which device?"
            return FakeArray(self, self.ipc.allocate(size, dtype))
        array = self.allocate(size, dtype)
        self.current.add(lambda: array.memory.view(np.uint8).fill(0xFF))
        return array

    def zeros(self, size: int, dtype: Any) -> FakeArray:
        array = self.allocate(size, dtype)
        self.current.add(lambda: array.memory.fill(0))
        return array

    def asarray(self, host: Any) -> FakeArray:
        array = self.allocate(host.size, host.dtype)
        array.memory[:] = host
        return array

    def _is_here(self, address: int) -> bool:
        if self.ipc.is_here(address, 1) or any(
            0 <= address - begin < os.stat(name).st_size
            for begin, name in tuple(self.ipc.files.items())
        ):
            return True
        return any(0 <= address - one.ctypes.data < max(1, one.nbytes) for one in self._allocated)

    def _is_busy(self, address: int, n_bytes: int) -> bool:
        return any(a < address + n_bytes and address < a + n for a, n in self.under_way)

    def _stream(self, pointer: int) -> Stream:
        return self.streams[pointer - 1]

    def _copy(self, target: int, source: int, n_bytes: int, kind: int, stream: int) -> None:
        to_host = kind == 2
        if n_bytes:
            assert self._is_here(source if to_host else target), "no memory of the device"
            other = self._is_here(target if to_host else source)
            assert other == (kind == 3), "memory of the device"
        if kind == 3:
            self.between += n_bytes
        else:
            self.copied[to_host] += n_bytes
        if to_host:
            ctypes.memset(target, 0xFF, n_bytes)
        end = source, n_bytes
        self.under_way.append(end)

        def copy() -> None:
            ctypes.memmove(target, source, n_bytes)
            self.under_way.remove(end)

        self._stream(stream).add(copy)

    def _set(self, target: int, value: int, n_bytes: int, stream: int) -> None:
        self._stream(stream).add(lambda: ctypes.memset(target, value, n_bytes))

    def _limit(self, size: int) -> None:
        self.limits[self.devices[-1]] = size

    def _register(self, address: int, n_bytes: int, flags: int) -> None:
        assert not address % 4096
        if self.refuses:
            self.refused += 1
            raise CUDARuntimeError(2)
        if address in self.registered:
            raise CUDARuntimeError(712)
        self.registered[address] = n_bytes
        self.was_registered = True


def names_of(params: str) -> list[tuple[str, str]]:
    """(type, name) of each."""
    return [tuple(param.removeprefix("raw ").split()) for param in params.split(", ")]  # type: ignore[misc]


class _Elementwise:
    def __init__(
        self,
        fake: FakeCuda,
        ins: str,
        outs: str,
        operation: str,
        name: str,
        **more: Any,
    ) -> None:
        assert more == {"no_return": True, "options": ("--fmad=false",)}
        self.fake, self.name = fake, name
        self.inputs, self.outputs = names_of(ins), names_of(outs)
        self.lines = operation.splitlines()

    def __call__(self, *arguments: Any) -> None:
        assert self.fake.current is not self.fake.null, "a kernel on nobody's stream"
        declared = [*self.inputs, *self.outputs]
        assert len(declared) == len(arguments)
        given = {name: value for (_, name), value in zip(declared, arguments, strict=True)}
        dtype = given[self.outputs[0][1]].dtype
        for (kind, name), value in zip(declared, arguments, strict=True):
            expected = {"T": dtype}.get(kind) or np.dtype(kind)
            assert value.dtype == expected, (self.name, name, value.dtype)
        arrays = [v for name, v in given.items() if isinstance(v, FakeArray) and name != "bad"]
        assert len({len(array) for array in arrays}) == 1, self.name
        self.fake.kernels.append(self.name)
        self.fake.current.add(lambda: self._run(given, dtype))

    def _run(self, given: dict[str, Any], dtype: Any) -> None:
        values = {k: v.memory if isinstance(v, FakeArray) else v for k, v in given.items()}
        values = {k: v.copy() if k.startswith("in_") else v for k, v in values.items()}
        with np.errstate(all="ignore"):
            for line in self.lines:
                if line == "if (z != z) bad[0] = 1;":
                    if (values["z"] != values["z"]).any():
                        values["bad"][0] = 1
                    continue
                target, _, text = line.removesuffix(";").partition(" = ")
                name = target.removeprefix("T ")
                result = _Reader(text, values, dtype).read()
                assert name == "z" or result.dtype == dtype, (self.name, line)
                if name.startswith("out_"):
                    values[name][:] = result
                else:
                    values[name] = result


class _Reader:
    """Computes one expression of a kernel's text."""

    def __init__(self, text: str, values: dict[str, Any], dtype: Any) -> None:
        text = text.replace("unsigned int", "unsigned_int")
        self.tokens = _TOKEN.findall(text)
        assert "".join(self.tokens) == re.sub(r"\s", "", text), text
        self.values = values
        self.casts = {"T": dtype, "unsigned_int": np.uint32, "float": np.float32}

    def read(self) -> Any:
        result = self.expression()
        assert not self.tokens, self.tokens
        return result

    def expression(self) -> Any:
        left = self.primary()
        while self.tokens and self.tokens[0] not in (")", "?", ":"):
            operator = self.tokens.pop(0)
            left = _OPERATORS[operator](left, self.primary())
        if self.tokens and self.tokens[0] == "?":
            self.tokens.pop(0)
            yes = self.expression()
            assert self.tokens.pop(0) == ":"
            return np.where(left, yes, self.expression())
        return left

    def primary(self) -> Any:
        token = self.tokens.pop(0)
        if token == "(":
            if self.tokens[0] in self.casts and self.tokens[1] == ")":
                dtype = self.casts[self.tokens.pop(0)]
                self.tokens.pop(0)
                return np.asarray(self.primary()).astype(dtype)
            result = self.expression()
            assert self.tokens.pop(0) == ")"
            return result
        if token in ("sqrt", "__uint_as_float"):
            argument = self.primary()
            return np.sqrt(argument) if token == "sqrt" else argument.view(np.float32)
        return np.uint32(token) if token.isdigit() else self.values[token]


_OPERATORS: dict[str, Any] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "<<": np.left_shift,
    "==": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}


class _Distance:
    def __init__(self, fake: FakeCuda, *texts: str) -> None:
        assert texts[:2] == ("T x, T y", "float64 total")
        self.fake = fake

    def __call__(self, a: FakeArray, b: FakeArray) -> FakeArray:
        result = self.fake.allocate(1, np.float64)
        self.fake.kernels.append("distance")

        def run() -> None:
            difference = a.memory.astype(np.float64) - b.memory.astype(np.float64)
            result.memory[0] = (difference * difference).sum()

        self.fake.current.add(run)
        return FakeArray(self.fake, result.memory.reshape(()))  # as CuPy does
