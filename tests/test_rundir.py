"""The run directory: what is written, what is refused, and what a full disk does to it."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe import toml
from psframe.errors import RunDirError
from psframe.rundir import RunDir


def lines(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl strictly: a bare NaN is an error."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_new_run_is_running(tmp_path: Path) -> None:
    config = {"lr": 0.1, "data": {"path": "x"}}
    run_dir = RunDir.create(tmp_path / "a" / "b", config=config)
    run_dir.close()
    assert sorted(p.name for p in run_dir.path.iterdir()) == [
        "checkpoints",
        "config.toml",
        "metrics.jsonl",
        "status.json",
    ]
    assert toml.load(run_dir.path / "config.toml") == config
    assert RunDir.read_status(run_dir.path) == {
        "state": "running",
        "updates": 0,
        "test_accuracy": None,
        "reason": "",
    }


def test_time_in_the_name_never_names_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20300102-030405")
    runs = [RunDir.create(str(tmp_path / "runs" / "{time}"), config={}) for _ in range(3)]
    for run_dir in runs:
        run_dir.close()
    names = [run_dir.path.name for run_dir in runs]
    assert names == ["20300102-030405", "20300102-030405-2", "20300102-030405-3"]


@pytest.mark.parametrize(
    "name", ["status.json", "metrics.jsonl", "config.toml", "checkpoints/final.safetensors"]
)
def test_another_runs_folder_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunDirError, match=rf"another run's {file.name}.*--resume.*--overwrite"):
        RunDir.create(tmp_path, config={})
    assert file.read_text() == "precious"
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_removes_what_runs_write_and_nothing_else(tmp_path: Path) -> None:
    RunDir.create(tmp_path, config={"old": 1}).close()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "checkpoints" / "final.safetensors").write_text("old")
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    (tmp_path / "mine.txt").write_text("mine")
    run_dir = RunDir.create(tmp_path, overwrite=True, config={"new": 1})
    run_dir.close()
    assert toml.load(tmp_path / "config.toml") == {"new": 1}
    assert lines(tmp_path) == []
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["notes.txt"]
    assert (tmp_path / "mine.txt").exists()


def test_a_folder_with_other_files_is_used(tmp_path: Path) -> None:
    (tmp_path / "slurm-1.out").write_text("")
    RunDir.create(tmp_path, config={}).close()


def test_paths_that_cannot_be_folders(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunDirError, match=r"file'.*a file is in the way"):
        RunDir.create(file, config={})
    with pytest.raises(RunDirError, match="a file is in the way"):
        RunDir.create(file / "run", config={})
    with pytest.raises(RunDirError, match="a file is in the way"):
        RunDir.create(str(file / "{time}"), config={})


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EACCES, "that you may write"), (errno.ENOSPC, "free some space")],
)
def test_a_folder_that_takes_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RunDirError, match=rf"{os.strerror(number)}; .*{words}"):
        RunDir.create(tmp_path / "run", config={})


def test_status_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    seen = []
    replace = Path.replace

    def look(self: Path, target: Path) -> Path:
        seen.append((json.loads(self.read_text()), json.loads(Path(target).read_text())))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", look)
    accuracy = np.float32(0.5)
    assert run_dir.status("completed", updates=np.int64(7), test_accuracy=accuracy)  # type: ignore[arg-type]
    run_dir.close()
    new, old = seen[0]
    assert (old["state"], new["state"]) == ("running", "completed")
    assert RunDir.read_status(tmp_path) == {
        "state": "completed",
        "updates": 7,
        "test_accuracy": 0.5,
        "reason": "",
    }
    assert not list(tmp_path.glob(".status*"))


def test_a_status_of_no_known_state_is_our_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a state"):
        RunDir(tmp_path).status("finished", updates=1)


def test_a_survivor_can_attach_and_give_the_verdict(tmp_path: Path) -> None:
    RunDir.create(tmp_path, config={}).close()
    survivor = RunDir(tmp_path)
    assert survivor.status("failed", updates=3, reason="rank 0 was lost")
    survivor.metrics(update=3)
    survivor.close()
    status = RunDir.read_status(tmp_path)
    assert status is not None
    assert (status["state"], status["reason"]) == ("failed", "rank 0 was lost")
    assert lines(tmp_path) == [{"update": 3}]


def test_read_status(tmp_path: Path) -> None:
    assert RunDir.read_status(tmp_path) is None
    assert RunDir.read_status(tmp_path / "none") is None
    whole = '{"state": "running", "updates": 1, "test_accuracy": null, "reason": ""}'
    for text in (
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"state": "new"}',
        whole.replace('"running"', '["running"]'),
        whole.replace('"running"', '"new"'),
        whole.replace("null", '"much"'),
        whole.replace("1", "true"),
    ):
        (tmp_path / "status.json").write_text(text)
        with pytest.raises(RunDirError, match=r"status.json: is not a run's status"):
            RunDir.read_status(tmp_path)


@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "config.toml"])
def test_a_pipe_in_the_place_of_a_file_is_waited_for_by_nobody(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(RunDirError, match=f"{name}: is no regular file"):
        RunDir.reopen(tmp_path)
    with pytest.raises(RunDirError, match=f"{name}: is no regular file"):
        RunDir.create(tmp_path, overwrite=True)
    if name == "status.json":
        with pytest.raises(RunDirError, match="is no regular file"):
            RunDir.read_status(tmp_path)


def test_metrics_are_readable_at_once_and_never_hold_a_bare_nan(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    assert run_dir.metrics(a=math.nan, b=-math.inf, c=np.float32(0.5), d=np.int64(2), e="x")
    assert lines(tmp_path) == [{"a": None, "b": None, "c": 0.5, "d": 2, "e": "x"}]
    run_dir.metrics(a=1)
    assert len(lines(tmp_path)) == 2
    run_dir.close()


def fill_disk(monkeypatch: pytest.MonkeyPatch, written: int = 0) -> None:
    """Let the next writes to file descriptors write a few bytes, or none and fail."""
    write = os.write

    def partial(fd: int, data: bytes) -> int:
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:written])

    monkeypatch.setattr(os, "write", partial)


@pytest.mark.parametrize("written", [0, 5])
def test_a_full_disk_warns_once_loses_whole_lines_and_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, written: int
) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    run_dir.metrics(update=1)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "psframe"):
        fill_disk(patch, written)
        assert not run_dir.metrics(update=2)
        assert not run_dir.metrics(update=3)
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert run_dir.metrics(update=4)
    run_dir.close()
    assert lines(tmp_path) == [{"update": 1}, {"update": 4}]
    run_dir.status("completed", updates=4)
    status = RunDir.read_status(tmp_path)
    assert status is not None
    assert status["state"] == "completed"
    assert status["reason"] == "metrics.jsonl lacks 2 lines: No space left on device"


def test_dev_full_is_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    run_dir.close()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    assert not run_dir.metrics(update=1)
    assert run_dir.metrics_lost == 1
    assert "free some space" in caplog.text
    run_dir.close()


def test_a_status_that_does_not_fit_is_written_over_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    run_dir.close()
    open_ = Path.open

    def no_new_files(self: Path, mode: str = "r", *args: Any, **keywords: Any) -> Any:
        if "w" in mode and not self.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_(self, mode, *args, **keywords)

    monkeypatch.setattr(Path, "open", no_new_files)
    assert run_dir.status("completed", updates=9)
    status = RunDir.read_status(tmp_path)
    assert status is not None
    assert status["updates"] == 9


def test_a_status_that_cannot_be_written_is_an_error_in_the_log_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = RunDir(tmp_path / "gone")
    assert not run_dir.status("completed", updates=9)
    assert "status.json" in caplog.text


def test_a_relative_folder_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the program goes meanwhile; what is wrong with it is told as it was given."""
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir.create("run", config={"a": 1})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_dir.metrics(epoch=1)
    run_dir.status("completed", updates=3)
    assert run_dir.path == tmp_path / "run"
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"epoch": 1}\n'
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunDirError, match=r"^run directory 'run'"):
        RunDir.create("run")
    run_dir.close()


