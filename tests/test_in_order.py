"""Messages in the order of their senders, whenever their arrays are there."""

from __future__ import annotations

import itertools

import pytest

from psframe.transports.in_order import InOrder


def test_whole_messages_pass() -> None:
    order: InOrder[str] = InOrder()
    order.add(0, "a")
    order.add(1, "b")
    assert list(order.ready) == ["a", "b"]


def test_a_message_waits_for_its_array_and_holds_up_its_own_sender_only() -> None:
    order: InOrder[str] = InOrder()
    a = order.hold(0, "a")
    order.add(0, "b")
    order.add(1, "c")
    assert list(order.ready) == ["c"]
    order.arrived(0, a)
    order.add(0, "d")
    assert list(order.ready) == ["c", "a", "b", "d"]


@pytest.mark.parametrize("turns", list(itertools.permutations(range(3))))
def test_arrays_that_are_complete_in_another_order(turns: tuple[int, ...]) -> None:
    order: InOrder[int] = InOrder()
    entries = []
    for number in range(3):
        entries.append(order.hold(7, 10 * number))
        order.add(7, 10 * number + 1)
    there: set[int] = set()
    for turn in turns:
        order.arrived(7, entries[turn])
        there.add(turn)
        whole = next((n for n in range(3) if n not in there), 3)
        assert list(order.ready) == [m for n in range(whole) for m in (10 * n, 10 * n + 1)]
