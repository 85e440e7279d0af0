"""Signals to a training that is being imported; of those to a run, see `test_errors_mpirun`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from psframe.starting import is_training

ROOT = Path(__file__).parents[1]
# In place of the first thing that takes long to import.
NUMPY = """
import os, signal
os.kill(os.getpid(), signal.{name})
raise ImportError("the signal has not ended it")
"""


def start(
    folder: Path, name: str, *words: str, rank: str = "", ignored: bool = False
) -> subprocess.CompletedProcess[str]:
    (folder / "numpy.py").write_text(NUMPY.format(name=name), encoding="utf-8")
    more = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"} | ({"PMI_RANK": rank} if rank else {})
    ignore = f"import os, signal, sys; signal.signal(signal.{name}, signal.SIG_IGN)"
    ignore += "; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return subprocess.run(
        [sys.executable, *(["-c", ignore] if ignored else []), *words],
        cwd=folder,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "status"), [("SIGTERM", 130), ("SIGINT", 130), ("SIGUSR1", 75), ("SIGUSR2", 75)]
)
@pytest.mark.parametrize("words", [("-m", "psframe.train"), ("-mpsframe", "train")], ids=" ".join)
def test_a_signal_while_it_is_imported(
    tmp_path: Path, words: tuple[str, ...], name: str, status: int
) -> None:
    done = start(tmp_path, name, *words)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == f"psframe: {name} received while no run is under way\n"
    assert not (tmp_path / "runs").exists()


def test_rank_0_says_it_for_all(tmp_path: Path) -> None:
    done = start(tmp_path, "SIGTERM", "-m", "psframe.train", rank="3")
    assert (done.returncode, done.stdout + done.stderr) == (130, "")


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As SIGINT is in a shell's background."""
    done = start(tmp_path, "SIGINT", "-m", "psframe.train", ignored=True)
    assert "the signal has not ended it" in done.stderr


def test_other_programs_are_left_alone(tmp_path: Path) -> None:
    done = start(tmp_path, "SIGTERM", "-c", "import psframe; psframe.run")
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("argv", "words", "expected"),
    [
        (["-m"], ["python", "-m", "psframe.train"], True),
        (["-m", "--seed", "1"], ["python", "-u", "-m", "psframe.train", "--seed", "1"], True),
        (["-m"], ["python", "-mpsframe.train"], True),
        (["-m", "train"], ["python", "-m", "psframe", "train"], True),
        (["/usr/bin/psframe", "train"], ["python", "/usr/bin/psframe", "train"], True),
        (["/usr/bin/psframe", "report"], ["python", "/usr/bin/psframe", "report"], False),
        (["-m"], ["python", "-m", "psframe.evaluate"], False),
        (["-m", "psframe.train"], ["python", "-m", "theirs", "psframe.train"], False),
        (["mine.py", "-m", "psframe.train"], ["python", "mine.py", "-m", "psframe.train"], False),
        (["-m"], ["python", "-m"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_which_process_is_a_training(argv: list[str], words: list[str], expected: bool) -> None:
    assert is_training(argv, words) is expected
