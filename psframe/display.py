"""What a training shows while it goes on: a live board on a terminal, else a line now and then.

There is no thread: `tick` is called often, from the server's loop, and draws when it is time. What
drawing costs is bounded to a hundredth of the time; it never waits for a terminal that does not
take any more (stopped by Ctrl-S) or for the reader of a pipe, and one that has gone ends the
display, not the training.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, TextIO

from psframe.board import board, one_line
from psframe.monitor import Monitor
from psframe.terminal import Terminal, find_terminal, is_writable

__all__ = ["DISPLAYS", "Display", "can_write", "display_for"]

DISPLAYS = ("auto", "live", "lines", "none")

_LIVE_S = 0.125  # between two drawings
_LINES_S = 5.0  # between two plain lines
# Drawing may take this part of the time ...
_PART_MAX = 0.01
# ... unless it takes so long that the display would seem to have died.
_PAUSE_MAX_S = 10.0

_log = logging.getLogger("psframe")


def display_for(
    stream: TextIO,
    monitor: Monitor,
    *,
    show: Literal["auto", "live", "lines", "none"] = "auto",
    title: str = "",
    evaluation: str = "test",
    launched: bool = False,
    clock: Callable[[], float] = time.monotonic,
    environ: Mapping[str, str] | None = None,
) -> Display:
    """Choose how to show a training.

    Args:
        stream: usually sys.stdout.
        monitor: what is shown.
        show: "live", a board that is drawn anew; "lines", a plain line now and then; "none",
            nothing; "auto", live if the stream ends at a terminal, else lines.
        title: the live board's first line.
        evaluation: what the accuracy is of: "test" or "validation".
        launched: whether an MPI launcher stands between this process and the terminal.
        clock: seconds that only grow.
        environ: os.environ; TERM and, through rich, NO_COLOR count.

    Returns:
        The display, to be used as a context manager around the run.
    """
    if show == "none":
        return Display(monitor, clock)
    if show != "lines":
        terminal = find_terminal(stream, launched=launched, environ=environ)
        if terminal is None and show == "live":
            terminal = Terminal(stream)
        if terminal is not None:
            captured = tuple(
                name
                for name in ("stdout", "stderr")
                if getattr(sys, name) is stream
                or _reaches_terminal(getattr(sys, name), launched, environ)
            )
            return _Live(
                monitor, clock, terminal, title, evaluation, captured=captured, environ=environ
            )
    return _Lines(monitor, clock, stream, evaluation)


class Display:
    """Shows nothing; the others show something in `_draw`.

    Args:
        monitor: what is shown.
        clock: seconds that only grow.
        interval_s: at least between two drawings.

    Attributes:
        seconds: spent drawing.
        drawings: how many.
    """

    def __init__(
        self, monitor: Monitor, clock: Callable[[], float], interval_s: float = float("inf")
    ) -> None:
        self.seconds = 0.0
        self.drawings = 0
        self._monitor = monitor
        self._clock = clock
        # What drawing costs is the processor's time: on a crowded node a drawing may well wait for
        # its turn, and the display would stand still for nothing.
        self._cost = time.thread_time if clock is time.monotonic else clock
        self._interval_s = interval_s
        self._due = clock() + interval_s
        self._open = False

    def __enter__(self) -> Display:
        self._open = True
        self._guarded(self._begin)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def tick(self) -> None:
        """Draw if it is time; call it often, from one thread."""
        if not self._open or self._clock() < self._due:
            return
        begin = self._cost()
        self._guarded(self._draw)
        cost = self._cost() - begin
        end = self._clock()
        self.seconds += cost
        self.drawings += 1
        # The first one also warms up what draws.
        usual = cost if self.drawings > 1 else 0.0
        pause = min(usual * (1.0 / _PART_MAX - 1.0), _PAUSE_MAX_S)
        self._due = end + max(self._interval_s, pause)

    def close(self) -> None:
        """Leave one last line and the terminal as it was; again, it does nothing."""
        if self._open:
            self._guarded(self._end)
            self._open = False

    def _begin(self) -> None:
        pass

    def _draw(self) -> None:
        pass

    def _end(self) -> None:
        pass

    def _release(self) -> None:
        pass

    def _guarded(self, action: Callable[[], None]) -> None:
        """Let whatever goes wrong with the display end the display only."""
        try:
            action()
        except Exception as error:
            self._open = False
            with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
                self._release()
            ours = not isinstance(error, (OSError, ValueError))
            _log.warning("the display ends: %s; the run goes on", error, exc_info=ours)


class _Lines(Display):
    """A plain line every few seconds, and one at the end."""

    def __init__(
        self,
        monitor: Monitor,
        clock: Callable[[], float],
        stream: TextIO,
        evaluation: str,
    ) -> None:
        super().__init__(monitor, clock, _LINES_S)
        self._stream = stream
        self._evaluation = evaluation

    def _draw(self) -> None:
        if is_writable(self._stream):
            self._print(one_line(self._monitor.statistics(), evaluation=self._evaluation))

    def _end(self) -> None:
        now = self._monitor.statistics()
        if now.pushes:
            self._print(one_line(now, evaluation=self._evaluation, last=True))

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class _Live(Display):
    """A board on a terminal, drawn anew in place; what others print goes above it.

    It uses neither the alternate screen nor a hidden cursor nor another input mode, so that there
    is nothing to restore should this process be killed.
    """

    def __init__(
        self,
        monitor: Monitor,
        clock: Callable[[], float],
        terminal: Terminal,
        title: str,
        evaluation: str,
        *,
        captured: tuple[str, ...] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(monitor, clock, _LIVE_S)
        self._terminal = terminal
        self._evaluation = evaluation
        self._captured = captured
        self._handlers: list[tuple[Any, Any]] = []
        self._title = title
        self._ascii_only = not can_write(terminal.stream, "█░")
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text = Text
        self._size = self._terminal.size()
        self._console = Console(
            file=terminal.stream,
            force_terminal=True,
            force_interactive=True,
            markup=False,
            emoji=False,
            highlight=False,
            width=self._size[0],
            height=self._size[1],
            _environ=environ,
        )
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout="stdout" in captured,
            redirect_stderr="stderr" in captured,
            vertical_overflow="crop",
        )
        self._due = clock()

    def _begin(self) -> None:
        # Rich would hide the cursor, and end the program when its output's reader has gone.
        setattr(self._console, "show_cursor", lambda show=True: False)  # noqa: B010
        setattr(self._console, "on_broken_pipe", _report_broken_pipe)  # noqa: B010
        before = {name: getattr(sys, name) for name in self._captured}
        self._live.start()
        for handler in _stream_handlers():
            for name, stream in before.items():
                if handler.stream is stream:
                    handler.setStream(getattr(sys, name))
                    self._handlers.append((handler, stream))
                    break

    def _draw(self) -> None:
        if not is_writable(self._terminal.stream):
            return
        self._fit()
        lines = board(
            self._monitor.statistics(),
            self._size[0],
            self._size[1] - 2,
            title=self._title,
            evaluation=self._evaluation,
            ascii_only=self._ascii_only,
        )
        # It ends with an empty line, since Open MPI forwards nothing of a line that is incomplete;
        # with two, since rich drops one.
        text = self._text("\n", no_wrap=True, overflow="crop", end="").join(
            self._text.assemble(*line) for line in [*lines, [], []]
        )
        self._live.update(text, refresh=True)

    def _fit(self) -> None:
        """Follow the terminal's size; lines that a narrower one has broken are wiped away."""
        size = self._terminal.size()
        if size != self._size:
            narrower = size[0] < self._size[0]
            self._size = self._console.size = size
            if narrower:
                self._console.file.write("\x1b[2J\x1b[H")

    def _end(self) -> None:
        self._release()
        now = self._monitor.statistics()
        if now.pushes:
            line = one_line(now, evaluation=self._evaluation, last=True, width=self._size[0] - 1)
            self._terminal.stream.write(line + "\n")
            self._terminal.stream.flush()

    def _release(self) -> None:
        try:
            self._live.stop()
        finally:
            for handler, stream in self._handlers:
                handler.setStream(stream)
            self._handlers.clear()
            self._terminal.close()


def _report_broken_pipe() -> None:
    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _stream_handlers() -> list[Any]:
    """Find what writes log lines to streams."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    return [
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
    ]


def _reaches_terminal(stream: TextIO, launched: bool, environ: Mapping[str, str] | None) -> bool:
    terminal = find_terminal(stream, launched=launched, environ=environ)
    if terminal is None:
        return False
    terminal.close()
    return True


def can_write(stream: TextIO, text: str) -> bool:
    """Tell whether a stream takes such text; one of no encoding (io.StringIO) takes any."""
    encoding = getattr(stream, "encoding", "ascii")
    try:
        text.encode("utf-8" if encoding is None else encoding)
    except UnicodeEncodeError:
        return False
    return True
