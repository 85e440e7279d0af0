"""The optimizers as a user sees them: arguments, equality, text, imports."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe import optim
from psframe.layout import Layout
from psframe.optim.updater import _slot_arrays

CLASSES: list[Any] = [optim.SGD, optim.Adagrad, optim.RMSProp, optim.Adam, optim.AdamW]
by_class = pytest.mark.parametrize("cls", CLASSES)


def any_of(value: Any) -> Any:
    """Hide from the type checker that an argument is wrong."""
    return value


@by_class
def test_frozen_equal_hashable_and_printed_alike(cls: Any) -> None:
    a, b = cls(1, no_decay=["*bias"]), cls(np.float32(1.0), no_decay=("*bias",))
    assert a == b
    assert hash(a) == hash(b)
    assert repr(a) == repr(b)
    assert eval(repr(a), vars(optim)) == a
    assert a != cls(1)
    assert a != cls(0.5, no_decay=("*bias",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.lr = 2.0


def test_rules_of_different_kinds_differ() -> None:
    assert optim.Adam(0.1, weight_decay=0.01) != optim.AdamW(0.1)


def test_a_delayed_rule_is_frozen_equal_and_printed_alike() -> None:
    a, b = optim.DelayedNesterov(1, 4), optim.DelayedNesterov(1.0, every=4, momentum=0.9)
    assert a == b
    assert repr(a) == (
        "DelayedNesterov(lr=1.0, every=4, momentum=0.9, activation=0.0, weight_decay=0.0,"
        " no_decay=())"
    )
    assert eval(repr(a), vars(optim)) == a
    assert a != optim.DelayedNesterov(1, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        any_of(a).every = 2


def test_positional_arguments() -> None:
    assert optim.SGD(0.1, 0.9, True, 1e-4) == optim.SGD(
        lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    assert optim.Adam(1e-3, 0.9, 0.999, 1e-8, 0.0) == optim.Adam()
    sgd: Any = optim.SGD
    with pytest.raises(TypeError):
        sgd(0.1, 0.9, True, 1e-4, ("*bias",))


@by_class
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, r"lr is -0\.1, expected a finite number >= 0"),
        ({"lr": math.nan}, ValueError, "lr is nan"),
        ({"lr": math.inf}, ValueError, "lr is inf"),
        ({"lr": "0.1"}, TypeError, "lr is '0.1' of type str, expected a number"),
        ({"lr": None}, TypeError, "lr is None"),
        ({"lr": True}, TypeError, "lr is True"),
        ({"lr": 0.1, "weight_decay": -1e-4}, ValueError, "weight_decay is -0.0001"),
        (
            {"lr": 0.1, "no_decay": "bias"},
            TypeError,
            r"no_decay is 'bias', .*such as \('\*bias',\)",
        ),
        ({"lr": 0.1, "no_decay": (1,)}, TypeError, r"no_decay is .* patterns that are strings"),
    ],
)
def test_bad_arguments_of_all(
    cls: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"{cls.__name__}: {message}"):
        cls(**arguments)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optim.SGD(0.1, momentum=1.0), ValueError, "momentum is 1.0, .* >= 0 and < 1;"),
        (lambda: optim.SGD(0.1, momentum=-0.1), ValueError, "momentum is -0.1"),
        (lambda: optim.SGD(0.1, nesterov=True), ValueError, "needs a momentum > 0.*momentum=0.9"),
        (
            lambda: optim.SGD(0.1, 0.9, nesterov=any_of(1)),
            TypeError,
            "nesterov is 1, expected True or",
        ),
        (lambda: optim.DelayedNesterov(0.1, every=0), ValueError, "every is 0, .* >= 1"),
        (lambda: optim.DelayedNesterov(0.1, any_of(2.0)), TypeError, "every is 2.0 of type float"),
        (lambda: optim.DelayedNesterov(0.1, 2, momentum=1.0), ValueError, "momentum is 1.0"),
        (lambda: optim.DelayedNesterov(0.1, 2, activation=-0.1), ValueError, "activation is -0.1"),
        (
            lambda: optim.DelayedNesterov(0.1, 4, activation=0.3),
            ValueError,
            r"activation is 0.3, .*\[0, 1/every\], so at most 0.25; leave it out",
        ),
        (lambda: optim.Adagrad(eps=0.0), ValueError, "Adagrad: eps is 0.0, .* > 0"),
        (lambda: optim.RMSProp(rho=1.0), ValueError, "rho is 1.0"),
        (lambda: optim.Adam(beta1=1.0), ValueError, "Adam: beta1 is 1.0"),
        (lambda: optim.AdamW(beta2=1.5), ValueError, "AdamW: beta2 is 1.5"),
        (lambda: optim.Adam(eps=-1e-8), ValueError, "eps is -1e-08"),
    ],
)
def test_bad_arguments_of_one(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_eps_that_is_zero_in_float32_is_refused_at_once() -> None:
    layout = Layout.of({"w": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"eps is 1e-60, which is 0 in float32.*1e-8"):
        optim.Adam(eps=1e-60).updater(layout, 0, 3)
    optim.Adam(eps=1e-60).updater(Layout.of({"w": np.zeros(3)}), 0, 3)


@pytest.mark.parametrize("shard", [(-1, 2), (2, 1), (0, 4)])
def test_a_shard_outside_the_vector_is_refused(shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"expected it within \[0, 3\)"):
        optim.SGD(0.1).updater(Layout.of({"w": np.zeros(3)}), *shard)


@pytest.mark.parametrize(
    ("norm", "clip_norm", "scale"),
    [(0.0, 1.0, 1.0), (1.0, 1.0, 1.0), (4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (9.0, math.inf, 1.0)],
)
def test_clip_scale(norm: float, clip_norm: float, scale: float) -> None:
    assert optim.clip_scale(norm, clip_norm) == scale


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_clip_scale_of_no_norm_is_nan(norm: float) -> None:
    assert math.isnan(optim.clip_scale(norm, 1.0))


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan])
def test_clip_norm_is_positive(clip_norm: float) -> None:
    with pytest.raises(ValueError, match=r"clip_norm: got .*, expected a number > 0"):
        optim.clip_scale(1.0, clip_norm)


def test_without_a_folder_for_its_cache_a_loop_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import numba

    from psframe.optim import cpu, formulas

    njit: Any = numba.njit

    def without_cache(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*arguments, **options)

    monkeypatch.setattr(numba, "njit", without_cache)
    caplog.set_level("INFO", logger="psframe")
    loop = cpu.compile_loop.__wrapped__(formulas.sgd, 0, 3, np.dtype(np.float32))
    out, ones = np.zeros(5, np.float32), np.ones(5, np.float32)
    scalars = np.array([1, 0, 0.5] + [0] * 7, np.float32)
    assert not loop(1, 4, ones, ones, out, scalars)
    assert out.tolist() == [0.0, 0.5, 0.5, 0.5, 0.0]
    assert "compiled anew in every process: cannot cache" in caplog.text


def test_the_second_process_finds_the_loops_in_the_cache(tmp_path: Path) -> None:
    program = (
        "import numpy as np\n"
        "from psframe.optim import cpu, formulas\n"
        "loop = cpu.compile_loop(formulas.momentum, 1, 5, np.dtype(np.float32))\n"
        "print(sum(loop.stats.cache_hits.values()), sum(loop.stats.cache_misses.values()))\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    printed = [
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            timeout=60,
            env=environment,
            capture_output=True,
            text=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert printed == [["0", "1"], ["1", "0"]]


def test_a_changed_formula_is_not_found_in_the_cache() -> None:
    from psframe.optim import cpu

    def first(w: float, g: float, lr: float) -> float:
        return w - lr * g

    def second(w: float, g: float, lr: float) -> float:
        return w + lr * g

    names = {cpu.bind_formula(cpu._loop0, f, vars(cpu)).__qualname__ for f in (first, second)}
    assert len(names) == 2


@pytest.mark.parametrize("size", [0, 1, 15, 16, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_slots_begin_at_cache_lines_and_do_not_overlap(size: int, dtype: Any) -> None:
    arrays: list[Any] = [
        *_slot_arrays(np, 4, size, np.dtype(dtype)),
        *_slot_arrays(np, 2, size, np.dtype(dtype), before=4),
    ]
    addresses = [array.ctypes.data for array in arrays]
    assert [array.size for array in arrays] == [size] * 6
    assert all(address % 64 == 0 for address in addresses) or size == 0
    for k, array in enumerate(arrays):
        array[:] = k + 1
    assert all((array == k + 1).all() for k, array in enumerate(arrays))


def test_importing_and_choosing_a_rule_imports_neither_numba_nor_cupy() -> None:
    program = (
        "import sys, psframe.optim as o; o.AdamW(); o.schedules.Cosine(1.0, steps=3)\n"
        "assert not {'numba', 'cupy', 'mpi4py'} & set(sys.modules), 'imported too early'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("module", ["clipping", "delayed", "rules", "schedules"])
def test_the_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"psframe.optim.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
