"""What batches do with gradients that are refused, and with what is left at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import psframe
from psframe import Buffered, Ringleader, WarmStart, stale
from psframe.events import Failure, Leave, Reason
from psframe.layout import Array
from psframe.marking import Marks

from fakes import Desk  # isort: skip

HUGE = 3e38


def simulate(grads: dict[int, list[float]], mode: Any, **more: Any) -> psframe.SimResult:
    """Let each worker push gradients of one number, one after the other."""

    def work(worker: psframe.Worker) -> None:
        worker.pull()
        for value in grads[worker.index]:
            worker.push_pull({"w": np.full(64, value, np.float32)})

    more.setdefault("optimizer", psframe.optim.SGD(10.0))
    return psframe.simulate(
        work,
        {"w": np.zeros(64, np.float32)},
        mode=mode,
        workers=len(grads),
        compute_time_s=lambda rng, worker, clock: 1.0 + worker / 10,
        **more,
    )


@pytest.mark.parametrize("servers", [1, 2])
def test_a_refused_gradient_is_in_no_later_mean(servers: int) -> None:
    result = simulate({0: [1.0, HUGE], 1: [1.0, 2.0]}, Ringleader(), servers=servers)
    assert result.ledger.applied == 3
    assert result.ledger.refused == 1
    # The mean of 1 and 1, and of 2 alone, for worker 0 has left.
    assert result.params is not None
    np.testing.assert_array_equal(result.params["w"], -10.0 - 20.0)
    result = simulate({0: [1.0, HUGE, 1.0], 1: [1.0, 2.0, 2.0]}, Ringleader(), servers=servers)
    assert result.ledger.refused == 1, "the huge one is in no table"


def test_what_was_pushed_before_all_had_makes_an_update_at_the_end() -> None:
    result = simulate({0: [1.0, 1.0], 1: []}, Ringleader(), optimizer=psframe.optim.SGD(0.1))
    assert result.ledger.applied == 2
    assert result.version >= 1
    assert result.params is not None
    assert (result.params["w"] < 0).all()


@pytest.mark.parametrize("servers", [1, 2])
def test_a_correction_that_is_not_finite_spoils_no_batch(servers: int) -> None:
    """g + lambda g g (x - read) overflows for large g; the others' gradients are applied."""
    rule = stale.DelayCompensation(1.0, adaptive=False)
    grads = {0: [1.0, 1.0, 1.0, 1.0], 1: [1.0, 1e30, 1.0, 1.0]}
    optimizer = psframe.optim.SGD(0.1)
    result = simulate(grads, Buffered(2), stale=rule, servers=servers, optimizer=optimizer)
    assert result.ledger.applied + result.ledger.refused == 8
    assert result.ledger.refused <= 1
    assert result.params is not None
    assert np.isfinite(result.params["w"]).all()
    assert result.version >= result.ledger.applied // 2


def test_an_interrupted_run_s_mark_has_its_whole_batch() -> None:
    desk = Desk(1, Buffered(5), marks=Marks(at_end=True))
    for _ in range(3):
        desk.slots[0][:] = 1.0
        desk.push(0)
    assert desk.store.version == 0
    desk.machine.handle(Leave(0, Failure("KeyboardInterrupt", "", "")))
    assert desk.store.version == 1
    assert not desk.store.pending


def test_a_warm_start_ends_with_the_clocks_that_followers_have_already() -> None:
    policy = WarmStart(1, psframe.SSP(0)).policy(2)
    policy.finish(0)  # of what the leader has decided after its turn
    policy.finish(0)
    policy.close([1])
    assert policy.clocks == [2, 1]


def test_gap_aware_counts_no_step_of_a_batch_that_is_not_complete() -> None:
    seen: list[tuple[Array, Array]] = []

    class Look(stale.Rule):
        def __repr__(self) -> str:
            return "Look()"

        def factor(self, push: stale.Stale) -> float:
            return 1.0

        def correction(self, *_: Any) -> Any:
            class Correction:
                def correct(self, worker: int, grad: Any, *_: Any) -> Any:
                    return grad

                def applied(self, before: Any, after: Any) -> None:
                    seen.append((before.copy(), after.copy()))

                def rejected(self) -> None: ...

            return Correction()

    simulate({0: [1.0] * 8}, Buffered(4), stale=Look())
    moved = [bool((before != after).any()) for before, after in seen]
    assert moved == [False, False, False, True] * 2
    assert Reason.STALE.text == "stale"
