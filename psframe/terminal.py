"""Whether a stream ends at a terminal, and how large that is; under mpirun too.

Open MPI gives each rank a pseudo-terminal of its own, wherever its output goes, whose size is none
or that of the user's at the start; MPICH gives it a pipe, even at a terminal. What counts under a
launcher is therefore where the output of the launcher goes, and the launcher is one of this
process's ancestors, if it runs on this node.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from collections.abc import Iterator, Mapping
from typing import TextIO

__all__ = ["Terminal", "find_terminal", "is_writable"]

_LAUNCHERS = frozenset(("mpirun", "mpiexec", "prterun", "orterun", "prun", "mpiexec.hydra"))
# Between a rank and its launcher: a proxy, a wrapper script or two, a shell.
_ANCESTORS_MAX = 8
# Launchers told so put a rank's number before each line, or the lines into files.
_PREFIXING = re.compile(
    r"-{1,2}(tag-output|timestamp-output|output|output-filename|xml|prepend-rank|l|outfile-pattern)\b"
)
_SIZE = (80, 24)


class Terminal:
    """A terminal that a stream's output reaches.

    Args:
        stream: what is written to.
        source: file descriptor to ask for the size, owned; -1 for none.
    """

    def __init__(self, stream: TextIO, source: int = -1) -> None:
        self.stream = stream
        self._source = source

    def size(self) -> tuple[int, int]:
        """Give columns and lines, as they are now."""
        if self._source >= 0:
            try:
                columns, lines = os.get_terminal_size(self._source)
            except OSError:
                columns, lines = 0, 0  # it has gone
            if columns > 0 and lines > 0:
                return columns, lines
        return _number("COLUMNS") or _SIZE[0], _number("LINES") or _SIZE[1]

    def close(self) -> None:
        """Let go of the terminal, not of the stream."""
        if self._source >= 0:
            os.close(self._source)
            self._source = -1


def find_terminal(
    stream: TextIO | None, *, launched: bool = False, environ: Mapping[str, str] | None = None
) -> Terminal | None:
    """Find the terminal that what is written to `stream` reaches and that can move its cursor.

    Args:
        stream: usually sys.stdout or sys.stderr; None is one that was closed at the start.
        launched: whether this process was started by an MPI launcher.
        environ: os.environ.

    Returns:
        The terminal; None if there is none, or it is a dumb one.
    """
    if (os.environ if environ is None else environ).get("TERM", "dumb") in ("", "dumb", "unknown"):
        return None
    if stream is None:
        return None
    try:
        number, is_terminal = stream.fileno(), stream.isatty()
    except (OSError, ValueError):  # it has no descriptor, or is closed
        return None
    if launched and number in (1, 2):
        for process, name in _ancestors():
            if name in _LAUNCHERS:
                source = _launcher_terminal(process, number)
                return None if source < 0 else Terminal(stream, source)
    if is_terminal and (_width(number) or not launched):
        return Terminal(stream, os.dup(number))
    return None


def is_writable(stream: TextIO) -> bool:
    """Tell whether a short line can be written without waiting for a reader."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return bool(poll.poll(0))
    except (OSError, ValueError):  # not a file: writing cannot wait
        return True


def _width(descriptor: int) -> int:
    try:
        return os.get_terminal_size(descriptor).columns
    except OSError:
        return 0


def _ancestors() -> Iterator[tuple[int, str]]:
    process = os.getppid()
    for _ in range(_ANCESTORS_MAX):
        try:
            with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
                stat = file.read()
        except OSError:
            return  # it has ended, or there is no /proc
        end = stat.rindex(")")
        yield process, stat[stat.index("(") + 1 : end]
        process = int(stat[end + 2 :].split()[1])
        if process <= 1:
            return


def _launcher_terminal(process: int, descriptor: int) -> int:
    """Open the terminal that the launcher's output goes to, for its size; -1 if there is none."""
    source = -1
    with contextlib.suppress(OSError):  # another user's process, or one that has ended
        with open(f"/proc/{process}/cmdline", encoding="utf-8", errors="replace") as file:
            if any(_PREFIXING.match(argument) for argument in file.read().split("\0")):
                return -1
        path = f"/proc/{process}/fd/{descriptor}"
        if re.match(r"/dev/(pts/\d+|tty)", os.readlink(path)):
            source = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
            if not _width(source):
                os.close(source)
                source = -1
    return source


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 0
