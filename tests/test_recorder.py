"""The recorder: which lines of metrics.jsonl the leader's events become, and when."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from psframe.events import EpochDone, Evaluated, Logged
from psframe.recorder import Recorder
from psframe.rundir import RunDir
from psframe.state import Fields


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Clock:
    """Seconds that grow by one a look."""

    def __init__(self) -> None:
        self.now = -1.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_line_an_epoch_with_its_evaluation(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    recorder = Recorder(run_dir, Clock())
    recorder(Logged(0, {"loss": (6.0, 2), "other": (1.0, 1)}))
    recorder(Logged(1, {"loss": (3.0, 1)}))
    recorder(EpochDone(0, 45, 1437, 1.5))
    recorder(Logged(0, {"loss": (1.0, 1)}))
    recorder(Evaluated(0, 45, {"loss": 10.0, "correct": 15.0, "count": 20.0}))
    assert recorder.test_accuracy == 0.75
    recorder(EpochDone(1, 90, 1437, 2.0))
    recorder(Evaluated(1, 90, {"loss": 5.0, "correct": 18.0, "count": 20.0}))
    recorder.close()
    assert recorder.updates == 90
    assert lines(tmp_path) == [
        {
            "time_s": 2.0,
            "epoch": 0,
            "update": 45,
            "train_loss": 3.0,
            "samples_per_s": 1437.0,
            "staleness_mean": 1.5,
            "test_loss": 0.5,
            "test_accuracy": 0.75,
            "evaluated_update": 45,
        },
        {
            "time_s": 4.0,
            "epoch": 1,
            "update": 90,
            "train_loss": 1.0,
            "samples_per_s": 718.5,
            "staleness_mean": 2.0,
            "test_loss": 0.25,
            "test_accuracy": 0.9,
            "evaluated_update": 90,
        },
    ]


def status(folder: Path) -> tuple[str, int, float | None]:
    found = json.loads((folder / "status.json").read_text())
    return found["state"], found["updates"], found["test_accuracy"]


def test_the_status_of_a_running_run_tells_how_far_it_is(tmp_path: Path) -> None:
    now = [0.0]
    recorder = Recorder(RunDir.create(tmp_path, config={}), lambda: now[0])
    assert status(tmp_path) == ("running", 0, None)
    recorder(EpochDone(0, 10, 100, 0.0))
    recorder(Evaluated(0, 10, {"correct": 1.0, "count": 2.0}))
    assert status(tmp_path) == ("running", 10, 0.5)
    now[0] = 0.5
    recorder(EpochDone(1, 20, 100, 0.0))
    recorder(Evaluated(1, 20, {"correct": 2.0, "count": 2.0}))
    assert status(tmp_path) == ("running", 10, 0.5), "not so soon again"
    now[0] = 1.0
    recorder(EpochDone(2, 30, 100, 0.0))
    recorder(Evaluated(2, 30, {"correct": 2.0, "count": 2.0}))
    assert status(tmp_path) == ("running", 30, 1.0)


def test_the_status_is_left_to_the_verdict_once_closed(tmp_path: Path) -> None:
    recorder = Recorder(RunDir.create(tmp_path, config={}), Clock())
    recorder(EpochDone(0, 10, 100, 0.0))
    recorder.close()
    assert len(lines(tmp_path)) == 1
    assert status(tmp_path) == ("running", 0, None)


def test_a_signal_waits_until_the_status_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handler writes the verdict, and that must be what is written last."""
    run_dir = RunDir.create(tmp_path, config={})
    recorder = Recorder(run_dir, Clock(), evaluations=False)
    fsync = os.fsync

    def verdict(number: int, frame: Any) -> None:
        recorder.close()
        run_dir.status("interrupted", updates=10)

    def interrupted(fd: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        signal.raise_signal(signal.SIGTERM)
        fsync(fd)

    before = signal.signal(signal.SIGTERM, verdict)
    try:
        monkeypatch.setattr(os, "fsync", interrupted)
        recorder(EpochDone(0, 10, 100, 0.0))
        assert signal.getsignal(signal.SIGTERM) is verdict
    finally:
        signal.signal(signal.SIGTERM, before)
    assert status(tmp_path)[0] == "interrupted"


def test_a_disk_that_refuses_the_status_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(RunDir.create(tmp_path, config={}), Clock(), evaluations=False)

    def full(self: Path, *args: Any, **keywords: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(Path, "write_text", full)
    for epoch in range(5):
        recorder(EpochDone(epoch, epoch, 100, 0.0))
    recorder.close()
    monkeypatch.undo()
    assert len(caplog.records) == 1
    assert len(lines(tmp_path)) == 5


def test_what_workers_measured_is_summed_by_epoch(tmp_path: Path) -> None:
    recorder = Recorder(RunDir.create(tmp_path, config={}), Clock(), evaluations=False)
    recorder(Logged(0, {"compute_s": (1.0, 2), "data_s": (0.25, 2), "other": (9.0, 1)}))
    recorder(Logged(1, {"compute_s": (2.0, 2)}))
    recorder(EpochDone(0, 1, 10, 0.0))
    recorder(Logged(1, {"compute_s": (4.0, 2)}))
    recorder(EpochDone(1, 2, 10, 0.0))
    recorder.close()
    first, second = lines(tmp_path)
    assert (first["compute_s"], first["data_s"]) == (3.0, 0.25)
    assert second["compute_s"] == 4.0
    assert not {"data_s", "servers_s", "other"} & set(second)


@pytest.mark.parametrize("evaluations", [None, False])
def test_without_evaluations(tmp_path: Path, evaluations: bool | None) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    recorder = Recorder(run_dir, Clock(), evaluations=evaluations)
    seen = []
    for epoch in range(6):
        recorder(EpochDone(epoch, 10 * epoch, 100, 0.0))
        seen.append(len(lines(tmp_path)))
    recorder.close()
    assert seen == ([0, 0, 0, 4, 5, 6] if evaluations is None else [1, 2, 3, 4, 5, 6])
    assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert "test_accuracy" not in lines(tmp_path)[0]
    assert recorder.test_accuracy is None


@pytest.mark.parametrize("evaluations", [None, True])
def test_with_evaluations_that_come_late_or_never(tmp_path: Path, evaluations: bool | None) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    recorder = Recorder(run_dir, Clock(), evaluations=evaluations)
    sums = {"correct": 1.0, "count": 2.0}
    recorder(EpochDone(0, 10, 100, 0.0))
    recorder(EpochDone(1, 20, 100, 0.0))
    recorder(Evaluated(0, 10, sums))
    for epoch in range(2, 6):
        recorder(EpochDone(epoch, 10 + 10 * epoch, 100, 0.0))
    recorder(Evaluated(1, 20, sums))
    recorder(Evaluated(5, 60, sums))
    recorder.close()
    found = [(line["epoch"], line["update"], line.get("test_accuracy")) for line in lines(tmp_path)]
    assert found == [
        (0, 10, 0.5),
        (1, 20, None),  # it has waited long enough
        (2, 30, None),
        (1, 20, 0.5),
        (5, 60, 0.5),
        (3, 40, None),
        (4, 50, None),
    ]


def test_a_run_without_epochs_leaves_a_line(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    recorder = Recorder(run_dir, Clock())
    recorder(Logged(0, {"train_loss": (4.0, 2)}))
    recorder.close()
    assert lines(tmp_path) == [{"time_s": 1.0, "update": 0, "train_loss": 2.0}]


def test_what_was_written_for_an_early_verdict_is_written_again_complete(tmp_path: Path) -> None:
    """After SIGTERM the verdict comes at once, and the checkpoint to go on from a moment later."""
    run_dir = RunDir.create(tmp_path, config={})
    recorder = Recorder(run_dir, Clock(), evaluations=True)
    sums = {"correct": 1.0, "count": 2.0}
    for epoch in (0, 1):
        recorder(Logged(0, {"loss": (2.0, 1)}))
        recorder(EpochDone(epoch, 10 * epoch + 10, 100, 0.0))
    recorder(Evaluated(0, 10, sums))
    recorder.close()
    assert [line["epoch"] for line in lines(tmp_path)] == [0, 1]
    recorder(Logged(0, {"loss": (3.0, 1)}))
    recorder(EpochDone(2, 30, 100, 0.0))
    recorder(Evaluated(1, 20, sums))
    recorder(Logged(0, {"loss": (4.0, 1)}))
    assert len(lines(tmp_path)) == 2, "the verdict is written"
    state = json.loads(json.dumps(recorder.state()))
    run_dir.unlock()

    run_dir = RunDir.reopen(tmp_path)
    recorder = Recorder(run_dir, Clock())
    run_dir.go_on({}, 30, recorder.restore(Fields(state)))
    recorder(Evaluated(2, 30, sums))
    recorder(EpochDone(3, 40, 100, 0.0))
    recorder.close()
    found = [
        (line["epoch"], line["train_loss"], "test_accuracy" in line) for line in lines(tmp_path)
    ]
    assert found == [(0, 2.0, True), (1, 2.0, True), (2, 3.0, True), (3, 4.0, False)]


def test_a_run_without_epochs_goes_on_with_its_mean_loss(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    recorder = Recorder(run_dir, Clock())
    recorder(Logged(0, {"loss": (4.0, 1)}))
    recorder.close()
    state = json.loads(json.dumps(recorder.state()))
    run_dir.unlock()
    run_dir = RunDir.reopen(tmp_path)
    recorder = Recorder(run_dir, Clock())
    run_dir.go_on({}, 0, recorder.restore(Fields(state)))
    recorder(Logged(0, {"loss": (2.0, 1)}))
    recorder.close()
    recorder.close()
    assert [line["train_loss"] for line in lines(tmp_path)] == [3.0]
