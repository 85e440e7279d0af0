"""What the leader's process does for the outside world: records, observers, and the verdict."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from psframe.events import HostEvent
from psframe.plan import Observer
from psframe.rundir import Recorder, RunDir

__all__ = ["Host"]


class Host:
    """Takes the leader's events and keeps the run directory, if there is one.

    Args:
        run_dir: the folder, already created, or None.
        observer: the caller's own observer.
    """

    def __init__(self, run_dir: RunDir | None, observer: Observer | None) -> None:
        self.run_dir = run_dir
        self._observer = observer
        self._recorder = None if run_dir is None else Recorder(run_dir)
        self._closed = False

    @classmethod
    def open(
        cls,
        run_dir: str | Path | None,
        *,
        overwrite: bool,
        config: Mapping[str, Any],
        observer: Observer | None,
    ) -> Host:
        """Create the run directory and the host.

        Raises:
            RunDirError: the directory cannot be used.
        """
        if run_dir is None:
            return cls(None, observer)
        return cls(RunDir.create(run_dir, overwrite=overwrite, config=config), observer)

    @property
    def path(self) -> Path | None:
        """The run directory's path."""
        return None if self.run_dir is None else self.run_dir.path

    def __call__(self, event: HostEvent) -> None:
        """Take one event of the leader."""
        if self._recorder is not None:
            self._recorder(event)
        if self._observer is not None:
            self._observer(event)

    def verdict(self, state: str, *, updates: int | None = None, reason: str = "") -> None:
        """Write how the run ended; only the first verdict counts.

        Args:
            state: completed, failed or interrupted.
            updates: updates applied; the latest known if None.
            reason: why, if it was not completed.
        """
        if self._closed or self.run_dir is None or self._recorder is None:
            return
        self._closed = True
        self.run_dir.status(
            state,
            updates=self._recorder.updates if updates is None else updates,
            test_accuracy=self._recorder.test_accuracy,
            reason=reason,
        )
        self._recorder.close()

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into a verdict, written at once, and KeyboardInterrupt.

        At once, because Open MPI leaves a rank 0.3 s between SIGTERM and SIGKILL. Outside of the
        main thread, where Python allows no handlers, it does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: FrameType | None) -> None:
            name = signal.Signals(number).name
            self.verdict("interrupted", reason=f"{name} received")
            raise KeyboardInterrupt(name)

        before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
