"""Every rule against its paper in float64, and against NumPy float32 bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from psframe import optim
from psframe.layout import Layout
from psframe.optim.updater import decay_runs

Vector = Any

RULES: dict[str, optim.Optimizer] = {
    "sgd": optim.SGD(0.1),
    "sgd-decay": optim.SGD(0.1, weight_decay=0.02),
    "momentum": optim.SGD(0.1, momentum=0.9, weight_decay=0.02),
    "nesterov": optim.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.02),
    "delayed": optim.DelayedNesterov(0.1, 3, 0.9, 0.2, weight_decay=0.02),
    "adagrad": optim.Adagrad(0.1, weight_decay=0.02),
    "rmsprop": optim.RMSProp(0.01, rho=0.9, weight_decay=0.02),
    "adam": optim.Adam(0.01),
    "adam-l2": optim.Adam(0.01, weight_decay=0.02),
    "adamw": optim.AdamW(0.01, weight_decay=0.1),
    "scheduled": optim.AdamW(optim.schedules.Cosine(0.05, steps=40, end=0.001)),
}
by_rule = pytest.mark.parametrize("name", RULES)


def layout_of(size: int, dtype: Any = np.float32) -> Layout:
    return Layout.of({"w": np.zeros(size, dtype)})


def gradients(size: int, steps: int, dtype: Any = np.float32) -> Iterator[Vector]:
    rng = np.random.default_rng(7)
    for _ in range(steps):
        yield rng.standard_normal(size).astype(dtype)


def start(size: int, dtype: Any = np.float32) -> Vector:
    return np.random.default_rng(8).standard_normal(size).astype(dtype)


def train(updater: Any, params: Vector, grads: Iterator[Vector], scale: float = 1.0) -> Vector:
    """Apply the gradients in turn; every one must be accepted."""
    for step, grad in enumerate(grads):
        out = np.full_like(params, np.nan)
        assert updater.update(step, params, grad, out, scale)
        params = out
    return params


def paper(rule: Any, w: Vector, grads: Iterator[Vector], scale: float) -> Vector:
    """Follow the papers with whole vectors in float64, and their bias-corrected moments."""
    first = second = velocity = np.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        lr = rule.lr(t - 1) if callable(rule.lr) else rule.lr
        decoupled = isinstance(rule, optim.AdamW)
        g = np.multiply(g, scale, dtype=np.float64)
        if not decoupled:
            g = g + rule.weight_decay * w
        match rule:
            case optim.SGD():
                velocity = rule.momentum * velocity + g
                step = g + rule.momentum * velocity if rule.nesterov else velocity
            case optim.DelayedNesterov(every=n, activation=c, momentum=beta):
                second = second + g
                if t % n == 0:
                    velocity = beta * velocity + second / n
                    step = (1 - c * n + c) * beta * velocity + g / n
                    second = np.zeros_like(w)
                else:
                    step = c * beta * velocity + g / n
            case optim.Adagrad():
                second = second + g**2
                step = g / (second**0.5 + rule.eps)
            case optim.RMSProp():
                second = second - (1 - rule.rho) * (second - g**2)
                step = g / (second**0.5 + rule.eps)
            case optim.Adam():
                first = first - (1 - rule.beta1) * (first - g)
                second = second - (1 - rule.beta2) * (second - g**2)
                mean = first / (1 - rule.beta1**t)
                step = mean / ((second / (1 - rule.beta2**t)) ** 0.5 + rule.eps)
                step = step + (rule.weight_decay * w if decoupled else 0.0)
            case _:
                raise AssertionError(rule)
        w = w - lr * step
    return w


@by_rule
@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 3e-5)])
def test_fifty_steps_follow_the_paper(
    name: str, dtype: Any, tolerance: float, scale: float
) -> None:
    rule, size = RULES[name], 203
    got = train(
        rule.updater(layout_of(size, dtype), 0, size),
        start(size, dtype),
        gradients(size, 50, dtype),
        scale,
    )
    want = paper(rule, start(size, dtype).astype(np.float64), gradients(size, 50, dtype), scale)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def op_by_op(rule: Any, w: Vector, grads: Iterator[Vector], scale: float) -> Vector:
    """Write the formulas as single NumPy operations, every scalar rounded to the dtype first."""
    real = w.dtype.type
    slots = [np.zeros_like(w), np.zeros_like(w)]
    for t, g in enumerate(grads, start=1):
        lr = rule.lr(t - 1) if callable(rule.lr) else rule.lr
        decoupled = isinstance(rule, optim.AdamW)
        g = g * real(scale) + real(0.0 if decoupled else rule.weight_decay) * w
        if isinstance(rule, optim.SGD):
            if rule.momentum:
                slots[0] = real(rule.momentum) * slots[0] + g
                g = g + real(rule.momentum) * slots[0] if rule.nesterov else slots[0]
            w = w - real(lr) * g
        elif isinstance(rule, optim.DelayedNesterov):
            n, c, ahead = rule.every, rule.activation, rule.activation
            g = g * real(1 / n)
            slots[1] = slots[1] + g
            if t % n == 0:
                slots = [real(rule.momentum) * slots[0] + slots[1], np.zeros_like(w)]
                ahead = 1 - c * n + c
            w = w - real(lr) * (real(ahead * rule.momentum) * slots[0] + g)
        elif isinstance(rule, optim.Adam):
            b1, b2 = rule.beta1, rule.beta2
            slots[0] = real(b1) * slots[0] + real(1 - b1) * g
            slots[1] = real(b2) * slots[1] + real(1 - b2) * (g * g)
            root = np.sqrt(slots[1]) * real((1 - b2**t) ** -0.5) + real(rule.eps)
            shrink = real(lr * rule.weight_decay if decoupled else 0.0)
            w = w - (real(lr / (1 - b1**t)) * (slots[0] / root) + shrink * w)
        else:
            if isinstance(rule, optim.RMSProp):
                slots[1] = real(rule.rho) * slots[1] + real(1 - rule.rho) * (g * g)
            else:
                slots[1] = slots[1] + g * g
            w = w - real(lr) * (g / (np.sqrt(slots[1]) + real(rule.eps)))
        assert w.dtype == real
    return w


@by_rule
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_the_bits_are_those_of_numpy_op_by_op(name: str, dtype: Any, scale: float) -> None:
    rule, size = RULES[name], 1001
    got = train(
        rule.updater(layout_of(size, dtype), 0, size),
        start(size, dtype),
        gradients(size, 12, dtype),
        scale,
    )
    want = op_by_op(rule, start(size, dtype), gradients(size, 12, dtype), scale)
    assert got.tobytes() == want.tobytes()


def test_plain_sgd_is_w_minus_lr_g_to_the_bit() -> None:
    w, g = start(999), next(gradients(999, 1))
    out = np.empty_like(w)
    assert optim.SGD(0.05).updater(layout_of(999), 0, 999).update(0, w, g, out)
    assert out.tobytes() == (w - np.float32(0.05) * g).tobytes()


@by_rule
@pytest.mark.parametrize("seed", range(3))
def test_bits_do_not_depend_on_where_shards_begin(name: str, seed: int) -> None:
    rule, size = RULES[name], 517
    layout = Layout.of({f"t{i}": np.zeros(47, np.float32) for i in range(11)})
    whole = train(rule.updater(layout, 0, size), start(size), gradients(size, 5))
    cuts = np.sort(np.random.default_rng(seed).integers(0, size + 1, 6)).tolist()
    for begin, end in zip([0, *cuts], [*cuts, size], strict=True):
        part = train(
            rule.updater(layout, begin, end),
            start(size)[begin:end],
            (grad[begin:end] for grad in gradients(size, 5)),
        )
        assert part.tobytes() == whole[begin:end].tobytes(), (seed, begin, end)


@by_rule
def test_params_and_gradient_are_only_read(name: str) -> None:
    w, g = start(64), next(gradients(64, 1))
    before = w.tobytes() + g.tobytes()
    w.flags.writeable = g.flags.writeable = False
    assert RULES[name].updater(layout_of(64), 0, 64).update(0, w, g, np.empty_like(w))
    assert w.tobytes() + g.tobytes() == before


def test_momentum_of_a_constant_gradient_has_a_closed_form() -> None:
    mu, lr, steps = 0.5, 0.25, 20
    updater = optim.SGD(lr, momentum=mu).updater(layout_of(1, np.float64), 0, 1)
    got = train(updater, np.zeros(1), iter([np.ones(1)] * steps))
    velocity_sum = (steps - mu * (1 - mu**steps) / (1 - mu)) / (1 - mu)
    np.testing.assert_allclose(got, -lr * velocity_sum, rtol=1e-14)


def test_delayed_nesterov_is_nesterov_on_the_means_of_gradients() -> None:
    n, size = 4, 50
    grads = list(gradients(size, 5 * n, np.float64))
    means = [np.mean(grads[k : k + n], axis=0) for k in range(0, len(grads), n)]
    rule = optim.DelayedNesterov(0.1, every=n, momentum=0.9)
    same = optim.SGD(0.1, momentum=0.9, nesterov=True)
    layout = layout_of(size, np.float64)
    got = train(rule.updater(layout, 0, size), np.zeros(size), iter(grads))
    want = train(same.updater(layout, 0, size), np.zeros(size), iter(means))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_delayed_nesterov_of_every_update_is_nesterov() -> None:
    size = 50
    rule = optim.DelayedNesterov(0.1, every=1, momentum=0.9, activation=0.3)
    same = optim.SGD(0.1, momentum=0.9, nesterov=True)
    got, want = (
        train(r.updater(layout_of(size), 0, size), start(size), gradients(size, 9))
        for r in (rule, same)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_adagrad_of_a_constant_gradient_is_a_sum_of_inverse_roots() -> None:
    updater = optim.Adagrad(1.0).updater(layout_of(1, np.float64), 0, 1)
    got = train(updater, np.zeros(1), iter([np.full(1, 3.0)] * 30))
    np.testing.assert_allclose(got, -sum(k**-0.5 for k in range(1, 31)), rtol=1e-9)


@pytest.mark.parametrize("rule", [optim.Adam(0.01), optim.AdamW(0.01, weight_decay=0.0)])
def test_adam_of_a_constant_gradient_steps_by_lr(rule: optim.Optimizer) -> None:
    grad = np.array([1e-3, -1.0, 50.0])
    got = train(rule.updater(layout_of(3, np.float64), 0, 3), np.zeros(3), iter([grad] * 25))
    np.testing.assert_allclose(got, -0.25 * np.sign(grad), rtol=2e-5)


def test_adamw_without_gradient_only_shrinks() -> None:
    updater = optim.AdamW(0.1, weight_decay=0.5).updater(layout_of(2, np.float64), 0, 2)
    got = train(updater, np.array([1.0, -2.0]), iter([np.zeros(2)] * 10))
    np.testing.assert_allclose(got, np.array([1.0, -2.0]) * 0.95**10, rtol=1e-14)


@by_rule
def test_a_learning_rate_of_zero_moves_nothing(name: str) -> None:
    chosen: Any = RULES[name]
    rule = dataclasses.replace(chosen, lr=0.0)
    w = start(33)
    assert train(rule.updater(layout_of(33), 0, 33), w, gradients(33, 3)).tobytes() == w.tobytes()


LAYOUT = Layout.of(
    {
        "conv.weight": np.zeros((3, 3), np.float32),
        "conv.bias": np.zeros(3, np.float32),
        "norm.bias": np.zeros(2, np.float32),
        "empty": np.zeros(0, np.float32),
        "fc.weight": np.zeros((2, 4), np.float32),
        "fc.bias": np.zeros((), np.float32),
    }
)


@pytest.mark.parametrize(
    ("begin", "end", "no_decay", "runs"),
    [
        (0, 23, (), ((0, 23, True),)),
        (0, 23, ("*",), ((0, 23, False),)),
        (0, 23, ("*.bias",), ((0, 9, True), (9, 14, False), (14, 22, True), (22, 23, False))),
        (0, 23, ("conv*", "norm.bia?"), ((0, 14, False), (14, 23, True))),
        (10, 15, ("*.bias",), ((0, 4, False), (4, 5, True))),
        (9, 14, ("*.bias",), ((0, 5, False),)),
        (12, 12, ("*.bias",), ()),
        (0, 23, ("*.BIAS", "bias"), ((0, 23, True),)),
    ],
)
def test_runs_of_equal_decay_are_maximal(
    begin: int, end: int, no_decay: tuple[str, ...], runs: tuple[tuple[int, int, bool], ...]
) -> None:
    assert decay_runs(LAYOUT, begin, end, no_decay) == runs


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: optim.SGD(0.1, weight_decay=0.3, **k),
        lambda **k: optim.SGD(0.1, momentum=0.9, weight_decay=0.3, **k),
        lambda **k: optim.Adagrad(0.1, weight_decay=0.3, **k),
        lambda **k: optim.RMSProp(0.1, weight_decay=0.3, **k),
        lambda **k: optim.Adam(0.1, weight_decay=0.3, **k),
        lambda **k: optim.AdamW(0.1, weight_decay=0.3, **k),
    ],
)
@pytest.mark.parametrize("shard", [(0, 23), (5, 19)])
def test_each_group_decays_as_if_alone(
    make: Callable[..., optim.Optimizer], shard: tuple[int, int]
) -> None:
    begin, end = shard

    def result(rule: optim.Optimizer) -> Vector:
        grads = (grad[begin:end] for grad in gradients(23, 4))
        return train(rule.updater(LAYOUT, begin, end), start(23)[begin:end], grads)

    decayed, spared = result(make()), result(make(no_decay=("*",)))
    biases: Vector = np.r_[np.zeros(9, bool), np.ones(5, bool), np.zeros(8, bool), True][begin:end]
    assert (decayed != spared).all()
    want: Vector = np.where(biases, spared, decayed)
    assert result(make(no_decay=("*.bias",))).tobytes() == want.tobytes()


def test_an_empty_shard_accepts_every_update() -> None:
    nothing = np.zeros(0, np.float32)
    for rule in RULES.values():
        updater = rule.updater(LAYOUT, 23, 23)
        assert updater.update(0, nothing, nothing.copy(), nothing.copy())
