"""The encoders' kernels as C: what CUDA has and C has not is put in, and threads take turns."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from cuda_emulator import compile_bodies

from psframe.codecs.cuda.base import MACHINE

__all__ = ["THREADS", "argument", "compiled"]

THREADS = 64  # as many as the emulator has stacks for
_MACHINE = """\
typedef {real} T;
typedef {integer} B;
DEVICE B bits(T x) {{ B y; memcpy(&y, &x, sizeof y); return y; }}
DEVICE T from_bits(B x) {{ T y; memcpy(&y, &x, sizeof y); return y; }}
DEVICE T add(T a, T b) {{ return a + b; }}
DEVICE T sub(T a, T b) {{ return a - b; }}
DEVICE T mul(T a, T b) {{ return a * b; }}
DEVICE T divide(T a, T b) {{ return a / b; }}
DEVICE double widen(T x) {{ return (double)x; }}
DEVICE T narrow(double x) {{ return (T)x; }}
DEVICE int atomicOr(int *at, int value) {{ int old = *at; *at |= value; return old; }}
DEVICE unsigned atomicAdd(unsigned *at, unsigned n) {{ unsigned old = *at; *at += n; return old; }}
"""
_TYPES = {"f": ("float", "unsigned int"), "d": ("double", "unsigned long long")}


@functools.cache
def compiled(code: str) -> tuple[Any, dict[str, list[Any]]]:
    """Compile a CUDA source of `psframe.codecs.cuda`."""
    (char,) = [char for char, begin in MACHINE.items() if code.startswith(begin)]
    begin, mark, bodies = code.removeprefix(MACHINE[char]).partition("KERNEL ")
    real, integer = _TYPES[char]
    machine = _MACHINE.format(real=real, integer=integer)
    return compile_bodies(machine + begin, mark + bodies)


def argument(value: Any, kind: Any) -> Any:
    """Check an argument as a launch would take it, and turn it into C's."""
    if kind is ctypes.c_void_p:
        assert type(value) is int, value
        return value
    expected = {
        ctypes.c_int: np.int32,
        ctypes.c_longlong: np.int64,
        ctypes.c_ulonglong: np.uint64,
        ctypes.c_double: np.float64,
    }[kind]
    assert type(value) is expected, (value, kind)
    return kind(value.item())
