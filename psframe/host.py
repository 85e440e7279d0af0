"""What the leader's process does for the outside world: records, observers, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from psframe.events import HostEvent
from psframe.plan import Observer
from psframe.recorder import Recorder
from psframe.rundir import RunDir
from psframe.witness import Witness

__all__ = ["Host"]

# A reason is for reading; an exception's message may be megabytes.
_REASON_CHARS_MAX = 4000


class Host:
    """Takes the leader's events and keeps the run directory, if there is one.

    Args:
        run_dir: the folder, already created, or None.
        observer: the caller's own observer.

    Attributes:
        ending: whether the observer has asked for the end of the run.
        tick: the observer's method of that name, if it has one; to be called now and then.
    """

    def __init__(self, run_dir: RunDir | None, observer: Observer | None) -> None:
        self.run_dir = run_dir
        self._observer = observer
        self._recorder = None if run_dir is None else Recorder(run_dir)
        self._witness = None if run_dir is None else Witness(run_dir.path)
        self._version: Callable[[], int] = lambda: 0
        self._closed = False
        self.ending = False
        self.tick: Callable[[], Any] = getattr(observer, "tick", lambda: None)
        if run_dir is not None:
            getattr(observer, "opened", lambda folder: None)(run_dir.path)

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
        folder = RunDir.create(run_dir, overwrite=overwrite, config=config)
        return cls(folder, observer)

    @property
    def path(self) -> Path | None:
        """The run directory's path."""
        return None if self.run_dir is None else self.run_dir.path

    def watch(self, version: Callable[[], int]) -> None:
        """Learn where to ask for the updates applied so far, for a verdict that comes early."""
        self._version = version

    def __call__(self, event: HostEvent) -> None:
        """Take one event of the leader."""
        if self._recorder is not None and not self._closed:
            self._recorder(event)
        if self._observer is not None and self._observer(event) is True:
            self.ending = True

    def verdict(self, state: str, *, updates: int | None = None, reason: str = "") -> None:
        """Write how the run ended; only the first verdict counts.

        Args:
            state: completed, failed or interrupted.
            updates: updates applied; as many as by now if None.
            reason: why, if it was not completed.
        """
        if self._closed or self.run_dir is None or self._recorder is None:
            return
        self._closed = True
        try:
            self._recorder.close()  # a reader that waits for the verdict finds every line
        finally:
            self.run_dir.status(
                state,
                updates=self._version() if updates is None else updates,
                test_accuracy=self._recorder.test_accuracy,
                reason=reason[:_REASON_CHARS_MAX],
            )
        if self._witness is not None:
            self._witness.dismiss()
