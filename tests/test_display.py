"""What a training shows: the words, and where, when and how they reach a terminal or a file."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import pty
import struct
import sys
import termios
from collections.abc import Iterator
from typing import Any, cast

import pytest

from psframe import terminal
from psframe.board import Line, board, one_line
from psframe.display import Display, can_write, display_for
from psframe.events import EpochDone, Evaluated, Logged, PushHandled
from psframe.monitor import Monitor
from psframe.statistics import Statistics

CAPABLE = {"TERM": "xterm-256color"}


class Clock:
    """Seconds that stand still until told; each look may take some."""

    def __init__(self) -> None:
        self.now = 0.0
        self.look_s = 0.0

    def __call__(self) -> float:
        self.now += self.look_s
        return self.now


def fed(workers: int = 3, clock: Clock | None = None) -> Monitor:
    """A monitor of a training after 15 s, an epoch and a half; worker i made i + 1 pushes/s."""
    clock = clock or Clock()
    turns = [worker for worker in range(workers) for _ in range(worker + 1)]
    monitor = Monitor(workers, 4, 100 * len(turns), clock)
    version = 0
    for second in range(15):
        for worker in turns:
            clock.now += 1.0 / len(turns)
            version += 1
            monitor(PushHandled(worker, 0, version - 2, version, 1, True))
            times = {"compute_s": (0.6, 1), "servers_s": (0.3, 1), "data_s": (0.1, 1)}
            monitor(Logged(worker, {"loss": (0.25, 1), "samples": (10.0, 1), **times}))
        if second == 9:
            monitor(EpochDone(0, version, 100 * len(turns), 1.0))
            monitor(Evaluated(0, version, {"loss": 9.0, "correct": 45.0, "count": 50.0}))
    clock.now = 15.0
    return monitor


def plain(lines: list[Line]) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines]


# ---- the words ----


def test_a_board_on_a_terminal_of_80_columns() -> None:
    text = plain(board(fed().statistics(), 80, 24, title="mlp on digits", ascii_only=True))
    assert text == [
        "mlp on digits",
        "epoch 2/4 ###########...................  38%  0:15 elapsed  0:25 left",
        "updates    90  6/s                      loss       0.25",
        "samples    900  60/s                    test accuracy 90.00%  best 90.00%",
        "staleness  1.00  1.00 over the run",
        "",
        "worker  samples/s              compute  servers    data  staleness",
        "     0       9.71  ###.......      60%      30%     10%       1.00",
        "     1       19.4  ######....      60%      30%     10%       1.00",
        "     2       30.9  ##########      60%      30%     10%       1.00",
    ]


def test_with_more_workers_than_rows_the_slowest_are_shown() -> None:
    text = plain(board(fed(50).statistics(), 80, 12))
    assert len(text) == 12
    assert [line.split()[0] for line in text[-6:-1]] == ["0", "1", "2", "3", "4"]
    assert text[-1] == "   ... and 45 more, 60 to 500"


@pytest.mark.parametrize("width", [1, 20, 40, 60, 64, 76, 80, 200])
@pytest.mark.parametrize("height", [1, 2, 5, 8, 24, 60])
@pytest.mark.parametrize("monitor", [fed(0), fed(1), fed(3), fed(40), Monitor(3, 4, clock=Clock())])
def test_a_board_fits_any_terminal(width: int, height: int, monitor: Monitor) -> None:
    text = plain(board(monitor.statistics(), width, height, title="a title " * 20))
    assert 1 <= len(text) <= height
    assert max(map(len, text)) <= width


def test_a_worker_that_has_fallen_silent_stands_out() -> None:
    clock = Clock()
    monitor = fed(2, clock)
    clock.now += 75.0
    text = plain(board(monitor.statistics(), 80, 24))
    assert text[-1].endswith("silent 1:15")


def test_a_line_now_and_one_at_the_end() -> None:
    now = fed().statistics()
    assert one_line(now) == (
        "epoch 2/4 50%  updates 90 (6/s)  60 samples/s  loss 0.25  test accuracy 90.00%"
        "  staleness 1.00  0:25 left"
    )
    last = one_line(now, last=True, evaluation="validation")
    assert last.startswith("1 of 4 epochs in 15.00 s  updates 90 (6/s)  60 samples/s  loss 0.25")
    assert "validation accuracy" in last
    short = "epoch 2/4 50%  loss 0.25  test accuracy 90.00%"
    assert one_line(now, width=60) == short, "what matters least goes first"
    assert one_line(now, width=10) == "epoch 2/4 50%  test accuracy 90.00%"


def test_before_the_first_update_a_line_says_so() -> None:
    clock = Clock()
    monitor = Monitor(3, 4, 1000, clock)
    clock.now += 65.0
    assert one_line(monitor.statistics()) == "epoch 1/4 0%  no update yet after 1:05"


# ---- without a terminal ----


def shown_lines(display: Display, clock: Clock, seconds: float) -> None:
    for _ in range(int(seconds * 4)):
        clock.now += 0.25
        display.tick()


def test_plain_lines_are_bounded_by_time() -> None:
    clock, stream = Clock(), io.StringIO()
    with display_for(stream, fed(clock=clock), clock=clock) as display:
        shown_lines(display, clock, 26.0)
        assert stream.getvalue().count("\n") == 5
    text = stream.getvalue()
    assert text.count("\n") == 6
    assert text.splitlines()[-1].startswith("1 of 4 epochs")
    assert "\x1b" not in text


def test_a_run_of_a_second_leaves_its_last_line_and_an_empty_one_none() -> None:
    clock, stream = Clock(), io.StringIO()
    with display_for(stream, fed(clock=clock), clock=clock) as display:
        display.tick()
    display.close()
    assert stream.getvalue().count("\n") == 1
    empty = io.StringIO()
    with display_for(empty, Monitor(1, 1, 1, clock), clock=clock):
        pass
    assert empty.getvalue() == ""


def test_nothing_is_shown_where_nothing_is_wanted() -> None:
    clock, stream = Clock(), io.StringIO()
    with display_for(stream, fed(clock=clock), show="none", clock=clock) as display:
        shown_lines(display, clock, 60.0)
    assert stream.getvalue() == ""


def test_a_pipe_whose_reader_does_not_read_is_not_waited_for() -> None:
    clock = Clock()
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "w") as stream:
        os.set_blocking(writing, False)
        while terminal.is_writable(stream):
            os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
        display = display_for(stream, fed(clock=clock), clock=clock)
        with display:
            shown_lines(display, clock, 60.0)
            assert display.drawings > 0
            os.read(source.fileno(), 1 << 20)


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@pytest.mark.parametrize("show", ["lines", "live"])
def test_a_stream_that_has_gone_ends_the_display_only(
    show: Any, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    with display_for(Gone(), fed(clock=clock), show=show, clock=clock, environ=CAPABLE) as display:
        shown_lines(display, clock, 60.0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert display.drawings == 1


def test_drawing_takes_a_hundredth_of_the_time_at_most() -> None:
    clock = Clock()
    display = display_for(io.StringIO(), fed(clock=clock), show="live", clock=clock)
    with display:
        clock.look_s = 0.01  # so that drawing, between two looks, takes some
        begin = clock.now
        for _ in range(100_000):
            display.tick()
        assert display.drawings > 10
        assert display.seconds <= 0.011 * (clock.now - begin)
        clock.look_s = 0.0


# ---- on a terminal ----


class Screen:
    """A pseudo-terminal: what is written to `stream` is in `text`."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.resize(80, 24)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def text(self) -> str:
        self.stream.flush()
        parts = [b""]
        os.set_blocking(self._master, False)
        try:
            while True:
                parts.append(os.read(self._master, 1 << 16))
        except BlockingIOError:
            return b"".join(parts).decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def screen() -> Iterator[Screen]:
    found = Screen()
    yield found
    found.close()


