"""Who counts as lost, by what is known of it; without MPI, and by a clock of the test's own."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from psframe.errors import MessageError, RankLost
from psframe.transports.faults import Faults
from psframe.transports.heartbeat import Beats, Messages
from psframe.transports.processes import Processes
from psframe.transports.transfers import PIECE_BYTES, Transfers
from psframe.transports.watch import CountedOut, Pulse, Unwatched, Watch

NAMES = (0, 5, 6, 7)


class FakeGroup:
    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        self.size = len(ranks)

    def Translate_ranks(self, ranks: list[int], group: FakeGroup) -> list[int]:
        return [group.ranks.index(self.ranks[rank]) for rank in ranks]


class FakeComm:
    """A communicator whose ranks die when the test says so."""

    def __init__(self, size: int) -> None:
        self.group = FakeGroup(list(range(size)))
        self.dead: list[int] = []
        self.acknowledged = 0

    def Ack_failed(self) -> int:
        self.acknowledged = len(self.dead)
        return self.acknowledged

    def Get_failed(self) -> FakeGroup:
        return FakeGroup(self.dead[: self.acknowledged])


class Lines:
    """The shared memory of four ranks."""

    def __init__(self) -> None:
        self.memory = [memoryview(bytearray(64)) for _ in range(4)]
        self.beats = [Beats(line, {}, None) for line in self.memory]


class Desk:
    """A watch on ranks 1 to 3, and what it tells."""

    def __init__(self, *, pulsed: bool = False) -> None:
        self.comm, self.lines = FakeComm(4), Lines()
        lines = {rank: self.lines.memory[rank] for rank in (1, 2, 3)}
        self.watch = Watch(
            Faults(self.comm),
            NAMES,
            Beats(self.lines.memory[0], lines, None),
            [1, 2, 3],
            Processes({}),
            10.0,
            paced=pulsed,
            pulsed=pulsed,
        )
        self.told: list[tuple[int, str]] = []
        self.watch.tell(lambda rank, why: self.told.append((rank, why)))
        self.watch.start()
        self.now = self.watch.due

    def pass_time(self, seconds: float, *alive: int) -> None:
        """Look four times a second, while these ranks show that they live."""
        for _ in range(int(4 * seconds)):
            self.now += 0.25
            for rank in alive:
                self.lines.beats[rank].beat()
            self.watch.look(self.now)


def test_the_silent_are_lost_once_and_the_others_are_not() -> None:
    desk = Desk()
    desk.pass_time(9, 1, 3)
    assert not desk.told
    desk.pass_time(9, 1, 3)
    assert [rank for rank, _ in desk.told] == [2]
    assert "silent for 10.2 s" in desk.told[0][1]
    assert desk.watch.lost == {2}
    assert desk.lines.beats[0].count(0) == 0  # of what it has opened itself
    assert memoryview(desk.lines.memory[0]).cast("q")[0] == 72  # it has shown itself at each look


def test_the_error_tells_of_the_last_message() -> None:
    desk = Desk()
    numbers = {1: 0, 2: 0, 3: 0}
    desk.watch.last_message = lambda rank: numbers[rank]
    numbers[2] = 412
    desk.pass_time(15, 1, 3)
    assert "its last message (number 412) came" in desk.told[0][1]


def test_time_in_which_nobody_looked_is_nobody_s_silence() -> None:
    desk = Desk()
    desk.pass_time(1, 1, 2, 3)
    desk.now += 1000.0  # the watcher itself was stopped
    desk.pass_time(5)
    assert not desk.told
    desk.pass_time(6, 1, 2)
    assert [rank for rank, _ in desk.told] == [3]


def test_a_failed_call_tells_who_is_dead_or_is_raised() -> None:
    desk = Desk()
    error = RuntimeError("of no dead rank")
    with pytest.raises(RuntimeError, match="of no dead rank"):
        desk.watch.failed(error)
    desk.comm.dead += [3, 1]
    desk.watch.failed(RuntimeError("a process has failed"))
    desk.watch.failed(RuntimeError("it fails again"))
    assert [rank for rank, _ in desk.told] == [1, 3]
    assert desk.watch.faults.dead == {1, 3} == desk.watch.lost


def test_who_is_found_dead_after_it_was_silent_is_told_once() -> None:
    desk = Desk()
    desk.pass_time(11, 1, 3)
    desk.comm.dead.append(2)
    desk.pass_time(1, 1, 3)
    assert [rank for rank, _ in desk.told] == [2]
    assert desk.watch.faults.dead == {2}


def test_losses_before_anybody_asked_are_told() -> None:
    desk = Desk()
    told: list[int] = []
    desk.watch.lose(1, "it has died")
    desk.watch.tell(lambda rank, why: told.append(rank))
    assert told == [1]


def test_what_cannot_go_on_is_said_at_every_look() -> None:
    desk = Desk(pulsed=True)
    desk.watch.tell(lambda rank, why: desk.watch.give_up(rank, "server 0"))
    text = r"server 0 \(rank 5\) is lost: it has died"
    with pytest.raises(RankLost, match=text):
        desk.watch.lose(1, "it has died")
    for _ in range(2):
        with pytest.raises(RankLost, match=text):
            desk.watch.look(desk.now)


def test_who_comes_back_after_the_end_is_told() -> None:
    desk = Desk(pulsed=True)
    words: list[str | None] = [None, "it has been silent for 3 s"]
    desk.watch.over = lambda: words.pop(0)
    desk.watch.look(desk.now)  # it is over, or not; this rank is none of the lost
    with pytest.raises(CountedOut, match="silent for 3 s"):
        desk.watch.look(desk.now)


def test_a_pulse_beats_and_ends_what_notices_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread is in a computation, so it is the pulse that ends the job."""
    monkeypatch.setattr("psframe.transports.watch._NOTICE_S", 0.01)
    desk = Desk(pulsed=True)
    desk.watch.every_s = 0.001
    desk.watch.tell(lambda rank, why: desk.watch.give_up(rank, "server 0"))
    monkeypatch.setattr(desk.watch.processes, "ended", lambda: [1])
    ended: list[RankLost] = []
    pulse = Pulse(desk.watch, ended.append)
    pulse._thread.join()
    pulse.close()
    assert [str(lost) for lost in ended] == ["server 0 (rank 5) is lost: its process has ended"]
    assert memoryview(desk.lines.memory[0]).cast("q")[0] > 0


