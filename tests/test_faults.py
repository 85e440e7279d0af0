"""Ranks that are lost while a training goes on, with real processes.

`make test-faults` plays a hundred such scenes.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from faults.driver import MPIS, ROOT, TIMEOUT_S, Scene, play

KILL, STOP = signal.SIGKILL, signal.SIGSTOP

SCENES = [
    Scene("ulfm", "async", 1, (2,), KILL, 0.3),
    Scene("ulfm", "bsp", 1, (1, 3), KILL, 0.3),
    Scene("ulfm", "ssp", 2, (3,), KILL, 0.3),
    Scene("ulfm", "async", 1, (3,), STOP, 0.3, resume_s=2 * TIMEOUT_S),
    Scene("ulfm", "async", 1, (0,), KILL, 0.3),
    Scene("ulfm", "async", 2, (1,), KILL, 0.3),
    Scene("openmpi", "async", 1, (2,), KILL, 0.3),
    Scene("mpich", "async", 1, (2,), KILL, 0.3),
    Scene("mpich", "ssp", 1, (3,), STOP, 0.3),
    Scene("mpich", "async", 1, (0,), STOP, 0.3),
]


@pytest.mark.parametrize(
    "scene", SCENES, ids=lambda s: f"{s.mpi}-{s.mode}-{s.what}".replace(" ", "-")
)
def test_a_loss_ends_no_more_than_it_must(scene: Scene, tmp_path: Path) -> None:
    """The bound, the verdict, the ledger and the accuracy, as `faults.driver` has them."""
    if not (ROOT / MPIS[scene.mpi][0] / "bin" / "mpirun").exists():
        pytest.skip(f"needs {MPIS[scene.mpi][0]} of `make test`")
    outcome = play(scene, tmp_path)
    assert not outcome.wrong, f"{outcome.wrong}\n{outcome.output}"
