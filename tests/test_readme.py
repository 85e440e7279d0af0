"""The README's programs run as they stand there, and what it says of flags and files is so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from psframe.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run_program(text: str, folder: Path) -> str:
    """Run a program in a process of its own, in an empty folder; return what it prints."""
    (folder / "program.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "program.py"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_example_finds_the_line(tmp_path: Path) -> None:
    assert "psframe.run(" in PROGRAMS[0]
    assert run_program(PROGRAMS[0], tmp_path).split() == "500 updates: [ 2. -1. 0.5]".split()


def test_the_library_example_with_three_threads(tmp_path: Path) -> None:
    text = PROGRAMS[0].replace("optimizer=", "workers=3, optimizer=")
    assert text != PROGRAMS[0]
    assert run_program(text, tmp_path).split()[:2] == ["500", "updates:"]


def test_the_simulation_has_the_staleness_that_the_table_of_modes_says(tmp_path: Path) -> None:
    assert "psframe.simulate(" in PROGRAMS[1]
    printed = run_program(PROGRAMS[1], tmp_path)
    found = re.fullmatch(r"(\d+\.\d+) s, mean staleness (\d+)\n", printed)
    assert found, printed
    assert 0.4 < float(found[1]) < 0.6  # 5000 updates of 1000 workers at 0.1 s
    # W - 1 = 999 counts the 1000 gradients in flight at the end, which are about 1000 updates old
    # each: of 5000 that are a fifth.
    assert 780 <= int(found[2]) <= 820


def test_there_are_no_other_programs() -> None:
    assert len(PROGRAMS) == 2


def test_the_work_function_is_ten_lines_at_most() -> None:
    body = PROGRAMS[0].partition("def work(worker):\n")[2].partition("\n\n")[0]
    assert 1 <= len(body.splitlines()) <= 9


@pytest.mark.parametrize(
    "flag", sorted(set(re.findall(r"psframe\.train[^\n`]* (--[a-z-]+)|`(--[a-z-]+)[^`]*`", README)))
)
def test_flags_are_flags(flag: tuple[str, str]) -> None:
    name = flag[0] or flag[1]
    of_mpirun = {"--allow-run-as-root", "--oversubscribe", "--bind-to"}
    settings = {"--" + key.replace("_", "-") for key in vars(Settings())}
    assert name in settings | of_mpirun | {"--help"}


# ---- the commands ----

VENV = Path(sys.executable).parent
COMMANDS = re.findall(r"^    ((?:mpirun|psframe|python -m) .*?)(?:  +#.*)?$", README, re.MULTILINE)
# A benchmark's own defaults take minutes; the tests of benchmarks measure.
LESS = {
    "push-pull": " --bytes 64KiB --rounds 1 --seconds 0.05",
    "apply": " --params 1000 --rounds 1",
}


def run_command(command: str, folder: Path) -> str:
    """Run a command of the README's as root may have to, with few epochs."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    crowd = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }
    given = {"TMPDIR": os.environ["TMPDIR"]}
    path = f"{VENV}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-c", f'psframe() {{ python -m psframe "$@"; }}; {command}'],
        cwd=folder,
        env={**root, **crowd, **given, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": "/tmp"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.skipif(not (VENV / "mpirun").exists(), reason="needs an environment with mpirun")
def test_the_commands_work(tmp_path: Path) -> None:
    """Those of training first: the others use the run that it leaves."""
    order = sorted(COMMANDS, key=lambda command: "train" not in command)
    assert {"train", "report", "evaluate", "predict", "bench"} <= set(
        re.findall(r"psframe[ .](\w+)", " ".join(order))
    )
    for command in order:
        command = command.replace("RUN_DIR", "runs/r").replace("DATA", "digits")
        if "train" in command:
            resumes = "--resume" in command
            command += " --epochs 2" + ("" if resumes else " --run-dir runs/r --overwrite")
        for name, more in LESS.items():
            command += more if name in command else ""
        assert run_command(command, tmp_path)
