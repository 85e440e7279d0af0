"""Compiles a formula into one pass over memory with numba: update and finite test together.

No fastmath: it makes the bits of an element depend on where its range begins, and compiles the
finite test away. Without it LLVM neither contracts to FMA nor reorders, so a float32 result is
that of the same NumPy float32 operations, bit for bit. x - x is 0 for a finite x and NaN
otherwise, and an OR over `z != z` is a reduction that vectorises without fastmath; it is a
boolean one, because LLVM makes vectors as long as the widest type in a loop allows, and an int64
would halve them.
"""

from __future__ import annotations

import functools
import logging
import types
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from psframe.layout import Array
from psframe.optim.formulas import SCALARS_MAX

__all__ = ["bind_formula", "compile_follow", "compile_loop"]

_log = logging.getLogger("psframe")


def formula(*args: Any) -> Any:
    """Stand for the rule's formula in the loops below; `compile_loop` puts it in."""
    raise AssertionError("a loop runs only with a formula put in")


SCALARS = SCALARS_MAX  # in the loops below; `compile_loop` puts in how many the formula takes


def _loop0(begin: int, end: int, params: Array, grad: Array, out: Array, h: Array) -> bool:
    """Apply a rule without slots to [begin, end); true if some result is not finite."""
    scalars = (h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], h[8], h[9])[:SCALARS]
    p, g, o = params[begin:end], grad[begin:end], out[begin:end]
    bad = False
    for i in range(o.size):
        w = formula(p[i], g[i], *scalars)
        o[i] = w
        z = w - w
        bad = bad | (z != z)
    return bad


def _loop1(
    begin: int, end: int, params: Array, grad: Array, out: Array, h: Array, old: Array, new: Array
) -> bool:
    """Apply a rule with one slot to [begin, end), reading `old` and writing `new`."""
    scalars = (h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], h[8], h[9])[:SCALARS]
    p, g, o = params[begin:end], grad[begin:end], out[begin:end]
    a, b = old[begin:end], new[begin:end]
    bad = False
    for i in range(o.size):
        w, s = formula(p[i], g[i], a[i], *scalars)
        o[i] = w
        b[i] = s
        z = (w - w) + (s - s)
        bad = bad | (z != z)
    return bad


def _loop2(
    begin: int,
    end: int,
    params: Array,
    grad: Array,
    out: Array,
    h: Array,
    old0: Array,
    new0: Array,
    old1: Array,
    new1: Array,
) -> bool:
    """Apply a rule with two slots to [begin, end), reading the `old`s and writing the `new`s."""
    scalars = (h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], h[8], h[9])[:SCALARS]
    p, g, o = params[begin:end], grad[begin:end], out[begin:end]
    a, b, c, d = old0[begin:end], new0[begin:end], old1[begin:end], new1[begin:end]
    bad = False
    for i in range(o.size):
        w, s, t = formula(p[i], g[i], a[i], c[i], *scalars)
        o[i] = w
        b[i] = s
        d[i] = t
        z = (w - w) + (s - s) + (t - t)
        bad = bad | (z != z)
    return bad


_LOOPS = (_loop0, _loop1, _loop2)


def loop(begin: int, end: int, *arrays: Any) -> bool:
    """Stand for a compiled loop in `_follow`; `compile_follow` puts it in."""
    raise AssertionError("it runs only with a loop put in")


def load_acquire(words: Array) -> int:
    """Stand for the atomic load of words[0] in `_follow`; `compile_follow` puts it in."""
    raise AssertionError("it runs only compiled")


def _follow(words: Array, begin: int, limit: int, arrays: Any) -> tuple[int, bool]:
    """Apply a rule from `begin` on, as far as words[0] says that the gradient is, or to `limit`.

    Waits a little, some ten microseconds, for more of it, but never longer.
    """
    bad = False
    tries = 0
    while begin < limit and tries < PATIENCE:
        end = min(load_acquire(words), limit)
        tries += 1
        if begin < end:
            bad = bad | loop(begin, end, *arrays)
            begin = end
            tries = 0
    return begin, bad


PATIENCE = 20_000  # loads without progress, each of half a nanosecond or more


