"""What looks on at a training: the files that it leaves, and what it asks for beforehand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from psframe import watching as module
from psframe.errors import ArgumentError
from psframe.events import EpochDone, Logged, PushHandled, SpanKind, Spans
from psframe.history import EpochSummary
from psframe.monitor import Monitor
from psframe.tensorboard import _NAMES
from psframe.watching import Watching

SPEEDS = {"speed/samples_per_s", "time/compute_s", "time/servers_s", "time/data_s"}


def watch(folder: Path | None, **how: Any) -> Watching:
    found = Watching(Monitor(1, 2, 10), servers=1, show="none", **how)
    with found:
        if folder is not None:
            found.opened(folder)
        found(Logged(0, {"loss": (1.0, 1), "samples": (5.0, 1)}))
        found(PushHandled(0, 0, 0, 1, 0, True))
        found(Spans(0, 1.0, [(int(SpanKind.COMPUTE), 0.5, 1.0)]))
        found(EpochDone(0, 1, 5, 0.0))
        found.epoch(
            EpochSummary(
                *(0, 1, 5, 1.0, 0.0), samples_per_s=2.0, compute_s=0.5, servers_s=0.25, data_s=0.125
            )
        )
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


def test_event_files_have_an_epochs_numbers_and_the_staleness_so_far(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch(tmp_path, tensorboard=True)
    read = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0}).Reload()
    tags = read.Tags()
    assert tags["histograms"] == ["staleness"]
    (histogram,) = read.Histograms("staleness")
    assert (histogram.step, histogram.histogram_value.num) == (1, 1)
    found = {*tags["scalars"], *tags["tensors"]}
    assert found == {"epoch", "loss/train", "staleness/mean", *SPEEDS}


def test_every_number_of_an_event_file_has_a_source() -> None:
    """A name that nothing is ever shown under is a promise that is not kept."""
    fields = {field.name for field in dataclasses.fields(EpochSummary)}
    assert set(_NAMES) <= fields


def test_the_line_of_ranks_is_as_long_as_there_are_workers() -> None:
    found = Watching(Monitor(2, 1), servers=2, serving=(0, 2), show="none")
    assert found.line == (0, 2, 1, 3)
    found(Spans(3, 1.0, [(int(SpanKind.COMPUTE), 0.5, 1.0)]))
    assert found.line == (0, 2, 1, 3, 4, 5)
    assert Watching(Monitor(2, 1), servers=2, show="none").line == ()


def test_without_a_run_directory_there_are_no_files() -> None:
    assert watch(None, trace=True).monitor.updates == 1


def test_a_missing_package_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"pip install 'psframe\[tensorboard\]'"):
        watch(None, tensorboard=True)
