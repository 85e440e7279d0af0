"""What becomes of stale gradients: against closed forms, over shards, refused, by users' rules."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import math
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest

import psframe
from psframe import stale
from psframe.layout import Array, Layout
from psframe.stale import (
    Accept,
    Chain,
    Clip,
    Correction,
    DelayAdaptive,
    DelayCompensation,
    Drop,
    GapAware,
    Inverse,
    Rule,
    Stale,
    as_rule,
    chain,
    checked_factor,
)

SIZE, WORKERS = 1003, 3
RULES: list[Rule] = [
    Accept(),
    Inverse(),
    DelayAdaptive(4),
    Drop(4),
    Clip(1.5),
    DelayCompensation(2.0),
    DelayCompensation(0.04, adaptive=False),
    GapAware(),
    chain(Drop(4), DelayCompensation(2.0), Clip(1)),
]
by_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def push(staleness: int = 0, norm: float = math.nan, worker: int = 0) -> Stale:
    return Stale(worker, WORKERS, staleness, norm)


def layout_of(dtype: Any, size: int = SIZE) -> Layout:
    return Layout.of({"a": np.zeros(size - 3, dtype), "b": np.zeros(3, dtype)})


def made(
    rule: Rule, dtype: Any, begin: int = 0, end: int = SIZE, layout: Layout | None = None
) -> Correction:
    found = rule.correction(layout or layout_of(dtype), begin, end, WORKERS)
    assert found is not None
    return found


def any_of(value: Any) -> Any:
    """Hide from the type checker that an argument is wrong."""
    return value


class Steps:
    """Random gradients, parameters, and what workers have read of them, with some updates refused.

    Gives (worker, grad, params, read, params after it, whether it is refused) in turn.
    """

    def __init__(self, dtype: Any, seed: int = 0, steps: int = 40, size: int = SIZE) -> None:
        rng, self.rows = np.random.default_rng(seed), []
        now = rng.standard_normal(size).astype(dtype)
        read = [now] * WORKERS
        for _ in range(steps):
            worker = int(rng.integers(WORKERS))
            grad = rng.standard_normal(size).astype(dtype)
            after = (now - dtype(0.1) * rng.standard_normal(size)).astype(dtype)
            refused = bool(rng.integers(4) == 0)
            self.rows.append((worker, grad, now, read[worker], after, refused))
            now = now if refused else after
            read[worker] = now


def run(correction: Correction, steps: Steps, part: slice = slice(None)) -> list[Array]:
    """Give all that is made of the gradients; inputs are read-only, and `out` holds garbage."""
    results = []
    for worker, *arrays, refused in steps.rows:
        grad, params, read, after = (array[part].copy() for array in arrays)
        for array in (grad, params, read, after):
            array.flags.writeable = False
        out = np.full_like(grad, np.nan)
        found = correction.correct(worker, grad, params, read, out)
        assert found is grad or found is out
        results.append(found.copy())
        if refused:
            correction.rejected()
        else:
            correction.applied(params, after)
    return results


# ---- factors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [*range(12), 10**6])
def test_factors_are_the_closed_forms(tau: int) -> None:
    assert Accept().factor(push(tau)) == 1.0
    assert Inverse().factor(push(tau)) == 1 / max(1, tau)
    for threshold in (0.5, 1, 4, 7.5):
        expected = 1.0 if tau <= threshold else threshold / tau
        assert DelayAdaptive(threshold).factor(push(tau)) == expected
    for threshold in (1, 4, 11):
        assert Drop(threshold).factor(push(tau)) == (1.0 if tau < threshold else None)
    for rule in (DelayCompensation(2.0), GapAware()):
        assert rule.factor(push(tau)) == 1.0


@pytest.mark.parametrize(
    ("norm", "factor"),
    [(0.0, 1.0), (1.5, 1.0), (1.6, 1.5 / 1.6), (1e300, 1.5 / 1e300), (math.inf, None)],
)
def test_clip_bounds_the_norm(norm: float, factor: float | None) -> None:
    assert Clip(1.5).needs_norm
    assert Clip(1.5).factor(push(3, norm)) == factor


@pytest.mark.parametrize("tau", range(10))
@pytest.mark.parametrize("norm", [0.1, 3.0, 20.0])
def test_factors_of_a_chain_multiply_and_each_sees_the_norm_so_far(tau: int, norm: float) -> None:
    inverse = 1 / max(1, tau)
    assert chain(Inverse(), Clip(1.0)).factor(push(tau, norm)) == inverse * (
        min(1.0, 1.0 / (norm * inverse))
    )
    clipped = min(1.0, 1.0 / norm)
    assert chain(Clip(1.0), Inverse()).factor(push(tau, norm)) == clipped * inverse
    assert chain(chain(Inverse(), Clip(1.0)), Inverse()).factor(push(tau, norm)) == (
        pytest.approx(min(inverse, 1.0 / norm) * inverse)
    )
    kept = chain(Inverse(), Drop(5), Clip(1.0)).factor(push(tau, norm))
    assert (kept is None) == (tau >= 5)


def test_a_chain_needs_what_its_rules_need() -> None:
    assert not chain(Drop(3), Inverse()).needs_norm
    assert not chain(Drop(3), Inverse()).needs_read
    assert chain(Drop(3), Clip(1)).needs_norm
    assert chain(chain(GapAware()), Clip(1)).needs_read
    assert not Chain.needs_norm
    assert chain(Drop(3), Inverse()).correction(layout_of(np.float32), 0, 5, 2) is None


# ---- corrections -------------------------------------------------------------------------------


@by_dtype
def test_delay_compensation_with_one_lambda(dtype: Any) -> None:
    lam, steps = dtype(0.04), Steps(dtype)
    found = run(made(DelayCompensation(0.04, adaptive=False), dtype), steps)
    for (_, g, x, read, _, _), corrected in zip(steps.rows, found, strict=True):
        assert corrected.dtype == dtype
        np.testing.assert_array_equal(corrected, g + lam * (g * g) * (x - read))


@by_dtype
@pytest.mark.parametrize("decay", [0.95, 0.0])
def test_adaptive_delay_compensation_forgets_refused_gradients(dtype: Any, decay: float) -> None:
    steps = Steps(dtype)
    found = run(made(DelayCompensation(2.0, decay=decay), dtype), steps)
    mean = {worker: np.zeros(SIZE, dtype) for worker in range(WORKERS)}
    for (worker, g, x, read, _, refused), corrected in zip(steps.rows, found, strict=True):
        new = dtype(decay) * mean[worker] + dtype(1 - decay) * (g * g)
        lam = dtype(2.0) / np.sqrt(new + dtype(1e-7))
        np.testing.assert_array_equal(corrected, g + lam * (g * g) * (x - read))
        if not refused:
            mean[worker] = new
    assert {row[5] for row in steps.rows} == {False, True}


def test_an_update_that_is_abandoned_is_as_one_that_is_rejected() -> None:
    rule, steps = DelayCompensation(2.0), Steps(np.float64)
    plain = made(rule, np.float64)
    other = made(rule, np.float64)
    kept = [row for row in steps.rows if not row[5]]
    steps.rows = kept
    expected = run(plain, steps)
    for row, want in zip(kept, expected, strict=True):
        worker, g, x, read, after, _ = row
        for abandoned in ((worker + 1) % WORKERS, worker):
            other.correct(abandoned, 3 * g, x, read, np.empty(SIZE))
        np.testing.assert_array_equal(other.correct(worker, g, x, read, np.empty(SIZE)), want)
        other.applied(x, after)


@pytest.mark.parametrize("rule", [DelayCompensation(2.0), DelayCompensation(1.0, adaptive=False)])
def test_a_fresh_gradient_is_left_as_it_is(rule: Rule) -> None:
    for dtype in (np.float32, np.float64):
        x, g = np.linspace(-3, 3, SIZE, dtype=dtype), np.linspace(1, 2, SIZE, dtype=dtype)
        np.testing.assert_array_equal(made(rule, dtype).correct(0, g, x, x, np.empty_like(g)), g)
        np.testing.assert_array_equal(
            made(rule, dtype).correct(0, g, x, x.copy(), np.empty_like(g)), g
        )


def test_delay_compensation_is_the_gradient_of_a_quadratic_where_g_g_is_its_hessian() -> None:
    """f = x^2 / 2 has Hessian 1: where g = 1 the corrected gradient is that at x."""
    read, x = np.ones(SIZE), np.linspace(-1, 3, SIZE)
    rule = made(DelayCompensation(1.0, adaptive=False), np.float64)
    np.testing.assert_allclose(rule.correct(0, read, x, read, np.empty(SIZE)), x, atol=1e-15)


@by_dtype
def test_overflow_makes_a_gradient_that_is_refused_and_is_forgotten(dtype: Any) -> None:
    rule = DelayCompensation(2.0)
    correction, witness = made(rule, dtype), made(rule, dtype)
    x, read = np.ones(SIZE, dtype), np.zeros(SIZE, dtype)
    huge = np.full(SIZE, np.finfo(dtype).max / 2, dtype)
    assert not np.isfinite(correction.correct(0, huge, x, read, np.empty(SIZE, dtype))).any()
    correction.rejected()
    for k in range(3):
        g = np.full(SIZE, k + 1, dtype)
        results = [c.correct(0, g, x, read, np.empty(SIZE, dtype)) for c in (correction, witness)]
        assert results[0].tobytes() == results[1].tobytes()
        for c in (correction, witness):
            c.applied(x, x)
    too_large = made(DelayCompensation(1e300, adaptive=False), np.float32)
    ones = np.ones(SIZE, np.float32)
    assert np.isinf(too_large.correct(0, ones, 2 * ones, ones, np.empty_like(ones))).all()


@by_dtype
@pytest.mark.parametrize("size", [3, 255, 256, 1003])
def test_gap_aware_is_the_closed_form(dtype: Any, size: int) -> None:
    steps = Steps(dtype, size=size)
    correction = made(GapAware(), dtype, 0, size, layout_of(dtype, size))
    found = run(correction, steps)
    lengths: list[float] = []
    tolerance = 1e-12 if dtype is np.float64 else 2e-7
    for (_, g, x, read, after, refused), corrected in zip(steps.rows, found, strict=True):
        gap = math.sqrt(np.mean((x.astype(float) - read) ** 2))
        expected = g.astype(float)
        if lengths:
            weights = 0.001 * 0.999 ** np.arange(len(lengths))[::-1]
            mean = float((weights * lengths).sum() / (1 - 0.999 ** len(lengths)))
            expected = g / (1 + gap / mean)
        np.testing.assert_allclose(corrected, expected, rtol=tolerance)
        if not refused:
            lengths.append(math.sqrt(np.mean((after.astype(float) - x) ** 2)))


def test_gap_aware_counts_steps_that_all_go_one_way() -> None:
    """With tau equal steps between them the gradient is divided by 1 + tau."""
    correction, step = made(GapAware(), np.float64), np.full(SIZE, 0.5)
    x, g = [k * step for k in range(12)], np.linspace(-1, 1, SIZE)
    for k in range(11):
        for tau in range(k + 1):
            got = correction.correct(0, g, x[k], x[k - tau], np.empty(SIZE))
            np.testing.assert_allclose(got, g / (1 + tau), rtol=1e-12)
        correction.applied(x[k], x[k + 1])


@by_dtype
def test_gap_aware_leaves_what_is_fresh_and_what_cannot_be_compared(dtype: Any) -> None:
    correction = made(GapAware(), dtype)
    g, x, out = np.ones(SIZE, dtype), np.ones(SIZE, dtype), np.empty(SIZE, dtype)
    assert correction.correct(0, g, x, 2 * x, out) is g  # before the first step
    correction.applied(x, x)  # a learning rate of 0
    assert correction.correct(0, g, x, 2 * x, out) is g
    correction.applied(x, 2 * x)
    assert correction.correct(0, g, x, x, out) is g
    assert correction.correct(0, g, x, 2 * x, out) is out


@by_dtype
@pytest.mark.parametrize(
    "rule",
    [
        DelayCompensation(2.0),
        DelayCompensation(0.04, adaptive=False),
        chain(DelayCompensation(1.0), Inverse(), DelayCompensation(0.1, adaptive=False)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("cuts", [(0, 1, SIZE), (0, 0, 16, 500, 501, SIZE, SIZE)])
def test_the_number_of_servers_changes_no_bit(
    rule: Rule, cuts: tuple[int, ...], dtype: Any
) -> None:
    steps = Steps(dtype, steps=12)
    whole = run(made(rule, dtype), steps)
    shards = [run(made(rule, dtype, b, e), steps, slice(b, e)) for b, e in pairwise(cuts)]
    for k, expected in enumerate(whole):
        assert np.concatenate([shard[k] for shard in shards]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("rule", [DelayCompensation(2.0), GapAware()], ids=repr)
def test_an_empty_shard_is_corrected_too(rule: Rule) -> None:
    steps = Steps(np.float32, steps=5)
    assert [len(found) for found in run(made(rule, np.float32, 7, 7), steps, slice(7, 7))] == [
        0
    ] * 5


@pytest.mark.parametrize("rule", [DelayCompensation(2.0), GapAware()], ids=repr)
@pytest.mark.parametrize("shard", [(-1, 2), (2, 1), (0, SIZE + 1)])
def test_a_shard_outside_the_vector_is_refused(rule: Rule, shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"expected it within \[0, {SIZE}\)"):
        rule.correction(layout_of(np.float32), *shard, WORKERS)


@pytest.mark.parametrize(
    "rule", [DelayCompensation(2.0), DelayCompensation(2.0, adaptive=False), GapAware()], ids=repr
)
def test_arrays_that_do_not_fit_are_never_given_to_a_loop(rule: Rule) -> None:
    correction = made(rule, np.float32)
    good, short = np.ones(SIZE, np.float32), np.ones(SIZE - 1, np.float32)
    for k in range(4):
        arrays = [good, good, 2 * good, good.copy()]
        arrays[k] = short
        with pytest.raises(AssertionError, match="shard"):
            correction.correct(0, *arrays)
    double = np.ones(SIZE)
    with pytest.raises(TypeError):
        correction.correct(0, good, double, good, good.copy())


# ---- several corrections -----------------------------------------------------------------------


@dataclass(frozen=True)
class Add(Rule):
    """Adds a number to every element, and writes down what it is told; 0 leaves it as it is."""

    number: float
    log: ClassVar[list[str]] = []

    def factor(self, push: Stale) -> float | None:
        return 0.5

    def correction(self, layout: Layout, begin: int, end: int, workers: int) -> Correction:
        return Adding(self)


class Adding:
    def __init__(self, rule: Add) -> None:
        self.rule = rule

    def correct(self, worker: int, grad: Array, params: Array, read: Array, out: Array) -> Array:
        assert not np.shares_memory(grad, out)
        if not self.rule.number:
            return grad
        np.multiply(grad, 2, out=out)
        out += self.rule.number
        return out

    def applied(self, before: Array, after: Array) -> None:
        self.rule.log.append(f"applied {self.rule.number}")

    def rejected(self) -> None:
        self.rule.log.append(f"rejected {self.rule.number}")


@pytest.mark.parametrize(
    "numbers",
    [(1,), (1, 2), (0, 1), (1, 0), (0, 0), (1, 0, 2), (1, 2, 3, 0), (5, 4, 3, 2, 1), (1, 0, 0)],
)
def test_corrections_of_a_chain_follow_each_other(numbers: tuple[int, ...]) -> None:
    """Twice what the one before has made, and a number: every result tells the order."""
    rule = chain(*[Add(number) for number in numbers], Accept())
    correction = made(rule, np.float64)
    g, out = np.linspace(-1, 1, SIZE), np.empty(SIZE)
    g.flags.writeable = False
    for _ in range(2):
        got = correction.correct(0, g, g, g, out)
        assert got is (out if any(numbers) else g)
        expected = g.copy()
        for number in filter(None, numbers):
            expected = 2 * expected + number
        np.testing.assert_array_equal(got, expected)
    Add.log.clear()
    correction.applied(g, g)
    correction.rejected()
    told = [f"{what} {n}" for what in ("applied", "rejected") for n in numbers]
    assert Add.log == told
    assert rule.factor(push()) == 0.5 ** len(numbers)


def test_a_correction_that_gives_something_else_is_named() -> None:
    class Wrong(Adding):
        def correct(self, *arguments: Any) -> Any:
            return np.ones(SIZE, np.float32) if self.rule.number else None

    @dataclass(frozen=True)
    class Bad(Add):
        def correction(self, layout: Layout, begin: int, end: int, workers: int) -> Correction:
            return Wrong(self)

    def work(worker: psframe.Worker) -> None:
        worker.push({"w": np.ones(SIZE)}).wait()

    for number, name in ((0, "NoneType"), (1, "an array of float32")):
        with pytest.raises(RuntimeError, match=rf"stale: Wrong\.correct gave {name} of its own"):
            psframe.run(
                work, {"w": np.ones(SIZE)}, optimizer=psframe.optim.SGD(0.1), stale=Bad(number)
            )


def test_a_user_s_rule_scales_corrects_and_drops_a_quadratic_s_gradients() -> None:
    """A rule that knows the Hessian gives each gradient at the present parameters: serial SGD."""
    curvature = np.linspace(0.1, 1.5, SIZE)

    class Exact:
        def correct(
            self, worker: int, grad: Array, params: Array, read: Array, out: Array
        ) -> Array:
            np.multiply(params - read, curvature, out=out)
            out += grad
            return out

        def applied(self, before: Array, after: Array) -> None:
            pass

        def rejected(self) -> None:
            pass

    @dataclass(frozen=True)
    class Newton(Rule):
        most: int = 4

        needs_read: ClassVar[bool] = True

        def factor(self, push: Stale) -> float | None:
            return 1.0 if push.staleness < self.most else None

        def correction(self, layout: Layout, begin: int, end: int, workers: int) -> Correction:
            return Exact()

    rule = as_rule(Newton())
    correction, rng = made(rule, np.float64), random.Random(1)
    x = serial = np.ones(SIZE)
    read, read_at, version, out, dropped = [x] * 5, [0] * 5, 0, np.empty(SIZE), 0
    for _ in range(200):
        worker = rng.randrange(5)
        factor = checked_factor(rule, Stale(worker, 5, version - read_at[worker], math.nan))
        if factor is None:
            dropped += 1
        else:
            g = correction.correct(worker, curvature * read[worker], x, read[worker], out)
            x, serial = x - 0.2 * factor * g, serial - 0.2 * curvature * serial
            version += 1
        read[worker], read_at[worker] = x, version
    assert 0 < dropped < 190
    np.testing.assert_allclose(x, serial, rtol=1e-12, atol=1e-12)


# ---- what is no rule, and what is wrong with one -----------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        -1.0,
        -1e-300,
        "1",
        True,
        1j,
        np.float64("nan"),
        [1.0],
        10**400,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_factor_that_is_none_names_its_rule(value: Any) -> None:
    @dataclass(frozen=True)
    class Odd(Rule):
        k: int = 3

        def factor(self, push: Stale) -> float | None:
            return any_of(value)

    for rule in (Odd(), chain(Accept(), Odd(), Inverse())):
        with pytest.raises(
            RuntimeError, match=r"stale: \S*Odd\(k=3\) gave the factor .* expected a"
        ):
            checked_factor(rule, push(4))


@pytest.mark.parametrize("value", [0.0, 1, 2.5, np.float32(0.5), np.int64(3), None])
def test_a_factor_is_any_number_that_is_not_negative(value: Any) -> None:
    @dataclass(frozen=True)
    class Fine(Rule):
        def factor(self, push: Stale) -> float | None:
            return any_of(value)

    factor = checked_factor(Fine(), push(4))
    assert factor == value
    assert factor is None or type(factor) is float


def test_what_is_no_rule_is_refused() -> None:
    for rule in RULES:
        assert as_rule(rule) is rule
    with pytest.raises(TypeError, match=r"got the class Inverse, expected a rule; write Inverse\("):
        as_rule(Inverse)
    with pytest.raises(TypeError, match=r"got 3 of type int, expected a rule of psframe\.stale"):
        as_rule(3)
    with pytest.raises(TypeError, match="got None of type NoneType"):
        as_rule(None)
    with pytest.raises(TypeError, match="got the class Clip"):
        chain(Inverse(), any_of(Clip))
    with pytest.raises(ValueError, match="chain: expected at least one rule"):
        chain()


def test_a_rule_whose_text_differs_from_rank_to_rank_is_refused() -> None:
    @dataclass(frozen=True)
    class Lent(Rule):
        f: Callable[[int], float]

        def factor(self, push: Stale) -> float | None:
            return self.f(push.staleness)

    with pytest.raises(TypeError, match=r"differs from rank to rank.*make Lent a frozen"):
        as_rule(Lent(lambda tau: 1.0))


def test_a_rule_must_say_its_factor() -> None:
    class Silent(Rule):
        pass

    with pytest.raises(TypeError, match="abstract"):
        any_of(Silent)()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_frozen_equal_hashable_and_printed_alike(rule: Rule) -> None:
    again = eval(repr(rule), vars(stale))
    assert again == rule
    assert hash(again) == hash(rule)
    assert repr(again) == repr(rule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        any_of(rule).anything = 1


def test_numbers_are_written_alike() -> None:
    assert repr(Clip(1)) == repr(Clip(any_of(np.float32(1)))) == "Clip(norm=1.0)"
    assert repr(Drop(any_of(np.int64(4)))) == "Drop(threshold=4)"
    assert repr(chain(Drop(4), Accept())) == "chain(Drop(threshold=4), Accept())"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DelayAdaptive(0), ValueError, "DelayAdaptive: threshold is 0.0, .* > 0"),
        (lambda: DelayAdaptive(math.inf), ValueError, "threshold is inf"),
        (lambda: DelayAdaptive(any_of("4")), TypeError, "threshold is '4'"),
        (lambda: Drop(0), ValueError, "Drop: threshold is 0, expected an integer >= 1"),
        (lambda: Drop(any_of(4.0)), TypeError, r"threshold is 4\.0 of type float"),
        (lambda: Drop(any_of(True)), TypeError, "threshold is True"),
        (lambda: Clip(0.0), ValueError, "Clip: norm is 0.0"),
        (lambda: Clip(math.nan), ValueError, "norm is nan"),
        (lambda: Clip(10**400), ValueError, "norm is inf"),
        (lambda: Clip(-(10**400)), ValueError, "norm is -inf"),
        (lambda: DelayCompensation(-1.0), ValueError, "lam is -1.0"),
        (lambda: DelayCompensation(any_of(None)), TypeError, "lam is None"),
        (lambda: DelayCompensation(1.0, decay=1.0), ValueError, "decay is 1.0, .* < 1"),
        (
            lambda: DelayCompensation(1.0, any_of(0.95)),
            TypeError,
            "adaptive is 0.95, expected True",
        ),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("module", ["", ".chaining", ".corrections", ".factors"])
def test_the_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"psframe.stale{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_choosing_a_rule_imports_no_compiler() -> None:
    program = (
        "import sys, psframe.stale as s; s.chain(s.DelayCompensation(2.0), s.GapAware())\n"
        "assert not {'numba', 'cupy', 'mpi4py'} & set(sys.modules), 'imported too early'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
