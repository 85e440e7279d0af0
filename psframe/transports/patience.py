"""How to wait: at first busily, then with care for whoever else needs the core."""

from __future__ import annotations

import os
import time

from psframe.transports.bell import Bell
from psframe.transports.watch import Unwatched

__all__ = ["Patience"]

# Ranks fewer than the cores: Tests, then yields, then sleeps; more: yield at once, for a
# spinning rank takes its core from the one that it waits for.
_SPINS = 500
# Counted in time, since a yield takes as long as others like. A little longer than a large update.
_YIELD_S, _YIELD_CROWDED_S = 10e-3, 1e-3
_SLEEP_S = 100e-6
# A sleep costs the kernel of a virtual machine some 29 us of a core, so short ones a sixth of it.
# Who has slept for 50 ms is waiting for something slow; a message then is 0.7 ms late at most.
_SLEEPY_S, _LONG_SLEEP_S = 50e-3, 650e-6
# At a bell: others look whether this process lives, and it looks up itself.
_BELL_S = 50e-3
# Who is rung for wakes on the core of who rings, as like as not, though others are free, and a tick
# or two pass before the kernel parts them: spinning, each would hold the other up.
_SAME_CORE_S = 10e-3


class Patience:
    """What to do while nothing comes: test again, yield the core, then sleep.

    Args:
        crowded: whether the node has more ranks than this process may use cores.
        watch: looks, when it is time to, who still lives.
        bell: where this process sleeps, if all who send to it ring there; else it sleeps a little,
            again and again.

    Attributes:
        asleep: whether nothing has come for so long that it sleeps; little should be done then.
    """

    def __init__(
        self, crowded: bool, watch: Unwatched | None = None, bell: Bell | None = None
    ) -> None:
        self._watch = watch
        self._bell = bell
        self._set = False  # whether the bell is
        self._spins = self._spins_apart = 0 if crowded else _SPINS
        self._together_until = 0.0
        self._yield_s = _YIELD_CROWDED_S if crowded else _YIELD_S
        self._turns = 0
        self._until = 0.0
        self.asleep = False

    def reset(self) -> None:
        """Something came."""
        self._turns = 0
        self.asleep = False
        if self._set:
            self._clear()

    def rung(self) -> None:
        """This process has woken another, or another this one: do not spin for a while."""
        if self._spins_apart:
            self._spins = 0
            self._together_until = time.monotonic() + _SAME_CORE_S

    def _clear(self) -> None:
        assert self._bell is not None, "it is set"
        self._set = False
        self._bell.clear()

    def wait(self, *, busy: bool = False) -> bool:
        """Nothing came; True if so much time has passed that a clock may be read.

        Args:
            busy: whether something is under way of which nobody will ring.

        Raises:
            RankLost: what is waited for cannot come.
        """
        self._turns += 1
        if self._turns <= self._spins:
            return False
        now = time.monotonic()
        if self._watch is not None and now >= self._watch.due:
            self._watch.look(now)
        if self._spins != self._spins_apart and now > self._together_until:
            self._spins = self._spins_apart
        if not self.asleep:
            if self._turns == self._spins + 1:
                self._until = now + self._yield_s
            if now < self._until:
                os.sched_yield()
                return True
        self.asleep = True
        bell = self._bell
        if bell is not None and not busy:
            if self._set:
                bell.sleep(_BELL_S)
                self.rung()
            else:
                bell.set()  # and look once more
            self._set = not self._set
            return True
        if self._set:
            self._clear()
        time.sleep(_SLEEP_S if now < self._until + _SLEEPY_S else _LONG_SLEEP_S)
        return True
