"""Blocks of work as a worker sees them."""

from __future__ import annotations

import pytest

from psframe.errors import MessageError
from psframe.events import Lease, LeaseKind, TaskSpec
from psframe.tasks import EpochOrders, Task


def task(kind: LeaseKind, epoch: int, begin: int, end: int) -> Task:
    orders = EpochOrders(0, 0, TaskSpec(10, 4, 2, True, eval_samples=6, eval_batch_size=3))
    lease = Lease(0, 1, kind, epoch, begin, end)
    return orders.task(lease, lambda: pytest.fail("pulled"), lambda sums: None)


def test_the_last_blocks_of_a_plan() -> None:
    assert len(task(LeaseKind.TRAIN, 1, 8, 10).indices) == 2
    assert task(LeaseKind.EVALUATE, 1, 3, 6).indices.tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("kind", "epoch", "begin", "end"),
    [
        (LeaseKind.TRAIN, 0, 8, 11),  # would be shorter than it says
        (LeaseKind.TRAIN, 2, 0, 4),
        (LeaseKind.EVALUATE, 0, 6, 7),
        (LeaseKind.EVALUATE, 0, 0, 2**62),  # would be allocated
        (LeaseKind.EVALUATE, 2, 0, 3),
    ],
)
def test_a_block_that_the_plan_has_not(kind: LeaseKind, epoch: int, begin: int, end: int) -> None:
    with pytest.raises(MessageError, match=rf"a lease is of \[{begin}, {end}\) in epoch {epoch}"):
        task(kind, epoch, begin, end)