def live(screen: Screen, clock: Clock, monitor: Monitor | None = None, **more: Any) -> Display:
    more.setdefault("environ", CAPABLE)
    return display_for(screen.stream, monitor or fed(clock=clock), clock=clock, **more)


def test_a_terminal_gets_a_board_in_place_and_keeps_a_line(screen: Screen) -> None:
    clock = Clock()
    with live(screen, clock, title="mlp on digits") as display:
        display.tick()
        first = screen.text()
        display.tick()
        assert screen.text() == "", "it is not time"
        clock.now += 0.13
        display.tick()
        second = screen.text()
    last = screen.text()
    assert "mlp on digits" in first
    assert "\x1b[36m" in first, "the bar has a colour"
    assert second.count("\x1b[1A") == first.count("\n"), "drawn over the first"
    assert last.endswith("\r\n")
    assert "1 of 4 epochs in 15.13 s" in last.splitlines()[-1]
    assert "?25" not in first + second + last, "no hidden cursor"
    assert "?1049" not in first + second + last, "no other screen"


def test_no_color_means_none(screen: Screen) -> None:
    with live(screen, Clock(), environ={**CAPABLE, "NO_COLOR": "1"}) as display:
        display.tick()
        assert "\x1b[3" not in screen.text()


@pytest.mark.parametrize("term", ["dumb", "unknown", ""])
def test_a_dumb_terminal_gets_lines(screen: Screen, term: str) -> None:
    clock = Clock()
    with live(screen, clock, environ={"TERM": term}) as display:
        shown_lines(display, clock, 6.0)
    assert screen.text().count("\n") == 2
    assert "\x1b" not in screen.text()


def test_a_terminal_may_change_its_size(screen: Screen) -> None:
    clock = Clock()
    with live(screen, clock) as display:
        display.tick()
        assert "worker" in screen.text()
        screen.resize(40, 8)
        clock.now += 1.0
        display.tick()
        text = screen.text()
        assert text.startswith("\x1b[2J\x1b[H"), "broken lines are wiped away"
        assert "worker" not in text
        screen.resize(120, 50)
        clock.now += 1.0
        display.tick()
        text = screen.text()
        assert "\x1b[2J" not in text
        assert "worker" in text


