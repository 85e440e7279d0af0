"""A small process that writes the verdict if the process that owes it is killed.

Launchers kill the ranks of a job that has lost one: MPICH's at once, with a signal that nobody can
handle; and so does the kernel when memory runs out. `status.json` would say "running" for ever.

The witness reads from a pipe. One byte says that the verdict is written; the end of the pipe
without it, that nobody will write one. It is in a session of its own, so that no signal meant for
the job ends it, and needs the standard library only.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["Witness"]

_REASON = (
    "the process that serves was killed, or left without a verdict; the job's output may say why"
)
# The witness leaves as soon as it has read its byte.
_LEAVE_BOUND_S = 2.0

_log = logging.getLogger("psframe")


class Witness:
    """Watches this process on behalf of a run directory.

    Args:
        folder: the run directory; its status.json says "running".
    """

    def __init__(self, folder: Path) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(folder.absolute())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            _log.warning("no witness of the run, should it be killed: %s", error)

    def dismiss(self) -> None:
        """Say that the verdict is written, and see the witness leave."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.communicate(b".", timeout=_LEAVE_BOUND_S)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            process.kill()  # it can do no harm any more
            process.wait()


def _testify(folder: Path) -> None:
    """Turn a status of "running" into "failed"."""
    file = folder / "status.json"
    status = json.loads(file.read_text(encoding="utf-8"))
    if status["state"] != "running":
        return
    status.update(state="failed", reason=_REASON, updates=_updates(folder, status["updates"]))
    temporary = folder / f".status.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(status) + "\n", encoding="utf-8")
    temporary.replace(file)


def _updates(folder: Path, known: int) -> int:
    """Find the latest number of updates that metrics.jsonl tells of."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        told = [json.loads(line).get("update") or 0 for line in lines]
    except (OSError, ValueError):
        return known
    return max([known, *told])


if __name__ == "__main__" and not sys.stdin.buffer.read(1):
    _testify(Path(sys.argv[1]))
