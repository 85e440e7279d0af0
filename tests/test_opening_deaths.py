"""Workers that die while servers have their GPU memory open, and they the servers', under mpirun.

Without a GPU: memory of `fake_ipc` outlives its owner as long as somebody has it open, which CUDA
does not promise; `gpu/test_opening_gpu` asks a card.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults.driver import LAUNCHERS, MPIS, ROOT, SETTINGS

PROGRAM = ROOT / "tests" / "faults" / "opening.py"
BOUND_S = 90.0
RANKS, VICTIM, AT, STEPS = 4, 1, 3, 12
MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Scene:
    """When the worker dies; see `faults/opening.py`.

    Attributes:
        applied: how many pushes of its are applied, if that is known.
    """

    moment: str
    mode: str
    servers: int
    killer: int = 0
    respawn: int = 0
    applied: int | None = None

    def __str__(self) -> str:
        whom = f"-{self.killer}" if self.moment in ("received", "granted") else ""
        return f"{self.moment}{whom}-{self.mode}-{self.servers}" + "-replaced" * self.respawn


SCENES = [
    Scene("computing", "async", 1, applied=AT),
    Scene("computing", "bsp", 2),
    Scene("pulling", "async", 2, applied=AT),
    Scene("pushed", "async", 1),
    Scene("pushed", "async", 2),
    Scene("received", "async", 1, applied=AT),
    Scene("received", "bsp", 1),
    Scene("received", "bsp", 2),
    Scene("received", "async", 2, killer=1),
    Scene("granted", "async", 1, applied=AT - 1),
    Scene("granted", "async", 2, killer=1),
    Scene("received", "async", 1, respawn=1),
]


def play(scene: Scene, folder: Path) -> str:
    """Run the scene to its end; nothing is left of it but the files in its folder."""
    venv, flags = MPIS["ulfm"]
    binaries = ROOT / venv / "bin"
    if not (binaries / "mpirun").exists():
        pytest.skip(f"needs {venv} of `make test`")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    asked = (scene.moment, scene.mode, scene.servers, scene.killer, scene.respawn)
    line = [binaries / "mpirun", *flags, "-n", str(RANKS), binaries / "python", PROGRAM, folder]
    output = folder / "output"
    with output.open("wb") as out:
        job = subprocess.Popen(
            [*line, *map(str, asked)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**clean, **SETTINGS, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
            start_new_session=True,
        )
    status: int | None = None
    try:
        with suppress(subprocess.TimeoutExpired):
            status = job.wait(BOUND_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        for file in folder.glob("rank-[0-9]") if status is None else ():
            with suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)
    text = output.read_text(errors="replace")
    assert status == 0, f"status {status}\n{text[-6000:]}"
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """A folder for a job; what its dead have left in memory is removed."""
    yield tmp_path
    for pid in {file.read_text() for file in tmp_path.glob("rank-[0-9]")}:
        for file in MEMORY.glob(f"psframe-test-ipc-{pid}-*"):
            file.unlink()


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_the_others_go_on_and_its_memory_is_forgotten(scene: Scene, folder: Path) -> None:
    text = play(scene, folder)
    victim = (folder / f"rank-{scene.servers + VICTIM}").read_text()
    for rank in range(RANKS):
        file = folder / f"rank-{rank}.json"
        assert file.exists() == (rank != scene.servers + VICTIM), text
        if file.exists():
            found = json.loads(file.read_text())
            assert (found["open"], found["open_again"], found["wrong"]) == (0, 0, [])
            assert found["kept"] == (rank < scene.servers), "what the dead had open is not freed"
            assert found["lent"] == 2, "the next run has memory of its own"
            if scene.respawn and not rank:  # the other workers'
                assert found["beside_replacement"] == [RANKS - scene.servers - 1]
    assert len(list(MEMORY.glob(f"psframe-test-ipc-{victim}-*"))) == 1, "it had lent its own"
    check(scene, json.loads((folder / "result.json").read_text()), folder)


def check(scene: Scene, result: dict[str, Any], folder: Path) -> None:
    """The ledger adds up, and the parameters are those of the pushes that were applied."""
    ledger, version = result["ledger"], result["version"]
    fates = sum(ledger[fate] for fate in ("applied", "refused", "dropped", "lost", "stopped"))
    assert ledger["received"] == fates
    assert result["lost"] == [VICTIM]
    others = [worker for worker in range(RANKS - scene.servers) if worker != VICTIM]
    assert set(result["again"]) == {-10.0 * len(others)}
    first, *rest = result["shards"]
    if scene.mode == "bsp" or scene.respawn:
        assert {first, *rest} == {-float(version)}
        return
    applied = {worker: int((folder / f"applied-{worker}").read_text()) for worker in others}
    assert set(applied.values()) == {STEPS}
    of_victim = version - sum(applied.values())
    assert of_victim in (AT - 1, AT, AT + 1)
    assert scene.applied in (None, of_victim)
    slopes = sum(count * (worker + 1) for worker, count in applied.items())
    assert first == -(slopes + of_victim * (VICTIM + 1))
    missing = ledger["partial"] * (VICTIM + 1)
    assert all(shard == first + missing for shard in rest)