def test_what_others_print_and_log_goes_above(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(sys, "stdout", screen.stream)
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    logger = logging.getLogger("somebody.else")
    handlers = [logging.StreamHandler(screen.stream), logging.StreamHandler(errors)]
    monkeypatch.setattr(logger, "handlers", handlers)
    monkeypatch.setattr(logger, "propagate", False)
    with live(screen, clock) as display:
        display.tick()
        screen.text()
        print("[red]printed[/red]")
        printed = screen.text()
        logger.warning("logged")
        logged = screen.text()
        assert handlers[1].stream is errors, "that goes elsewhere, and stays there"
    for text, what in ((printed, "[red]printed[/red]"), (logged, "logged")):
        assert text.index("\x1b[1A") < text.index(what) < text.index("epoch 2/4")
    assert errors.getvalue() == "logged\n"
    assert sys.stdout is screen.stream
    assert [handler.stream for handler in handlers] == [screen.stream, errors]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_all_as_it_was(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr(sys, "stdout", screen.stream)

    def training() -> None:
        with live(screen, Clock()) as display:
            display.tick()
            raise error

    with pytest.raises(error):
        training()
    assert sys.stdout is screen.stream
    assert screen.text().splitlines()[-1].endswith("test accuracy 90.00%")


def test_a_mistake_of_the_display_does_not_end_the_training(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdout", screen.stream)
    clock = Clock()
    monitor = fed(clock=clock)

    def broken() -> Statistics:
        raise ZeroDivisionError("a mistake")

    with live(screen, clock, monitor) as display:
        monkeypatch.setattr(monitor, "statistics", broken)
        shown_lines(display, clock, 2.0)
        assert sys.stdout is screen.stream
    assert display.drawings == 1
    assert "ZeroDivisionError" in caplog.text


def test_bars_for_terminals_that_know_ascii_only(screen: Screen) -> None:
    screen.stream.reconfigure(encoding="ascii")  # type: ignore[attr-defined]
    with live(screen, Clock()) as display:
        display.tick()
        assert "####" in screen.text()


# ---- which terminal ----


def test_what_a_stream_can_write_is_known_by_its_encoding() -> None:
    class Bare:
        """It has a `write` and no encoding."""

    assert can_write(io.StringIO(), "█")
    assert can_write(io.TextIOWrapper(io.BytesIO(), "utf-8"), "█")
    assert not can_write(io.TextIOWrapper(io.BytesIO(), "ascii"), "█")
    assert not can_write(cast(Any, Bare()), "█")


def test_a_file_is_no_terminal() -> None:
    with open(os.devnull, "w") as stream:
        assert terminal.find_terminal(stream, environ=CAPABLE) is None
    assert terminal.find_terminal(stream, environ=CAPABLE) is None, "a closed one neither"
    assert terminal.find_terminal(io.StringIO(), environ=CAPABLE) is None


def test_a_terminal_of_no_size_is_one_of_80_by_24(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen.resize(0, 0)
    monkeypatch.delenv("LINES", raising=False)
    monkeypatch.setenv("COLUMNS", "132")
    found = terminal.find_terminal(screen.stream, environ=CAPABLE)
    assert found is not None
    assert found.size() == (132, 24)
    found.close()
    found.close()
    assert terminal.find_terminal(screen.stream, environ=CAPABLE, launched=True) is None


class Launched:
    """A stream of descriptor 1."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal

    def fileno(self) -> int:
        return 1

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize("own_terminal", [True, False], ids=["as Open MPI", "as MPICH"])
@pytest.mark.parametrize("piped", [True, False])
def test_under_a_launcher_its_terminal_counts(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, own_terminal: bool, piped: bool
) -> None:
    ancestors = [(10, "proxy"), (11, "mpirun"), (12, "bash")]
    monkeypatch.setattr(terminal, "_ancestors", lambda: iter(ancestors))
    stream: Any = Launched(own_terminal)
    asked: list[tuple[int, int]] = []

    def launchers(process: int, descriptor: int) -> int:
        asked.append((process, descriptor))
        return -1 if piped else os.dup(screen.stream.fileno())

    monkeypatch.setattr(terminal, "_launcher_terminal", launchers)
    found = terminal.find_terminal(stream, environ=CAPABLE, launched=True)
    assert asked == [(11, 1)]
    if piped:
        assert found is None
    else:
        assert found is not None
        assert found.size() == (80, 24)
        found.close()


def test_the_output_of_a_process_is_looked_up() -> None:
    """This very process stands in for the launcher; under pytest its output is no terminal."""
    with open(os.devnull) as nothing:
        assert terminal._launcher_terminal(os.getpid(), nothing.fileno()) == -1
    assert terminal._launcher_terminal(2**22 + 1, 1) == -1, "no such process"
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
    source = terminal._launcher_terminal(os.getpid(), slave)
    assert os.get_terminal_size(source) == (90, 30)
    for descriptor in (source, master, slave):
        os.close(descriptor)


@pytest.mark.parametrize(
    ("argument", "prefixes"),
    [("--tag-output", True), ("-l", True), ("--output", True), ("-n", False), ("-launch", False)],
)
def test_launchers_that_put_something_before_each_line(argument: str, prefixes: bool) -> None:
    assert bool(terminal._PREFIXING.match(argument)) == prefixes
