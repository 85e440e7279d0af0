"""Signals that come while a training is still starting: it ends with its exit status, and no stack.

What `psframe.train` imports takes a second or two, and begins with the package itself. So the
package imports this before anything else, and if this process is to train, by the command line,
handlers stand from then on. Until the run begins there is nothing to be saved and nobody to be
told: a process ends at once, and a launcher then ends the others. Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

__all__ = ["INTERRUPTED", "PREEMPTED", "end_on_signals", "is_training"]

# Exit statuses: what a shell reports of a program that SIGINT ended, and EX_TEMPFAIL of sysexits.h:
# the schedulers' "try again".
INTERRUPTED, PREEMPTED = 130, 75

_STATUS = {
    signal.SIGTERM: INTERRUPTED,
    signal.SIGINT: INTERRUPTED,
    signal.SIGUSR1: PREEMPTED,
    signal.SIGUSR2: PREEMPTED,
}
# One that is not 0 is another rank's, which leaves it to rank 0 to say something.
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


def is_training(argv: Sequence[str], words: Sequence[str]) -> bool:
    """Tell whether a process is `psframe train`, in any of its spellings, and no other program.

    Args:
        argv: as in `sys`, while the package is imported.
        words: the interpreter's whole command line.
    """
    first = argv[0] if argv else ""  # an embedded interpreter may have none
    if Path(first).name == "psframe":
        return list(argv[1:2]) == ["train"]
    if first != "-m":  # which Python has in place of the module's name for now
        return False
    at = next((k for k, word in enumerate(words) if word.startswith("-m")), len(words))
    given = [words[at][2:], *words[at + 1 :]] if words[at : at + 1] != ["-m"] else words[at + 1 :]
    return list(given[:1]) == ["psframe.train"] or list(given[:2]) == ["psframe", "train"]


def end_on_signals() -> None:
    """End this process at once when a signal comes; one that it is to ignore stays ignored."""
    for number in _STATUS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    if all(os.environ.get(name, "0") == "0" for name in _RANKS):
        said = f"psframe: {signal.Signals(number).name} received while no run is under way\n"
        with contextlib.suppress(OSError):  # nobody reads it; the status says as much
            os.write(2, said.encode())
    os._exit(_STATUS[signal.Signals(number)])


if is_training(sys.argv, sys.orig_argv):
    end_on_signals()
