"""A `cupy` of NumPy arrays that runs the models' kernel texts, compiled as C, thread by thread.

Its stream does nothing before somebody synchronises: launches, products and copies wait in a queue,
so that memory which is reused too early is seen. Threads of a block take turns at each barrier, up
and down in turn, and so do blocks begin. New memory is full of NaN, and what lies around it is
checked. Blocks are smaller than on a GPU, so that small arrays have many.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from psframe.models.cuda import kernels, text

_PRELUDE = """\
#define _GNU_SOURCE
#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>
#define KERNEL static
#define DEVICE static inline
#define __shared__ static
typedef struct { unsigned x, y; } Index;
static Index threadIdx, blockIdx, blockDim, gridDim;
static inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }

/* Each thread has a stack of its own, made once; later switches are jumps, which cost no calls of
   the system as swapcontext does. */
enum { THREADS_MAX = 64, STACK = 32768 };
static ucontext_t made[THREADS_MAX], maker;
static jmp_buf scheduler, places[THREADS_MAX];
static char stacks[THREADS_MAX][STACK], done[THREADS_MAX], begun[THREADS_MAX];
static int current;
static void (*body)(void);
int diverged;

static void __syncthreads(void) { if (!_setjmp(places[current])) _longjmp(scheduler, 1); }

static void live(void) {
    for (;;) {
        body();
        done[current] = 1;
        __syncthreads();
    }
}

static void resume(void) {
    const int t = current;
    if (_setjmp(scheduler)) return;
    if (begun[t]) _longjmp(places[t], 1);
    begun[t] = 1;
    getcontext(&made[t]);
    made[t].uc_stack.ss_sp = stacks[t];
    made[t].uc_stack.ss_size = STACK;
    makecontext(&made[t], live, 0);
    swapcontext(&maker, &made[t]);
}

static void run_together(void) {
    static int downwards; /* every other block begins so */
    const int threads = blockDim.x;
    downwards = !downwards;
    memset(done, 0, sizeof done);
    for (int round = 0, left = threads; left; ++round) {
        const int before = left;
        for (int i = 0; i < threads; ++i) {
            current = round % 2 == downwards ? threads - 1 - i : i;
            threadIdx.x = current;
            resume();
            left -= done[current];
        }
        if (left && left != before) diverged = 1;
        if (diverged) return;
    }
}

static void run_apart(void) {
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) body();
}

