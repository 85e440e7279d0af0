"""A small process that says something in its parent's place, if that has not gone on in time.

MPI_Init waits for every rank and holds the interpreter meanwhile: no thread of the process and no
handler of a signal could say why it ends. The process reads from a pipe, which ends when its parent
goes on or dies. It is in a session of its own, so that no signal meant for the job ends it, and
needs the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator

__all__ = ["told_after"]

# Between SIGKILL and the end of a process.
_DEATH_BOUND_S = 2.0


@contextlib.contextmanager
def told_after(bound_s: float, message: str) -> Iterator[None]:
    """Have a message on stderr if the block takes longer.

    Raises:
        OSError: no process can be started that would write it.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(bound_s), message],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        assert process.stdin is not None, "it is a pipe"
        process.stdin.close()
        process.kill()  # it may still be starting
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_DEATH_BOUND_S)


def _wait(bound_s: float, message: str) -> None:
    if select.select([0], [], [], bound_s)[0]:
        return
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{message}\n".encode(errors="replace"))


if __name__ == "__main__":
    _wait(float(sys.argv[1]), sys.argv[2])
