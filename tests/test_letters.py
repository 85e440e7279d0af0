"""Letters between a worker and the server: whole, each once, and each in its turn."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from psframe.transports import letters
from psframe.transports.bell import Bell, can_ring
from psframe.transports.letters import Desk, Letters, can_write
from psframe.transports.shared_memory import Segment
from psframe.wire import HEADER_BYTES

pytestmark = pytest.mark.skipif(not can_write(1, 0), reason="this machine has no letters")


def nothing() -> None:
    pass


def office(
    workers: list[int],
    *,
    alone: bool = True,
    crowded: bool = False,
    bells: dict[int, Bell] | None = None,
    own_bell: Bell | None = None,
    on_ring: Callable[[], None] = nothing,
) -> tuple[Desk, dict[int, Letters]]:
    """Make a desk and the other ends of those workers."""
    server = Segment.create(1, 1, "f4")
    segments = {worker: Segment.create(1, 1, "f4") for worker in workers}
    desk = Desk(server, segments, bells=bells or {}, alone=alone, crowded=crowded, on_ring=on_ring)
    ends = {
        worker: Letters(segment, server, worker, crowded=crowded, bell=own_bell, on_ring=on_ring)
        for worker, segment in segments.items()
    }
    return desk, ends


def write(end: Letters, byte: int) -> None:
    end.push[:] = bytes([byte]) * HEADER_BYTES
    end.send()


def answer(desk: Desk, worker: int, byte: int) -> None:
    desk.answers[worker][:] = bytes([byte]) * HEADER_BYTES
    desk.send(worker)


@pytest.mark.parametrize("crowded", [False, True])
def test_a_push_is_there_once_and_so_is_its_answer(crowded: bool) -> None:
    desk, ends = office([0], crowded=crowded)
    end = ends[0]
    assert desk.take() == -1
    for turn in range(3):
        assert not end.awaited
        write(end, turn)
        assert end.awaited
        assert not end.take()
        assert desk.take() == 0
        assert desk.pushes[0] == bytes([turn]) * HEADER_BYTES
        assert desk.take() == -1
        desk.expect(0, 10 + turn)
        assert desk.expects(0, 10 + turn)
        assert not desk.expects(0, 11 + turn)
        answer(desk, 0, 100 + turn)
        assert not desk.expects(0, 10 + turn)
        assert end.awaited
        assert end.take(once=True)
        assert end.answer == bytes([100 + turn]) * HEADER_BYTES
        assert not end.awaited


@pytest.mark.parametrize("busy", [False, True])
def test_each_has_its_turn(busy: bool) -> None:
    """A worker that is quick with its next push does not come before those who wait."""
    desk, ends = office([1, 2, 5])
    desk.busy = busy
    for end in ends.values():
        write(end, 1)
    taken = []
    for _ in range(7):
        taken.append(desk.take())
        write(ends[taken[-1]], 1)
    assert taken == [1, 2, 5, 1, 2, 5, 1]


@pytest.mark.parametrize(("alone", "in_a_row"), [(True, letters._IN_A_ROW), (False, 1)])
def test_other_messages_have_their_turn(alone: bool, in_a_row: int) -> None:
    desk, ends = office([0], alone=alone)
    for _ in range(2):
        for _ in range(in_a_row):
            write(ends[0], 1)
            assert desk.take() == 0
        write(ends[0], 1)
        assert desk.take() == -1
        assert desk.take() == 0
        assert desk.take() == -1  # nothing there: what follows is counted anew


def test_other_messages_are_looked_for_before_the_next_letter_is_waited_for() -> None:
    """Whoever was answered has first to compute, or at least to look at the answer."""
    desk, ends = office([0])
    desk.busy = True
    looks = iter(range(1000))
    desk._looks = looks  # type: ignore[assignment]
    write(ends[0], 1)
    assert desk.take() == 0
    assert desk.take() == -1
    assert next(looks) == 0
    assert desk.take() == -1
    assert next(looks, None) is None


def test_a_number_that_nobody_may_write_is_passed_over() -> None:
    desk, ends = office([0, 2])
    desk._board[1] = 77
    assert desk.take() == -1
    write(ends[2], 1)
    assert desk.take() == 2
    assert desk.take() == -1


def test_a_letter_is_found_that_came_before_a_message() -> None:
    desk, ends = office([0, 1])
    assert not desk.take_from(0)
    write(ends[0], 1)
    write(ends[1], 2)
    assert desk.take_from(0)
    assert not desk.take_from(0)
    assert desk.take() == 1
    assert desk.take() == -1
    assert not desk.take_from(7)  # who has none, or is a server
    assert not desk.take_from(-1)


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), -1])
def test_numbers_that_others_have_spoilt_cost_nobody_else_anything(number: int) -> None:
    """Neither end computes with what it reads there."""
    desk, ends = office([0, 1])
    for turn in range(2):
        desk._numbers[0][0] = number  # as worker 0 can, and then the board
        desk._board[0] = number
        assert desk.take() == 0  # what it finds is judged by who takes it
        for worker, end in ends.items():
            write(end, turn)
            assert desk.take() == worker
            desk.expect(worker, turn)
            answer(desk, worker, turn)
            assert end.take(once=True)


def test_who_has_letters() -> None:
    assert not can_write(2, 0)
    most = letters._WORKERS_MAX
    assert can_write(1, most - 1)
    assert not can_write(1, most)
    desk, ends = office([0, most - 1])
    write(ends[most - 1], 3)
    assert desk.take() == most - 1


def test_no_line_of_a_page_has_two_uses() -> None:
    from psframe.transports.bell import BELL_LINE
    from psframe.transports.borrowing import CARD_LINE
    from psframe.transports.heartbeat import BEAT_LINE
    from psframe.transports.meeting import SLOTS

    lines = [*range(SLOTS), BELL_LINE, CARD_LINE, BEAT_LINE]
    for first in (letters._PUSH_LINE, letters._ANSWER_LINE):
        lines += range(first, first + letters._LETTER_LINES)
    assert len(set(lines)) == len(lines)
    board = range(letters._BOARD_LINE, letters._BOARD_LINE + letters._BOARD_LINES)
    assert not set(board) & {*range(SLOTS), BELL_LINE, CARD_LINE, BEAT_LINE}


@pytest.mark.skipif(not can_ring(), reason="this machine's futex is not known")
def test_who_sleeps_is_woken() -> None:
    memory = Segment.create(1, 1, "f4")
    server, worker = Bell(memory.words(30)), Bell(memory.words(31))
    rung: list[str] = []
    desk, ends = office(
        [0], bells={0: worker}, own_bell=server, on_ring=lambda: rung.append("once")
    )
    for bell, send in ((server, lambda: write(ends[0], 1)), (worker, lambda: answer(desk, 0, 2))):
        rung.clear()
        bell.set()
        asleep = threading.Thread(target=bell.sleep, args=(60.0,))
        asleep.start()
        send()
        asleep.join(30.0)
        assert not asleep.is_alive()
        assert rung == ["once"]
        desk.take()
        desk.expect(0, 1)


@pytest.mark.parametrize("crowded", [False, True])
def test_no_letter_is_read_in_parts_or_twice(crowded: bool) -> None:
    """Two processes write as fast as they can; what is read is whole, and the next."""
    desk, ends = office([0, 1], crowded=crowded)
    turns = 5000
    children = []
    for worker, end in ends.items():
        child = os.fork()
        if child == 0:
            good = True
            for turn in range(turns):
                write(end, (turn * 2 + worker) % 251)
                while not end.take():
                    os.sched_yield()
                good = good and end.answer == bytes([(turn + worker) % 241]) * HEADER_BYTES
            os._exit(0 if good else 1)
        children.append(child)
    done = {0: 0, 1: 0}
    desk.busy = True
    while min(done.values()) < turns:
        worker = desk.take()
        if worker < 0:
            os.sched_yield()
            continue
        turn = done[worker]
        assert desk.pushes[worker] == bytes([(turn * 2 + worker) % 251]) * HEADER_BYTES
        desk.expect(worker, turn)
        answer(desk, worker, (turn + worker) % 241)
        done[worker] += 1
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
