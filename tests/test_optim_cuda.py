"""The C written from the formulas: its text, and its bits when a C compiler runs it."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe import optim
from psframe.layout import Layout
from psframe.optim import cuda, formulas
from psframe.optim.formulas import SCALARS_MAX
from psframe.stale import formulas as corrections
from psframe.stale import kernels

RULES: dict[str, Any] = {
    "sgd": optim.SGD(0.1, weight_decay=0.02),
    "momentum": optim.SGD(0.1, momentum=0.9, weight_decay=0.02),
    "nesterov": optim.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.02),
    "delayed": optim.DelayedNesterov(0.1, 3, 0.9, 0.2, weight_decay=0.02),
    "adagrad": optim.Adagrad(0.1, weight_decay=0.02),
    "rmsprop": optim.RMSProp(0.01, weight_decay=0.02),
    "adam": optim.Adam(0.01, weight_decay=0.02),
    "adamw": optim.AdamW(0.01, weight_decay=0.1),
}
SIZE = 1000


def names_of(params: str) -> list[str]:
    return [param.split()[-1] for param in params.split(", ")]


def test_the_text_of_momentum() -> None:
    text = cuda.translate(formulas.momentum, 1)
    assert text.in_params == ("T in_w, T in_g, T in_m, T scale, T decay, T lr, T mu, T nesterov")
    assert text.out_params == "T out_w, T out_m, raw int32 bad"
    assert text.operation.splitlines() == [
        "T w = in_w;",
        "T g = in_g;",
        "T m = in_m;",
        "g = ((g * scale) + (decay * w));",
        "m = ((mu * m) + g);",
        "T step = (nesterov != (T)0 ? (g + (mu * m)) : m);",
        "T new_w = (w - (lr * step));",
        "T new_m = m;",
        "out_w = new_w;",
        "out_m = new_m;",
        "T z = (new_w - new_w) + (new_m - new_m);",
        "if (z != z) bad[0] = 1;",
    ]


@pytest.mark.parametrize("name", RULES)
def test_every_formula_becomes_a_whole_kernel(name: str) -> None:
    rule = RULES[name]
    text = cuda.translate(rule.formula, len(rule.slots))
    assert len(names_of(text.in_params)) == 2 + len(rule.slots) + rule.scalar_count
    assert len(names_of(text.out_params)) == 2 + len(rule.slots)
    assert rule.scalar_count <= SCALARS_MAX
    assert len(rule.scalars(0, 0.1, 1.0, 0.0)) == rule.scalar_count
    assert not re.search(r"[0-9]\.[0-9]", text.operation), "a literal in the arithmetic"
    assert "--fmad=false" in cuda.OPTIONS


def _pow(w: float, g: float, lr: float) -> float:
    return w - lr * g**2


def _literal(w: float, g: float, lr: float) -> float:
    return w - 0.5 * g


def _loop(w: float, g: float, lr: float) -> float:
    while g > lr:
        g = g - lr
    return w


def _unknown(w: float, g: float, lr: float) -> float:
    return w - SIZE


def _scalar_written(w: float, g: float, lr: float) -> float:
    lr = lr * lr
    return w - lr * g


def _too_many(w: float, g: float, lr: float) -> tuple[float, float]:
    return w, g


@pytest.mark.parametrize("formula", [_pow, _literal, _loop, _unknown, _scalar_written, _too_many])
def test_what_is_not_arithmetic_is_refused(formula: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=f"formula {formula.__name__}: .*cannot be written in C"):
        cuda.translate(formula, 0)


def test_names_that_cupy_reserves_are_refused() -> None:
    def formula(w: float, g: float, n: float) -> float:
        return w - n * g

    with pytest.raises(ValueError, match="'n' is a reserved name"):
        cuda.translate(formula, 0)


def test_a_formula_without_a_source_is_refused() -> None:
    there: dict[str, Any] = {}
    exec("def typed(w, g): return w - g", there)
    with pytest.raises(ValueError, match="formula typed: its source is not to be had"):
        cuda.translate(there["typed"], 0)


def c_program(rule: Any, ctype: str) -> str:
    """Wrap the kernel's text in the loop that CuPy would write around it."""
    text = cuda.translate(rule.formula, len(rule.slots))
    inputs, outputs = names_of(text.in_params), names_of(text.out_params)[:-1]
    arrays, scalars = inputs[: 2 + len(rule.slots)], inputs[2 + len(rule.slots) :]
    parameters = (
        ["long size"]
        + [f"const T *p_{name}" for name in arrays]
        + ["const T *h"]
        + [f"T *p_{name}" for name in outputs]
        + ["int *bad"]
    )
    before = [f"const T {name} = h[{k}];" for k, name in enumerate(scalars)]
    before += [f"const T {name} = p_{name}[k];" for name in arrays]
    after = [f"p_{name}[k] = {name};" for name in outputs]
    return "\n".join(
        [
            "#include <tgmath.h>",
            f"typedef {ctype} T;",
            f"void kernel({', '.join(parameters)}) {{",
            "for (long k = 0; k < size; ++k) {",
            *before,
            *(f"T {name};" for name in outputs),
            text.operation,
            *after,
            "}}",
        ]
    )


