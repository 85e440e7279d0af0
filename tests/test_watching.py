"""What looks on at a training: the files that it leaves, and what it asks for beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from psframe import watching as module
from psframe.errors import ArgumentError
from psframe.events import EpochDone, Logged, PushHandled, SpanKind, Spans
from psframe.history import EpochSummary
from psframe.monitor import Monitor
from psframe.watching import Watching


def watch(folder: Path | None, **how: Any) -> Watching:
    found = Watching(Monitor(1, 2, 10), servers=1, show="none", **how)
    with found:
        if folder is not None:
            found.opened(folder)
        found(Logged(0, {"loss": (1.0, 1), "samples": (5.0, 1)}))
        found(PushHandled(0, 0, 0, 1, 0, True))
        found(Spans(0, 1.0, [(int(SpanKind.COMPUTE), 0.5, 1.0)]))
        found(EpochDone(0, 1, 5, 0.0))
        found.epoch(EpochSummary(0, 1, 5, 1.0, 0.0))
        found.tick()
    return found


def test_a_timeline_is_written_and_nothing_else(tmp_path: Path) -> None:
    watch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.jsonl"]
    last = json.loads((tmp_path / "timeline.jsonl").read_text().splitlines()[-1])
    assert (last["update"], last["workers"][0][:2]) == (1, [1, 5])


def test_a_trace_and_event_files_are_written_if_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    watch(tmp_path, trace=True, tensorboard=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["tensorboard", "timeline.jsonl", "trace.json"]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_without_a_run_directory_there_are_no_files() -> None:
    assert watch(None, trace=True).monitor.updates == 1


def test_a_missing_package_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"pip install 'psframe\[tensorboard\]'"):
        watch(None, tensorboard=True)
