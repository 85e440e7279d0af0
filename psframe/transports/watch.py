"""Who of a run's ranks still lives: what MPI says, what the kernel says, and who is silent.

Nothing is looked at for a message; now and then, while nothing comes or between two events, a rank
looks up.

There are two threads. The main one alone asks MPI who has died, and what it looks at raises there.
The other is the `Pulse`: it shows that the rank lives, and on a worker, which may compute for long,
it inspects: beats and silence are its own then. Whom either finds lost, `lose` takes.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable

from psframe.errors import RankLost
from psframe.transports.faults import Faults
from psframe.transports.heartbeat import Beats
from psframe.transports.processes import Processes

__all__ = ["CountedOut", "Pulse", "Unwatched", "Watch"]

# From one look to the next, at most; a part of the time after which a silent rank counts as lost.
_LOOK_S = 0.25
_LOOKS = 8

# A server that has not come back to its queue for so long never will; kernels are compiled in less.
_STUCK_S = 60.0
# So long has a rank that does not compute to end by itself, before its `Pulse` ends the job.
_NOTICE_S = 2.0


class CountedOut(RankLost):
    """Raised on a rank that was silent for too long, came back, and finds the run over."""


class Unwatched:
    """What a rank knows that looks at nobody: who has been found dead by a call that failed.

    Args:
        faults: what MPI says.

    Attributes:
        faults: as given.
        lost: the ranks that count as lost.
        due: when to look, by the monotonic clock: never.
    """

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.lost: set[int] = faults.dead
        self.due = math.inf

    def failed(self, error: Exception) -> None:
        """Learn why a call of MPI has failed.

        Raises:
            Exception: the error itself, if nobody is dead.
        """
        self.faults.explain(error)

    def failed_with(self, peer: int, error: Exception) -> None:
        """Learn why a call that has to do with one rank has failed; return if that rank is lost.

        Raises:
            Exception: the error itself, if it is not.
        """
        if peer not in self.lost:
            self.failed(error)
            if peer not in self.lost:
                raise error

    def look(self, now: float) -> None:
        """Look."""

    def lose(self, rank: int, why: str) -> None:
        """Count a rank as lost; there is nobody to tell."""
        self.lost.add(rank)

    def take_leave(self) -> bool:
        """Whether nobody's sign of life is still under way; to be asked until it is so."""
        return True

    def close(self) -> None:
        """Look no more."""