static void run_grid(unsigned x, unsigned y, unsigned threads, void (*what)(void), int together) {
    gridDim.x = x; gridDim.y = y; blockDim.x = threads; blockDim.y = 1; body = what;
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
            if (together) run_together(); else run_apart();
}
"""
_HALF = """\
typedef _Float16 S;
DEVICE float load(S x) { return (float)x; }
DEVICE S store(float x) { return (S)x; }
"""
_TYPES = {
    "int": ctypes.c_int,
    "long long": ctypes.c_longlong,
    "i64": ctypes.c_longlong,
    "u64": ctypes.c_ulonglong,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_THREADS, _CHUNK = 64, 1024
_GUARD = 64
_POISON = 0xFF  # NaN in every floating type


@functools.cache
def _library(storage: str) -> tuple[Any, dict[str, list[Any]]]:
    """Compile the kernels of one storage type; give them with the types of their parameters."""
    begin = _HALF if storage == "float16" else text._STORAGE[storage]
    return compile_bodies(begin, text.BODIES, (f"-DTHREADS={_THREADS}", f"-DCHUNK={_CHUNK}"))


def compile_bodies(
    begin: str, bodies: str, flags: tuple[str, ...] = ()
) -> tuple[Any, dict[str, list[Any]]]:
    """Compile kernels' bodies as C.

    Args:
        begin: what comes before them, behind the prelude.
        bodies: as in a CUDA source, from KERNEL on.
        flags: of gcc.

    Returns:
        The library, whose functions `launch_NAME` take the grid's and the block's size first, and
        by name the types of the kernels' own parameters.
    """
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("there is no gcc to compile the kernels with")
    parts = [_PRELUDE, begin, bodies]
    signatures = {}
    for name, inside, code in re.findall(
        r"KERNEL void (\w+)\((.*?)\) \{\n(.*?)\n\}\n", bodies, re.DOTALL
    ):
        params = [" ".join(param.split()) for param in inside.split(",")]
        kinds = [param.rpartition("*")[0].strip() or param.rpartition(" ")[0] for param in params]
        names = [re.split(r"[ *]", param)[-1] for param in params]
        types = [f"{kind} *" if "*" in p else kind for kind, p in zip(kinds, params, strict=True)]
        parts += [f"static {t} {name}_{n};" for t, n in zip(types, names, strict=True)]
        parts.append(f"static void body_{name}(void) {{")
        parts.append(f"    {name}({', '.join(f'{name}_{n}' for n in names)}); }}")
        taken = ", ".join(f"{t} {n}" for t, n in zip(types, names, strict=True))
        parts.append(f"void launch_{name}(unsigned gx, unsigned gy, unsigned gt, {taken}) {{")
        parts += [f"    {name}_{n} = {n};" for n in names]
        together = int("__syncthreads" in code or "block_" in code)
        parts.append(f"    run_grid(gx, gy, gt, body_{name}, {together}); }}")
        signatures[name] = [
            ctypes.c_void_p if t.endswith("*") else _TYPES[t.removeprefix("const ")] for t in types
        ]
    folder = Path(tempfile.mkdtemp(prefix="psframe-kernels-"))
    source, library = folder / "kernels.c", folder / "kernels.so"
    source.write_text("\n".join(parts))
    given = ["-std=gnu11", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Werror"]
    given += [*flags, "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-clobbered"]
    subprocess.run([gcc, *given, str(source), "-o", str(library), "-lm"], check=True, timeout=120)
    loaded = ctypes.CDLL(str(library))
    shutil.rmtree(folder)
    assert len(signatures) == bodies.count("KERNEL void")
    return loaded, signatures


class Stream:
    """What has been queued and not been done.

    Attributes:
        launches: names of kernels, "gemm" and "copy", in order.
        synchronisations: how often the host has waited for work that was not done.
        allocations: how often memory has been allocated.
    """

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.synchronisations = 0
        self.allocations = 0
        self._queue: list[Callable[[], None]] = []
        self._done = 0
        self.guards: list[tuple[Any, int]] = []  # memory, which a pool keeps, and its size
        self.kept: list[Any] = []

    def put(self, name: str, what: Callable[[], None]) -> None:
        self.launches.append(name)
        self._queue.append(what)

    @property
    def end(self) -> int:
        return self._done + len(self._queue)

    def run(self, end: int | None = None) -> None:
        """Do what has been queued, up to a place."""
        count = len(self._queue) if end is None else max(0, end - self._done)
        for what in self._queue[:count]:
            what()
        del self._queue[:count]
        self._done += count

    def done(self, end: int) -> bool:
        return self._done >= end

    def wait(self, end: int) -> None:
        if not self.done(end):
            self.synchronisations += 1
            self.run(end)

    def owns(self, address: int) -> bool:
        """Tell whether an address lies in memory of the device."""
        return any(
            0 <= address - memory.ctypes.data - _GUARD < size for memory, size in self.guards
        )

    def check(self) -> None:
        """Do all that is left, and see that nothing was written beside any memory."""
        self.run()
        for memory, size in self.guards:
            assert (memory[:_GUARD] == _POISON).all()
            assert (memory[_GUARD + size :] == _POISON).all()


class Memory:
    """What `ndarray.data` is: an address, and copies that are queued."""

    def __init__(self, stream: Stream, ptr: int) -> None:
        self.stream, self.ptr = stream, ptr

    def copy_to_host_async(self, address: int, size: int) -> None:
        ctypes.memset(address, _POISON, size)  # until it has arrived
        self.stream.put("copy", lambda: ctypes.memmove(address, self.ptr, size))

    def copy_from_host_async(self, address: int, size: int) -> None:
        self.stream.put("copy", lambda: ctypes.memmove(self.ptr, address, size))


class FakeArray(np.ndarray[Any, Any]):
    """A NumPy array that says it is CuPy's; what NumPy computes with it, the stream does first."""

    __module__ = "cupy"
    stream: Stream

    def __array_finalize__(self, other: Any) -> None:
        self.stream = getattr(other, "stream", None)  # type: ignore[assignment]

    @property
    def data(self) -> Any:
        return Memory(self.stream, self.ctypes.data)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **how: Any) -> Any:
        for one in inputs:
            if type(one) is np.ndarray and one.ndim:
                raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        self.stream.run()
        self.stream.launches.append(ufunc.__name__)
        out = how.pop("out", None)
        if out is not None:
            how["out"] = tuple(one.view(np.ndarray) for one in out)
        plain = [one.view(np.ndarray) if isinstance(one, FakeArray) else one for one in inputs]
        result = getattr(ufunc, method)(*plain, **how)
        if out is not None:
            return out[0]
        self.stream.allocations += 1
        return _of(self.stream, np.array(result))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.stream.run()
        self.stream.launches.append("assign")
        self.view(np.ndarray)[key] = value

    def __float__(self) -> float:
        self.stream.wait(self.stream.end)
        return float(self.view(np.ndarray))

    def copy(self, order: Any = "C") -> Any:
        self.stream.run()
        self.stream.allocations += 1
        return _of(self.stream, self.view(np.ndarray).copy())

    def argmax(self, axis: Any = None) -> Any:
        self.stream.run()
        return _of(self.stream, self.view(np.ndarray).argmax(axis))


