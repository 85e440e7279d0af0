"""What remains of a training: the record, and the text that is printed of it."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psframe.board import one_line
from psframe.closing import closing_lines, print_summary
from psframe.events import Evaluated, Logged, PushHandled
from psframe.ledger import Ledger
from psframe.monitor import Monitor
from psframe.plan import Result
from psframe.summary import find_slowest, summarise, write_summary

STEP = {"compute_s": 0.010, "servers_s": 0.004, "data_s": 0.002}


class Clock:
    """Seconds that grow by 10 ms a look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def watched(steps: list[list[dict[str, float]]]) -> Monitor:
    """A monitor that saw each worker's steps, in turns; a step is its times."""
    monitor = Monitor(len(steps), 2, 100, Clock())
    version = 0
    for i in range(max(map(len, steps), default=0)):
        for worker, own in enumerate(steps):
            if i < len(own):
                version += 1
                monitor(PushHandled(worker, i, version - 2, version, 1, True))
                sums = {name: (value, 1) for name, value in own[i].items()}
                monitor(Logged(worker, {"samples": (10.0, 1), **sums}))
    return monitor


def result(counts: list[int], **ledger: int) -> Result:
    total = sum(counts)
    account = Ledger(received=total, applied=total) if not ledger else Ledger(**ledger)
    return Result(None, total, np.array(counts, np.int64), True, account)


def record(
    steps: list[list[dict[str, float]]] | None = None, counts: list[int] | None = None, **more: Any
) -> dict[str, Any]:
    steps = [[STEP] * 4] * 3 if steps is None else steps
    counts = [2, 10] if counts is None else counts
    outcome = dataclasses.replace(result(counts), devices=more.pop("devices", ("cpu",)))
    return summarise(outcome, watched(steps).statistics(), seconds=2.0, **more)


def text(found: dict[str, Any], width: int = 80, **more: Any) -> str:
    stream = io.StringIO()
    print_summary(found, stream, width=width, **more)
    return stream.getvalue()


# ---- the record ----


def test_the_record_is_what_readers_of_summary_json_expect() -> None:
    monitor = watched([[STEP] * 2, [STEP]])
    monitor(Evaluated(1, 3, {"correct": 9.0, "count": 10.0}))
    found = summarise(
        result([1, 2], received=4, applied=3, refused=1),
        monitor.statistics(),
        seconds=1.23456,
        accuracy=0.75,
        loss=math.nan,
        confusion=np.array([[3, 1], [0, 0]]),
        classes=("cat", "dog"),
        mode="async",
        optimizer="adagrad",
        model="mlp",
        data="pets.npz",
        ranks=(1, 2),
    )
    workers = found.pop("workers")
    assert found == {
        "accuracy": 0.75,
        "loss": None,
        "seconds": 1.235,
        "updates": 3,
        "updates_before": 0,
        "samples": 30,
        "staleness": [1, 2],
        "ledger": {
            "received": 4,
            "applied": 3,
            "refused": 1,
            "dropped": 0,
            "lost": 0,
            "stopped": 0,
            "partial": 0,
        },
        "mode": "async",
        "optimizer": "adagrad",
        "model": "mlp",
        "data": "pets.npz",
        "classes": ["cat", "dog"],
        "confusion": [[3, 1], [0, 0]],
        "per_class": [0.75, None],
        "slowest": None,
        "lost": [],
        "replaced": [],
        "devices": [],
        "best_epoch": None,  # the monitor saw a best one, but nothing of it was kept
        "stopped_early": False,
    }
    assert workers[0] == {
        "worker": 0,
        "rank": 1,
        "pushes": 2,
        "samples": 20,
        "samples_per_s": pytest.approx(20 / 0.05, rel=0.01),
        "staleness_mean": 1.0,
        "compute_s": 0.02,
        "servers_s": 0.008,
        "data_s": 0.004,
    }
    assert workers[1]["rank"] == 2


