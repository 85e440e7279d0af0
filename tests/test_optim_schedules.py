"""Learning rates: closed forms, boundaries, equality, and what a rank may compare."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

from psframe import optim
from psframe.layout import Layout
from psframe.optim.schedules import Composed, Constant, Cosine, LinearWarmup, Step

anything: Any = optim.schedules  # through which the type checker lets wrong arguments pass

MADE = [
    lambda: Constant(0.1),
    lambda: Step(0.1, every=10, factor=0.5),
    lambda: Cosine(0.1, steps=100, end=0.01),
    lambda: LinearWarmup(0.1, steps=5),
    lambda: Composed((LinearWarmup(0.1, steps=5), Cosine(0.1, steps=10)), (5,)),
]


def test_constant() -> None:
    assert [Constant(0.3)(k) for k in (0, 1, 10**9)] == [0.3] * 3


def test_step_changes_at_the_multiples() -> None:
    lr = Step(0.4, every=3, factor=0.1)
    assert [lr(k) for k in (0, 2)] == [0.4, 0.4]
    assert [lr(k) for k in (3, 5)] == [0.4 * 0.1, 0.4 * 0.1]
    assert lr(6) == pytest.approx(0.004)
    assert lr(10**6) == 0.0


def test_cosine_at_its_ends_and_middle() -> None:
    lr = Cosine(1.0, steps=8, end=0.2)
    assert lr(0) == 1.0
    assert lr(4) == pytest.approx(0.6)
    assert lr(2) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert lr(7) > lr(8) == lr(9) == lr(10**9) == 0.2


def test_warmup_rises_evenly_and_stays() -> None:
    lr = LinearWarmup(0.5, steps=4, start=0.1)
    assert [lr(k) for k in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert lr(4) == lr(5) == lr(10**9) == 0.5


def test_composed_schedules_count_from_their_own_beginning() -> None:
    lr = Composed((LinearWarmup(1.0, steps=4), Constant(0.7), Step(1.0, every=2)), (4, 6))
    assert [lr(k) for k in range(10)] == pytest.approx(
        [0.0, 0.25, 0.5, 0.75, 0.7, 0.7, 1.0, 1.0, 0.1, 0.1]
    )


def test_composed_takes_any_callable_and_nests() -> None:
    inner = Composed((Constant(1.0), lambda step: float(step)), (2,))
    lr = Composed([Constant(5.0), inner], [3])  # type: ignore[arg-type]
    assert [lr(k) for k in range(8)] == [5.0, 5.0, 5.0, 1.0, 1.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("make", MADE)
def test_equal_hashable_and_printed_alike(make: Any) -> None:
    assert make() == make()
    assert hash(make()) == hash(make())
    assert repr(make()) == repr(make())
    assert eval(repr(make())) == make()


def test_numbers_are_brought_to_one_form() -> None:
    assert repr(Constant(1)) == repr(Constant(np.float64(1.0))) == "Constant(value=1.0)"
    assert repr(Step(1, np.int64(2), 1)) == "Step(value=1.0, every=2, factor=1.0)"


def decay_by_hand(step: int, base: float = 1.0) -> float:
    return base / (1 + step)


class Halving:
    def __call__(self, step: int) -> float:
        return 0.5**step


def test_repr_of_a_users_function_holds_no_address() -> None:
    for lr in (decay_by_hand, functools.partial(decay_by_hand, base=2.0), Halving(), lambda s: 1.0):
        text = repr(optim.SGD(lr))
        assert "0x" not in text
        assert text == repr(optim.SGD(lr))
    assert "decay_by_hand line" in repr(optim.SGD(decay_by_hand))
    assert repr(Composed((Halving(),), ())).count("Halving") == 1


@pytest.mark.parametrize("lr", [decay_by_hand, Halving(), Cosine(1.0, steps=5)])
def test_updates_use_the_rate_of_their_step(lr: Any) -> None:
    updater = optim.SGD(lr).updater(Layout.of({"w": np.zeros(1)}), 0, 1)
    w = np.zeros(1)
    for step in (0, 1, 2, 3, 7, 2):
        out = np.empty(1)
        assert updater.update(step, w, np.ones(1), out)
        assert out[0] == -lr(step)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-0.1, ValueError, r"gave -0\.1 for update 4, expected a finite number >= 0"),
        (math.nan, ValueError, "gave nan for update 4"),
        (math.inf, ValueError, "gave inf for update 4"),
        (None, TypeError, "gave None for update 4, expected a number; return a float"),
        ("1", TypeError, "gave '1' for update 4"),
        (True, TypeError, "gave True for update 4"),
    ],
)
def test_what_a_schedule_may_not_give(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optim.SGD(lambda step: value).learning_rate(4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: anything.Constant(-1.0),
            ValueError,
            r"Constant: value is -1\.0, expected .* >= 0",
        ),
        (lambda: anything.Constant(math.nan), ValueError, "value is nan"),
        (
            lambda: anything.Constant("0.1"),
            TypeError,
            "value is '0.1' of type str, expected a number",
        ),
        (lambda: anything.Step(0.1, every=0), ValueError, "every is 0, expected an integer >= 1"),
        (lambda: anything.Step(0.1, every=1.5), TypeError, "every is 1.5 of type float"),
        (
            lambda: anything.Step(0.1, every=1, factor=1.1),
            ValueError,
            r"factor is 1\.1.*LinearWarmup",
        ),
        (lambda: anything.Cosine(0.1, steps=0), ValueError, "steps is 0"),
        (lambda: anything.Cosine(0.1, steps=True), TypeError, "steps is True"),
        (lambda: anything.LinearWarmup(0.1, steps=3, start=-1), ValueError, "start is -1"),
        (lambda: anything.Composed((), ()), ValueError, "0 schedules and 0 boundaries"),
        (
            lambda: anything.Composed((Constant(1.0),), (1,)),
            ValueError,
            "1 schedules and 1 boundaries",
        ),
        (
            lambda: anything.Composed((Constant(1.0), 0.1), (1,)),
            TypeError,
            r"write Constant\(0\.1\)",
        ),
        (lambda: anything.Composed(Constant(1.0), ()), TypeError, r"expected a tuple.*\(x,\)"),
        (
            lambda: anything.Composed((Constant(1.0),) * 2, (1.0,)),
            TypeError,
            "boundaries that are ints",
        ),
        (
            lambda: anything.Composed((Constant(1.0),) * 2, (0,)),
            ValueError,
            "increasing numbers from 1",
        ),
        (lambda: anything.Composed((Constant(1.0),) * 3, (4, 4)), ValueError, "increasing"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
