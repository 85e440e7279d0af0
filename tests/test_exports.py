"""What the package exports: all of it there, and imported when it is asked for."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import psframe


def exported_by() -> dict[str, str]:
    """By name, where a type checker is told that it comes from."""
    block = next(
        node
        for node in ast.parse(Path(psframe.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    )
    return {
        alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_a_type_checker_sees_what_there_is() -> None:
    assert sorted(exported_by()) == sorted(psframe.__all__)


@pytest.mark.parametrize("name", psframe.__all__)
def test_what_is_exported_is_where_it_is_said_to_be(name: str) -> None:
    home = importlib.import_module(exported_by()[name])
    assert getattr(psframe, name) is getattr(home, name)
    assert name in dir(psframe)


def test_what_is_not_exported_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'psframe' has no attribute 'nothing'"):
        psframe.nothing  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(psframe, "__nothing__")


def test_a_type_checker_notices_what_is_not_exported(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import psframe\npsframe.Asynk()\nfrom psframe import Rnu\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", program],
        cwd=Path(psframe.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert 'has no attribute "Asynk"' in done.stdout, done.stdout + done.stderr
    assert 'has no attribute "Rnu"' in done.stdout


def test_a_module_is_an_attribute_as_if_it_had_been_imported() -> None:
    program = "import psframe; print(psframe.errors.Stopped is psframe.Stopped, psframe.stale)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("True <module 'psframe.stale'")


def test_a_broken_module_is_no_missing_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise AttributeError("numpy has no attribute this")

    monkeypatch.setattr(psframe, "import_module", broken)
    monkeypatch.delattr(psframe, "run", raising=False)
    with pytest.raises(ImportError, match=r"psframe\.run cannot be imported: numpy has no"):
        psframe.run  # noqa: B018


def test_the_package_alone_imports_nothing_else() -> None:
    """Neither NumPy nor the rest of psframe; each is there when something needs it."""
    program = (
        "import sys, psframe\n"
        "print(sorted(n for n in sys.modules if n.startswith(('psframe', 'numpy', 'mpi4py'))))\n"
        "psframe.Stopped\n"
        "print('psframe.runtime' in sys.modules, psframe.optim.SGD(0.1))\n"
        "from psframe import *\n"
        "print(run is psframe.run)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    alone, later, star = done.stdout.splitlines()
    assert alone == "['psframe', 'psframe.starting']"
    assert later.startswith("False SGD(")
    assert star == "True"
