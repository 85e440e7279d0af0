"""What README and CONTRIBUTING name exists: make targets, commands, files and links."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make_targets() -> set[str]:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    return {found[1] for line in lines if (found := re.match(r"([a-z][\w-]*):(?!=)", line))}


def code_in(markdown: str) -> str:
    """The fenced blocks and the code spans of a page."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    .*$", markdown, re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return "\n".join([*fenced, *indented, *re.findall(r"`([^`\n]+)`", prose)])


def broken_promises(markdown: str, root: Path) -> list[str]:
    """What a page names and the checkout lacks: make targets, commands, files, links."""
    code = code_in(markdown)
    targets = re.findall(r"^\s*(?:\$ )?(?:\w+=\S+ )*make +([a-z][\w-]*)(?![\w=/-])", code, re.M)
    broken = [f"make {name}" for name in targets if name not in make_targets()]

    commands = re.findall(r"-m (psframe(?:\.[a-z]\w*)+)", code)
    broken += [f"python -m {name}" for name in commands if not _is_module(root, name)]

    # A path is a word in code that begins with one of our folders; `RUN_DIR/...` and globs are not.
    folders = r"psframe|tests|examples|benchmarks|docs|\.ci"
    paths = re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w)(?![\w*<{{])", code)
    paths += re.findall(r"(?<![\w./-])((?:[A-Z]{4,}\.md|Makefile|LICENSE|pyproject\.toml))\b", code)
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", markdown)
    broken += [path for path in paths + links if not (root / path).exists()]
    return broken


def _is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize(
    "promise",
    [
        "```\nmake world\n```",
        "run `make nothing`",
        "    python -m psframe.nothing --lr 1",
        "see `docs/nothing.md`",
        "see [the design](docs/nothing.md#shape)",
        "in `NOTHING.md`",
    ],
)
def test_a_broken_promise_is_noticed(promise: str) -> None:
    assert broken_promises(promise, ROOT)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_what_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "make test" in code_in(text)
    assert broken_promises(text, ROOT) == []


def test_make_help_names_every_target() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    listed = set(re.findall(r"^  ([a-z-]+) ", done.stdout, re.MULTILINE))
    assert listed == make_targets() >= {"train", "test", "check", "bench", "clean", "help"}
