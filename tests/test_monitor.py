"""The monitor: what it makes of events, at times that a fake clock tells; and its timeline."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest

from psframe.events import EpochDone, Evaluated, Logged, PushHandled
from psframe.monitor import Monitor
from psframe.timeline import Timeline


class Clock:
    """Seconds that stand still until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Feed:
    """A monitor of `workers`, fed with steps of 10 samples that take a second each."""

    def __init__(self, workers: int = 2, epochs: int = 4, samples: int = 100) -> None:
        self.clock = Clock()
        self.monitor = Monitor(workers, epochs, samples, self.clock)
        self.version = 0

    def push(self, worker: int, staleness: int = 0, *, applied: bool = True) -> None:
        self.version += applied
        before = self.version - staleness - 1
        self.monitor(PushHandled(worker, 0, before, self.version, staleness, applied))

    def step(self, worker: int, *, after_s: float = 0.0, loss: float = 1.0, **times: float) -> None:
        self.clock.now += after_s
        self.push(worker)
        sums = {"loss": (loss, 1), "samples": (10.0, 1)}
        self.monitor(Logged(worker, {**sums, **{name: (s, 1) for name, s in times.items()}}))


def test_a_fresh_monitor_knows_nothing() -> None:
    now = Feed().monitor.statistics()
    assert (now.epoch, now.fraction, now.updates, now.updates_per_s) == (0, 0.0, 0, 0.0)
    assert now.samples_per_s is now.loss is now.accuracy is now.staleness is now.left_s is None
    assert [(one.pushes, one.seen_s, one.compute) for one in now.workers] == [(0, None, None)] * 2


def test_totals_and_each_workers_numbers() -> None:
    feed = Feed()
    feed.step(0, after_s=1.0, compute_s=0.5, servers_s=0.25, data_s=0.25)
    feed.step(1, after_s=1.0, compute_s=0.9)
    feed.push(1, 3)
    feed.push(1, 0, applied=False)
    feed.clock.now += 2.0
    now = feed.monitor.statistics()
    assert (now.time_s, now.updates, now.pushes, now.samples) == (4.0, 3, 4, 20)
    assert (now.staleness_mean, dict(now.staleness_counts)) == (1.0, {0: 2, 3: 1})
    first, second = now.workers
    assert (first.pushes, first.samples, first.seen_s) == (1, 10, 3.0)
    assert (first.compute, first.servers, first.data) == (0.5, 0.25, 0.25)
    assert (second.pushes, second.staleness_mean, second.seen_s) == (3, 1.0, 2.0)
    assert second.compute == 1.0
    assert feed.monitor.rows() == [[1, 10, 0, 0.5, 0.25, 0.25], [3, 10, 3, 0.9, 0.0, 0.0]]


def test_rates_loss_and_staleness_are_of_the_last_seconds() -> None:
    feed = Feed(samples=10**6)
    for _ in range(100):
        feed.step(0, after_s=0.25, loss=8.0, servers_s=1.0)
    for _ in range(100):
        feed.step(1, after_s=0.125, loss=2.0, compute_s=1.0)
    now = feed.monitor.statistics()
    assert now.updates_per_s == pytest.approx(8.0, rel=0.02)
    assert now.samples_per_s == pytest.approx(80.0, rel=0.02)
    assert (now.loss, now.staleness) == (2.0, 0.0)
    assert now.workers[0].pushes_per_s == 0.0, "it has stopped, and is judged by now"
    assert now.workers[1].samples_per_s == pytest.approx(80.0, rel=0.02)
    assert now.workers[1].mean_samples_per_s == pytest.approx(1000 / (200 * 0.1875), rel=0.02)


def test_a_worker_of_rare_pushes_is_judged_by_its_whole_run() -> None:
    feed = Feed(samples=10**6)
    for _ in range(10):
        feed.step(0, after_s=30.0)
    feed.clock.now += 15.0
    assert feed.monitor.statistics().workers[0].pushes_per_s == pytest.approx(10 / 285)