@pytest.fixture
def compile_c(tmp_path: Path) -> Callable[[str], Any]:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("there is no gcc to compile the written C with")

    def build(program: str) -> Any:
        source, library = tmp_path / "kernel.c", tmp_path / "kernel.so"
        source.write_text(program)
        flags = ["-std=c11", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Werror"]
        command = [gcc, *flags, str(source), "-o", str(library), "-lm"]
        subprocess.run(command, check=True, timeout=60)
        return ctypes.CDLL(str(library)).kernel

    return build


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", RULES)
def test_the_written_c_has_the_bits_of_the_cpu_loop(
    name: str, dtype: Any, compile_c: Callable[[str], Any]
) -> None:
    rule = RULES[name]
    kernel = compile_c(c_program(rule, "float" if dtype is np.float32 else "double"))
    updater = rule.updater(Layout.of({"w": np.zeros(SIZE, dtype)}), 0, SIZE)
    rng = np.random.default_rng(3)
    w = rng.standard_normal(SIZE).astype(dtype)
    slots = [np.zeros(SIZE, dtype) for _ in rule.slots]

    def run(step: int, w: Any, grad: Any) -> tuple[list[Any], int]:
        scalars = np.array(rule.scalars(step, rule.lr, 0.5, rule.weight_decay), dtype)
        results = [np.empty(SIZE, dtype) for _ in range(1 + len(slots))]
        bad = ctypes.c_int(0)
        arrays = [w, grad, *slots, scalars, *results]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        kernel(ctypes.c_long(SIZE), *pointers, ctypes.byref(bad))
        return results, bad.value

    for step in range(8):
        grad = rng.standard_normal(SIZE).astype(dtype)
        out = np.empty(SIZE, dtype)
        assert updater.update(step, w, grad, out, 0.5)
        (got, *slots), bad = run(step, w, grad)
        assert bad == 0
        assert got.tobytes() == out.tobytes()
        for slot, want in zip(slots, updater.slots.values(), strict=True):
            assert slot.tobytes() == want.tobytes()
        w = out
    grad = np.zeros(SIZE, dtype)
    grad[SIZE // 2] = np.inf
    assert run(8, w, grad)[1] == 1
    assert not updater.update(8, w, grad, np.empty(SIZE, dtype), 0.5)


STAGES: dict[str, tuple[cuda.Stage, ...]] = {
    "fixed": (cuda.Stage(corrections.fixed, reads=1),),
    "adaptive": (cuda.Stage(corrections.adaptive, reads=1, states=1),),
    "scaled": (cuda.Stage(corrections.scaled),),
    "chained": (
        cuda.Stage(corrections.adaptive, reads=1, states=1),
        cuda.Stage(corrections.fixed, reads=1),
        cuda.Stage(corrections.scaled),
    ),
}
# The scalars of each stage; of `corrections`.
SCALARS = {"fixed": (2.0,), "adaptive": (1.5, 0.95, 1.0 - 0.95, 1e-7), "scaled": (0.3,)}
_CUDA_NAMES = """#include <tgmath.h>
#include <stdint.h>
#include <string.h>
typedef uint16_t uint16;
static inline float __uint_as_float(unsigned int bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
"""


def staged_program(rule: Any, stages: tuple[cuda.Stage, ...], payload: str, ctype: str) -> str:
    """Wrap the text of a kernel with stages in a loop over [begin, end)."""
    text = cuda.translate(rule.formula, len(rule.slots), stages, payload)
    named = [param.split() for param in text.in_params.split(", ")]
    arrays = [(kind, name) for kind, name in named if name.startswith("in_")]
    scalars = [name for _, name in named if not name.startswith("in_")]
    outputs = names_of(text.out_params)[:-1]
    parameters = ["long begin", "long end", "const T *h", "int *bad"]
    parameters += [f"const {kind} *p_{name}" for kind, name in arrays]
    parameters += [f"T *p_{name}" for name in outputs]
    lines = [f"const T {name} = h[{k}];" for k, name in enumerate(scalars)]
    lines += [f"const {kind} {name} = p_{name}[k];" for kind, name in arrays]
    lines += [f"T {name};" for name in outputs]
    lines += [text.operation, *(f"p_{name}[k] = {name};" for name in outputs)]
    half = "typedef _Float16 float16;\n" if payload == "float16" else ""  # of newer compilers
    head = f"{_CUDA_NAMES}{half}typedef {ctype} T;\nvoid kernel({', '.join(parameters)}) {{"
    return "\n".join([head, "for (long k = begin; k < end; ++k) {", *lines, "}}"])


def corrected_on_cpu(name: str, grad: Any, w: Any, read: Any, old: Any) -> tuple[Any, Any]:
    """Apply one stage with the loops of the CPU."""
    out, new, h = np.empty_like(w), np.empty_like(w), np.array(SCALARS[name], w.dtype)
    if name == "fixed":
        kernels.compile_fixed(w.dtype)(grad, w, read, out, h)
        return out, None
    if name == "adaptive":
        kernels.compile_adaptive(w.dtype)(grad, w, read, out, h, old, new)
        return out, new
    return grad * h[0], None


# The widening is the first line of every kernel, so that it is tried with some.
CASES = [(name, staged, "float32") for name in RULES for staged in STAGES] + [
    (name, "chained", payload) for name in ("momentum", "adam") for payload in ("float16", "uint16")
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "staged", "payload"), CASES)
def test_one_kernel_has_the_bits_of_all_the_loops(
    name: str, staged: str, dtype: Any, payload: str, compile_c: Callable[[str], Any]
) -> None:
    rule, stages = RULES[name], STAGES[staged]
    ctype = "float" if dtype is np.float32 else "double"
    kernel = compile_c(staged_program(rule, stages, payload, ctype))
    rng = np.random.default_rng(7)
    w, read = rng.standard_normal((2, SIZE)).astype(dtype)
    raw = rng.standard_normal(SIZE).astype(np.float32)
    raw[:3] = 0.0, -0.0, 6e-8
    sent: Any = raw.astype(dtype)
    grad = sent
    if payload == "float16":
        sent = raw.astype(np.float16)
        grad = sent.astype(dtype)
    elif payload == "uint16":
        sent = (raw.view(np.uint32) >> 16).astype(np.uint16)
        grad = (sent.astype(np.uint32) << 16).view(np.float32).astype(dtype)
    olds = [rng.random(SIZE).astype(dtype) for stage in stages for _ in range(stage.states)]
    expected, news = grad, []
    for stage in stages:
        formula = stage.formula.__name__
        expected, new = corrected_on_cpu(formula, expected, w, read, olds[0] if olds else None)
        news += [] if new is None else [new]
    updater = rule.updater(Layout.of({"w": np.zeros(SIZE, dtype)}), 0, SIZE)
    out = np.empty(SIZE, dtype)
    assert updater.update(0, w, expected, out, 0.5)

    scalars = list(rule.scalars(0, rule.lr, 0.5, rule.weight_decay))
    arrays = [w, sent, *(np.zeros(SIZE, dtype) for _ in rule.slots)]
    for stage in stages:
        arrays += [read] * stage.reads + olds[: stage.states]
        scalars += SCALARS[stage.formula.__name__]
    results = [np.full(SIZE, np.nan, dtype) for _ in range(1 + len(rule.slots) + len(olds))]
    h, bad = np.array(scalars, dtype), ctypes.c_int(0)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (h, *arrays, *results)]
    for begin, end in ((0, 1), (1, 640), (640, SIZE - 3), (SIZE - 3, SIZE)):  # in ranges
        bounds = ctypes.c_long(begin), ctypes.c_long(end)
        kernel(*bounds, pointers[0], ctypes.byref(bad), *pointers[1:])
    assert bad.value == 0
    wanted = [out, *updater.slots.values(), *news]
    for got, want in zip(results, wanted, strict=True):
        assert got.tobytes() == want.tobytes()


