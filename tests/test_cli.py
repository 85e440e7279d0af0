"""`psframe`: the table of commands."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import psframe
from psframe.cli import COMMANDS, main
from psframe.output import command, parse_flags, program

ROOT = Path(psframe.__file__).parents[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main(name: str) -> None:
    assert callable(importlib.import_module(COMMANDS[name][0]).main)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"psframe.{name}" in capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main([]) == 2


def test_a_wrong_command_suggests_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_a_command_like_no_other_gets_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"]) == 2
    assert "there is no command 'xyzzy'. They are train, " in capsys.readouterr().err


# ---- what it is called here, and what is wrong with its flags ----


def test_what_is_to_be_typed_depends_on_what_the_shell_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tmp_path / "env" / "bin"
    environment.mkdir(parents=True)
    for name in ("python", "psframe"):
        (environment / name).write_text("#!/bin/sh\n")
        (environment / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(environment / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert command("report") == "env/bin/python -m psframe.report"
    monkeypatch.setenv("PATH", f"{environment}{os.pathsep}/usr/bin")
    assert command("report") == "psframe report"
    (environment / "psframe").unlink()
    assert command("report") == "python -m psframe.report"
    monkeypatch.chdir("/")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert command("report") == f"{environment}/python -m psframe.report".removeprefix("/")


@pytest.mark.parametrize(
    ("started", "name"),
    [
        ("/env/bin/psframe", "psframe report"),
        ("/src/psframe/__main__.py", "psframe report"),
        ("/src/psframe/report/__main__.py", "python -m psframe.report"),
    ],
)
def test_a_program_is_called_as_it_was_started(
    started: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert program("report") == name


def parse(*flags: str, quiet: bool = False) -> object:
    import tyro

    def settings(epochs: int = 3) -> int:
        """Do nothing.

        Args:
            epochs: how often each sample is used.
        """
        return epochs

    return parse_flags(tyro.cli, settings, name="report", quiet=quiet, args=flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--epochs", "x"], "--epochs: expected a whole number, got 'x'\n"),
        (["--epoch", "3"], "Unrecognized options: --epoch, 3"),
        (["--epochs"], "Missing value for argument '--epochs'"),
    ],
)
def test_a_wrong_flag_is_told_in_plain_lines_and_by_one_rank(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*flags)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith(f"psframe: error: {said}")) == ("", True)
    assert err.isascii()
    assert err.isprintable() or not [c for c in err if not c.isprintable() and c != "\n"]
    assert "---" not in err
    assert all(line == line.rstrip() for line in err.splitlines())
    with pytest.raises(SystemExit) as caught:
        parse(*flags, quiet=True)
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_right_flags_and_a_call_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--epochs", "7") == 7
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "how often each sample is used" in out
    assert "\x1b" not in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("psframe ")


def test_it_is_a_module_too() -> None:
    command = [sys.executable, "-m", "psframe", "data", "describe", "digits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.startswith("digits: ")


def test_whoever_reads_may_leave() -> None:
    """The pipe is closed before anything is printed: no traceback, no complaint."""
    command = [sys.executable, "-m", "psframe", "data", "describe", "digits", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=100) == 0


def test_a_closed_output_ends_nothing(tmp_path: Path) -> None:
    run = f"train --epochs 1 --run-dir {tmp_path / 'r'}"
    for typed in (run, "data describe digits", f"predict {tmp_path / 'r'} digits -o -"):
        for closed in (">&-", ">&- 2>&-"):
            again = "--overwrite" if typed == run else ""
            line = f"exec {sys.executable} -m psframe {typed} {again} {closed}"
            assert subprocess.run(["bash", "-c", line], timeout=100, check=False).returncode == 0
    assert (tmp_path / "r" / "summary.json").exists()


def test_names_that_the_locale_has_no_letters_for(tmp_path: Path) -> None:
    rows = [f"{i % 3},{i % 3},{('été', '日本', 'b')[i % 3]}" for i in range(60)]
    (tmp_path / "d.csv").write_text("\n".join(["x,y,name", *rows]) + "\n", encoding="utf-8")
    plain = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    train = ["train", "--data", "d.csv", "--epochs", "1", "--run-dir", "r"]
    for typed in (train, ["evaluate", "r"], ["data", "describe", "d.csv"]):
        done = subprocess.run(
            [sys.executable, "-m", "psframe", *typed],
            env={**os.environ, **plain, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert b"\\u65e5" in done.stdout


class _Interrupts:
    """Ctrl-C while a module is imported."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "psframe.closing":
            raise KeyboardInterrupt


def test_an_interrupt_while_a_command_is_imported_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [name for name in sys.modules if name in ("psframe.train", "psframe.closing")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [_Interrupts(), *sys.meta_path])
    assert main(["train"]) == 130
    assert capsys.readouterr() == ("", "")