def test_a_run_that_nobody_watched_has_a_record_all_the_same() -> None:
    found = summarise(result([]), Monitor(2, 1, clock=Clock()).statistics(), seconds=0.0)
    assert found["slowest"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "test accuracy   unknown" in text(found)


def test_the_record_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = record()
    assert write_summary(tmp_path, found)
    file = tmp_path / "summary.json"
    assert json.loads(file.read_text()) == found

    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    assert not write_summary(tmp_path, {**found, "updates": 7})
    assert json.loads(file.read_text()) == found
    assert list(tmp_path.iterdir()) == [file], "no half of it stays behind"
    assert len(caplog.records) == 1


def test_updates_from_before_a_resume_are_not_of_its_seconds() -> None:
    monitor = Monitor(1, 2, 100, Clock())
    monitor.goes_on(1000)
    for version in range(1000, 1012):
        monitor(PushHandled(0, version, version, version + 1, 0, True))
    now = monitor.statistics()
    outcome = dataclasses.replace(result([12]), version=1012)
    found = summarise(outcome, now, seconds=2.0)
    assert (found["updates"], found["updates_before"]) == (1012, 1000)
    assert "  6 updates/s" in text(found)
    assert (
        one_line(dataclasses.replace(now, time_s=2.0), last=True)
        .split("updates ")[1]
        .startswith("1,012 (6/s)")
    )
    assert now.updates_per_s <= 12 / 0.1, "the resume itself is no update"


# ---- the slowest ----


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("compute_s", "computing gradients"),
        ("servers_s", "waiting for servers"),
        ("data_s", "waiting for data"),
    ],
)
def test_a_worker_of_a_lower_rate_is_named_with_the_reason(part: str, words: str) -> None:
    slow = {**STEP, part: 0.1}
    found = record([[STEP] * 9, [slow] * 3, [STEP] * 9])
    slowest, why = find_slowest(found["workers"])
    assert slowest == 1
    factor = sum(slow.values()) / sum(STEP.values())
    assert why.startswith(f"{factor:.2g} times slower than the others: 100 ms a step {words}")


def test_in_step_the_slowest_is_the_one_that_others_wait_for() -> None:
    waiting = {"compute_s": 0.01, "servers_s": 0.03, "data_s": 0.0}
    slow = {"compute_s": 0.04, "servers_s": 0.0, "data_s": 0.0}
    found = record([[waiting] * 5, [waiting] * 5, [slow] * 5], mode="bsp")
    slowest, why = find_slowest(found["workers"], "bsp")
    assert found["slowest"] == slowest == 2
    assert why.startswith("its own part of a step takes 4 times as long, and the others wait for")
    assert why.endswith(": 40 ms a step computing gradients, the others 10 ms")
    assert find_slowest(found["workers"], "async")[0] is None, "there nobody waits for it"


def test_steps_that_are_nearly_all_waiting_have_no_slowest() -> None:
    waiting = {"compute_s": 0.001, "servers_s": 0.099, "data_s": 0.0}
    slow = {"compute_s": 0.004, "servers_s": 0.096, "data_s": 0.0}
    found = record([[waiting] * 5, [waiting] * 5, [slow] * 5], mode="bsp")
    assert find_slowest(found["workers"], "bsp") == (None, "all workers are much alike")


def test_the_slowest_is_none_of_those_with_the_higher_rates_in_the_table() -> None:
    """Its steps are longer, its rate is higher: a worker that began late, say."""
    workers = record([[STEP] * 9, [{**STEP, "servers_s": 0.1}] * 3, [STEP] * 9])["workers"]
    for one, rate in zip(workers, (100.0, 300.0, 200.0), strict=True):
        one["samples_per_s"] = rate
    assert find_slowest(workers)[0] is None
    workers[1]["samples_per_s"] = 50.0
    assert find_slowest(workers)[0] == 1