def _of(stream: Stream, array: Any) -> Any:
    found = array.view(FakeArray)
    found.stream = stream
    stream.kept.append(array)
    return found


class Cublas:
    """`cupy.cuda.cublas`, as far as `psframe.models.cuda.gemm` calls it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._on_device = False
        self.computes: list[int] = []

    def setPointerMode(self, handle: int, mode: int) -> None:
        assert handle == 7
        self._on_device = bool(mode)

    def gemmEx(self, handle: int, ta: int, tb: int, m: int, n: int, k: int, *rest: int) -> None:
        alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algo = rest
        one = (alpha, a, a_type, lda, 0, b, b_type, ldb, 0, beta, c, c_type, ldc, 0)
        self.gemmStridedBatchedEx(handle, ta, tb, m, n, k, *one, 1, compute, algo)

    def gemmStridedBatchedEx(
        self, handle: int, ta: int, tb: int, m: int, n: int, k: int, *rest: int
    ) -> None:
        alpha, a, a_type, lda, a_step, b, b_type, ldb, b_step, *rest_c = rest
        beta, c, c_type, ldc, c_step, batch, compute, algo = rest_c
        assert (handle, algo) == (7, -1)
        assert compute in (68, 77)
        assert a_type == b_type
        assert (a_type, c_type) in {(0, 0), (2, 2), (2, 0), (14, 14), (14, 0)}
        assert lda >= (k if ta else m)
        assert ldb >= (n if tb else k)
        assert ldc >= m
        self.computes.append(compute)
        assert {self._stream.owns(number) for number in (alpha, beta)} == {self._on_device}
        known = None if self._on_device else (_number(alpha), _number(beta))

        def work() -> None:
            first, second = (_number(alpha), _number(beta)) if known is None else known
            assert second == 0.0
            for number in range(batch):
                left = _matrix(a, a_type, lda, *((k, m) if ta else (m, k)), number * a_step)
                right = _matrix(b, b_type, ldb, *((n, k) if tb else (k, n)), number * b_step)
                left, right = left.T if ta else left, right.T if tb else right
                out = _matrix(c, c_type, ldc, m, n, number * c_step, write=True)
                with np.errstate(over="ignore", invalid="ignore"):  # float16 may overflow
                    product = (left @ right) * np.float32(first)
                    out[...] = to_bfloat16(product) if c_type == 14 else product

        self._stream.put("gemm", work)


def _number(address: int) -> float:
    return ctypes.c_float.from_address(address).value


def _matrix(
    address: int, kind: int, ld: int, rows: int, columns: int, begin: int, *, write: bool = False
) -> Any:
    """See a column-major matrix at an address, as float32 unless it is to be written."""
    dtype = np.dtype({0: np.float32, 2: np.float16, 14: np.uint16}[kind])
    count = ld * (columns - 1) + rows
    held = (ctypes.c_char * (count * dtype.itemsize)).from_address(address + begin * dtype.itemsize)
    flat = np.frombuffer(held, dtype)
    step = dtype.itemsize
    matrix = np.lib.stride_tricks.as_strided(flat, (rows, columns), (step, step * ld))
    if write:
        return matrix
    return from_bfloat16(matrix) if kind == 14 else matrix.astype(np.float32)


def to_bfloat16(values: Any) -> Any:
    """Round float32 to bfloat16, to even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: Any) -> Any:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


