"""Laws of compression, checked through `psframe.simulate`: what error feedback is for.

`tests/test_codecs_laws.py` has the same of encoders and decoders alone.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from laws import simulate

from psframe import BSP, Async, Worker
from psframe.codecs import QSGD, BFloat16, Sign, TopK

# ---- f_i(x) = <a_i, x>^2 + |x|^2 / 4, one worker each -------------------------------------------

AXES = np.array([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])


def sizes(codec: Any, rounds: int) -> np.ndarray:
    """|x| (its largest element) after each round of 3 workers, from (1, 1, 1) with step 0.02."""
    found: list[float] = []

    def work(worker: Worker) -> None:
        x, a = worker.pull()["w"], AXES[worker.index]
        while True:
            x = worker.push_pull({"w": 2 * (a @ x) * a + x / 2})["w"]
            if worker.index == 0:
                found.append(float(abs(x).max()))

    simulate(
        work,
        params={"w": np.ones(3)},
        workers=3,
        mode=BSP(),
        lr=0.02,
        codec=codec,
        max_updates=rounds + 1,
    )
    assert len(found) == rounds
    return np.array(found)


def test_top_1_without_error_feedback_grows_by_one_factor_for_ever() -> None:
    """Beznosikov et al., On Biased Compression, 2020: all largest elements point away.

    Of three gradients (5.5 at the largest element of each) one moves each element: the factor is
    1 + 0.02 * 5.5 / 3.
    """
    found = sizes(TopK(1 / 3, error_feedback=False), 200)
    np.testing.assert_allclose(found[1:] / found[:-1], 1.0 + 0.02 * 5.5 / 3, rtol=0, atol=1e-9)
    assert found[0] == pytest.approx(1.036667, abs=1e-6)


CODECS = pytest.mark.parametrize("codec", [TopK(1 / 3), Sign(), QSGD(3), BFloat16()], ids=repr)


@CODECS
def test_with_error_feedback_compressed_descent_converges(codec: Any) -> None:
    # The least curvature is 1/2: 0.99 a round, which is 1.4e-4 after 880.
    assert sizes(codec, 880)[-1] < 1e-2


@pytest.mark.slow
@CODECS
def test_with_error_feedback_compressed_descent_goes_to_the_minimum(codec: Any) -> None:
    assert sizes(codec, 10_000)[-1] < 1e-30


# ---- g = 4 with probability 1/4, else -1 --------------------------------------------------------


@functools.cache
def slopes(steps: int) -> np.ndarray:
    return np.where(np.random.default_rng(7).random(steps) < 0.25, 4.0, -1.0)


def drift(codec: Any, steps: int) -> float:
    """How far x goes in a step in the mean; step 0.01.

    Karimireddy et al., Error Feedback Fixes SignSGD, 2019, counterexample 1: they descend on
    [-1, 1], which x reaches one end of; here it goes on.
    """
    grads = slopes(steps)

    def work(worker: Worker) -> None:
        worker.pull()
        for g in grads:
            worker.push_pull({"w": np.array([g])})

    result = simulate(
        work, params={"w": np.zeros(1)}, workers=1, mode=Async(), lr=0.01, codec=codec
    )
    assert result.version == steps
    assert result.params is not None
    return float(result.params["w"][0]) / steps


def check_signs(steps: int) -> None:
    # The slope's standard deviation is 2.17.
    error = 4 * 0.01 * 2.17 / np.sqrt(steps)
    assert drift(None, steps) == pytest.approx(-0.01 / 4, abs=error)
    # The sign is 1 in a quarter of the steps: it goes up by half of them.
    assert drift(Sign(1.0, error_feedback=False), steps) == pytest.approx(0.01 / 2, abs=error)
    # With error feedback only what is still to be sent is missing.
    for codec in (Sign(), TopK(1.0), QSGD(1)):
        assert drift(codec, steps) == pytest.approx(drift(None, steps), abs=error)
    # A fixed scale of 1 can keep up with a slope of 1/4 in the mean.
    assert drift(Sign(1.0), steps) == pytest.approx(drift(None, steps), abs=error)


def test_signs_alone_go_the_wrong_way_and_with_error_feedback_the_right_one() -> None:
    check_signs(2_000)


@pytest.mark.slow
def test_signs_go_the_right_way_over_many_steps() -> None:
    check_signs(20_000)