class Watch(Unwatched):
    """What one rank knows of the others' lives.

    Args:
        faults: what MPI says.
        names: of each rank, for messages.
        beats: the signs of life.
        watched: the ranks whose silence is judged here.
        processes: those of this node that matter here.
        timeout_s: a silent rank counts as lost after so long.
        paced: whether there can be a `Pulse`, which then shows that this rank lives.
        pulsed: whether it inspects, too; a look then only raises what that has found.

    Attributes:
        lost: the ranks that count as lost.
        why: of each of them, the reason.
        due: when to look again, by the monotonic clock; infinite before `start`.
        on_lost: called with each rank that is lost, and why, once; may raise.
        on_asked: called with the signal that a watched rank tells of.
        last_message: rank -> a number that its messages have, and that grows, for the error; -1
            if it has none.
        over: called with every look: tells, if the run has ended without this rank, why it counts
            as lost; None: there is nobody to ask.
        fatal: raised at every look once it is set.
        left_behind: whether the processes are still needed after the end.
    """

    def __init__(
        self,
        faults: Faults,
        names: tuple[int, ...],
        beats: Beats,
        watched: Iterable[int],
        processes: Processes,
        timeout_s: float,
        *,
        paced: bool,
        pulsed: bool,
    ) -> None:
        super().__init__(faults)
        self.lost = set()
        self.why: dict[int, str] = {}
        self.on_lost: Callable[[int, str], None] = _ignore
        self.on_asked: Callable[[int], None] | None = None
        self.last_message: Callable[[int], int] | None = None
        self.over: Callable[[], str | None] | None = None
        self.fatal: RankLost | None = None
        self.left_behind = False
        self.beats = beats
        self.processes = processes
        self.every_s = min(_LOOK_S, timeout_s / _LOOKS)
        self._names = names
        self._timeout_s = timeout_s
        self.paced = paced
        self._pulsed = pulsed
        self._watched = list(watched)
        # By rank: signs of life and messages, how many, and when there was last one more.
        self._signs: dict[int, tuple[int, float]] = {}
        self._messages: dict[int, tuple[int, float]] = {}
        self._asked: dict[int, int] = {}
        self._looked = 0.0
        self._losing = threading.Lock()  # held for a moment, by one who calls nobody

    def tell(self, on_lost: Callable[[int, str], None]) -> None:
        """Have every loss told, those included that there have been."""
        self.on_lost = on_lost
        for rank in sorted(self.lost):
            on_lost(rank, self.why[rank])

    @property
    def was_silent(self) -> bool:
        """Whether this rank has not looked for so long that it may count as lost."""
        return self._looked > 0.0 and time.monotonic() - self._looked > self._timeout_s

    def start(self) -> None:
        """Begin; everybody has just been heard of."""
        now = self._looked = self.due = time.monotonic()
        for rank in self._watched:
            self._signs[rank] = self.beats.count(rank), now
            self._messages[rank] = -1, now

    def failed(self, error: Exception) -> None:
        """Learn why a call of MPI has failed.

        Raises:
            Exception: the error itself, if nobody is dead; what `on_lost` raises.
        """
        for rank in self.faults.explain(error):
            self.lose(rank, "it has died")

    def tick(self) -> None:
        """Look if it is time to."""
        now = time.monotonic()
        if now >= self.due:
            self.look(now)

    def look(self, now: float) -> None:
        """Show that this rank lives, and find out who does not.

        Raises:
            RankLost: the run cannot go on, or has gone on without this rank.
        """
        self.due = now + self.every_s
        if self.fatal is not None:
            raise self.fatal
        why = None if self.over is None else self.over()
        if why is not None:
            raise CountedOut(f"this rank counts as lost, and the run has ended without it: {why}")
        if not self._pulsed:
            self.inspect(now)

    def inspect(self, now: float) -> None:
        """Do what a look is for.

        Raises:
            RankLost: as `look`.
        """
        self._exchange_signs()
        for rank in self.processes.ended():
            self.lose(rank, "its process has ended")
        # MPI may be late, or tell only who waits for them. A worker loses none but servers so, and
        # with them the run.
        if not self._pulsed and not self.lost <= self.faults.dead:
            for rank in self.faults.learn():
                self.lose(rank, "it has died")
        # Time in which this rank did not look is nobody else's silence.
        missed = now - self._looked
        missed = 0.0 if missed < self._timeout_s / 2 else missed
        self._looked = now
        for rank in self._watched:
            if rank in self.lost:
                continue
            self._note_message(rank, now)
            self._note_signal(rank)
            count, when = self._signs[rank]
            there = self.beats.count(rank)
            if there != count:
                self._signs[rank] = there, now
            elif missed:
                self._signs[rank] = count, when + missed
            elif now - when > self._timeout_s:
                self.lose(rank, f"it has been silent for {now - when:.1f} s")

    def lose(self, rank: int, why: str) -> None:
        """Count a rank as lost; it is told once.

        Raises:
            RankLost, whatever `on_lost` does.
        """
        with self._losing:
            if rank in self.lost:
                return
            self.why[rank] = why = why + self._last_words(rank)
            self.lost.add(rank)  # before anybody can raise
        self.on_lost(rank, why)

    def give_up(self, rank: int, what: str) -> None:
        """Say that the run cannot go on without a rank, now and at every later look.

        Raises:
            RankLost: always.
        """
        self.fatal = RankLost(f"{what} (rank {self._names[rank]}) is lost: {self.why[rank]}")
        raise self.fatal

    def take_leave(self) -> bool:
        """Look no more, and send and receive the last signs; True once that is done.

        Raises:
            Exception: MPI's, if nobody is dead; RankLost.
        """
        self.due = math.inf
        messages = self.beats.messages
        try:
            return messages is None or messages.take_leave()
        except RuntimeError as error:
            self.faults.explain(error)
            return False

    def close(self) -> None:
        """Look no more; nobody is told of anything any more."""
        self.due = math.inf
        if self.beats.messages is not None:
            self.beats.messages.close(self.lost)
        self.on_lost, self.on_asked, self.last_message, self.over = _ignore, None, None, None
        if not self.left_behind:
            self.processes.close()

    def pulse(self, now: float) -> None:
        """Do what is to be done while the process does something else.

        Raises:
            RankLost: as `look`; or this rank has not looked for long.
        """
        self.beats.beat()
        if self._pulsed:
            self.inspect(now)
        elif now - self._looked > max(_STUCK_S, self._timeout_s):
            raise RankLost(
                f"this server has handled nothing for {now - self._looked:.0f} s: an observer, a"
                " score or an update does not come back"
            )

    def _exchange_signs(self) -> None:
        if not self.paced:
            self.beats.beat()
        if self.beats.messages is not None:
            try:
                self.beats.messages.receive()
            except RuntimeError as error:
                self.failed(error)

    def _note_message(self, rank: int, now: float) -> None:
        if self.last_message is not None:
            number = self.last_message(rank)
            if number != self._messages[rank][0]:
                self._messages[rank] = number, now

    def _note_signal(self, rank: int) -> None:
        number = self.beats.asked(rank)
        if number and number != self._asked.get(rank) and self.on_asked is not None:
            self._asked[rank] = number
            self.on_asked(number)

    def _last_words(self, rank: int) -> str:
        number, when = self._messages.get(rank, (-1, 0.0))
        if number < 0:
            return ""
        return f"; its last message (number {number}) came {time.monotonic() - when:.1f} s ago"


def _ignore(rank: int, why: str) -> None:
    pass


class Pulse:
    """A thread that shows that this rank lives, while it computes, until it is closed.

    Args:
        watch: what is to be done; if it is not paced, there is no thread.
        end: ends the job, for a rank that would notice too late that the run cannot go on.
        begin: makes the thread ready for what MPI may do in it; called there before each sign,
            until it says that the thread is.
    """

    def __init__(
        self,
        watch: Watch,
        end: Callable[[RankLost], None],
        begin: Callable[[], bool] = lambda: True,
    ) -> None:
        self._watch = watch
        self._end = end
        self._begin = begin
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="psframe-pulse", daemon=True)
        if watch.paced:
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        if self._watch.paced:
            self._thread.join()  # it waits for nobody, or is ending the job

    def _run(self) -> None:
        ready = False
        while not self._over.wait(self._watch.every_s):
            ready = ready or self._begin()
            try:
                self._watch.pulse(time.monotonic())
            except RankLost as lost:
                if not self._over.wait(_NOTICE_S):
                    self._end(lost)
                return
