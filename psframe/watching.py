"""What looks on while a training goes on, on the root: display, timeline, event files, trace."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from psframe.display import Display, display_for
from psframe.errors import ArgumentError
from psframe.events import HostEvent, Spans
from psframe.history import EpochSummary
from psframe.monitor import Monitor
from psframe.placement import line_of
from psframe.tensorboard import EventFiles
from psframe.timeline import Timeline
from psframe.timetrace import TimeTrace

__all__ = ["Watching"]


class Watching:
    """The observer of a training run; a context manager around it.

    Args:
        monitor: what the others look at.
        servers: S.
        serving: the ranks that serve, server 0 first; empty without MPI.
        show: what is displayed; see `display_for`. "none" on ranks that are not the root.
        title: the live display's first line.
        evaluation: what its accuracy is of.
        launched: whether an MPI launcher stands between this process and the terminal.
        tensorboard, trace: whether to write event files, and a trace.

    Attributes:
        monitor: as given.

    Raises:
        ArgumentError: `tensorboard` is not installed.
    """

    def __init__(
        self,
        monitor: Monitor,
        *,
        servers: int,
        serving: Sequence[int] = (),
        show: Any = "auto",
        title: str = "",
        evaluation: str = "test",
        launched: bool = False,
        tensorboard: bool = False,
        trace: bool = False,
    ) -> None:
        self.monitor = monitor
        self._servers = servers
        self._serving = serving
        self._workers = 0  # of which there are spans
        self._display: Display = display_for(
            sys.stdout, monitor, show=show, title=title, evaluation=evaluation, launched=launched
        )
        self._timeline: Timeline | None = None
        self._events: EventFiles | None = None
        self._trace = TimeTrace() if trace else None
        self._folder: Path | None = None
        self._tensorboard = tensorboard
        if tensorboard and find_spec("tensorboard") is None:  # before the run, not in it
            raise ArgumentError(
                "--tensorboard needs the tensorboard package: pip install 'psframe[tensorboard]'"
            )

    def __enter__(self) -> Watching:
        self._display.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._display.close()
        if self._timeline is not None:
            self._timeline.close()
        if self._events is not None:
            self._events.close()
        if self._trace is not None and self._folder is not None:
            self._trace.write(self._folder, self._servers, self.line)

    @property
    def line(self) -> tuple[int, ...]:
        """The ranks in the order servers, workers, those that are known of; empty without MPI."""
        known = max(self.monitor.workers, self._workers)
        return line_of(self._serving, len(self._serving) + known) if self._serving else ()

    def opened(self, folder: Path) -> None:
        """Learn where the run's files go."""
        self._folder = folder
        self._timeline = Timeline(folder, self.monitor)
        if self._tensorboard:
            self._events = EventFiles(folder / "tensorboard")

    def goes_on(self, version: int) -> None:
        """Learn that updates up to this version were made before."""
        self.monitor.goes_on(version)

    def tick(self) -> None:
        """Do what is due."""
        self._display.tick()
        if self._timeline is not None:
            self._timeline.tick()

    def __call__(self, event: HostEvent) -> None:
        """Take one event of the run."""
        if isinstance(event, Spans):
            self._workers = max(self._workers, event.worker + 1)
            if self._trace is not None:
                self._trace(event)
            return
        self.monitor(event)

    def epoch(self, summary: EpochSummary) -> None:
        """Take an epoch that is complete."""
        if self._events is None:
            return
        self._events.epoch(dataclasses.asdict(summary))
        found = self.monitor.statistics().staleness_counts
        counts = [found.get(i, 0) for i in range(max(found, default=-1) + 1)]
        self._events.histogram(summary.version, "staleness", counts)
