"""The Chrome trace: tracks, aligned clocks, and its bound."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from psframe import timetrace
from psframe.events import Logged, SpanKind, Spans
from psframe.timetrace import TimeTrace

COMPUTE, APPLY = int(SpanKind.COMPUTE), int(SpanKind.APPLY)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def written(
    trace: TimeTrace, folder: Path, servers: int = 1, line: tuple[int, ...] = ()
) -> tuple[list[Any], list[Any], Any]:
    file = trace.write(folder, servers, line)
    assert file == folder / "trace.json"
    content = json.loads(file.read_text())
    names = [e for e in content["traceEvents"] if e["ph"] == "M"]
    spans = [e for e in content["traceEvents"] if e["ph"] == "X"]
    return names, spans, content["otherData"]


def test_a_track_for_each_rank(tmp_path: Path) -> None:
    trace = TimeTrace(Clock())
    trace(Logged(0, {}))
    trace(Spans(-1, 100.0, [(APPLY, 99.0, 99.5)]))
    trace(Spans(-1, 100.0, [], 1))
    trace(Spans(1, 100.0, [(COMPUTE, 98.0, 98.25)]))
    names, spans, other = written(trace, tmp_path, servers=2)
    assert [(e["tid"], e["args"]["name"]) for e in names[1:]] == [
        (0, "rank 0 (server 0)"),
        (1, "rank 1 (server 1)"),
        (3, "rank 3 (worker 1)"),
    ]
    assert spans == [
        {"name": "apply", "ph": "X", "pid": 0, "tid": 0, "ts": 1e6, "dur": 5e5},
        {"name": "compute", "ph": "X", "pid": 0, "tid": 3, "ts": 0.0, "dur": 2.5e5},
    ]
    assert other == {"spans_dropped": 0}


def test_tracks_bear_the_ranks_of_servers_that_were_placed(tmp_path: Path) -> None:
    trace = TimeTrace(Clock())
    for who in (-1, -2, 0, 1):
        trace(Spans(who, 100.0, [(APPLY, 99.0, 99.5)]))
    names, _, _ = written(trace, tmp_path, servers=2, line=(0, 2, 1, 3))
    assert [(e["tid"], e["args"]["name"]) for e in names[1:]] == [
        (0, "rank 0 (server 0)"),
        (1, "rank 1 (worker 0)"),
        (2, "rank 2 (server 1)"),
        (3, "rank 3 (worker 1)"),
    ]


def test_another_nodes_clock_is_aligned_by_the_quickest_message(tmp_path: Path) -> None:
    """Worker 0's clock is 40 s behind; its messages take 0.2 s and 0.001 s."""
    clock = Clock()
    trace = TimeTrace(clock)
    clock.now = 100.2
    trace(Spans(0, 60.0, [(COMPUTE, 59.0, 60.0)]))
    clock.now = 101.001
    trace(Spans(0, 61.0, [(COMPUTE, 60.0, 61.0)]))
    trace(Spans(-1, 101.0, [(APPLY, 99.0, 100.0)]))
    _, spans, _ = written(trace, tmp_path)
    assert [event["ts"] for event in spans] == pytest.approx([1000.0, 1e6 + 1000.0, 0.0], abs=1.0)


def test_clocks_that_differ_by_a_messages_time_are_one(tmp_path: Path) -> None:
    clock = Clock()
    trace = TimeTrace(clock)
    trace(Spans(0, 99.9995, [(COMPUTE, 99.0, 99.5)]))
    trace(Spans(-1, 100.0, [(APPLY, 99.0, 99.5)]))
    _, spans, _ = written(trace, tmp_path)
    assert [event["ts"] for event in spans] == [0.0, 0.0]


def test_it_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timetrace, "_SPANS_MAX", 5)
    trace = TimeTrace(Clock())
    for _ in range(3):
        trace(Spans(0, 100.0, [(COMPUTE, 1.0, 2.0)] * 3))
    _, spans, other = written(trace, tmp_path)
    assert (len(spans), trace.dropped, other) == (5, 4, {"spans_dropped": 4})


def test_a_disk_that_refuses_it_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "psframe"):
        assert TimeTrace(Clock()).write(tmp_path / "none", 1) is None
    assert "the run has no trace" in caplog.text