def test_of_workers_much_alike_none_is_the_slowest() -> None:
    assert find_slowest(record()["workers"])[0] is None
    assert find_slowest(record([[STEP]])["workers"]) == (None, "")
    assert find_slowest([]) == (None, "")


def test_a_lost_worker_is_named_so_and_is_not_the_slowest() -> None:
    steps = [[STEP] * 9, [{**STEP, "compute_s": 0.1}] * 3, [STEP] * 9, [STEP] * 4]
    outcome = dataclasses.replace(result([25]), lost=(1, 3), replaced=(3,))
    now = watched(steps).statistics()
    found = summarise(outcome, now, seconds=2.0, ranks=(1, 2, 3, 4))
    assert (found["lost"], found["replaced"], found["slowest"]) == ([1, 3], [3], None)
    said = text(found)
    assert "the slowest" not in said
    begin = next(i for i, line in enumerate(said.splitlines()) if line.startswith("worker "))
    rows = said.splitlines()[begin + 1 : begin + 5]
    ends = ["  rank 1", "  rank 2  lost", "  rank 3", "  lost, replaced"]
    assert all(row.endswith(end) for row, end in zip(rows, ends, strict=True))
    assert max(map(len, rows)) <= 80


def test_of_many_workers_the_lost_are_among_those_shown() -> None:
    outcome = dataclasses.replace(result([90]), lost=(29,))
    found = summarise(outcome, watched([[STEP] * 3] * 30).statistics(), seconds=2.0)
    (row,) = [line for line in text(found).splitlines() if line.startswith("    29 ")]
    assert row.endswith("  lost")


# ---- the text ----


def test_the_text_of_a_small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psframe.closing.command", lambda name: f"psframe {name}")
    found = record(
        devices=("cuda", "cuda", "cpu"),
        accuracy=0.975,
        loss=0.0712,
        confusion=[[38, 2], [0, 40]],
        classes=("cat", "dog"),
        model="mlp",
        data="digits",
        mode="async",
        optimizer="adagrad",
        best_epoch=11,
        stopped_early=True,
    )
    found["workers"] = [{**found["workers"][0], "samples_per_s": 1234.0}]
    assert text(found, run_dir="runs/1").splitlines() == [
        "mlp, digits, async, adagrad, cpu (1 of 3 workers) and cuda (2 of 3 workers)",
        "test accuracy   97.50%  (2 of 80 wrong)  test loss 0.0712  best epoch 12, stopped early",
        "time            2.00 s  6 updates/s  60 samples/s, start-up included",
        "updates         12  samples 120",
        "pushes          12 received = 12 applied",
        "",
        "staleness       mean 0.83 updates",
        "              0  █████████                                           2  16.7%",
        "              1  ███████████████████████████████████████████        10  83.3%",
        "",
        "worker    samples  samples/s  compute  servers  data  staleness",
        "     0         40      1,234      62%      25%   12%       1.00",
        "",
        "true label (row) and what it was taken for (column)",
        "      cat dog",
        "cat    38   2",
        "dog     .  40",
        "",
        "accuracy by label, the worst first",
        "  cat   95.00%  38 of 40",
        "  ... and 1 more, 100.00%",
        "",
        "files           runs/1",
        "next            psframe report runs/1",
    ]


def test_many_values_of_staleness_are_gathered() -> None:
    lines = text(record(counts=[0] * 30 + [5] * 300)).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("staleness"))
    rows = lines[begin + 1 : lines.index("", begin)]
    assert len(rows) <= 12
    assert rows[0].split()[:3] == ["0", "to", "49"]
    assert sum(int(row.split()[-2].replace(",", "")) for row in rows) == 1500