def test_a_pulse_has_its_thread_made_ready_before_it_beats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(pulsed=True)
    desk.watch.every_s = 0.001
    done: list[str] = []
    enough = threading.Event()

    def begin() -> bool:
        assert threading.current_thread().name == "psframe-pulse"
        done.append("begin")
        return done.count("begin") == 2  # the first time it is too early

    def beat(now: float) -> None:
        done.append("beat")
        if done.count("beat") == 4:
            enough.set()

    monkeypatch.setattr(desk.watch, "pulse", beat)
    pulse = Pulse(desk.watch, lambda lost: None, begin)
    enough.wait()
    pulse.close()
    assert done[:6] == ["begin", "beat", "begin", "beat", "beat", "beat"]


def test_a_process_that_ends_is_told_and_one_can_be_ended() -> None:
    code = "import sys; sys.stdin.read()"
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) for _ in range(2)
    ]
    processes = Processes({rank: child.pid for rank, child in enumerate(children)})
    assert processes.ended() == []
    os.kill(children[1].pid, signal.SIGSTOP)
    assert processes.kill(1)
    assert not processes.kill(7)
    children[1].wait()
    assert children[1].stdin is not None
    children[1].stdin.close()
    assert processes.ended() == [1]
    assert processes.ended() == []
    children[0].communicate()
    assert processes.ended() == [0]
    assert processes.kill(0)  # it is not there any more
    processes.close()


