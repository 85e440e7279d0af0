"""Every example runs, as its first lines say; the Slurm script is read by bash only."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
# What each prints: a pattern that says that it has learned something.
PRINTS = {
    "work_function.py": r"400 updates\nw = \[ 2\.\S* +-1\.\S* +0\.5\S*\]  b = \[3\.\S*\]\npushes",
    "model_class.py": r"test accuracy 9[4-9]\.\d% after 900 updates",
    "local_steps.py": r"local_sgd: 1080 steps, 120 updates, 9[3-9]\.\d%\nelastic: .* 9[3-9]\.",
    "simulate.py": r"mode .*\nBSP\(backup=0\) .*\nBSP\(backup=1\) .*\nSSP.* 1280 .*\nAsync\(\) ",
}


def run(*arguments: str, cwd: Path = ROOT) -> str:
    launcher = ("OMPI_", "PMI", "PMIX_", "SLURM_")
    environ = {name: v for name, v in os.environ.items() if not name.startswith(launcher)}
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=cwd,
        env={**environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_here() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == set(PRINTS)


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    printed = run(str(FOLDER / name), cwd=tmp_path)
    assert re.match(PRINTS[name], printed), printed


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_says_how_to_run_it(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert f"    python examples/{name}" in text


def test_the_model_class_is_one_for_the_command(tmp_path: Path) -> None:
    printed = run(
        *("-m", "psframe.train", "--model", "examples.model_class:TanhNet", "--lr", "0.02"),
        *("--epochs", "5", "--run-dir", str(tmp_path / "run")),
    )
    assert re.search(r"test accuracy +9\d\.\d+%", printed), printed
    assert re.search(r"updates +225\b", printed), printed


def test_a_simulation_is_the_same_again(tmp_path: Path) -> None:
    first = run(str(FOLDER / "simulate.py"), cwd=tmp_path)
    assert run(str(FOLDER / "simulate.py"), cwd=tmp_path) == first
