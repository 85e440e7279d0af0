"""Who may go on: the three policies by hand, and against a definition that forgets nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest

from psframe import BSP, SSP, Async
from psframe.consistency import Verdict

TAKE, WAIT, LATE = Verdict.TAKE, Verdict.WAIT, Verdict.LATE


@pytest.mark.parametrize("mode", [SSP, BSP])
@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_modes_check_their_argument(mode: Any, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{mode.__name__}: (staleness|backup): expected"):
        mode(value)


def test_async_never_waits() -> None:
    policy = Async().policy(2)
    for _ in range(50):
        assert policy.may_start(0)
        assert policy.offer(0) is TAKE
        assert not policy.finish(0)
    assert policy.clocks == [50, 0]


@pytest.mark.parametrize("s", [0, 1, 3])
def test_ssp_bounds_the_gap(s: int) -> None:
    policy = SSP(s).policy(2)
    for _ in range(s + 1):  # just after a step the gap is at most s + 1
        assert policy.offer(0) is TAKE
        policy.finish(0)
    assert policy.offer(0) is WAIT
    assert policy.offer(1) is TAKE
    assert policy.finish(1), "the slowest has moved: others may go on"
    assert policy.offer(0) is TAKE


def test_ssp_waits_for_live_workers_only() -> None:
    policy = SSP(0).policy(3)
    policy.finish(0)
    policy.finish(1)
    assert not policy.may_start(0)
    assert policy.leave(2)
    assert policy.may_start(0)
    assert not policy.leave(2), "a second time it makes no difference"
    policy.finish(0)
    assert not policy.leave(0), "it was not the slowest"
    assert not policy.leave(1), "nobody is left to go on"


@pytest.mark.parametrize("seed", range(20))
def test_ssp_is_its_definition(seed: int) -> None:
    rng = random.Random(seed)
    s, workers = rng.randrange(4), rng.randrange(1, 7)
    policy = SSP(s).policy(workers)
    clocks, live = [0] * workers, set(range(workers))
    while live:
        worker = rng.choice(sorted(live))
        slowest = min(clocks[w] for w in live)
        assert policy.may_start(worker) == (slowest >= clocks[worker] - s)
        if rng.random() < 0.05:
            policy.leave(worker)
            live.discard(worker)
        elif policy.may_start(worker):
            clocks[worker] += 1
            rng.choice([policy.finish, policy.refuse])(worker)
        assert policy.clocks == clocks
        assert policy.live == [w in live for w in range(workers)]


def test_bsp_closes_a_round_when_all_have_pushed() -> None:
    policy = BSP().policy(3)
    assert policy.due() is None, "an empty round does not close"
    assert policy.offer(2) is TAKE
    assert policy.offer(2) is WAIT, "one push a worker and round"
    assert policy.offer(0) is TAKE
    assert policy.due() is None
    assert policy.offer(1) is TAKE
    assert policy.due() == [0, 1, 2], "in worker order, whoever came first"
    assert policy.clocks == [1, 1, 1]
    assert all(policy.may_start(w) for w in range(3))


def test_bsp_backup_drops_the_laggard_and_lets_it_join() -> None:
    policy = BSP(backup=1).policy(3)
    policy.offer(0)
    assert policy.due() is None
    policy.offer(2)
    assert policy.due() == [0, 2]
    policy.offer(0)
    policy.offer(2)
    assert policy.due() == [0, 2]
    assert policy.offer(1) is LATE
    policy.join(1)
    assert policy.clocks == [2, 2, 2]
    assert policy.offer(1) is TAKE


def test_bsp_the_first_to_go_are_the_backups() -> None:
    """A round has W - b members as long as so many can push."""
    policy = BSP(backup=1).policy(4)
    policy.leave(3)
    for worker in (0, 1):
        policy.offer(worker)
    assert policy.due() is None
    policy.offer(2)
    assert policy.due() == [0, 1, 2]
    policy.park(2)
    policy.offer(1)
    assert policy.due() is None
    policy.offer(0)
    assert policy.due() == [0, 1], "all that can"


def test_bsp_with_more_backups_than_workers_needs_one_push() -> None:
    policy = BSP(backup=5).policy(2)
    assert policy.due() is None
    policy.offer(1)
    assert policy.due() == [1]


def test_bsp_a_refused_step_counts_for_the_round() -> None:
    policy = BSP().policy(2)
    policy.offer(0)
    policy.refuse(0)
    assert not policy.may_start(0), "its next step belongs to the next round"
    assert policy.due() is None
    policy.offer(1)
    assert policy.due() == [1]
    assert policy.clocks == [1, 1]
    for worker in (0, 1):
        policy.offer(worker)
        policy.refuse(worker)
    assert policy.due() == [], "a round of refusals closes without members"


def test_bsp_does_not_wait_for_who_is_gone_or_parked() -> None:
    policy = BSP().policy(3)
    policy.offer(0)
    assert policy.leave(1)
    assert policy.due() is None
    policy.park(2)
    assert policy.due() == [0]
    policy.offer(0)
    policy.leave(0)
    assert policy.due() is None, "who left took its push along"
    policy.unpark(2)
    assert policy.clocks[2] == 1, "it joins the round that is current"
    policy.offer(2)
    assert policy.due() == [2]
    assert not policy.leave(0)


@pytest.mark.parametrize("current", [True, False])
def test_bsp_an_old_gradient_of_who_has_sat_a_round_out_is_late(current: bool) -> None:
    policy = BSP().policy(2)
    policy.park(1)
    policy.offer(0)
    assert policy.due() == [0]
    policy.unpark(1)
    assert policy.offer(1, current=current) is (TAKE if current else LATE)
    if not current:
        policy.join(1)
        assert policy.due() is None, "the round waits for its next push"
        assert policy.offer(1, current=False) is TAKE, "only the first one is judged"


def test_bsp_who_was_parked_and_missed_nothing_is_not_late() -> None:
    policy = BSP().policy(2)
    policy.park(1)
    policy.unpark(1)
    assert policy.offer(1, current=False) is TAKE


def test_bsp_steps_finish_with_their_round() -> None:
    with pytest.raises(AssertionError):
        BSP().policy(1).finish(0)