def test_the_text_of_a_corrected_gradient() -> None:
    text = cuda.translate(formulas.sgd, 0, STAGES["fixed"], "float16")
    assert text.in_params == "T in_w, float16 in_g, T scale, T decay, T lr, T in_s0_read, T s0_lam"
    assert text.operation.splitlines()[:6] == [
        "T w = in_w;",
        "T g = (T)(float)in_g;",
        "T s0_g = g;",
        "T s0_w = w;",
        "T s0_read = in_s0_read;",
        "g = (s0_g + ((s0_lam * (s0_g * s0_g)) * (s0_w - s0_read)));",
    ]


class FakeArray(np.ndarray[Any, Any]):
    """A NumPy array that says it is CuPy's."""

    __module__ = "cupy"

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)


class FakeElementwiseKernel:
    """Takes what CuPy's takes, checks what CuPy's would, and applies the formula itself."""

    def __init__(
        self,
        in_params: str,
        out_params: str,
        operation: str,
        name: str,
        *,
        no_return: bool,
        options: tuple[str, ...],
    ) -> None:
        assert no_return
        assert isinstance(options, tuple)
        self.inputs, self.outputs = names_of(in_params), names_of(out_params)
        self.formula = getattr(formulas, name.removeprefix("psframe_"))

    def __call__(self, *arguments: Any) -> None:
        given = dict(zip(self.inputs + self.outputs, arguments, strict=True))
        arrays = [value for value in given.values() if isinstance(value, FakeArray)]
        assert len({array.dtype for array in arrays if array.dtype.kind == "f"}) == 1
        assert len({array.size for array in arrays[:-1]}) == 1
        assert all(arrays[0].dtype == value.dtype for value in given.values() if not value.shape)
        for k in range(arrays[0].size):
            inputs = [given[name] for name in self.inputs]
            values = [v[k] if isinstance(v, FakeArray) else v for v in inputs]
            results = self.formula(*values)
            for name, result in zip(self.outputs, np.atleast_1d(results), strict=False):
                given[name][k] = result
                if not np.isfinite(result):
                    given["bad"][0] = 1


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake: Any = types.ModuleType("cupy")
    fake.zeros = lambda shape, dtype: np.zeros(shape, dtype).view(FakeArray)
    fake.int32 = np.int32
    fake.ElementwiseKernel = FakeElementwiseKernel
    monkeypatch.setitem(sys.modules, "cupy", fake)
    cuda.compile_kernel.cache_clear()
    yield fake
    cuda.compile_kernel.cache_clear()


