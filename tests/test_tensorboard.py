"""Event files are read back with TensorBoard's own reader."""

import importlib.util
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe.errors import ArgumentError
from psframe.history import EpochSummary
from psframe.tensorboard import EventFiles

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"histograms": 0, "tensors": 0})
    return read.Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each tag's (step, value); the reader makes tensors of scalars."""
    found = read(folder)
    tags = found.Tags()
    values = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["tensors"]:
        events = [e for e in found.Tensors(tag) if len(e.tensor_proto.float_val) == 1]
        values[tag] = [(e.step, e.tensor_proto.float_val[0]) for e in events]
    return values


@needs_tensorboard
def test_an_epoch_is_read_back(tmp_path: Path) -> None:
    files = EventFiles(tmp_path / "tensorboard")
    files.epoch({"epoch": 0, "update": 45, "train_loss": 1.5, "test_accuracy": 0.75})
    files.epoch(vars(EpochSummary(epoch=1, version=90, train_loss=0.5, staleness_mean=2.0)))
    files.close()
    files.close()
    assert scalars(tmp_path / "tensorboard") == {
        "epoch": [(45, 0.0), (90, 1.0)],
        "loss/train": [(45, 1.5), (90, 0.5)],
        "accuracy/test": [(45, 0.75)],
        "staleness/mean": [(90, 2.0)],
    }
    assert not files.failed


@needs_tensorboard
def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    files = EventFiles(tmp_path)
    odd = {"a": None, "b": math.nan, "c": math.inf, "d": "5", "e": [1], "f": True, "g": 10**400}
    files.scalars(3, {**odd, "good": np.float32(0.5), "count": np.int64(7)})
    files.scalars(4, odd)
    files.epoch({"epoch": 0, "train_loss": None, "of_a_later_version": 3})
    files.close()
    assert scalars(tmp_path) == {"good": [(3, 0.5)], "count": [(3, 7.0)], "epoch": [(0, 0.0)]}


def histogram(folder: Path, name: str) -> tuple[int, Any]:
    from tensorboard.util import tensor_util

    (event,) = read(folder).Tensors(name)
    return event.step, tensor_util.make_ndarray(event.tensor_proto)


def raw_histogram(folder: Path) -> Any:
    """The histogram as it was written, before the reader makes equal buckets of it."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    events = [Event.FromString(record) for record in RawEventFileLoader(str(file)).Load()]
    (value,) = [v for e in events for v in e.summary.value if v.HasField("histo")]
    return value.histo


@needs_tensorboard
def test_a_histogram_is_read_back(tmp_path: Path) -> None:
    files = EventFiles(tmp_path)
    files.histogram(540, "staleness", np.array([33, 0, 290, 88]))
    files.histogram(541, "empty", [0, 0])
    files.close()
    found = raw_histogram(tmp_path)
    assert list(found.bucket) == [33, 0, 290, 88]
    assert list(found.bucket_limit) == [0.5, 1.5, 2.5, 3.5]
    assert (found.min, found.max, found.num) == (0, 3, 411)
    assert found.sum == 2 * 290 + 3 * 88
    assert found.sum_squares == 4 * 290 + 9 * 88


@needs_tensorboard
def test_tensorboard_shows_the_histogram(tmp_path: Path) -> None:
    files = EventFiles(tmp_path)
    files.histogram(7, "staleness", [10, 20, 30])
    files.close()
    found = read(tmp_path)
    if "staleness" in found.Tags()["histograms"]:
        (event,) = found.Histograms("staleness")
        assert (event.step, sum(event.histogram_value.bucket)) == (7, 60)
    else:
        step, buckets = histogram(tmp_path, "staleness")
        assert step == 7
        assert buckets[:, 2].sum() == pytest.approx(60)


@needs_tensorboard
def test_a_long_histogram_keeps_its_sum_in_bounded_buckets(tmp_path: Path) -> None:
    files = EventFiles(tmp_path)
    counts = np.arange(10_001)
    files.histogram(1, "staleness", counts)
    files.close()
    found = raw_histogram(tmp_path)
    assert 0 < len(found.bucket) == len(found.bucket_limit) <= 500
    assert sum(found.bucket) == found.num == counts.sum()
    assert found.bucket_limit[-1] >= 10_000


@needs_tensorboard
def test_a_full_disk_is_warned_of_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, "psframe"):
        files = EventFiles(tmp_path / "file" / "tensorboard")
        files.epoch({"epoch": 0, "train_loss": 1.0})
        files.close()
    assert files.failed
    (said,) = [record.getMessage() for record in caplog.records]
    assert "cannot be written" in said


@needs_tensorboard
def test_a_disk_that_fills_up_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = EventFiles(tmp_path)
    tries = []

    def full(event: Any) -> None:
        tries.append(event)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files._writer, "add_event", full)
    with caplog.at_level(logging.WARNING, "psframe"):
        for step in range(5):
            files.scalars(step, {"a": 1.0})
    files.close()
    assert len(tries) == 1
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ArgumentError, match=r"pip install 'tensorboard>=2\.16'"):
        EventFiles(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_import_alone_loads_nothing() -> None:
    code = "import sys, psframe.tensorboard; print('tensorboard' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