def test_the_epochs_part_is_counted_on_beyond_its_end() -> None:
    feed = Feed()
    for _ in range(5):
        feed.step(0, after_s=1.0)
    assert feed.monitor.statistics().fraction == pytest.approx(0.5)
    for _ in range(6):  # the last is of the next epoch already
        feed.step(0, after_s=1.0)
    assert feed.monitor.statistics().fraction == 1.0
    feed.monitor(EpochDone(0, 11, 100, 0.0))
    now = feed.monitor.statistics()
    assert (now.epoch, now.fraction) == (1, pytest.approx(0.1))


def test_an_epochs_samples_are_learned_from_its_end() -> None:
    feed = Feed(samples=0)
    for _ in range(10):
        feed.push(0)
    assert feed.monitor.statistics().fraction == 0.0
    feed.monitor(EpochDone(0, 10, 100, 0.0))
    for _ in range(5):
        feed.push(0)
    now = feed.monitor.statistics()
    assert (now.epoch, now.fraction, now.samples) == (1, 0.5, 150)


def test_the_time_left_is_told_once_there_is_something_to_go_by() -> None:
    feed = Feed(epochs=4)
    feed.clock.now += 1000.0  # start-up does not count
    feed.step(0)
    assert feed.monitor.statistics().left_s is None
    for epoch in range(2):
        for _ in range(10):
            feed.step(0, after_s=1.0)
        feed.monitor(EpochDone(epoch, feed.version, 100, 0.0))
    assert feed.monitor.statistics().left_s == pytest.approx(19.0, rel=0.1)
    for epoch in (2, 3):
        feed.monitor(EpochDone(epoch, feed.version, 100, 0.0))
    now = feed.monitor.statistics()
    assert (now.left_s, now.epoch, now.fraction) == (0.0, 4, 0.0)


def test_evaluations_and_the_best_of_them() -> None:
    monitor = Feed().monitor
    for epoch, correct in enumerate((6.0, 9.0, 8.0)):
        monitor(Evaluated(epoch, 10 * epoch, {"loss": 5.0, "correct": correct, "count": 10.0}))
    monitor(Evaluated(3, 40, {}))  # nothing was counted
    now = monitor.statistics()
    assert (now.accuracy, now.evaluation_loss, now.evaluated_epoch) == (0.8, 0.5, 2)
    assert (now.best_accuracy, now.best_epoch) == (0.9, 1)
    monitor(Evaluated(4, 50, {"correct": 7.0, "count": 10.0}, best=True))
    monitor(Evaluated(5, 60, {"correct": 10.0, "count": 10.0}))
    assert monitor.statistics().best_epoch == 4, "whoever scores them knows better"


def test_the_loss_is_that_of_the_last_epoch_and_this_one_in_a_short_run() -> None:
    feed = Feed(samples=40)
    for epoch, loss in enumerate((8.0, 4.0, 2.0)):
        for _ in range(4):
            feed.step(0, after_s=0.001, loss=loss)
        feed.monitor(EpochDone(epoch, feed.monitor.updates, 40, 0.0))
    assert feed.monitor.statistics().loss == 2.0
    for _ in range(4):
        feed.step(0, after_s=0.001, loss=1.0)
    assert feed.monitor.statistics().loss == 1.5


def test_a_loss_that_is_not_finite_is_shown_and_then_forgotten() -> None:
    feed = Feed()
    feed.step(0, loss=math.nan)
    loss = feed.monitor.statistics().loss
    assert loss is not None
    assert math.isnan(loss)
    feed.step(0, loss=3.0)
    assert feed.monitor.statistics().loss == 3.0


def test_workers_beyond_those_announced_get_rows() -> None:
    feed = Feed(workers=1)
    feed.step(0)
    feed.step(2, after_s=0.2)
    feed.monitor(Logged(4, {}))
    now = feed.monitor.statistics()
    assert [one.pushes for one in now.workers] == [1, 0, 1, 0, 0]


