"""Reports of runs whole and broken, few workers and many; what the words say, and of whom."""

import base64
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import write_lines, write_run

from psframe import train
from psframe.errors import ArgumentError, RunDirError
from psframe.report import make_report
from psframe.report.__main__ import main
from psframe.report.facts import gather
from psframe.report.page import page
from psframe.report.reading import Run, Timeline, number, read_run
from psframe.report.spans import on_one_clock, spans_of_times, spans_of_work, started_s
from psframe.report.words import findings
from psframe.summary import find_slowest

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
FIGURES = ["curves", "staleness", "rates", "times", "heat", "classes"]
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """A page's tags, attributes and words; fails on a tag that is not closed."""

    _EMPTY = frozenset(("meta", "br", "path", "use", "rect", "image"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self._EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self._EMPTY:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._EMPTY:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words += data + "\n"


def check_page(file: Path) -> Page:
    """Whatever the run, its page is closed, small, needs no other file, and runs nothing."""
    text = file.read_text(encoding="utf-8")
    assert len(text) < 5_000_000
    read = Page(text)
    allowed = "html head meta title style body main h1 h2 p div span b ul li section figure table"
    allowed += " figcaption thead tbody tr th td footer br svg g defs path use rect image clippath"
    assert read.tags <= set(allowed.split())
    assert not [name for name, _ in read.attributes if name.startswith("on") or name == "srcset"]
    links = [v for name, v in read.attributes if name in ("src", "href", "xlink:href")]
    assert [v for v in links if not v.startswith(("#", "data:image/png;base64,"))] == []
    inside = set(read.ids)
    assert [v for v in links if v.startswith("#") and v[1:] not in inside] == []
    assert [ref for ref in re.findall(r"url\(#([^)]*)\)", text) if ref not in inside] == []
    assert len(inside) == len(read.ids)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    return read


ALIKE = "all workers are much alike"


def said(run: Run) -> str:
    return "\n".join(found.text for found in findings(run, gather(run)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three workers with all files; not to be written into."""
    return write_run(tmp_path_factory.mktemp("runs") / "three", 3, waits=2)


# ---- whole runs ----


@needs_matplotlib
@pytest.mark.parametrize("workers", [pytest.param(64, marks=pytest.mark.slow), 1, 3, 16, 1000])
def test_a_whole_run_has_every_figure(tmp_path: Path, workers: int) -> None:
    lines = 64 if workers == 1000 else 150
    run = write_run(
        tmp_path / "run", workers, lines=lines, slow=workers - 1 if workers > 1 else None
    )
    began = time.monotonic()
    files = make_report(run)
    assert time.monotonic() - began < 60  # a few seconds on a machine of its own
    assert files[0] == run / "report" / "report.html"
    drawn = [name for name in FIGURES if name != "heat" or workers >= 12]
    assert [file.stem for file in files[1:]] == drawn
    for file in files[1:]:
        assert file.read_bytes().startswith(PNG)
        assert 5_000 < file.stat().st_size < 1_000_000
    words = check_page(files[0]).words
    assert "completed" in words
    assert "98." in words
    assert words.count("(slowest)") == (workers > 1)
    assert [f.name for f in (run / "report").iterdir() if f.name.endswith(".tmp")] == []


@needs_matplotlib
def test_a_real_run_of_the_command_can_be_reported(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train.main(["--epochs", "2", "--workers", "2", "--run-dir", str(folder)]) == 0
    assert main([str(folder)]) == 0
    read = check_page(folder / "report" / "report.html")
    assert "adagrad" in read.words
    assert "test accuracy" in read.words
    assert (folder / "report" / "curves.png").exists()


@needs_matplotlib
def test_a_hundred_thousand_lines_are_drawn_within_bounds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3, epochs=100_000, lines=1000, seconds=40_000.0)
    began = time.monotonic()
    files = make_report(run, images=False)
    assert time.monotonic() - began < 60
    assert [file.name for file in files] == ["report.html"]
    assert "mean of neighbours among 100,000 lines" in check_page(files[0]).words


def test_the_facts_are_the_summary_s(whole: Path) -> None:
    run = read_run(whole)
    summary = json.loads((whole / "summary.json").read_text())
    facts = gather(run)
    assert run.problems == []
    assert (facts.state, facts.accuracy) == ("completed", summary["accuracy"])
    assert facts.samples_per_s == pytest.approx(summary["samples"] / 40.0)
    assert facts.ledger == summary["ledger"]
    assert facts.workers[2].share("data_s") == pytest.approx(0.41, abs=0.02)
    assert facts.slowest == 2


def test_without_a_summary_the_other_files_say_nearly_the_same(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "summary.json").unlink()
    less, more = gather(read_run(run)), gather(read_run(whole))
    assert less.seconds == more.seconds
    assert less.updates == more.updates
    assert less.samples == more.samples
    assert less.slowest == more.slowest
    assert less.mode == "async"
    for one, other in zip(less.workers, more.workers, strict=True):
        assert one.samples_per_s == pytest.approx(other.samples_per_s)
        assert one.staleness_mean == pytest.approx(other.staleness_mean)
        assert one.share("data_s") == pytest.approx(other.share("data_s"))


# ---- one clock, and where the time went ----


def timeline_of(*lines: tuple[float, list[list[float]]]) -> Timeline:
    """A timeline of (time_s, a row a worker)."""
    return Timeline(np.array([t for t, _ in lines]), np.array([w for _, w in lines], float))


def test_metrics_and_timeline_count_from_the_start_of_the_command(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"epoch": 0, "time_s": 2.0}, {"epoch": 1}])
    rows = [{"time_s": t, "workers": [[n] * 6]} for t, n in ((1.5, 0), (3.0, 0), (3.4, 1), (4, 9))]
    write_lines(tmp_path / "timeline.jsonl", rows)
    run = read_run(tmp_path)
    on_one_clock(run)
    assert run.metrics["time_s"][0] == 3.5
    assert started_s(run.timeline) == 3.4
    # A timeline that begins in the middle says nothing of when the folder was opened.
    write_lines(tmp_path / "timeline.jsonl", rows[2:])
    run = read_run(tmp_path)
    on_one_clock(run)
    assert run.metrics["time_s"][0] == 2.0
    assert math.isnan(started_s(run.timeline))


def test_a_wait_is_spread_over_the_time_it_took() -> None:
    """Worker 0 computes for 1 s and waits for 3; worker 1 computes all the time."""
    idle, mid = [1, 32, 0, 1.0, 0.0, 0.0], [2, 64, 0, 1.0, 3.0, 0.0]
    timeline = timeline_of(
        (0.0, [[0] * 6, [0] * 6]),
        (1.0, [idle, [1, 32, 0, 1.0, 0.0, 0.0]]),
        (2.0, [idle, [2, 64, 0, 2.0, 0.0, 0.0]]),
        (3.0, [idle, [3, 96, 0, 3.0, 0.0, 0.0]]),
        (4.0, [mid, [4, 128, 0, 4.0, 0.0, 0.0]]),
    )
    found = spans_of_times(timeline)
    assert found is not None
    assert found.edges_s.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert found.done[:, 0].tolist() == [[0, 1, 0]] * 3
    assert found.done[:, 1].tolist() == [[1, 0, 0]] * 3
    counted = spans_of_work(timeline)
    assert counted is not None
    assert counted.done[:, :, 1].sum() == 3 * 32 + 32


def test_start_up_and_the_evaluation_at_the_end_are_no_work() -> None:
    timeline = timeline_of(
        (1.0, [[0] * 6]),
        (5.0, [[1, 32, 0, 0.01, 4.0, 0.0]]),
        (6.0, [[61, 1952, 0, 0.5, 4.4, 0.0]]),
        (7.0, [[121, 3872, 0, 1.0, 4.8, 0.0]]),
        (20.0, [[121, 3872, 0, 1.0, 4.8, 0.0]]),
    )
    rates, times = spans_of_work(timeline), spans_of_times(timeline)
    assert rates is not None
    assert times is not None
    assert rates.edges_s[[0, -1]].tolist() == times.edges_s[[0, -1]].tolist() == [5.0, 7.0]
    assert rates.rates.ravel().tolist() == pytest.approx([1920.0] * len(rates.rates))
    assert (times.done.sum(axis=2) <= times.lengths_s[:, None]).all()
    assert times.done.sum(axis=(0, 1)).tolist() == pytest.approx([0.99, 0.8, 0.0])


@needs_matplotlib
def test_both_panels_of_times_say_the_same_as_the_summary(whole: Path) -> None:
    """The mean over time of all workers together is the mean of the bars."""
    from psframe.report import canvas
    from psframe.report.workers import times

    run = read_run(whole)
    facts = gather(run)
    with canvas.drawing():
        figure = times(run, facts)
    left, right = figure.axes
    bars = [bar.get_height() for bar in left.patches]
    computing = [sum(bars[i : i + 3]) / 3 for i in (0, 3, 6)]
    areas = [area.get_paths()[0] for area in right.collections]
    begin, end = right.get_xlim()
    for path, share in zip(areas, computing, strict=False):
        x, y = path.vertices[:-1].T  # there below, and back above
        area = abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))) / 2
        assert area / (end - begin) == pytest.approx(share, abs=1e-6)
    for worker, bar in zip(facts.workers, bars[:3], strict=True):
        assert bar == pytest.approx(worker.compute_s / facts.seconds, abs=0.02)


@needs_matplotlib
def test_few_spans_are_steps_and_no_slopes(tmp_path: Path) -> None:
    from psframe.report import canvas
    from psframe.report.workers import rates

    rows = [[[0] * 6], [[1, 8, 0, 0, 0, 0]], [[30, 240, 0, 0, 0, 0]], [[40, 320, 0, 0, 0, 0]]]
    lines = [{"time_s": t, "workers": w} for t, w in zip((0.5, 2, 3, 4), rows, strict=True)]
    write_lines(tmp_path / "timeline.jsonl", lines)
    run = read_run(tmp_path)
    with canvas.drawing():
        (axes,) = rates(run, gather(run)).axes
    x, y = axes.lines[0].get_data()
    assert x.tolist() == [2, 3, 3, 4]
    assert y.tolist() == [232, 232, 80, 80]


@needs_matplotlib
def test_in_step_the_staleness_is_one_bar_among_whole_numbers(whole: Path, tmp_path: Path) -> None:
    from psframe.report import canvas
    from psframe.report.curves import staleness

    run = change(shutil.copytree(whole, tmp_path / "run"), mode="bsp", staleness=[900])
    with canvas.drawing():
        figure = staleness(run, gather(run))
        figure.canvas.draw()
    axes, said_beside = figure.axes
    low, high = axes.get_xlim()
    ticks = [t for t in axes.get_xticks() if low <= t <= high]
    assert ticks == [0, 1, 2, 3, 4]
    assert axes.patches[0].get_width() < 0.25 * (high - low)
    assert "0 throughout" in said_beside.texts[0].get_text()


@needs_matplotlib
def test_the_curves_show_the_start_up(tmp_path: Path) -> None:
    from psframe.report import canvas
    from psframe.report.curves import curves

    rows = [{"epoch": i, "time_s": 3.0 + i, "train_loss": 1.0 / (i + 1)} for i in range(5)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    rows = [{"time_s": t, "workers": [[n] * 6]} for t, n in ((1.0, 0), (3.5, 0), (3.7, 1), (8, 9))]
    write_lines(tmp_path / "timeline.jsonl", rows)
    run = read_run(tmp_path)
    on_one_clock(run)
    with canvas.drawing():
        axes = curves(run, gather(run)).axes[1]
    assert axes.get_xlabel() == "time since the start (s)"
    assert axes.get_xlim()[0] == 0
    assert axes.lines[0].get_xdata().tolist() == [4, 5, 6, 7, 8]
    assert "start-up" in [text.get_text() for text in axes.texts]


# ---- words ----


def test_the_words_name_the_worker_that_waits_for_data(whole: Path) -> None:
    text = said(read_run(whole))
    assert "Worker 2 (rank 3) waited 41% of its time for data: slow disk?" in text
    assert "as expected of 2 = W − 1 (W = 3 workers)" in text
    slowest = r"Worker 2 \(rank 3\) was the slowest, .* ms a step waiting for data, the others "
    assert re.search(slowest, text)


def test_the_words_name_the_worker_that_fell_silent(tmp_path: Path) -> None:
    text = said(read_run(write_run(tmp_path / "run", 8, dies=5, slow=1)))
    assert "Fell silent before the end: worker 5 after 20 s." in text
    assert "Worker 1 (rank 2) was the slowest" in text
    assert "2 of" in text
    assert "were lost: their worker died" in text


def test_a_lost_worker_is_said_to_be_lost_and_is_not_the_slowest(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 6, slow=1, dies=5)
    found = change(run, lost=[1, 5])
    text = said(found)
    assert "Worker 1 (rank 2), Worker 5 (rank 6) were lost" in text
    assert "slowest" not in text
    assert "Fell silent" not in text, "it has been said"
    assert [worker.lost for worker in gather(found).workers] == [False, True, *[False] * 3, True]


def change(run: Path, **fields: Any) -> Run:
    """The run with other fields in its summary."""
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | fields))
    return read_run(run)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "bsp", "staleness": [100]}, "Mean staleness was 0.0, as it is when all work in"),
        ({"mode": "bsp", "staleness": [1, 1]}, "but in BSP it should be 0"),
        ({"staleness": [100, 1]}, "below 2 = W − 1"),
        ({"staleness": [0, 0, 0, 0, 0, 9]}, "above 2 = W − 1"),
        ({"ledger": {"received": 7, "applied": 7}}, "Every one of the 7 pushes received was app"),
        ({"ledger": {"received": 7, "applied": 5}}, "does not add up"),
        ({"ledger": {"received": 7, "applied": 6, "dropped": 1}}, "1 of 7 pushes (14.3%) was drop"),
        ({"stopped_early": True}, "It was stopped early"),
    ],
)
def test_what_the_words_say_of_a_summary(
    whole: Path, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    assert words in said(change(shutil.copytree(whole, tmp_path / "run"), **fields))


def test_waiting_for_servers_has_another_remedy_in_each_mode(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    rows = [{"worker": i, "compute_s": 1, "servers_s": 3, "data_s": 0} for i in range(3)]
    text = said(change(run, workers=rows))
    assert "waited 75% of their time for servers" in text
    assert "--servers" in text
    assert "--mode async does without" in said(change(run, mode="bsp"))


def test_in_step_the_slowest_has_the_longest_steps(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    rows = [
        {"worker": i, "pushes": 100, "samples_per_s": 50, "servers_s": 9 - own, "data_s": 0}
        | {"compute_s": own}
        for i, own in enumerate((3, 8, 2))
    ]
    for slowest in (None, 1):
        text = said(change(run, mode="bsp", workers=rows, slowest=slowest))
        assert "Worker 1 was the slowest, its own part of a step takes 3.2 times as long" in text
        assert (
            "and the others wait for it (80 ms a step computing gradients, the others 25 ms)"
            in text
        )
    text = said(change(run, mode="async", workers=rows))
    assert "wait for it" not in text


@needs_matplotlib
@pytest.mark.parametrize("name", ["summary", "timeline"])
def test_the_report_and_the_summary_have_one_rule_for_the_slowest(
    tmp_path: Path, name: str
) -> None:
    """Rates differ and one is the lowest; steps do not, so none is slower than the others."""
    run = write_run(tmp_path / "run", 3, waits=None)
    rows = [
        {"worker": i, "pushes": 100 - 9 * i, "samples_per_s": 50 - 4.5 * i, "staleness_mean": 2}
        | {"compute_s": 3 - 0.27 * i, "servers_s": 0.1, "data_s": 0.1}
        for i in range(3)
    ]
    found = change(run, workers=rows, slowest=1)
    if name == "timeline":
        (run / "summary.json").unlink()
        counts = [[r["pushes"], 32, 0, r["compute_s"], 0.1, 0.1] for r in rows]
        write_lines(run / "timeline.jsonl", [{"time_s": 3.0, "workers": counts}])
        found = read_run(run)
    facts = gather(found)
    assert (facts.slowest, facts.slowest_why) == find_slowest(rows) == (None, ALIKE)
    assert "All workers are much alike." in said(found)
    assert "slowest" not in check_page(make_report(run, images=False)[0]).words


def learning(folder: Path, train_loss: list[float], test_loss: list[float]) -> Run:
    folder.mkdir()
    pairs = enumerate(zip(train_loss, test_loss, strict=True))
    rows = [{"epoch": i, "train_loss": a, "test_loss": b} for i, (a, b) in pairs]
    write_lines(folder / "metrics.jsonl", rows)
    return read_run(folder)


def test_overfitting_and_divergence_are_told_apart(tmp_path: Path) -> None:
    fits = learning(tmp_path / "a", [1.0, 0.5, 0.3, 0.2], [1.1, 0.6, 0.5, 0.45])
    over = learning(tmp_path / "b", [1.0, 0.5, 0.1, 0.01], [1.1, 0.6, 0.7, 0.9])
    rises = learning(tmp_path / "c", [1.0, 2.0, 4.0, 9.0], [1.1, 2.0, 4.0, 9.0])
    assert "overfit" not in said(fits)
    assert "rose to 1.50 times its least" in said(over)
    assert "diverges" in said(rises)
    assert "overfit" not in said(rises)


# ---- broken runs ----


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("")])
def test_what_is_no_run_is_an_error(
    tmp_path: Path, make: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run")
    for name in ("run", "n" * 5000):
        assert main([str(tmp_path / name)]) == 1
        assert "psframe: error:" in capsys.readouterr().err


def test_a_half_written_last_line_is_left_out(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    for name in ("metrics.jsonl", "timeline.jsonl"):
        file = run / name
        file.write_bytes(file.read_bytes()[:-7])
    read = read_run(run)
    assert [problem.partition(":")[0] for problem in read.problems] == [
        "metrics.jsonl",
        "timeline.jsonl",
    ]
    assert all("its last line is half-written" in problem for problem in read.problems)
    assert len(read.metrics["epoch"]) == 29
    assert read.timeline is not None
    assert len(read.timeline.time_s) == 199


def test_bad_lines_are_counted_and_named(tmp_path: Path) -> None:
    lines = [b'{"epoch": 0, "train_loss": 1.0}', b"[1]", b"\xff\xfe", b"", b'{"epoch": 1}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    run = read_run(tmp_path)
    assert run.problems == [
        "metrics.jsonl: 2 of 5 lines are not JSON objects, and were left out (the first is line 2)"
    ]
    assert run.metrics["epoch"].tolist() == [0, 1]


@pytest.mark.parametrize("value", [True, "5", None, [], {}, math.nan, math.inf, 10**400, -1e19])
def test_what_is_no_number(value: Any) -> None:
    assert math.isnan(number(value))


HOSTILE = b'<script>alert(1)</script>"><img src=x onerror=alert(2)>&amp;--!>'
BROKEN: dict[str, dict[str, bytes]] = {
    "only a status": {"status.json": b'{"state": "failed", "reason": "disk"}'},
    "only a configuration": {"config.toml": b"lr = 0.1\n"},
    "all empty": dict.fromkeys(
        ["config.toml", "status.json", "summary.json", "metrics.jsonl", "timeline.jsonl"], b""
    ),
    "all binary": dict.fromkeys(
        ["config.toml", "status.json", "summary.json", "metrics.jsonl", "timeline.jsonl"],
        bytes(range(256)) * 50,
    ),
    "deep": {"status.json": b"[" * 200_000, "metrics.jsonl": b'{"a":' * 100_000},
    "a pickle": {"summary.json": b"\x80\x04\x95cos\nsystem\n(S'touch x'\ntR."},
    "of other types": {
        "status.json": b'{"state": 3, "updates": "many", "reason": ["a"], "test_accuracy": {}}',
        "summary.json": b'{"accuracy": "x", "workers": {"0": 1}, "confusion": [[1], [2, 3]],'
        b' "ledger": [1], "staleness": "abc", "classes": 7, "per_class": [null, "a"]}',
        "metrics.jsonl": b'{"epoch": "one", "time_s": null, "train_loss": {}}\n',
        "timeline.jsonl": b'{"time_s": 1, "workers": 3}\n{"workers": [[1]]}\n',
    },
    "one of everything": {
        "metrics.jsonl": b'{"epoch": 0, "train_loss": 0.5, "test_accuracy": 0.5, "time_s": 0}\n',
        "timeline.jsonl": b'{"time_s": 0, "update": 0, "workers": [[0, 0, 0, 0, 0, 0]]}\n',
        "summary.json": b'{"staleness": [1], "confusion": [[0]], "workers": [{}], "slowest": 5}',
    },
    "zeros": {
        "metrics.jsonl": b'{"epoch": 0, "train_loss": 0, "test_accuracy": 0, "time_s": 0}\n' * 9,
        "timeline.jsonl": b'{"time_s": 0, "workers": [[0,0,0,0,0,0],[0,0,0,0,0,0]]}\n' * 9,
        "summary.json": b'{"staleness": [0, 0], "confusion": [[0, 0], [0, 0]], "seconds": 0,'
        b' "workers": [{"samples_per_s": 0}, {"samples_per_s": 0}]}',
    },
    "huge and negative": {
        "metrics.jsonl": b'{"epoch": -1e300, "train_loss": 1e308, "time_s": -5}\n'
        b'{"epoch": 1e300, "train_loss": -1e308, "time_s": 1e300, "staleness_mean": -3}\n',
        "timeline.jsonl": b'{"time_s": 1e300, "workers": [[-1, 1e308, 0, -1e308, 1e308, 0]]}\n'
        b'{"time_s": -1, "workers": [[1e308, 1e308, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]}\n',
        "summary.json": b'{"seconds": -1, "staleness": [1e308, 1e308], "updates": 1e300,'
        b' "workers": [{"pushes": -1, "samples_per_s": -7, "compute_s": -2, "data_s": 1}]}',
    },
    "times that cannot be": {
        "timeline.jsonl": b'{"time_s": 1e17, "workers": [[1,1,1,1,1,1]]}\n'
        b'{"time_s": -3, "workers": [[2,2,2,2,2,2]]}\n{"time_s": -1, "workers": [[3,3,3,3,3,3]]}\n'
        b'{"time_s": 9999999999, "workers": [[90,90,90,90,90,90]]}\n'
        b'{"time_s": 9999999999.000002, "workers": [[900,900,900,900,900,900]]}\n'
    },
    "with tags in every text": {
        "config.toml": b"lr = '" + HOSTILE + b"'\n",
        "status.json": json.dumps({"state": HOSTILE.decode(), "reason": HOSTILE.decode()}).encode(),
        "summary.json": json.dumps(
            {
                **dict.fromkeys(["mode", "model", "data", "optimizer"], HOSTILE.decode()),
                "classes": [HOSTILE.decode(), "$\\frac{", "数字\u0000", "a" * 10_000],
                "confusion": [[5, 1, 1, 0]] * 4,
                "ledger": {"received": 1, HOSTILE.decode(): 1, "reasons": {HOSTILE.decode(): 2}},
                "workers": [{"worker": 0, "device": HOSTILE.decode(), "rank": HOSTILE.decode()}],
            }
        ).encode(),
    },
}


@needs_matplotlib
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN)
def test_no_file_breaks_the_report(tmp_path: Path, files: dict[str, bytes]) -> None:
    run = tmp_path / "run&<b>"
    run.mkdir()
    for name, data in files.items():
        (run / name).write_bytes(data)
    written = make_report(run, images=False)
    words = check_page(written[0]).words
    assert "run&<b>" in words
    if HOSTILE in files.get("config.toml", b""):
        assert words.count(HOSTILE.decode()) >= 9
    assert sorted(entry.name for entry in run.iterdir()) == sorted([*files, "report"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)
NUMBER = st.sampled_from([0, 1, 2.5, 7, 100, -1, 1e17, None]) | st.integers(0, 20)
WORKER = "worker rank pushes samples samples_per_s staleness_mean compute_s servers_s data_s"
WORKERS = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(WORKER.split(), NUMBER)))
COUNTS = st.lists(st.lists(NUMBER, min_size=6, max_size=6), max_size=4)
COUNT = st.lists(st.integers(0, 5), min_size=1, max_size=4)
SUMMARY = "accuracy loss seconds updates samples staleness ledger mode classes confusion per_class"
SUMMARY += " workers slowest best_epoch stopped_early"
LINE = "time_s epoch update train_loss test_loss test_accuracy samples_per_s staleness_mean"
LINE += " workers"


@needs_matplotlib
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    summary=st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(SUMMARY.split(), JSON | NUMBER)
        | {"workers": WORKERS | JSON, "staleness": COUNT | JSON, "per_class": COUNT | JSON}
        | {"confusion": st.lists(COUNT, max_size=4) | JSON},
    ),
    lines=st.lists(
        st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(LINE.split(), JSON | NUMBER) | {"workers": COUNTS | JSON},
        )
    ),
    status=JSON,
)
def test_no_json_breaks_the_words(
    tmp_path: Path, summary: dict[str, Any], lines: list[dict[str, Any]], status: Any
) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "status.json").write_text(json.dumps(status))
    write_lines(tmp_path / "metrics.jsonl", lines)
    write_lines(tmp_path / "timeline.jsonl", lines)
    run = read_run(tmp_path)
    facts = gather(run)
    Page(page(run, facts, findings(run, facts), [], "now"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "status.json").mkdir()
    problems = read_run(tmp_path).problems
    assert len(problems) == 2
    assert all("is not an ordinary file" in problem for problem in problems)


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"time_s": t} for t in (1.0, 2.0, 0.5, 1.5)])
    rows = [(1.0, [[1] * 6]), (2.0, [[4] * 6]), (0.5, [[2] * 6, [1] * 6]), (1.0, [[3] * 6])]
    write_lines(tmp_path / "timeline.jsonl", [{"time_s": t, "workers": w} for t, w in rows])
    run = read_run(tmp_path)
    assert run.metrics["time_s"].tolist() == [1.0, 2.0, 2.5, 3.5]
    assert run.timeline is not None
    assert run.timeline.time_s.tolist() == [1.0, 2.0, 2.5, 3.0]
    assert run.timeline.counts[:, :, 0].tolist() == [[1, 0], [4, 0], [6, 1], [7, 1]]


def test_a_timeline_that_is_too_long_is_thinned_and_keeps_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psframe.report.reading._CELLS_MAX", 100)
    rows = [{"time_s": i, "workers": [[i] * 6, [2 * i] * 6]} for i in range(1001)]
    rows.append({"time_s": 2000, "workers": [[5000] * 6, [7000] * 6]})
    write_lines(tmp_path / "timeline.jsonl", rows)
    timeline = read_run(tmp_path).timeline
    assert timeline is not None
    assert 20 < len(timeline.time_s) <= 52
    assert timeline.time_s[-1] == 2000
    assert timeline.counts[-1, :, 0].tolist() == [5000, 7000]
    assert np.all(np.diff(timeline.counts, axis=0) >= 0)


# ---- writing ----


@needs_matplotlib
def test_another_folder_and_no_images(whole: Path, tmp_path: Path) -> None:
    assert main([str(whole), "-o", str(tmp_path / "a" / "b"), "--no-png"]) == 0
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["report.html"]
    assert not (whole / "report").exists()


@needs_matplotlib
@pytest.mark.parametrize("error", [28, 30])
def test_a_disk_that_refuses_is_an_error_and_nothing_is_left(
    whole: Path,
    tmp_path: Path,
    error: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    assert main([str(run), "--no-png"]) == 0
    before = (run / "report" / "report.html").read_bytes()

    def refuse(path: Path, data: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    capsys.readouterr()
    assert main([str(run)]) == 1
    message = capsys.readouterr().err
    assert os.strerror(error) in message
    assert "-o FOLDER" in message
    assert [file.name for file in (run / "report").iterdir()] == ["report.html"]
    assert (run / "report" / "report.html").read_bytes() == before


@needs_matplotlib
def test_a_file_in_the_way_is_an_error(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "report").write_text("mine")
    with pytest.raises(RunDirError, match="-o FOLDER"):
        make_report(run)
    assert (run / "report").read_text() == "mine"


def test_without_matplotlib_the_error_says_what_to_install(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArgumentError, match=r"pip install 'matplotlib>=3\.8'"):
        make_report(whole)
    assert not (whole / "report").exists()


def test_the_import_alone_loads_nothing_heavy() -> None:
    code = "import sys, psframe.report.__main__; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@needs_matplotlib
def test_the_user_s_own_style_is_neither_used_nor_changed(whole: Path, tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 40.0, "text.usetex": True}):
        make_report(whole, tmp_path / "a", images=False)
        assert matplotlib.rcParams["font.size"] == 40.0
    make_report(whole, tmp_path / "b", images=False)
    pages = [(tmp_path / folder / "report.html").read_text(encoding="utf-8") for folder in "ab"]
    drawings = [re.findall(r"<svg.*?</svg>", text, re.DOTALL) for text in pages]
    assert len(drawings[0]) == 5
    assert drawings[0] == drawings[1]


@needs_matplotlib
def test_a_colour_of_the_page_has_a_dark_twin(whole: Path, tmp_path: Path) -> None:
    from psframe.report.canvas import THEMES

    (file, *_) = make_report(whole, tmp_path, images=False)
    text = file.read_text(encoding="utf-8")
    for colour, (name, dark) in THEMES.items():
        assert f"--{name}:{colour};" in text
        assert f"--{name}:{dark};" in text
    drawings = text[text.index("<svg") : text.rindex("</svg>")]
    assert [colour for colour in THEMES if colour in drawings] == []
    for image in re.findall(r"data:image/png;base64,([^\"]*)", drawings):
        assert base64.b64decode(image).startswith(PNG)
