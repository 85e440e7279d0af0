"""What a pace that changes takes of the numbers that it is given."""

from __future__ import annotations

import pytest

from psframe import DynamicSSP
from psframe.consistency import Policy


def paced(high: int, own_s: float, its_s: float) -> Policy:
    """Worker 1 makes two steps, worker 0 five: the last ones are foreseen from these."""
    policy = DynamicSSP(0, high).policy(2)
    steps = [(its_s * k, 1) for k in (1, 2)] + [(2 * its_s + own_s * k, 0) for k in range(1, 6)]
    for policy.time_s, worker in steps:
        policy.finish(worker)
    return policy


@pytest.mark.parametrize("high", [10**9, 10**30])
def test_a_bound_without_end_is_not_foreseen_to_its_end(high: int) -> None:
    """A step for each up to the bound would take minutes, and gigabytes, at every push."""
    assert paced(high, 0.3, 1.0).may_start(0)


@pytest.mark.parametrize(("own_s", "its_s"), [(1e300, 1e-300), (1e-300, 1e300), (1.0, 5e-324)])
def test_speeds_that_no_number_compares_give_no_credit_or_some(own_s: float, its_s: float) -> None:
    assert paced(4, own_s, its_s).may_start(1)
