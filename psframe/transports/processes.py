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
        self._poll = select.poll()
        self._files: dict[int, int] = {}
        self._ranks: dict[int, int] = {}
        for rank, pid in pids.items():
            with contextlib.suppress(OSError):  # an old kernel, or a sandbox's: MPI may tell
                file = os.pidfd_open(pid)
                self._files[rank], self._ranks[file] = file, rank
                self._poll.register(file, select.POLLIN)

    def ended(self) -> list[int]:
        """The ranks whose processes have ended; each is told once."""
        ranks = []
        for file, _ in self._poll.poll(0):
            self._poll.unregister(file)
            ranks.append(self._ranks[file])
        return ranks

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
        for file in self._ranks:
            os.close(file)
        self._files, self._ranks, self._poll = {}, {}, select.poll()
