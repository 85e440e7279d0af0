"""The command on ranks: what rank 0 decides for all, and what all of them report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpi4py import MPI

from psframe.train import main

ROOT = MPI.COMM_WORLD.rank == 0


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("state", ["completed", "interrupted"])
def test_whether_a_run_is_completed_rank_0_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    """Each rank has a folder of its own; only rank 0's has the run."""
    monkeypatch.chdir(tmp_path)
    if ROOT:
        Path("r").mkdir()
        found = {"state": state, "updates": 5, "test_accuracy": 0.5, "reason": ""}
        Path("r/status.json").write_text(json.dumps(found))
    flags = ["--run-dir", "r", "--resume", "--epochs", "1", "--show", "none"]
    assert main(flags) == 0
    out, _ = capsys.readouterr()
    if not ROOT:
        assert out == ""
    elif state == "completed":
        assert out == "r: already completed, test accuracy 50.00%; nothing is changed\n"
    else:  # it has left no checkpoint, so it begins
        status = json.loads(Path("r/status.json").read_text())
        assert (status["state"], status["updates"]) == ("completed", 45)