@pytest.mark.parametrize("name", RULES)
def test_cupy_arrays_reach_the_kernel_in_the_order_it_declares(name: str, fake_cupy: Any) -> None:
    size = 9
    layout = Layout.of({"w": np.zeros(5), "bias": np.zeros(4)})
    rule = dataclasses.replace(RULES[name], no_decay=("bias",))
    cpu, gpu = rule.updater(layout, 0, size), rule.updater(layout, 0, size)
    rng = np.random.default_rng(5)
    w = rng.standard_normal(size)
    for step in range(3):
        grad, out = rng.standard_normal(size), np.empty(size)
        device_out = fake_cupy.zeros(size, np.float64)
        assert cpu.update(step, w, grad, out, 0.5)
        assert gpu.update(step, w.view(FakeArray), grad.view(FakeArray), device_out, 0.5)
        np.testing.assert_array_equal(device_out, out)
        w = out
    grad, device_out = np.full(size, np.nan), fake_cupy.zeros(size, np.float64)
    before = {key: slot.tobytes() for key, slot in gpu.slots.items()}
    assert not gpu.update(3, w.view(FakeArray), grad.view(FakeArray), device_out)
    assert {key: slot.tobytes() for key, slot in gpu.slots.items()} == before
    assert all(isinstance(slot, FakeArray) for slot in gpu.slots.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", RULES)
def test_the_gpu_has_the_bits_of_the_cpu(name: str, dtype: Any) -> None:
    cupy = pytest.importorskip("cupy")
    if not cupy.is_available():
        pytest.skip("there is no CUDA device")
    rule = RULES[name]
    layout = Layout.of({"w": np.zeros(SIZE, dtype)})
    cpu, gpu = rule.updater(layout, 0, SIZE), rule.updater(layout, 0, SIZE)
    rng = np.random.default_rng(3)
    w = rng.standard_normal(SIZE).astype(dtype)
    for step in range(8):
        grad = rng.standard_normal(SIZE).astype(dtype)
        out, device_out = np.empty(SIZE, dtype), cupy.empty(SIZE, dtype)
        assert cpu.update(step, w, grad, out, 0.5)
        assert gpu.update(step, cupy.asarray(w), cupy.asarray(grad), device_out, 0.5)
        assert cupy.asnumpy(device_out).tobytes() == out.tobytes()
        w = out
    grad = np.zeros(SIZE, dtype)
    grad[7] = np.nan
    before = {name: cupy.asnumpy(slot) for name, slot in gpu.slots.items()}
    assert not gpu.update(8, cupy.asarray(w), cupy.asarray(grad), cupy.empty(SIZE, dtype))
    for key, slot in gpu.slots.items():
        assert cupy.asnumpy(slot).tobytes() == before[key].tobytes()
