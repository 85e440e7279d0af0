"""What a command says: its name, what is wrong with its flags, and to readers that have gone."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from psframe.launcher import find_launcher
from psframe.terminal import find_terminal

__all__ = ["command", "give_up_printing", "parse_flags", "prepare_output", "program"]


_NUMBERS = {
    "invalid literal for int() with base 10": "a whole number",
    "could not convert string to float": "a number",
}
_NO_NUMBER = re.compile(
    f"Error parsing (?P<flag>--[a-z-]+): .*?(?P<why>{'|'.join(map(re.escape, _NUMBERS))}): "
    "(?P<value>'.*?')"
)


def command(name: str) -> str:
    """Say what to type here for a command of psframe.

    Args:
        name: of the command, such as "report".

    Returns:
        `psframe report` where the shell finds the one of this environment; else the way that
        starts this interpreter: `python -m psframe.report`, `.venv/bin/python -m psframe.report`.
    """
    interpreter = Path(sys.executable)
    if _found("psframe") == interpreter.parent / "psframe":
        return f"psframe {name}"
    for word in ("python", "python3"):
        if _found(word) == interpreter.parent / word:
            return f"{word} -m psframe.{name}"
    with contextlib.suppress(ValueError, OSError):  # not below it, or it has gone
        interpreter = interpreter.relative_to(Path.cwd())
    return f"{interpreter} -m psframe.{name}"


def _found(word: str) -> Path | None:
    found = shutil.which(word)
    return None if found is None else Path(os.path.abspath(found))


def program(name: str) -> str:
    """Say how this command was started: as `psframe NAME` or as a module."""
    started = Path(sys.argv[0])
    if started.name == "psframe" or started.parts[-2:] == ("psframe", "__main__.py"):
        return f"psframe {name}"
    return f"python -m psframe.{name}"


def parse_flags(parse: Callable[..., Any], *given: Any, name: str, quiet: bool, **how: Any) -> Any:
    """Parse a command line; where no terminal shows it, say what is wrong in plain lines.

    Args:
        parse: tyro's `cli`, or another function of its kind.
        given: its arguments.
        name: of the command.
        quiet: print nothing, neither help nor errors: another rank does.
        how: more arguments of `parse`.

    Raises:
        SystemExit: on --help, or on a wrong flag, after saying so.
    """
    prepare_output()
    how = {"prog": program(name), **how}
    if not quiet and _is_seen(sys.stdout) and _is_seen(sys.stderr):
        return parse(*given, **how)
    out, err = io.StringIO(), io.StringIO()  # no terminals: tyro does not colour
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return parse(*given, **how)
    except SystemExit:
        if not quiet:
            sys.stdout.write(out.getvalue())
            sys.stdout.flush()
            sys.stderr.write(_plain(err.getvalue()))
            sys.stderr.flush()
        raise


def _is_seen(stream: TextIO) -> bool:
    """Tell whether a stream ends at a terminal, behind a launcher or not."""
    terminal = find_terminal(stream, launched=find_launcher() is not None)
    if terminal is None:
        return False
    terminal.close()
    return True


def _plain(text: str) -> str:
    """Take the lines of an error out of its frame, whose first line is a title.

    Of a flag that is to be a number it is enough to say so.
    """
    lines = [line.strip(" |│") for line in text.splitlines()[1:]]
    lines = [line for line in lines if line.strip("-─+╭╰╮╯ ")]
    found = _NO_NUMBER.match(" ".join(lines))
    if found:
        wanted = _NUMBERS[found["why"]]
        lines = [f"{found['flag']}: expected {wanted}, got {found['value']}", lines[-1]]
    return "".join(f"{'  ' if i else 'psframe: error: '}{line}\n" for i, line in enumerate(lines))


def prepare_output() -> None:
    """See that stdout and stderr take whatever is printed.

    One that was closed at the start (`>&-`), which Python has as None, leads nowhere; and what a
    locale has no letters for is printed as escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
            setattr(sys, name, nowhere)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def give_up_printing() -> None:
    """Let all that is still printed to stdout go nowhere.

    Without it the interpreter tries once more at its end, and complains again.
    """
    with contextlib.suppress(OSError, ValueError):  # ValueError: stdout is no file of the system's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
