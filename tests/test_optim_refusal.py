"""An update that is refused leaves no trace in what follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from psframe import optim
from psframe.layout import Layout

SIZE = 100
LAYOUT = Layout.of({"a": np.zeros(60, np.float32), "bias": np.zeros(40, np.float32)})


def at_3(value: float, otherwise: float) -> Any:
    """Make a learning rate that is `value` for update number 3, the one to be refused."""
    return lambda step: value if step == 3 else otherwise


# The rule, a finite gradient too large for float32 somewhere in its formula, and the one before.
OVERFLOWS: dict[str, tuple[optim.Optimizer, float, float]] = {
    "sgd: the parameter": (optim.SGD(at_3(1e4, 0.1)), 3e38, 1.0),
    "sgd: only with the decay": (optim.SGD(at_3(1e4, 0.0), weight_decay=3e38), 0.0, 1.0),
    "momentum: the slot": (optim.SGD(1e-3, momentum=0.9), 3e38, 3e38),
    "nesterov: the step": (optim.SGD(1e-3, momentum=0.9, nesterov=True), 3e38, 1.0),
    "adagrad: the square": (optim.Adagrad(0.1), 1e30, 1.0),
    "rmsprop: the square": (optim.RMSProp(0.1), 1e30, 1.0),
    "adam: the square": (optim.Adam(0.1), 1e30, 1.0),
    "adamw: the square": (optim.AdamW(0.1, no_decay=("bias",)), 1e30, 1.0),
    "sgd: lr beyond float32": (optim.SGD(at_3(1e39, 0.1)), 1.0, 1.0),
    "adam: lr beyond float32": (optim.Adam(at_3(1e300, 0.1)), 1.0, 1.0),
}


def state(updater: Any) -> dict[str, bytes]:
    return {name: slot.tobytes() for name, slot in updater.slots.items()}


def grads() -> list[Any]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(SIZE).astype(np.float32) for _ in range(6)]


def feed(updater: Any, w: Any, batches: list[Any], step: int) -> Any:
    for k, grad in enumerate(batches, start=step):
        out = np.empty_like(w)
        assert updater.update(k, w, grad, out)
        w = out
    return w


@pytest.mark.parametrize("case", OVERFLOWS)
@pytest.mark.parametrize("where", [0, 1, 59, 60, SIZE - 1])
def test_an_overflow_is_refused_and_leaves_no_trace(case: str, where: int) -> None:
    rule, huge, primer = OVERFLOWS[case]
    updater, witness = rule.updater(LAYOUT, 0, SIZE), rule.updater(LAYOUT, 0, SIZE)
    batches = grads()
    batches[2][where] = primer
    w = feed(updater, np.full(SIZE, 0.5, np.float32), batches[:3], 0)
    assert feed(witness, np.full(SIZE, 0.5, np.float32), batches[:3], 0).tobytes() == w.tobytes()
    before, params = state(updater), w.tobytes()

    bad = np.full(SIZE, 0.25, np.float32)
    bad[where] = huge
    assert not updater.update(3, w, bad, np.empty_like(w))
    assert state(updater) == before
    assert w.tobytes() == params

    after = feed(updater, w, batches[3:], 4)
    assert after.tobytes() == feed(witness, w, batches[3:], 4).tobytes()
    assert state(updater) == state(witness)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "rule",
    [
        optim.SGD(0.1),
        optim.SGD(0.1, momentum=0.9),
        optim.Adagrad(),
        optim.RMSProp(),
        optim.Adam(),
        optim.AdamW(),
    ],
    ids=repr,
)
def test_every_element_is_tested(rule: optim.Optimizer, dtype: Any, value: float) -> None:
    size = 67  # a vector loop, its remainder and single elements
    layout = Layout.of({"w": np.zeros(size, dtype)})
    updater = rule.updater(layout, 0, size)
    w, out = np.ones(size, dtype), np.ones(size, dtype)
    for index in range(size):
        grad = np.ones(size, dtype)
        grad[index] = value
        assert not updater.update(0, w, grad, out), index
    assert updater.update(0, w, np.ones(size, dtype), out)


def test_refused_updates_in_a_row_then_training_goes_on() -> None:
    rule = optim.Adam(0.01)
    updater, witness = rule.updater(LAYOUT, 0, SIZE), rule.updater(LAYOUT, 0, SIZE)
    w = np.zeros(SIZE, np.float32)
    bad = np.full(SIZE, np.nan, np.float32)
    for _ in range(3):
        assert not updater.update(0, w, bad, np.empty_like(w))
    assert feed(updater, w, grads(), 0).tobytes() == feed(witness, w, grads(), 0).tobytes()


def test_a_schedule_that_fails_leaves_the_state() -> None:
    def lr(step: int) -> float:
        return -1.0 if step == 2 else 0.1

    rule = optim.SGD(lr, momentum=0.9)
    updater = rule.updater(LAYOUT, 0, SIZE)
    w = feed(updater, np.zeros(SIZE, np.float32), grads()[:2], 0)
    before = state(updater)
    with pytest.raises(ValueError, match=r"gave -1\.0 for update 2, expected a finite number >= 0"):
        updater.update(2, w, grads()[2], np.empty_like(w))
    assert state(updater) == before
    feed(updater, w, grads()[3:], 3)


def test_the_norm_of_an_overflowing_gradient_refuses_it() -> None:
    updater = optim.SGD(0.1).updater(LAYOUT, 0, SIZE)
    w, out = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
    scale = optim.clip_scale(float("inf"), 1.0)
    assert not updater.update(0, w, grads()[0], out, scale)
    assert updater.update(0, w, grads()[0], out, optim.clip_scale(2.0, 1.0))
    assert out.tobytes() == (w - np.float32(0.1) * (grads()[0] * np.float32(0.5))).tobytes()


def test_arrays_that_do_not_fit_are_never_given_to_the_kernel() -> None:
    updater = optim.SGD(0.1).updater(LAYOUT, 0, SIZE)
    good = np.zeros(SIZE, np.float32)
    with pytest.raises(AssertionError, match="another shard"):
        updater.update(0, good, np.zeros(SIZE - 1, np.float32), good.copy())
    with pytest.raises(TypeError):
        updater.update(0, good, np.zeros(SIZE), good.copy())
    with pytest.raises(TypeError):
        updater.update(0, good, np.zeros(2 * SIZE, np.float32)[::2], good.copy())