def test_what_it_keeps_is_bounded() -> None:
    feed = Feed(samples=10**9)
    for i in range(3000):
        feed.clock.now += 1.0
        feed.push(0, i)
    feed.push(0, 10**9)
    monitor = feed.monitor
    assert len(monitor._frames) <= 20
    assert len(monitor._marks) <= 64
    assert max(monitor.statistics().staleness_counts) == 1 << 16


# ---- the timeline ----


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]


def test_a_line_at_once_then_one_a_twentieth_of_a_second_and_one_at_the_end(
    tmp_path: Path,
) -> None:
    feed = Feed()
    feed.clock.now += 3.0
    timeline = Timeline(tmp_path, feed.monitor)
    for _ in range(10):
        feed.step(0, after_s=0.03125, compute_s=0.1)
        timeline.tick()
    feed.clock.now += 0.125
    timeline.close()
    timeline.tick()
    timeline.close()
    found = lines(tmp_path)
    assert found[0] == {"time_s": 3.0, "update": 0, "workers": [[0, 0, 0, 0.0, 0.0, 0.0]] * 2}
    times = [round(line["time_s"], 2) for line in found]
    assert times == [3.0, 3.06, 3.12, 3.19, 3.25, 3.31, 3.44]
    assert found[1] == {
        "time_s": 3.062,
        "update": 2,
        "workers": [[2, 20, 0, 0.2, 0.0, 0.0], [0, 0, 0, 0.0, 0.0, 0.0]],
    }


def test_rates_count_from_the_first_push_that_was_handled() -> None:
    """The first step was logged before its push, which waited 5 s for the server to compile."""
    feed = Feed()
    feed.monitor(Logged(0, {"samples": (10.0, 1)}))
    feed.clock.now += 5.0
    feed.push(0)
    for _ in range(9):
        feed.step(0, after_s=1.0)
    (one, _) = feed.monitor.statistics().workers
    assert one.mean_samples_per_s == pytest.approx(100 / 9)


def test_the_last_sign_of_life_has_its_own_line(tmp_path: Path) -> None:
    """The run is over at 0.02 s; its evaluation, of which the monitor hears nothing, takes 7 s."""
    feed = Feed()
    timeline = Timeline(tmp_path, feed.monitor)
    for _ in range(2):
        feed.step(0, after_s=0.01)
    feed.clock.now += 7.0
    timeline.close()
    found = [(line["time_s"], line["update"]) for line in lines(tmp_path)]
    assert found == [(0.0, 0), (0.02, 2), (7.02, 2)]


@pytest.mark.parametrize(
    ("workers", "elapsed", "every"),
    [(2, 0, 0.05), (64, 0, 0.2), (640, 0, 2.0), (2, 1e6, 1e3), (128, 1e6, 2e3)],
)
def test_lines_are_fewer_the_more_there_are(
    tmp_path: Path, workers: int, elapsed: float, every: float
) -> None:
    feed = Feed(workers=workers)
    feed.clock.now += elapsed
    timeline = Timeline(tmp_path, feed.monitor)
    for part in (0.9, 0.2):
        feed.clock.now += part * every
        timeline.tick()
    assert len(lines(tmp_path)) == 2


def test_a_full_disk_ends_the_timeline_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    feed = Feed()
    timeline = Timeline(tmp_path, feed.monitor)
    timeline.tick()
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    with caplog.at_level(logging.WARNING, "psframe"):
        for _ in range(3):
            feed.clock.now += 1.0
            timeline.tick()
        timeline.close()
    assert [os.strerror(errno.ENOSPC) in record.message for record in caplog.records] == [True]
    assert len(lines(tmp_path)) == 1, "the line that did not fit was taken back"


def test_a_folder_that_has_gone_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timeline = Timeline(tmp_path / "gone", Feed().monitor)
    timeline.tick()
    timeline.close()
    assert len(caplog.records) == 1