class FakeCupy(ModuleType):
    """The names of CuPy that the models use, on one device of a given compute capability."""

    def __init__(self, capability: str = "90") -> None:
        super().__init__("cupy")
        self.stream = stream = Stream()

        class Event:
            def __init__(self, *, disable_timing: bool) -> None:
                assert disable_timing
                self._place = 0

            def record(self) -> None:
                self._place = stream.end

            @property
            def done(self) -> bool:
                return stream.done(self._place)

            def synchronize(self) -> None:
                stream.wait(self._place)

        class Device:
            compute_capability = capability

            def __int__(self) -> int:
                return 0

        self.cublas = Cublas(stream)
        self.cuda = SimpleNamespace(
            cublas=self.cublas,
            get_cublas_handle=lambda: 7,
            alloc_pinned_memory=bytearray,
            Device=Device,
            Event=Event,
        )

    def RawModule(self, *, code: str) -> Any:
        storage = next(name for name in text._STORAGE if code == text.source(name))
        library, signatures = _library(storage)

        def get_function(name: str) -> Callable[..., None]:
            function, kinds = getattr(library, f"launch_{name}"), signatures[name]
            function.argtypes, function.restype = [ctypes.c_uint] * 3 + kinds, None

            def launch(grid: tuple[int, ...], block: tuple[int, ...], args: Any) -> None:
                given = [_argument(one, k) for one, k in zip(args, kinds, strict=True)]
                assert len(block) == 1
                assert 1 <= block[0] <= _THREADS
                x, y = (*grid, 1)[:2]
                assert 1 <= x < 2**31
                assert 1 <= y < 2**16

                def work() -> None:
                    function(x, y, block[0], *given)
                    diverged = ctypes.c_int.in_dll(library, "diverged")
                    assert not diverged.value, f"{name}: threads differ at a barrier"

                self.stream.put(name, work)

            return launch

        return SimpleNamespace(get_function=get_function)

    def empty(self, shape: Any, dtype: Any = np.float32) -> FakeArray:
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(size + 2 * _GUARD, _POISON, np.uint8)
        self.stream.allocations += 1
        self.stream.guards.append((memory, size))
        found = memory[_GUARD : _GUARD + size].view(dtype).reshape(shape)
        return _of(self.stream, found)  # type: ignore[no-any-return]

    def empty_like(self, array: Any) -> FakeArray:
        return self.empty(array.shape, array.dtype)

    def zeros(self, shape: Any, dtype: Any) -> FakeArray:
        found = self.empty(shape, dtype)
        found.view(np.ndarray)[...] = 0
        return found

    def asarray(self, array: Any) -> FakeArray:
        if isinstance(array, FakeArray):
            return array
        found = self.empty(np.shape(array), np.asarray(array).dtype)
        found.view(np.ndarray)[...] = array
        return found

    def asnumpy(self, array: FakeArray) -> Any:
        self.stream.run()
        return np.array(array.view(np.ndarray))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(np, name)
        if isinstance(function, (np.ufunc, type)):
            return function

        def call(*args: Any, **how: Any) -> Any:
            self.stream.run()
            self.stream.launches.append(name)
            self.stream.allocations += 1
            return _of(self.stream, function(*args, **how))

        return call


def install(monkeypatch: pytest.MonkeyPatch, capability: str = "90") -> FakeCupy:
    """Let a fake be what the models find as CuPy."""
    fake = FakeCupy(capability)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(kernels, "THREADS", _THREADS)
    monkeypatch.setattr(kernels, "CHUNK", _CHUNK)
    return fake


def _argument(value: Any, kind: Any) -> Any:
    """Check an argument as a launch would take it, and turn it into C's."""
    if kind is ctypes.c_void_p:
        assert isinstance(value, FakeArray) or type(value) is int, value  # None is no null pointer
        return value.ctypes.data if isinstance(value, FakeArray) else value
    expected = np.float32 if kind is ctypes.c_float else int
    assert type(value) is expected, (value, kind)
    return kind(value)
