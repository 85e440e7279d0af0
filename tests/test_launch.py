"""`psframe.launch`: the command line that each machine needs, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from psframe.errors import ArgumentError
from psframe.launch import command_line, main, program
from psframe.machine import Machine, find_mpirun

OPEN, MPICH = "Open MPI", "MPICH"
STARTED = ["python", "x.py"]


def machine(vendor: str = OPEN, **how: Any) -> Machine:
    return Machine(
        **{"vendor": vendor, "mpirun": "mpirun", "root": False, "cores": 4, "slurm": False, **how}
    )


def line(where: Machine, environ: dict[str, str] | None = None, **flags: Any) -> str:
    given = {"n": 4, "hosts": None, "hostfile": None, "env": (), **flags}
    found = command_line(SimpleNamespace(**given), STARTED, where, environ or {})
    assert found[-2:] == STARTED
    return " ".join(found[:-2])


@pytest.mark.parametrize(
    ("where", "flags", "expected"),
    [
        (machine(), {}, "mpirun -n 4 --bind-to none"),
        (machine(root=True), {}, "mpirun -n 4 --allow-run-as-root --bind-to none"),
        (machine(cores=2), {}, "mpirun -n 4 --oversubscribe --bind-to none"),
        (machine(cores=2, slurm=True), {}, "mpirun -n 4 --bind-to none"),
        (machine(), {"n": None}, "mpirun -n 4 --bind-to none"),
        (machine(cores=1), {"n": None}, "mpirun -n 2 --oversubscribe --bind-to none"),
        (
            machine(),
            {"hosts": "a:2,b"},
            "mpirun -n 4 --host a:2,b:1 --oversubscribe --bind-to none",
        ),
        (machine(), {"hosts": "a:2,b:2", "n": None}, "mpirun -n 4 --host a:2,b:2 --bind-to none"),
        (machine(), {"env": ("A=1", "B=x=y")}, "mpirun -n 4 --bind-to none -x A=1 -x B=x=y"),
        (machine(MPICH, root=True, cores=1), {}, "mpirun -n 4"),
        (machine(MPICH), {"hosts": "a:2,b:2"}, "mpirun -n 4 -hosts a:2,b:2"),
        (machine(MPICH), {"env": ("A=1",)}, "mpirun -n 4 -genv A 1"),
    ],
)
def test_each_machine_gets_the_flags_that_it_needs(
    where: Machine, flags: dict[str, Any], expected: str
) -> None:
    assert line(where, **flags) == expected


def test_slurm_says_how_many_ranks() -> None:
    assert line(machine(), {"SLURM_NTASKS": "12"}, n=None).split()[2] == "12"


def test_a_file_of_hosts(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("a\n")
    assert (
        line(machine(cores=1), hostfile=str(file))
        == f"mpirun -n 4 --hostfile {file} --bind-to none"
    )
    assert line(machine(MPICH), hostfile=str(file)) == f"mpirun -n 4 -f {file}"


@pytest.mark.parametrize(
    ("vendor", "flags", "words"),
    [
        (OPEN, {"n": 0}, "-n: expected 1 or more, got 0"),
        (OPEN, {"hosts": "a:0"}, "expected names as in a,b or a:4,b:2, got 'a:0'"),
        (OPEN, {"hosts": "a,,b"}, "got ''"),
        (OPEN, {"hosts": "a;rm -r"}, "got 'a;rm -r'"),
        (OPEN, {"hosts": "a", "hostfile": "f"}, "contradict each other"),
        (OPEN, {"hostfile": "no such file"}, "there is no such file"),
        (OPEN, {"env": ("A",)}, "expected NAME=VALUE, got 'A'"),
    ],
)
def test_what_makes_no_sense_is_refused(vendor: str, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        line(machine(vendor), **flags)
    assert words in str(caught.value)


def test_programs(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("")
    python = sys.executable
    assert program(["train", "--lr", "1"]) == [python, "-m", "psframe.train", "--lr", "1"]
    assert program([str(script), "x"]) == [python, str(script), "x"]
    assert program(["-m", "my.module"]) == [python, "-m", "my.module"]
    assert os.path.isabs(program(["true"])[0])
    for rest, words in [
        ([], "what is to be started stands after --"),
        (["trian"], "did you mean 'train'?"),
        (["none.py"], "there is no such script"),
        (["launch", "--", "train"], "'launch' runs in one process and not on ranks"),
        (["report", "runs/a"], "start it as psframe report ..."),
        (["data", "describe"], "start it as psframe data ..."),
    ]:
        with pytest.raises(ArgumentError, match=words):
            program(rest)


def fake(folder: Path, name: str, says: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_the_launcher_belongs_to_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the right vendor: in the environment's folders, then in PATH."""

    def search(*names: str) -> None:
        here, prefix, *path = (str(tmp_path / name) for name in names)
        monkeypatch.setattr(sys, "executable", f"{here}/python")
        monkeypatch.setattr(sys, "prefix", prefix)
        monkeypatch.setenv("PATH", os.pathsep.join(path))

    fake(tmp_path / "a", "mpirun", "HYDRA build details:")
    right = fake(tmp_path / "b", "mpiexec", "prterun (PRRTE) 3.0.3")
    search("none", "none", "a", "b")
    assert find_mpirun(OPEN) == str(right)
    assert find_mpirun(MPICH) == str(tmp_path / "a" / "mpirun")
    search("none", "none", "a")
    with pytest.raises(ArgumentError, match=r"no mpirun of it.*found only .*a/mpirun \(MPICH\)"):
        find_mpirun(OPEN)
    fake(tmp_path / "c", "mpirun", "something else 1.0")
    search("c", "none", "none")
    with pytest.raises(ArgumentError, match=r"c/mpirun \(unknown\)"):
        find_mpirun(OPEN)
    (tmp_path / "d").mkdir()
    near = fake(tmp_path / "d" / "bin", "mpirun", "prterun (PRRTE) 3.0.3")
    search("none", "d", "b")
    assert find_mpirun(OPEN) == str(near)


def test_a_dry_run_prints_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-n", "3", "--dry-run", "--", "train", "--data", "two words"]) == 0
    out = capsys.readouterr().out
    assert " -n 3 " in out
    assert out.endswith("-m psframe.train --data 'two words'\n")


def test_errors_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["-n", "3"], ["-n", "0", "--", "train"], ["--mpi", "mpich", "--", "train"]):
        assert main(flags) == 2
        assert capsys.readouterr().err.startswith("psframe: error: ")


def test_it_becomes_the_launcher(tmp_path: Path) -> None:
    """The ranks run, and the exit status is theirs."""
    script = tmp_path / "s.py"
    script.write_text(
        "import sys, numpy as np, psframe\n"
        "one = {'w': np.ones(2)}\n"
        "work = lambda worker: (worker.pull(), worker.push_pull(one)) and None\n"
        "result = psframe.run(work, {'w': np.zeros(2)}, optimizer=psframe.optim.SGD(1.0))\n"
        "print('root' if result.is_root else 'rank', result.version)\n"
        "sys.exit(7 if result.is_root else 0)\n"
    )
    command = [sys.executable, "-m", "psframe.launch", "-n", "3", "--", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 7, done.stderr
    assert sorted(text for text in done.stdout.split("\n")[1:] if text) == ["rank 2"] * 2 + [
        "root 2"
    ]
