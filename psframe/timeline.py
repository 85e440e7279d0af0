"""What a run's timeline.jsonl says: now and then, how much each worker has done by then."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

from psframe.monitor import Monitor

__all__ = ["Timeline"]

# The least time between two, up to so many workers.
_LINE_S = 0.05
_LINE_WORKERS = 16.0
# Their number in a run so long that this says less, up to so many workers.
_LINES = 1000.0
_LINES_WORKERS = 64.0

_log = logging.getLogger("psframe")


class Timeline:
    """Writes timeline.jsonl; call `tick` often and `close` at the end.

    A line has `time_s`, `update` and `workers`, the monitor's `rows`. The first is written at once:
    its time is when the run directory was opened, on the clock of the others. Then they come at
    most every 0.05 s max(1, W / 16) and every elapsed / 1000 max(1, W / 64), so that a run of a
    week leaves some thousands. A line that the disk refuses is the last that is tried: the run
    goes on without.

    Args:
        folder: the run directory; lines are added to a file that is there.
        monitor: what it writes of.
    """

    FILE = "timeline.jsonl"

    def __init__(self, folder: str | Path, monitor: Monitor) -> None:
        self._path = Path(folder) / self.FILE
        self._monitor = monitor
        self._fd = -1
        self._due = 0.0
        self._written = -1.0
        self._broken = False
        self.tick()

    def tick(self) -> None:
        """Write a line if it is time; call it often."""
        now = self._monitor.now_s()
        if now >= self._due and not self._broken:
            workers = self._monitor.workers
            least_s = _LINE_S * max(1.0, workers / _LINE_WORKERS)
            self._due = now + max(least_s, now / _LINES * max(1.0, workers / _LINES_WORKERS))
            self._write(now)

    def close(self) -> None:
        """Write the last lines and close the file; once closed, nothing more is written.

        One is of when a worker was last heard of: since then the run may have been evaluated.
        """
        now = self._monitor.now_s()
        seen = [w.seen_s for w in self._monitor.statistics().workers if w.seen_s is not None]
        last = now - min(seen, default=0.0)
        for time_s in (last, now):
            if time_s > self._written and not self._broken:
                self._write(time_s)
        self._broken = True
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, now: float) -> None:
        self._written = now
        line: dict[str, Any] = {
            "time_s": round(now, 3),
            "update": self._monitor.updates,
            "workers": self._monitor.rows(),
        }
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            if self._fd < 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._fd = os.open(self._path, flags, 0o666)
            size = os.fstat(self._fd).st_size
            written = os.write(self._fd, data)
            if written < len(data):
                os.ftruncate(self._fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._broken = True
            why = error.strerror or error
            _log.warning("%s: %s; no more lines are written, the run goes on", self._path, why)
