"""Workers that are killed and replaced, with real processes; in virtual time, `test_replacing`."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from faults.driver import LAUNCHERS, MPIS, ROOT, SETTINGS

PROGRAM = ROOT / "tests" / "faults" / "replacing.py"
BOUND_S = 90.0
# Codecs for a run of `PROGRAM`, and a look at its first parameters.
_CODECS = "codec=psframe.codecs.Float16(), pull_codec=psframe.codecs.TopK(0.01)"
_LOOK = """    assert (params["w"] == -params.version * 2.0**-10).all(), params["w"]
"""


class Job:
    """A run under mpirun."""

    def __init__(
        self, folder: Path, *, respawn: int, wanted: int, ranks: int, mpi: str, program: Path
    ) -> None:
        venv, flags = MPIS[mpi]
        binaries = ROOT / venv / "bin"
        if not (binaries / "mpirun").exists():
            pytest.skip(f"needs {venv} of `make test`")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
        launch = [binaries / "mpirun", *flags, "-n", str(ranks), binaries / "python"]
        self.folder = folder
        self.output = folder / "output"
        self.deadline = time.monotonic() + BOUND_S
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [*launch, program, folder, str(respawn), str(wanted)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**clean, **SETTINGS, "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")[-6000:]

    def find(self, pattern: str) -> list[Path]:
        """Wait until there are such files."""
        while not (found := list(self.folder.glob(pattern))):
            assert self.process.poll() is None, f"it has ended:\n{self.text}"
            assert time.monotonic() < self.deadline, f"no {pattern}:\n{self.text}"
            time.sleep(0.02)
        return found

    def send(self, pattern: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the process that has left such a file, once it is there."""
        (file,) = self.find(pattern)
        os.kill(int(file.read_text()), number)
        file.unlink()

    def result(self) -> dict[str, Any]:
        """Wait for the end."""
        status = self.process.wait(self.deadline - time.monotonic())
        file = self.folder / "result.json"
        assert file.exists(), f"no result, status {status}:\n{self.text}"
        assert status == 0, self.text
        return dict(json.loads(file.read_text()))


@contextmanager
def started(
    folder: Path,
    *,
    respawn: int,
    wanted: int,
    ranks: int = 3,
    mpi: str = "ulfm",
    program: Path = PROGRAM,
) -> Iterator[Job]:
    """Start a job; nothing is left of it afterwards."""
    job = Job(folder, respawn=respawn, wanted=wanted, ranks=ranks, mpi=mpi, program=program)
    try:
        yield job
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()
        for file in (*folder.glob("rank-*"), *folder.glob("replacement-*")):
            with suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)


def check(result: dict[str, Any], *, lost: list[int]) -> None:
    ledger = result["ledger"]
    fates = sum(ledger[fate] for fate in ("applied", "refused", "dropped", "lost", "stopped"))
    assert ledger["received"] == fates
    assert ledger["applied"] == result["version"]
    assert result["params"][0] == result["params"][1]
    assert sorted(result["lost"]) == lost


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    with started(tmp_path, respawn=1, wanted=1) as job:
        job.find("rank-1")
        job.send("rank-2")
        result = job.result()
        check(result, lost=[1])
        assert result["replacements"] == [1]
        assert result["again"] == 10, "of the one worker that is left"
        assert "a replacement of worker 1 has joined" in job.text


def test_the_run_waits_for_a_replacement_where_nobody_else_is_left(tmp_path: Path) -> None:
    with started(tmp_path, respawn=1, wanted=1, ranks=2) as job:
        job.send("rank-1")
        result = job.result()
        check(result, lost=[0])
        assert result["replacements"] == [0]


def test_two_killed_workers_are_replaced(tmp_path: Path) -> None:
    with started(tmp_path, respawn=2, wanted=2, ranks=4) as job:
        for rank in (1, 2, 3):
            job.find(f"rank-{rank}")
        job.send("rank-2")
        job.send("rank-3")
        result = job.result()
        check(result, lost=[1, 2])
        assert result["replacements"] == [1, 2]
        assert result["again"] == 10


def test_a_killed_replacement_is_replaced(tmp_path: Path) -> None:
    with started(tmp_path, respawn=2, wanted=99) as job:
        job.find("rank-1")
        job.send("rank-2")
        job.send("replacement-1-*")
        job.send("replacement-1-*")  # the second; there is none in its place
        while job.text.count("the replacement of worker 1 is lost") < 2:
            assert time.monotonic() < job.deadline, job.text
            time.sleep(0.02)
        assert job.process.poll() is None
        assert job.text.count("has joined") == 2