def test_a_look_at_the_processes_may_come_into_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a signal's handler beside the pulse; one object of the kernel's lets only one in."""

    class Poll:
        def __init__(self) -> None:
            self.files: list[int] = []
            self.running = False

        def register(self, file: int, mask: int) -> None:
            self.files.append(file)

        def poll(self, timeout: int) -> list[tuple[int, int]]:
            if self.running:
                raise RuntimeError("concurrent poll() invocation")
            self.running = True
            if not inner:
                inner.append([])
                inner[0] = processes.ended()
            self.running = False
            return [(file, 1) for file in self.files]

    inner: list[list[int]] = []
    monkeypatch.setattr("psframe.transports.processes.select.poll", Poll)
    processes = Processes({3: os.getpid()})
    assert processes.ended() == [3]
    assert inner == [[3]]
    assert processes.ended() == []
    processes.close()


def test_a_signal_that_a_rank_tells_of_is_taken_once() -> None:
    desk = Desk()
    taken: list[int] = []
    desk.watch.on_asked = taken.append
    desk.lines.beats[2].ask(signal.SIGUSR1)
    desk.pass_time(1, 1, 2, 3)
    desk.lines.beats[2].ask(signal.SIGTERM)
    desk.lines.beats[2].ask(signal.SIGUSR2)  # too late
    desk.pass_time(1, 1, 2, 3)
    assert taken == [signal.SIGUSR1, signal.SIGTERM]


# ---- what was under way ----


class FakeRequest:
    def __init__(self, outcomes: list[bool | Exception]) -> None:
        self.outcomes = outcomes

    def Test(self, status: Any = None) -> bool:
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def Start(self) -> None:
        pass

    def Free(self) -> None:
        pass

    Cancel = Wait = Free


def _transfers(dead: list[int]) -> tuple[Transfers, Unwatched, Callable[[str], Callable[[], None]]]:
    comm = FakeComm(4)
    comm.dead = dead
    watch = Unwatched(Faults(comm))
    done: list[str] = []
    transfers = Transfers(watch)
    transfers.done = done  # type: ignore[attr-defined]
    return transfers, watch, lambda name: lambda: done.append(name)


def test_what_a_silent_rank_may_still_send_has_its_memory_to_the_end_of_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may only have been stopped, and go on; who is dead will not."""
    monkeypatch.setattr("psframe.transports.transfers._kept", kept := [])
    dead: list[int] = []
    transfers, watch, then = _transfers(dead)
    transfers.add([FakeRequest([False])], then("never"), peer=1)
    transfers.add([FakeRequest([False])], then("never"), peer=2)
    watch.faults.dead.add(2)
    watch.lost = {1, 2}
    transfers.progress()
    transfers.close()
    assert [transfer.peer for transfer in kept] == [1]


def test_an_array_lives_as_long_as_its_transfer_also_of_one_that_is_given_up() -> None:
    """Of memory on a device nobody else may have a reference, and MPI counts none."""
    dead: list[int] = []
    transfers, _, then = _transfers(dead)
    arrays = [np.zeros(3), np.zeros(3)]
    alive = [weakref.ref(array) for array in arrays]
    transfers.add([FakeRequest([False, True])], then("left"), peer=1, keep=arrays.pop())
    failure = RuntimeError("a process has failed")
    transfers.add([FakeRequest([failure])], then("never"), peer=2, keep=arrays.pop())
    dead.append(2)
    transfers.progress()
    assert all(one() is not None for one in alive)
    transfers.progress()
    gc.collect()
    assert [one() is not None for one in alive] == [True, False]


def test_transfers_of_the_dead_are_given_up_and_the_others_go_on() -> None:
    dead: list[int] = []
    transfers, watch, then = _transfers(dead)
    failure = RuntimeError("a process has failed")
    transfers.add([FakeRequest([True]), FakeRequest([failure])], then("dead"), peer=2)
    transfers.add([FakeRequest([failure])], then("dead, too"), peer=2)
    transfers.add([FakeRequest([False, True])], then("alive"), peer=1)
    dead.append(2)
    transfers.progress()
    assert watch.lost == {2}
    transfers.progress()
    assert not transfers.busy
    assert transfers.done == ["alive"]  # type: ignore[attr-defined]


def test_a_transfer_to_one_who_dies_in_the_middle_of_a_turn_stays_until_the_end() -> None:
    """Its requests and buffers are MPI's, although it was tested before the death was known."""
    dead: list[int] = []
    transfers, _, then = _transfers(dead)
    failure = RuntimeError("a process has failed")
    under_way, failed = FakeRequest([False]), FakeRequest([failure])
    transfers.add([under_way], then("never"), peer=2)
    transfers.add([failed], then("never"), peer=2)
    dead.append(2)
    transfers.progress()
    assert not transfers.busy
    assert [t._requests for t in transfers._given_up] == [[under_way], [failed]]


def test_what_fails_with_a_rank_that_counts_as_lost_is_no_error() -> None:
    """Whether MPI knows it to be dead or not; and whoever else is dead is no excuse."""
    desk = Desk()
    desk.watch.lose(2, "it has been silent")
    desk.watch.failed_with(2, RuntimeError("connection reset"))
    assert not desk.watch.faults.dead
    desk.comm.dead.append(3)
    with pytest.raises(RuntimeError, match="truncated"):
        desk.watch.failed_with(1, RuntimeError("truncated"))
    assert [rank for rank, _ in desk.told] == [2, 3]


