"""The `psframe` command: one name for all of them, as subcommands."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from psframe.output import prepare_output
from psframe.starting import INTERRUPTED
from psframe.version import installed_version

__all__ = ["COMMANDS", "main"]

# Name, the module whose `main` it is, and what it is for.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("psframe.train", "train a classifier with a parameter server"),
    "evaluate": ("psframe.evaluate", "evaluate a trained model"),
    "predict": ("psframe.predict", "predict with a trained model"),
    "data": ("psframe.data.__main__", "look at data, and convert it"),
    "report": ("psframe.report.__main__", "draw what a run did"),
    "launch": ("psframe.launch", "start any of them, or a program, on several ranks"),
    "doctor": ("psframe.doctor.__main__", "say whether this machine and launch are fit"),
    "bench": ("psframe.bench", "measure pushes, pulls and updates on this machine"),
}

_HELP = """\
usage: psframe COMMAND [ARGUMENTS]

{commands}
  version   say which version this is

`psframe COMMAND --help` says more; `python -m psframe.COMMAND` is the same. For example:

  psframe train                              in this process, with worker threads
  psframe launch -n 4 -- train --mode bsp    a server and three workers, under MPI
  psframe report runs/20250131-101500
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return its exit status, or 2 for one that there is not."""
    prepare_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS)) + 2
        lines = [f"  {command:<{width}}{what}" for command, (_, what) in COMMANDS.items()]
        print(_HELP.format(commands="\n".join(lines)))
        return 0 if arguments else 2
    if name in ("version", "--version"):
        print(f"psframe {installed_version()}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        print(
            f"psframe: error: there is no command {name!r}{hint} They are "
            f"{', '.join(COMMANDS)} and version.",
            file=sys.stderr,
        )
        return 2
    try:
        module = importlib.import_module(COMMANDS[name][0])
        status: int = module.main(arguments[1:])
    except KeyboardInterrupt:  # while it was imported; a command's main has its own
        return INTERRUPTED
    return status
