"""A Sphinx directive that shows what a command's --help says, so that the two cannot differ."""

import os
import subprocess
import sys
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive


class CommandHelp(Directive):
    """`command-help:: train` shows the help of `psframe train`."""

    required_arguments = 0
    optional_arguments = 2
    has_content = False
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        """Ask the command itself."""
        environ = {**os.environ, "COLUMNS": "96", "NO_COLOR": "1", "TERM": "dumb"}
        done = subprocess.run(
            [sys.executable, "-m", "psframe", *self.arguments, "--help"],
            capture_output=True,
            text=True,
            env=environ,
            timeout=60,
            check=True,
        )
        text = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Any) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
