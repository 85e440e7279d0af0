"""The command on ranks: what rank 0 decides for all, and what all of them report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpi4py import MPI

from psframe.train import main

ROOT = MPI.COMM_WORLD.rank == 0


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("state", "status"), [("completed", 0), ("interrupted", 1)])
def test_whether_a_run_is_completed_rank_0_decides(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    state: str,
    status: int,
) -> None:
    """Each rank has a folder of its own; only rank 0's has the run."""
    monkeypatch.chdir(tmp_path)
    if ROOT:
        Path("r").mkdir()
        found = {"state": state, "updates": 5, "test_accuracy": 0.5, "reason": ""}
        Path("r/status.json").write_text(json.dumps(found))
    assert main(["--run-dir", "r", "--resume"]) == status
    out, err = capsys.readouterr()
    if not ROOT:
        assert (out, err) == ("", "")
    elif status:
        assert "the run in 'r' is interrupted after 5 updates" in err
    else:
        assert out == "r: already completed, test accuracy 50.00%; nothing is changed\n"
