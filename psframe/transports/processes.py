"""What the kernel says of the processes on this node."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Mapping

__all__ = ["Processes"]


class Processes:
    """The processes of this node whose end the kernel tells, whatever the MPI.

    Args:
        pids: by rank, in this process's namespace.
    """

    def __init__(self, pids: Mapping[int, int]) -> None:
        self._files: dict[int, int] = {}
        self._ranks: dict[int, int] = {}
        for rank, pid in pids.items():
            with contextlib.suppress(OSError):  # an old kernel, or a sandbox's: MPI may tell
                file = os.pidfd_open(pid)
                self._files[rank], self._ranks[file] = file, rank
        self._alive = set(self._ranks)  # their files

    def ended(self) -> list[int]:
        """The ranks whose processes have ended; each is told once.

        It may be called while it is at it, from another thread or a signal's handler, of which each
        is told then; so it has a poll of its own.
        """
        poll = select.poll()
        for file in tuple(self._alive):
            poll.register(file, select.POLLIN)
        files = [file for file, _ in poll.poll(0)]
        self._alive -= set(files)
        return [self._ranks[file] for file in files]

    def kill(self, rank: int) -> bool:
        """End a rank's process, stopped or not; False if it cannot be reached from here."""
        file = self._files.get(rank)
        if file is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(file, signal.SIGKILL)
        return True

    def close(self) -> None:
        """Let them go."""
        files, self._files, self._alive, self._ranks = self._ranks, {}, set(), {}
        for file in files:
            os.close(file)
