"""The documentation: its programs and commands are run, and it builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN = [page for page in PAGES if re.search("```(python|console)", page.read_text())]
# What is shown and not run: it needs a cluster, root's absence, or another environment.
SHOWN = (
    "pip install",
    "python -m venv",
    "source ",
    "sbatch ",
    "mpirun -n 4 python -m psframe.train",
)


def environment() -> dict[str, str]:
    """One in which `psframe` and `python` are those of this checkout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    kept = {
        k: v for k, v in os.environ.items() if k.startswith(("OMPI_", "PRTE_", "OMP_", "TMPDIR"))
    }
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": "/tmp", "TERM": "dumb"}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that it is said to print."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_what_a_page_shows_works(page: Path, tmp_path: Path) -> None:
    """In order, in an empty folder; a program that begins with a file's name becomes that file."""
    programs = 0
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            programs += 1
            named = re.match(r"# (\w+\.py)\n", text)
            name = named[1] if named else f"program{programs}.py"
            (tmp_path / name).write_text(text, encoding="utf-8")
            if not named:
                run([sys.executable, "-W", "error", name], tmp_path)
        elif language == "console":
            for command, expected in commands(text):
                printed = run(
                    ["bash", "-c", f'psframe() {{ python -m psframe "$@"; }}; {command}'], tmp_path
                )
                for line in expected:
                    assert line in printed, f"{command} does not print {line!r}:\n{printed}"


def test_what_is_only_shown_is_known() -> None:
    for page in PAGES:
        for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == "sh":
                for line in text.strip().splitlines():
                    assert line.startswith(SHOWN), f"{page.name}: {line}"


def test_every_page_is_in_the_contents() -> None:
    listed = re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert {page.stem for page in PAGES} == {*listed, "index"}


def test_files_that_pages_name_are_there() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:examples|docs|tests)/[\w./-]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_figures_are_small_and_shown() -> None:
    shown = {n for page in PAGES for n in re.findall(r"\]\(([\w-]+\.svg)\)", page.read_text())}
    assert shown == {figure.name for figure in DOCS.glob("*.svg")}
    for figure in shown:
        assert (DOCS / figure).stat().st_size < 60_000


@pytest.mark.slow
def test_the_figures_of_staleness_can_be_drawn_anew(tmp_path: Path) -> None:
    """Their looks differ with matplotlib's version; what they show is in the page, or simulated."""
    pytest.importorskip("matplotlib", reason="the extra 'plots' is not installed")
    run([sys.executable, str(DOCS / "plots_staleness.py"), str(tmp_path)], ROOT)
    drawn = {figure.name for figure in tmp_path.glob("*.svg")}
    assert drawn == {figure.name for figure in DOCS.glob("staleness-*.svg")}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the extra 'docs' is not installed: make docs")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(DOCS), str(tmp_path)]
    run(command, ROOT)
    assert "From nothing to a cluster" in (tmp_path / "tutorial.html").read_text()
    assert "--validation-fraction" in (tmp_path / "commands.html").read_text()