def test_a_replacement_is_sent_whole_parameters_where_others_get_differences(
    tmp_path: Path,
) -> None:
    """Each gradient is exact in float16, and so many of its multiples are in float32."""
    program = tmp_path / "program.py"
    text = PROGRAM.read_text()
    for old, new in (
        ("    respawn=RESPAWN,\n", "    respawn=RESPAWN,\n    " + _CODECS + ",\n"),
        ("lr=0.1),\n    device", "lr=2.0**-10),\n    device"),
        ("    while True:\n", _LOOK + "    while True:\n"),
    ):
        assert old in text
        text = text.replace(old, new)
    program.write_text(text)
    with started(tmp_path, respawn=2, wanted=1, program=program) as job:
        job.find("rank-1")
        job.send("rank-2")
        job.send("replacement-1-*")
        result = job.result()
        check(result, lost=[1])
        assert result["replacements"] == [1]
        assert result["again"] == 10


# A replacement that never comes to psframe.run: it loads data.
LOADING = """
if REPLACES in os.environ:
    import signal
    (FOLDER / ".new").write_text(str(os.getpid()), encoding="ascii")
    (FOLDER / ".new").rename(FOLDER / f"replacement-1-{os.getpid()}")
    signal.pause()
"""


@pytest.mark.parametrize("loading", [False, True])
def test_nobody_is_left_behind_when_server_0_dies(tmp_path: Path, loading: bool) -> None:
    program = tmp_path / "program.py"
    start = "PARAMS = "
    text = PROGRAM.read_text()
    program.write_text(text.replace(start, LOADING + start) if loading else text)
    with started(tmp_path, respawn=1, wanted=99, program=program) as job:
        job.find("rank-1")
        job.send("rank-2")
        (file,) = job.find("replacement-1-*")
        pid = int(file.read_text())
        server = int(Path(f"/proc/{pid}/status").read_text().partition("PPid:")[2].split()[0])
        replacement = os.pidfd_open(pid)
        os.kill(server, signal.SIGKILL)
        assert select.select([replacement], [], [], BOUND_S)[0], job.text
        os.close(replacement)
        job.process.wait(BOUND_S)
        assert "server 0" in job.text


def test_a_silent_worker_is_replaced_where_no_death_is_borne(tmp_path: Path) -> None:
    """MPICH would end the job for a death; it has not noticed any."""
    with started(tmp_path, respawn=1, wanted=1, mpi="mpich") as job:
        job.find("rank-1")
        (file,) = job.find("rank-2")
        os.kill(int(file.read_text()), signal.SIGSTOP)
        job.find("replacement-1-*")
        job.process.wait(BOUND_S)
        assert "this MPI ends the job when a rank dies" in job.text
        check(json.loads((tmp_path / "result.json").read_text()), lost=[1])


TRAINING = """
import os, sys
from pathlib import Path
from psframe.train import main

folder, respawn = Path(sys.argv[1]), sys.argv[2]
if "PSFRAME_REPLACES" not in os.environ:
    name = "rank-" + os.environ["OMPI_COMM_WORLD_RANK"]
    (folder / f".{name}").write_text(str(os.getpid()))
    (folder / f".{name}").rename(folder / name)
flags = ["--run-dir", str(folder / "run"), "--respawn", respawn, "--show", "none"]
sys.exit(main([*flags, "--epochs", "100", "--batch-size", "256"]))
"""


def test_a_training_that_replacements_alone_have_finished_is_evaluated(tmp_path: Path) -> None:
    """Its ranks are gone, but for rank 0."""
    program = tmp_path / "program.py"
    program.write_text(TRAINING)
    with started(tmp_path, respawn=2, wanted=0, program=program) as job:
        (metrics,) = job.find("run/metrics.jsonl")
        while not metrics.stat().st_size:
            assert time.monotonic() < job.deadline, job.text
            time.sleep(0.01)
        for rank in (1, 2):
            job.send(f"rank-{rank}")
        assert job.process.wait(job.deadline - time.monotonic()) == 0, job.text
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert status["state"] == "completed", status
        assert status["test_accuracy"] > 0.9
        assert "samples 143,700" in job.text, "each of each epoch once"


def test_a_program_that_does_something_else_now_does_not_join(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.read_text().replace("3000", "3000 + (REPLACES in os.environ)"))
    with started(tmp_path, respawn=1, wanted=99, program=program) as job:
        job.find("rank-1")
        job.send("rank-2")
        while "it calls psframe.run with another value of ['params']" not in job.text:
            assert time.monotonic() < job.deadline, job.text
            time.sleep(0.02)
        assert job.process.poll() is None, "the run goes on"
        assert "has joined" not in job.text
