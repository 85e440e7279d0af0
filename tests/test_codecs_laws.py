"""What compression does to descent, with and without error feedback: counterexamples of papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_codecs import Pair, layout_of

from psframe.codecs import QSGD, BFloat16, Float16, PowerSGD, Sign, TopK

START, STEP = 1.0, 0.02
AXES = np.array([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])


def descend_together(codec: Any, steps: int) -> list[float]:
    """Descend on the mean of f_i = <a_i, x>^2 + |x|^2 / 4, one worker each, from (1, 1, 1).

    Beznosikov et al., On Biased Compression for Distributed Learning, 2020.
    """
    layout = layout_of(np.float64, x=(3,))
    pairs = [Pair(codec, layout, seed=seed) for seed in range(3)]
    x, norms = np.full(3, START), []
    for _ in range(steps):
        grads = [2 * (a @ x) * a + x / 2 for a in AXES]
        x = x - STEP * sum(pair.send(g) for pair, g in zip(pairs, grads, strict=True)) / 3
        norms.append(float(np.abs(x).max()))
    return norms


def test_top_1_without_error_feedback_grows_by_the_same_factor_for_ever():
    """All gradients' largest elements point away: the factor is 1 + 0.02 * 5.5 / 3."""
    norms = descend_together(TopK(1 / 3, error_feedback=False), 200)
    factors = np.array(norms[1:]) / norms[:-1]
    assert factors == pytest.approx(1.0 + 0.02 * 5.5 / 3, abs=1e-9)
    assert factors[0] == pytest.approx(1.036667, abs=1e-6)


@pytest.mark.parametrize("codec", [TopK(1 / 3), Sign(), QSGD(3), BFloat16()], ids=repr)
def test_with_error_feedback_it_goes_to_the_minimum(codec):
    assert descend_together(codec, 10_000)[-1] < 1e-30


def test_float16_goes_as_far_as_its_smallest_number():
    """Gradients below 3e-8 are sent once they add up to that."""
    assert 0.0 < descend_together(Float16(), 10_000)[-1] < 0.02 * 2.0**-24


def test_sending_all_goes_to_the_minimum():
    assert descend_together(TopK(1.0, error_feedback=False), 10_000)[-1] < 1e-30


def descend_by_signs(codec: Any) -> float:
    """Descend on x / 4 over [-1, 1] with g = 4 (once in four times) or -1, from 0.

    Karimireddy et al., Error Feedback Fixes SignSGD, 2019, counterexample 1.
    """
    rng = np.random.default_rng(7)
    pair = Pair(codec, layout_of(np.float64, x=(1,)))
    x = 0.0
    for large in rng.random(20_000) < 0.25:
        x = float(np.clip(x - 0.01 * pair.send([4.0 if large else -1.0])[0], -1.0, 1.0))
    return x


def test_signs_without_error_feedback_go_the_wrong_way():
    assert descend_by_signs(Sign(1.0, error_feedback=False)) > 0.9


@pytest.mark.parametrize(
    "codec", [Sign(1.0), Sign(), TopK(1.0), QSGD(1), PowerSGD(1), Float16()], ids=repr
)
def test_signs_with_error_feedback_go_the_right_way(codec):
    assert descend_by_signs(codec) < -0.7
