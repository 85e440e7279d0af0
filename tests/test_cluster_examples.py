"""The batch scripts and container files: their form, and that psframe knows the flags they use."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from psframe.launch import arguments as launch_arguments
from psframe.settings import Settings

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(
    [
        *EXAMPLES.glob("slurm/*.sbatch"),
        *EXAMPLES.glob("pbs/*.pbs"),
        *EXAMPLES.glob("apptainer/*.sh"),
        *ROOT.glob("tests/slurm/*.sh"),
    ]
)


def test_there_are_some() -> None:
    assert {path.parent.name for path in SCRIPTS} == {"slurm", "pbs", "apptainer"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_a_script_is_one(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.read_text().startswith("#!/")


def commands(text: str) -> list[list[str]]:
    """The command lines of psframe's in a script, a line each."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = (line.strip() for line in joined.splitlines() if not line.lstrip().startswith("#"))
    whole = [re.split(r" \|\| | &$", line)[0] for line in lines if "-m psframe." in line]
    return [shlex.split(line) for line in whole]


def check(words: list[str]) -> None:
    """Every flag is one of the command's that it is given to."""
    at = next(i for i, word in enumerate(words) if word.startswith("psframe."))
    own = words[at + 1 :]
    if words[at] == "psframe.launch":
        cut = own.index("--")
        known = {field.replace("_", "-") for field in launch_arguments().__dataclass_fields__} | {
            "n"
        }
        assert flags(own[:cut]) <= known
        assert own[cut + 1] == "train"
        own = own[cut + 2 :]
    assert flags(own) <= {field.replace("_", "-") for field in Settings.__dataclass_fields__}
    assert "run-dir" in flags(own)


def flags(words: list[str]) -> set[str]:
    return {word.lstrip("-") for word in words if re.match(r"--?[a-z]", word)}


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.is_relative_to(EXAMPLES)], ids=lambda p: p.name
)
def test_psframe_knows_the_flags(script: Path) -> None:
    found = commands(script.read_text())
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize(
    "path",
    [
        *[s for s in SCRIPTS if s.is_relative_to(EXAMPLES)],
        *EXAMPLES.glob("kubernetes/*"),
        *EXAMPLES.glob("apptainer/*.def"),
    ],
    ids=lambda p: f"{p.parent.name}-{p.name}",
)
def test_what_to_change_is_on_top(path: Path) -> None:
    text = path.read_text()
    assert "---- change" in "\n".join(text.splitlines()[:22])


def test_the_kubernetes_job() -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes" / "train.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    spec = job["spec"]
    replicas = spec["mpiReplicaSpecs"]
    launcher = replicas["Launcher"]["template"]["spec"]["containers"][0]
    words = [str(word) for word in launcher["command"]]
    check(words)
    ranks = int(words[words.index("-n") + 1])
    assert ranks == replicas["Worker"]["replicas"] * spec["slotsPerWorker"]
    assert words[words.index("--hostfile") + 1] == "/etc/mpi/hostfile", "where the operator puts it"
    run_dir = words[words.index("--run-dir") + 1]
    for role in replicas.values():
        (mount,) = (
            mount["mountPath"]
            for mount in role["template"]["spec"]["containers"][0]["volumeMounts"]
            if mount["name"] == "work"
        )
        assert run_dir.startswith(f"{mount}/")
        assert f"\nWORKDIR {mount}\n" in (EXAMPLES / "kubernetes" / "Dockerfile").read_text()
        pod = role["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.mark.parametrize("name", ["kubernetes/Dockerfile", "apptainer/psframe.def"])
def test_an_image_installs_psframe_with_an_extra_that_there_is(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    extras = re.search(r"/opt/psframe\[(.*?)\]", text)
    assert extras is not None
    named = "openmpi" if extras[1] == "${EXTRAS}" else extras[1]
    assert f'\n{named} = ["' in (ROOT / "pyproject.toml").read_text()


def fake_run(folder: Path, body: str) -> dict[str, str]:
    """An environment in which each script starts, in place of a training, a shell script."""
    fake = folder / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/bash\nmkdir -p "$RUN_DIR"\n{body}\n')
    fake.chmod(0o755)
    for name in ("srun", "mpirun"):
        fake.with_name(name).symlink_to(fake)
    (folder / "nodes").write_text("a\na\n")
    return {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "VENV": str(folder),
        "RUN_DIR": str(folder / "run"),
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "1",
        "PBS_O_WORKDIR": str(folder),
        "PBS_NODEFILE": str(folder / "nodes"),
        "PBS_JOBID": "1",
    }


RUNNABLE = pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.is_relative_to(EXAMPLES)], ids=lambda p: p.name
)


@RUNNABLE
@pytest.mark.parametrize("status", [0, 3])
def test_the_status_is_shown_however_the_run_ends(
    tmp_path: Path, script: Path, status: int
) -> None:
    env = fake_run(tmp_path, f'echo "the status" >"$RUN_DIR/status.json"; exit {status}')
    done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=30, env=env)
    assert (done.stdout, done.stderr, done.returncode) == ("the status\n", "", status)


@RUNNABLE
def test_a_run_that_never_began_has_failed(tmp_path: Path, script: Path) -> None:
    env = fake_run(tmp_path, "exit 2")
    done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=30, env=env)
    assert (done.stdout, done.returncode) == ("", 2)


@pytest.mark.parametrize(
    ("script", "whole_job"),
    [("slurm/train.sbatch", False), ("pbs/train.pbs", True)],
    ids=["slurm", "pbs"],
)
def test_a_warning_reaches_the_run(tmp_path: Path, script: str, whole_job: bool) -> None:
    """Slurm signals the script's shell alone, as asked for; PBS every process of the job."""
    body = (
        "trap 'kill $!; echo interrupted >\"$RUN_DIR/status.json\"; exit 7' TERM\n"
        "sleep 60 >/dev/null &\necho started\nwait\n"
    )
    started = subprocess.Popen(
        ["bash", EXAMPLES / script],
        stdout=subprocess.PIPE,
        text=True,
        env=fake_run(tmp_path, body),
        start_new_session=True,
    )
    with started as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "started\n"
        (os.killpg if whole_job else os.kill)(job.pid, signal.SIGTERM)
        rest, _ = job.communicate(timeout=30)
    assert (rest, job.returncode) == ("interrupted\n", 7)


def test_slurm_is_asked_to_signal_the_shell_that_passes_it_on() -> None:
    """And where srun starts the tasks, the tasks."""
    for name, how in (("train.sbatch", "B:USR1@120"), ("train-srun.sbatch", "USR1@120")):
        text = (EXAMPLES / "slurm" / name).read_text()
        assert re.findall(r"^#SBATCH --signal=(\S+)$", text, re.MULTILINE) == [how]
        assert "#SBATCH --requeue" in text
        assert "--resume" in text