def test_two_threads_lose_a_rank_once() -> None:
    """The reason is there before the loss can be seen, and the loss is told once."""

    class Slow(dict[int, str]):
        def __setitem__(self, rank: int, why: str) -> None:
            assert rank not in desk.watch.lost
            other.start()  # finds the same, and has to wait
            super().__setitem__(rank, why)

    desk = Desk()
    desk.watch.why = Slow()
    other = threading.Thread(target=lambda: desk.watch.lose(1, "its process has ended"))
    desk.watch.lose(1, "it has died")
    other.join()
    assert desk.told == [(1, "it has died")]


def test_an_error_of_a_transfer_that_is_no_death_is_raised() -> None:
    transfers, _, then = _transfers([])
    transfers.add([FakeRequest([RuntimeError("truncated")])], then("never"), peer=1)
    with pytest.raises(RuntimeError, match="truncated"):
        transfers.progress()


def test_a_transfer_that_is_not_what_was_announced_is_given_up() -> None:
    transfers, _, then = _transfers([])
    requests = [FakeRequest([MessageError("too short")]), FakeRequest([False])]
    transfers.add(requests, then("never"), peer=1)
    transfers.add([FakeRequest([True])], then("the other"), peer=1)
    with pytest.raises(MessageError, match="too short"):
        transfers.progress()
    assert transfers.progress()
    assert transfers.done == ["the other"]  # type: ignore[attr-defined]
    assert not transfers.busy


def test_transfers_tell_of_their_pieces() -> None:
    transfers, _, then = _transfers([])
    seen: list[int] = []
    requests = [FakeRequest([True]), FakeRequest([False, True])]
    transfers.add(requests, then("all"), seen.append, peer=1)
    assert transfers.progress()
    assert seen == [PIECE_BYTES]
    assert transfers.progress()
    assert transfers.done == ["all"]  # type: ignore[attr-defined]


# ---- signs of life that are sent ----


class FakeStatus:
    source = 3


class BeatComm:
    def __init__(self, receive: FakeRequest, sends: dict[int, FakeRequest]) -> None:
        self.receive, self.sends = receive, sends
        self.buffers: dict[int, bytearray] = {}

    def Send_init(self, buffer: bytearray, rank: int, tag: int) -> FakeRequest:
        self.buffers[rank] = buffer
        return self.sends[rank]

    def Recv_init(self, buffer: bytearray, source: int, tag: int) -> FakeRequest:
        self.buffers[source] = buffer
        return self.receive


def test_messages_are_counted_and_the_dead_are_left_out() -> None:
    failure = RuntimeError("a process has failed")
    comm = BeatComm(
        FakeRequest([True, True, False, failure]),
        {1: FakeRequest([failure]), 3: FakeRequest([True])},
    )
    messages = Messages(comm, [1, 3], -1, FakeStatus(), 4)
    beats = Beats(None, {}, messages)
    beats.ask(signal.SIGUSR1)
    beats.beat()  # of which rank 1 hears nothing
    assert comm.buffers[3][0] == signal.SIGUSR1
    comm.buffers[-1][0] = signal.SIGTERM
    messages.receive()
    assert (beats.count(3), beats.count(1)) == (2, 0)
    assert (beats.asked(3), beats.asked(1)) == (signal.SIGTERM, 0)
    with pytest.raises(RuntimeError):
        messages.receive()  # who hears any has to know
    one = Messages(BeatComm(FakeRequest([failure]), {}), [], 0, FakeStatus(), 4)
    one.receive()
    one.receive()
    one.close([])


def test_a_rank_waits_for_the_last_sign_of_each_of_its_peers() -> None:
    comm = BeatComm(
        FakeRequest([True, False, True, False, False]),
        {1: FakeRequest([False, True]), 3: FakeRequest([True])},
    )
    status = FakeStatus()
    messages = Messages(comm, [1, 3], -1, status, 4)
    inbox = comm.buffers[-1]
    assert not messages.take_leave()  # an ordinary sign; rank 1 has not received the last one yet
    assert [comm.buffers[rank][1] for rank in (1, 3)] == [0, 1]
    inbox[1] = 1
    assert not messages.take_leave()  # of rank 3; rank 1 is sent the last one now
    assert comm.buffers[1][1] == 1
    status.source = 1
    comm.receive.outcomes[:] = [True, False]
    assert messages.take_leave()
