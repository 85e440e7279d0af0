"""Printing for somebody who may have gone: `psframe ... | head` is no error."""

from __future__ import annotations

import contextlib
import os
import sys

__all__ = ["give_up_printing"]


def give_up_printing() -> None:
    """Let all that is still printed to stdout go nowhere.

    Without it the interpreter tries once more at its end, and complains again.
    """
    with contextlib.suppress(OSError, ValueError):  # ValueError: stdout is no file of the system's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
