"""Which core a worker waits on, where ranks exceed cores: not on a busy server's.

Three that are always ready on two cores are two and one however the kernel places them, so it lets
them stay as they are: a server that shares its core with one worker, while the other has a core of
its own to wait on, for as long as it likes. The worker that notices steps aside, to where workers
wait already. It may run where it could before: the kernel moves it on as soon as a core is idle.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable

__all__ = ["Cores"]

# To look costs some 10 us; a kernel balances its cores every few milliseconds.
_EVERY_S, _EVERY_MOST_S = 2e-3, 32e-3


class Cores:
    """Where this thread runs and where the servers of its node do.

    Args:
        servers: their processes, in this process's namespace.

    Attributes:
        due: when to look again, by the monotonic clock; infinite if nothing can be seen.
        moves: how often this thread has stepped aside.
    """

    def __init__(self, servers: Iterable[int]) -> None:
        self.moves = 0
        self._every_s = _EVERY_S
        self._own = getattr(ctypes.PyDLL(None), "sched_getcpu", None)
        self._files: list[int] = []
        with contextlib.suppress(OSError):  # /proc may be hidden
            for pid in servers:
                self._files.append(os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC))
        self.due = 0.0 if self._files and self._own is not None else float("inf")

    def look(self, now: float) -> None:
        """Step aside if a server that is awake runs on this thread's core."""
        assert self._own is not None, "then it is never due"
        busy = {core for core in map(_core_if_awake, self._files) if core is not None}
        if self._own() in busy and self._step_aside(busy):
            self.moves += 1
            self._every_s = _EVERY_S
        else:
            self._every_s = min(2 * self._every_s, _EVERY_MOST_S)
        self.due = now + self._every_s

    def _step_aside(self, busy: set[int]) -> bool:
        may = os.sched_getaffinity(0)
        if may <= busy:
            return False
        try:
            os.sched_setaffinity(0, may - busy)
        except OSError:
            return False
        os.sched_setaffinity(0, may)
        return True

    def close(self) -> None:
        """Look no more."""
        files, self._files, self.due = self._files, [], float("inf")
        for file in files:
            os.close(file)


def _core_if_awake(file: int) -> int | None:
    """Read proc_pid_stat(5): the core a process's first thread runs on, or waits to run on."""
    try:
        text = os.pread(file, 1024, 0)
    except OSError:
        return None  # it has ended
    fields = text[text.rfind(b")") + 2 :].split()
    return int(fields[36]) if fields[0] == b"R" else None
