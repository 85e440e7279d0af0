"""How Sphinx builds the documentation: `make docs`, warnings are errors."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "psframe"
author = "the psframe developers"
project_copyright = "the psframe developers"
release = version_of("psframe")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "commands",  # _ext/commands.py: the help of each command, from its parser
]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"psframe {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_mock_imports = ["cupy"]
napoleon_numpy_docstring = False
napoleon_use_rtype = False


def _escape(app, what, name, obj, options, lines):  # type: ignore[no-untyped-def]
    """Shapes such as (n, *input_shape) are no emphasis, norms such as |g| no substitutions."""
    lines[:] = [line.replace("*input_shape", r"\*input_shape") for line in lines]
    if name.startswith(("psframe.stale.", "psframe.codecs.")):
        lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app):  # type: ignore[no-untyped-def]
    app.connect("autodoc-process-docstring", _escape)