# ---- going on ----------------------------------------------------------------------------------


def gone_on(folder: Path, updates: int, metrics_bytes: int) -> None:
    run_dir = RunDir.reopen(folder)
    run_dir.go_on({}, updates, metrics_bytes)
    run_dir.metrics(update=updates + 1)
    run_dir.close()
    run_dir.unlock()


def undone(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.undone.jsonl").read_text().splitlines()]


def test_lines_after_the_checkpoint_are_taken_back_and_kept_beside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    for update in (1, 2, 3, 4):
        run_dir.metrics(update=update)
        if update == 2:
            size = run_dir.metrics_bytes
    run_dir.close()
    run_dir.unlock()
    gone_on(tmp_path, 2, size + 5)  # in the middle of a line
    assert lines(tmp_path) == [{"update": 1}, {"update": 2}, {"update": 3}]
    assert undone(tmp_path) == [{"update": 3}, {"update": 4}]
    assert "2 lines that came after the checkpoint of version 2 are now in metrics.undone" in (
        caplog.text
    )
    gone_on(tmp_path, 0, 0)
    assert lines(tmp_path) == [{"update": 1}]
    assert [line["update"] for line in undone(tmp_path)] == [3, 4, 1, 2, 3]


def test_a_second_attempt_s_lines_are_taken_back_wherever_they_are(tmp_path: Path) -> None:
    """The file had lost lines with the machine, so that the next attempt's came before its length.

    Should that attempt's checkpoints rot, the first one's length says nothing of them.
    """
    run_dir = RunDir.create(tmp_path, config={})
    run_dir.metrics(update=10)
    run_dir.metrics(epoch=0)  # of no update
    run_dir.metrics(update=30)
    run_dir.close()
    run_dir.unlock()
    size = (tmp_path / "metrics.jsonl").stat().st_size
    gone_on(tmp_path, 20, size)
    assert lines(tmp_path) == [{"update": 10}, {"epoch": 0}, {"update": 21}]
    assert undone(tmp_path) == [{"update": 30}]


def test_a_line_that_is_no_json_stays(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path, config={})
    run_dir.close()
    run_dir.unlock()
    text = b'{"upd\n[1]\n' + b"[" * 100_000 + b'\n{"update": "x"}\n'
    (tmp_path / "metrics.jsonl").write_bytes(text)
    gone_on(tmp_path, 5, len(text))
    assert (tmp_path / "metrics.jsonl").read_bytes() == text + b'{"update": 6}\n'
    assert not (tmp_path / "metrics.undone.jsonl").exists()


def test_overwriting_removes_what_was_taken_back(tmp_path: Path) -> None:
    (tmp_path / "metrics.undone.jsonl").write_text("{}\n")
    with pytest.raises(RunDirError, match=r"holds another run's metrics\.undone"):
        RunDir.create(tmp_path)
    RunDir.create(tmp_path, overwrite=True).close()
    assert not (tmp_path / "metrics.undone.jsonl").exists()