def test_a_long_tail_of_staleness_is_one_row() -> None:
    lines = text(record(counts=[20, 600, 40, 1, *[0] * 15, 2, *[0] * 30, 1])).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("staleness"))
    rows = [line.split() for line in lines[begin + 1 : lines.index("", begin)]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert rows[-1][:3] == ["3", "to", "50"]
    assert rows[-1][-2:] == ["4", "0.6%"]


def test_of_many_workers_the_slowest_are_shown_and_the_rest_counted() -> None:
    waiting = {"compute_s": 0.01, "servers_s": 0.03, "data_s": 0.0}
    steps = [[waiting] * 3 for _ in range(39)]
    steps.append([{"compute_s": 0.04, "servers_s": 0.0, "data_s": 0.0}] * 3)
    found = record(steps, mode="ssp")
    for one in found["workers"]:
        one["samples_per_s"] = 200.0 - one["worker"] / 10
    lines = text(found).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("worker "))
    rows = lines[begin + 1 :]
    assert [int(row.split()[0]) for row in rows[:11]] == [39, *range(38, 28, -1)]
    assert rows[11].startswith("   ... and 29 more, 197 to 200 samples/s")
    assert rows[12].startswith("worker 39 is the slowest, its own part of a step takes 4 times as")
    assert rows[14].startswith("40 ms a step computing gradients, the others 10 ms")


def test_of_many_labels_the_most_confused_pairs_are_shown() -> None:
    matrix = np.diag(np.full(100, 50))
    matrix[3, 5] = 7
    matrix[4, 90] = 2
    matrix[99, 99] = 0
    found = text(record(confusion=matrix, accuracy=0.9, classes=["zero", "one"]))
    assert "true label (row)" not in found
    pairs = found.split("most often taken for another\n")[1].splitlines()
    assert pairs[0].split() == ["3", "taken", "for", "5", "7", "of", "57", "(12.3%)"]
    assert pairs[1].startswith("  4 taken for 90")
    assert pairs[2] == ""
    assert "... and 97 more, 100.00%\n" in found, "a label without samples is left out"


def test_no_confusion_at_all() -> None:
    matrix = np.diag(np.full(20, 5))
    found = text(record(confusion=matrix, accuracy=1.0))
    assert "no label was taken for another" in found
    assert "the worst first" not in found


def test_names_too_long_for_a_column_are_numbered() -> None:
    matrix = [[38, 2], [0, 40]]
    lines = text(record(confusion=matrix, classes=("airplane", "car"))).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("true label"))
    assert lines[begin].endswith("(column), by number")
    assert [line.split() for line in lines[begin + 1 : begin + 4]] == [
        ["1", "2"],
        ["airplane", "1", "38", "2"],
        ["car", "2", ".", "40"],
    ]


def test_reasons_and_parts_of_the_ledger() -> None:
    found = summarise(
        result([5], received=9, applied=5, refused=2, dropped=1, stopped=1, partial=2),
        watched([[STEP] * 5]).statistics(),
        seconds=1.0,
    )
    reasons = {"non-finite gradient": 2, "late": 1, "stopped": 1}
    words = " ".join(text(found, reasons=reasons).split())
    assert (
        "pushes 9 received = 5 applied + 2 refused + 1 dropped + 1 stopped; 2 of the applied in"
        " part (2 non-finite gradient, 1 late) staleness"
    ) in words


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("labels", [2, 12, 13])
def test_workers_bars_and_matrices_keep_to_the_width(width: int, labels: int) -> None:
    matrix = np.diag(np.full(labels, 12345))
    found = record(confusion=matrix, accuracy=1.0, classes=["a long name"] * labels)
    lines = closing_lines(found, width, ascii_only=True)
    rows = ["".join(part for part, _ in line) for line in lines]
    assert all(row.isascii() for row in rows)
    if width >= 80:
        assert max(map(len, rows)) <= width


def test_colours_are_for_terminals() -> None:
    found = record(accuracy=0.5)
    assert "\x1b" not in text(found)
    coloured = text(found, colour=True)
    assert "\x1b[" in coloured
    assert "50.00%" in coloured