def bind_formula(
    loop: Callable[..., Any], rule: Callable[..., Any], names: dict[str, Any], **more: Any
) -> Any:
    """Copy `loop` with the global name `formula` bound to the compiled formula.

    A closure would be plainer, but numba's cache on disk never finds a loop again that closes
    over a compiled function (its key holds a random id). The name of the copy is the key instead,
    so it carries a checksum of the formula.

    Args:
        loop: a function of a module.
        rule: the formula.
        names: the globals of that module.
        more: other global names of the copy.
    """
    import numba

    compiled = numba.njit(nogil=True, error_model="numpy", fastmath=False)(rule)
    code = rule.__code__
    text = repr((code.co_code, code.co_consts, code.co_names, code.co_varnames))
    bound = types.FunctionType(
        loop.__code__, {**names, "formula": compiled, **more}, f"{rule.__name__}_loop"
    )
    bound.__qualname__ = f"{rule.__name__}_loop_{zlib.crc32(text.encode()):08x}"
    bound.__module__ = names["__name__"]
    return bound


def _compile_load() -> Any:
    """Make the atomic load: a plain one may be moved out of the loop that waits for a change."""
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def load_acquire(typing_context: Any, words: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            return builder.load_atomic(array.data, "acquire", 8)

        return types.int64(words), generate

    return load_acquire


@functools.cache
def compile_follow(
    rule: Callable[..., Any], slots: int, scalars: int, dtype: np.dtype[Any]
) -> Callable[..., tuple[int, bool]]:
    """Compile a loop as `compile_loop` that keeps behind a gradient which is still being written.

    Returns:
        follow(words, begin, limit, (params, grad, out, scalars, old, new, ...)) -> how far it came,
        and whether something that it wrote is not finite. words[0], an int64 in memory shared with
        who writes, is the number of elements that are there; it is read atomically, and nothing
        that lies beyond it is.
    """
    import numba

    number = numba.from_dtype(dtype)
    read = numba.types.Array(number, 1, "C", readonly=True)
    write = numba.types.Array(number, 1, "C")
    index = numba.types.intp
    pack: Any = numba.types.Tuple
    arrays = pack((read, read, write, read, *(read, write) * slots))
    words = numba.types.Array(numba.types.int64, 1, "C")
    result = pack((index, numba.types.boolean))
    signature = result(words, index, index, arrays)
    code, compiled = _follow.__code__, compile_loop(rule, slots, scalars, dtype)
    bound = types.FunctionType(
        code,
        {**globals(), "loop": compiled, "load_acquire": _compile_load()},
        f"{rule.__name__}_follow",
    )
    bound.__qualname__ = f"follow_{compiled.__qualname__}"
    bound.__module__ = __name__
    follow: Callable[..., tuple[int, bool]] = _compile(bound, signature)
    return follow


def _compile(function: Callable[..., Any], signature: Any) -> Any:
    import numba

    options: Any = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        return numba.njit(signature, cache=True, **options)(function)
    except (RuntimeError, OSError) as error:  # no folder to write to, or no room in it
        _log.info("update kernels are compiled anew in every process: %s", error)
        return numba.njit(signature, **options)(function)


@functools.cache
def compile_loop(
    rule: Callable[..., Any], slots: int, scalars: int, dtype: np.dtype[Any]
) -> Callable[..., bool]:
    """Compile, or load from numba's cache on disk, the loop of one rule for one dtype.

    Args:
        rule: a function of `formulas`.
        slots: how many slots it has, 0 to 2.
        scalars: how many scalars it takes, at most SCALARS_MAX.
        dtype: float32 or float64, of arrays and scalars.

    Returns:
        loop(begin, end, params, grad, out, scalars, old, new, ...) -> true if something it wrote
        is not finite. `scalars` is an array of SCALARS_MAX elements: a call with a tuple of
        NumPy scalars takes 0.3 us longer. The loop releases the GIL. All arrays are contiguous
        and of `dtype`, none overlaps another, and [begin, end) lies in all of them; the last two
        nothing checks.
    """
    import numba

    number = numba.from_dtype(dtype)
    read = numba.types.Array(number, 1, "C", readonly=True)
    write = numba.types.Array(number, 1, "C")
    index = numba.types.intp
    signature = numba.types.boolean(index, index, read, read, write, read, *(read, write) * slots)
    bound = bind_formula(_LOOPS[slots], rule, globals(), SCALARS=scalars)
    return _compile(bound, signature)  # type: ignore[no-any-return]
