"""Rules in groups, and averages: against NumPy, over shards, and refused as a whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import psframe
from psframe.layout import Layout
from psframe.optim import SGD, Adam, Average, Grouped

RNG = np.random.default_rng(0)
PARAMS = {
    "a.w": RNG.normal(size=(3, 4)).astype(np.float32),
    "a.mean": RNG.normal(size=5).astype(np.float32),
    "b.mean": RNG.normal(size=2).astype(np.float32),
    "b.w": RNG.normal(size=7).astype(np.float32),
}
LAYOUT = Layout.of(PARAMS)
RULE = Grouped(Adam(0.1), {"*.mean": Average(0.9)})


def gradient(seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=LAYOUT.size).astype(np.float32)


def steps(rule: Any, cuts: list[int], count: int = 3, scale: float = 1.0) -> Any:
    """Apply some gradients to the shards between the cuts."""
    params = LAYOUT.flatten(PARAMS)
    bounds = [0, *cuts, LAYOUT.size]
    updaters = [rule.updater(LAYOUT, b, e) for b, e in pairwise(bounds)]
    for step in range(count):
        grad, out = gradient(step), np.empty_like(params)
        for updater, (b, e) in zip(updaters, pairwise(bounds), strict=True):
            assert updater.update(step, params[b:e], grad[b:e], out[b:e], scale)
        params = out
    return params


def test_each_parameter_has_its_rule() -> None:
    found = LAYOUT.views(steps(RULE, []))
    plain = LAYOUT.views(steps(Adam(0.1), []))
    for name, array in found.items():
        if not name.endswith(".mean"):
            np.testing.assert_array_equal(array, plain[name])
            continue
        expected = PARAMS[name]
        for step in range(3):
            observed = LAYOUT.views(gradient(step))[name]
            expected = np.float32(0.9) * expected + np.float32(0.1) * observed
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("cuts", [[1], [12], [14], [5, 13, 20], [17, 18]])
def test_the_number_of_servers_changes_no_bit(cuts: list[int]) -> None:
    np.testing.assert_array_equal(steps(RULE, cuts), steps(RULE, []))


def test_clipping_does_not_touch_averages() -> None:
    found, whole = LAYOUT.views(steps(RULE, [], 1, 0.5)), LAYOUT.views(steps(RULE, [], 1))
    np.testing.assert_array_equal(found["a.mean"], whole["a.mean"])


def test_the_norm_is_of_gradients_alone() -> None:
    """A worker's norm leaves averages out, and the server clips by it."""
    params = {"w": np.zeros(2), "mean": np.zeros(3)}
    grads = {"w": np.array([3.0, 4.0]), "mean": np.full(3, 1000.0)}

    def work(worker: Any) -> None:
        worker.pull()
        worker.push_pull(grads)

    rule = Grouped(SGD(1.0), {"mean": Average(0.5)})
    result = psframe.run(work, params, optimizer=rule, clip_norm=2.5)
    assert result.params is not None
    np.testing.assert_allclose(result.params["w"], [-1.5, -2.0])
    np.testing.assert_allclose(result.params["mean"], 500.0)


@pytest.mark.parametrize("servers", [1, 2])
def test_clipping_in_bsp_does_not_touch_averages(servers: int) -> None:
    params = {"mean": np.zeros(3), "w": np.zeros(4), "last": np.zeros(2)}

    def work(worker: Any) -> None:
        worker.pull()
        size = 3.0 * (1 + worker.index)
        worker.push_pull({"mean": np.full(3, 10.0), "w": np.full(4, size), "last": np.full(2, 8.0)})

    rule = Grouped(SGD(1.0), {"mean": Average(0.5), "last": Average(0.5)})
    result = psframe.run(
        *(work, params),
        optimizer=rule,
        mode=psframe.BSP(),
        workers=2,
        servers=servers,
        clip_norm=3.0,
    )
    assert result.params is not None
    np.testing.assert_allclose(result.params["w"], -1.5)  # each gradient to norm 3, so 1.5 each
    np.testing.assert_array_equal(result.params["mean"], 5.0)
    np.testing.assert_array_equal(result.params["last"], 4.0)


def test_bsp_averages_the_rounds_mean() -> None:
    def work(worker: Any) -> None:
        worker.pull()
        worker.push_pull({"mean": np.full(3, float(worker.index))})

    rule = Grouped(SGD(1.0), {"*": Average(0.75)})
    result = psframe.run(work, {"mean": np.ones(3)}, optimizer=rule, mode=psframe.BSP(), workers=3)
    assert result.params is not None
    np.testing.assert_array_equal(result.params["mean"], 0.75 * 1 + 0.25 * 1)


@pytest.mark.parametrize("bad", [0, 13, 22])
def test_what_is_not_finite_leaves_no_trace(bad: int) -> None:
    """Whichever part the bad element is in, the slots of all parts stay as they were."""
    params, out = LAYOUT.flatten(PARAMS), np.empty(LAYOUT.size, np.float32)
    tried, clean = (RULE.updater(LAYOUT, 0, LAYOUT.size) for _ in range(2))
    for updater in (tried, clean):
        assert updater.update(0, params, gradient(0), out)
    grad = gradient(1)
    grad[bad] = np.inf
    assert not tried.update(1, params, grad, np.empty_like(out))
    results = [np.empty_like(out) for _ in range(2)]
    for updater, result in zip((tried, clean), results, strict=True):
        assert updater.update(1, params, gradient(2), result)
    np.testing.assert_array_equal(*results)


def test_a_schedule_that_raises_leaves_no_trace() -> None:
    def schedule(step: int) -> float:
        return 0.1 if step < 5 else float("nan")

    rule = Grouped(Adam(0.1), {"b.w": SGD(schedule)})
    params, out = LAYOUT.flatten(PARAMS), np.empty(LAYOUT.size, np.float32)
    tried, clean = (rule.updater(LAYOUT, 0, LAYOUT.size) for _ in range(2))
    with pytest.raises(ValueError, match="expected a finite number"):
        tried.update(5, params, gradient(0), out)
    results = [np.empty_like(out) for _ in range(2)]
    for updater, result in zip((tried, clean), results, strict=True):
        assert updater.update(0, params, gradient(2), result)
    np.testing.assert_array_equal(*results)


def test_its_text_tells_all_of_it() -> None:
    """Ranks compare it."""
    assert repr(RULE) != repr(Grouped(Adam(0.1), {"*.mean": Average(0.8)}))
    assert repr(RULE) == repr(Grouped(Adam(0.1), {"*.mean": Average(0.9)}))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grouped(3), "expected a rule of psframe.optim, got 3"),  # type: ignore[arg-type]
        (lambda: Grouped(SGD(1), {"w": 3}), "got 3"),  # type: ignore[dict-item]
        (lambda: Grouped(SGD(1), {2: SGD(1)}), "a pattern of names, got 2"),  # type: ignore[dict-item]
        (lambda: Grouped(SGD(1), [SGD(1)]), "a mapping of patterns"),  # type: ignore[arg-type]
        (lambda: Average(1.0), "momentum is 1.0, expected"),
        (lambda: Average("x"), "expected a number"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()
