"""The command on ranks: what rank 0 decides for all, and what all of them report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpi4py import MPI

from psframe.devices import visible_gpus
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


@pytest.mark.mpi(min_size=2)
@pytest.mark.skipif(visible_gpus() > 0, reason="there is a GPU")
def test_device_pointers_without_a_device_are_an_error_on_every_rank_unless_they_may_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--run-dir", "r", "--epochs", "1", "--show", "none", "--overwrite"]
    assert main([*flags, "--gpu-direct", "on"]) == 1
    _, err = capsys.readouterr()
    assert ("psframe: error: gpu_direct: 'on'" in err) == ROOT, "rank 0 speaks for all"
    if ROOT:
        status = json.loads(Path("r/status.json").read_text())
        assert status["state"] == "failed"
        assert "no rank computes on a GPU" in status["reason"]
    assert main([*flags, "--gpu-direct", "auto"]) == 0
    if ROOT:
        assert json.loads(Path("r/status.json").read_text())["state"] == "completed"
